"""Feedforward connections: a linear map, batch normalisation and a variational dropout mask, in this order."""

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from modules import hidden_layer
from modules.dropout import masked
from modules.hidden_layer import SaturatedNorm
from modules.hooks import has_hooks
from modules.jacobian import BatchNormDerivative, Link
from modules.linear_map import LinearMap
from modules.neuron import Neuron
from modules.synapses import Synapses
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
    updated, in training; running statistics in evaluation. A simulation holds the statistics fixed (`frozen`). Raises ValueError where
    `linear` has no bias, and as `LinearMap.of` does.
    """

    def __init__(self, linear: Union[nn.Linear, nn.Conv2d, nn.ConvTranspose2d]):
        super().__init__()
        if linear.bias is None:
            raise ValueError("a connection's linear map has a bias: build it with bias=True")
        self.linear = linear
        unit_norm_filters_(linear.weight, self.map.filter_dim())
        nn.init.zeros_(linear.bias)
        self.norm = nn.BatchNorm1d(linear.out_features) if isinstance(linear, nn.Linear) else nn.BatchNorm2d(linear.out_channels)

    @property
    def map(self) -> LinearMap:
        """The linear map that `linear` applies, which may have been replaced. Raises ValueError where it is of no kind that is known."""
        return LinearMap.of(self.linear)

    def output_shape(self, input_shape: Sequence[int]) -> tuple:
        """Shape of one sample's output for one sample's input, both without the batch dimension."""
        return self.map.output_shape(input_shape, self.linear.weight)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        # Under bf16_products the linear map alone is bfloat16.
        return masked(self.norm(self.linear(x).to(x.dtype)), mask)

    def linear_part(self, x: Tensor) -> Tensor:
        """W x + b without a gradient, in the dtype of the products."""
        # Of a parameter itself autocast would keep the rounded copy, without a gradient, for later uses too.
        return self.map(x, self.linear.weight.detach(), self.linear.bias.detach())

    def rate(self, x: Tensor, neuron: Neuron, mask: Optional[Tensor],
             source: Optional[SaturatedNorm] = None) -> Tuple[Tensor, Optional[SaturatedNorm]]:
        """The rate that a layer settles at under this connection's current, for the rate x of the layer before, and what recomputes it.

        The latter is None where PyTorch's graph keeps the rate. `source` is what recomputes x, if something does.
        """
        if hidden_layer.serves(self, neuron, x, mask):
            return hidden_layer.rate(self, neuron, x, mask, source)
        return neuron.masked_equilibrium(self(x), mask)[0], None

    def rate_and_link(self, x: Tensor, neuron: Neuron, mask: Optional[Tensor], training: bool) -> Tuple[Tensor, Link]:
        """The same rate and the link of Jᵀ there; `training` as in `linearised`."""
        if training and hidden_layer.serves(self, neuron, x, mask):
            rate, saturated = SaturatedNorm.at(self.linear_part(x), self.norm, mask, neuron.threshold)
            return rate, Link(self.map, self.linear.weight, x.shape[1:], norm=saturated)
        drive, link = self.linearised(x, training)
        rate, gain = neuron.masked_equilibrium(drive, mask)
        return rate, link._replace(gain=gain)

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
        variance of that input's linear part. No running statistic changes. Raises ValueError where there are none to go by.
        """
        norm = self.norm
        mean, variance = norm.running_mean, norm.running_var
        if statistics_of is not None:
            y = self.linear(statistics_of).to(statistics_of.dtype)
            if self._synchronised:
                mean, variance = (statistic.to(y.dtype) for statistic in spread_statistics(y)[:2])
            else:
                variance, mean = torch.var_mean(y, dim=[0, *range(2, y.dim())], correction=0)
        elif mean is None:
            raise ValueError("a simulation holds the batch norm at its running statistics, and there are none: build it with "
                             "track_running_stats=True")
        # Folded in float64 and rounded once: a spike hangs on the last digits of a membrane potential.
        scale = torch.rsqrt(variance.double() + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.double()
        bias = (self.linear.bias - mean) * scale
        bias = bias if norm.bias is None else bias + norm.bias
        return Synapses(self.map, self.linear.weight, bias.to(mean.dtype), input_shape, scale)

    @property
    def is_plain(self) -> bool:
        """Whether kernels can stand for it: nobody has put another class, size, type or layout in a part's place, hooked into one or taken
        one away."""
        linear, norm = self.linear, self.norm
        if type(self) is not Connection or type(linear) not in (nn.Linear, nn.Conv2d) or type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            return False
        size, dtype = linear.weight.shape[:1], linear.weight.dtype
        for vector in (linear.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if vector is None or vector.shape != size or vector.dtype != dtype or not vector.is_contiguous():
                return False
        count = norm.num_batches_tracked
        if count is None or count.shape != () or count.dtype != torch.int64 or count.device != linear.weight.device:
            return False
        return (norm.track_running_stats and norm.momentum is not None
                and not any(map(has_hooks, (self, linear, norm))))

    @property
    def _synchronised(self) -> bool:
        return isinstance(self.norm, SynchronisedBatchNorm)
