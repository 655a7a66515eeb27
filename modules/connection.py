"""Feedforward connections: a linear map, batch normalisation and a variational dropout mask, in this order."""

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from modules.dropout import masked
from modules.jacobian import BatchNormDerivative, Link
from modules.linear_map import LinearMap, scaled_filters
from modules.simulation import Synapses
from modules.synchronised_norm import SynchronisedBatchNorm, SynchronisedNormDerivative, spread_statistics


def unit_norm_filters_(weight: Tensor, output_dim: int = 0) -> None:
    """Initialise in place: uniform in (−1, 1), then every output channel's filter scaled to unit L2 norm."""
    with torch.no_grad():
        weight.uniform_(-1, 1)
        other_dims = [dim for dim in range(weight.dim()) if dim != output_dim]
        weight.div_(torch.linalg.vector_norm(weight, dim=other_dims, keepdim=True))


class Connection(nn.Module):
    """I = mask · BN(W x + b), from (batch, *input_shape) to (batch, *output_shape).

    Calling the module follows its mode as any PyTorch module does: statistics of the batch, with running statistics
    updated, in training; running statistics in evaluation. A simulation holds the statistics fixed (`frozen`).
    """

    def __init__(self, linear: Union[nn.Linear, nn.Conv2d]):
        super().__init__()
        self.linear, self.map = linear, LinearMap.of(linear)
        unit_norm_filters_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.norm = nn.BatchNorm1d(linear.out_features) if isinstance(linear, nn.Linear) else nn.BatchNorm2d(linear.out_channels)

    def output_shape(self, input_shape: Sequence[int]) -> tuple:
        """Shape of one sample's output for one sample's input, both without the batch dimension."""
        return self.map.output_shape(input_shape, self.linear.weight)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        # Under bf16_products the linear map alone is bfloat16.
        return masked(self.norm(self.linear(x).to(x.dtype)), mask)

    def linearised(self, x: Tensor, training: bool) -> Tuple[Tensor, Link]:
        """The output at `x` before any mask, and the link of Jᵀ there, with ones for its gain.

        `training` says whether batch norm takes the statistics of the batch or the running ones; it updates none.
        """
        shape = x.shape[1:]
        if not training:
            fixed = self.frozen(shape)
            return fixed(x).to(x.dtype), Link(self.map, fixed.weight, shape)
        kind = SynchronisedNormDerivative if self._synchronised else BatchNormDerivative
        y, derivative = kind.at(self.linear(x).to(x.dtype), self.norm)
        return y, Link(self.map, self.linear.weight, shape, norm=derivative)

    def frozen(self, input_shape: Sequence[int], statistics_of: Optional[Tensor] = None) -> Synapses:
        """The connection as a fixed affine map, batch norm folded into weight and bias, for use at every time step.

        It normalises with the running statistics, or, where an input `statistics_of` is given, with the mean and biased
        variance of that input's linear part. No running statistic changes.
        """
        mean, variance = self.norm.running_mean, self.norm.running_var
        if statistics_of is not None:
            y = self.linear(statistics_of).to(statistics_of.dtype)
            if self._synchronised:
                mean, variance = (statistic.to(y.dtype) for statistic in spread_statistics(y)[:2])
            else:
                variance, mean = torch.var_mean(y, dim=[0, *range(2, y.dim())], correction=0)
        # Folded in float64 and rounded once: a spike hangs on the last digits of a membrane potential.
        scale = self.norm.weight.double() * torch.rsqrt(variance.double() + self.norm.eps)
        bias = (self.linear.bias - mean) * scale + self.norm.bias
        weight = scaled_filters(self.map, self.linear.weight, scale)
        return Synapses(self.map, weight.to(mean.dtype), bias.to(mean.dtype), input_shape)

    @property
    def _synchronised(self) -> bool:
        return isinstance(self.norm, SynchronisedBatchNorm)
