"""Feedforward connections: a linear map, batch normalisation and a variational dropout mask, in this order."""

import math
from typing import Callable, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LinearMap = Union[nn.Linear, nn.Conv2d]


def unit_norm_filters_(weight: Tensor, output_dim: int = 0) -> None:
    """Initialise in place: uniform in (−1, 1), then every output channel's filter scaled to unit L2 norm."""
    with torch.no_grad():
        weight.uniform_(-1, 1)
        other_dims = [dim for dim in range(weight.dim()) if dim != output_dim]
        weight.div_(torch.linalg.vector_norm(weight, dim=other_dims, keepdim=True))


def dropout_mask(shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """One variational mask, Bernoulli(1−p)/(1−p) for each output unit, to be used at every time step of a pass.

    p is rounded to a multiple of 2⁻¹⁶, with which the mask's mean is exactly 1.
    """
    drop = round(p * 65536)
    words = -(-math.prod(shape) // 4)
    # Four 16-bit draws from each 64-bit word: generating them is what costs on a CPU.
    draws = torch.empty(words, dtype=torch.int64, device=like.device).random_(-2**63, None).view(torch.int16)
    keep = draws[:math.prod(shape)].to(like.dtype).ge_(drop - 32768)
    return keep.mul_(65536 / (65536 - drop)).view(shape)


def masked(output: Tensor, mask: Optional[Tensor]) -> Tensor:
    return output if mask is None else output * mask


class Connection(nn.Module):
    """I = mask · BN(W x + b), from (batch, *input_shape) to (batch, *output_shape).

    Calling the module follows its mode as any PyTorch module does: statistics of the batch, with running statistics
    updated, in training; running statistics in evaluation. A simulation holds the statistics fixed (`frozen`).
    """

    def __init__(self, linear: LinearMap):
        super().__init__()
        self.linear = linear
        unit_norm_filters_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.norm = nn.BatchNorm1d(linear.out_features) if isinstance(linear, nn.Linear) else nn.BatchNorm2d(linear.out_channels)

    def output_shape(self, input_shape: Sequence[int]) -> tuple:
        """Shape of one sample's output for one sample's input, both without the batch dimension."""
        if isinstance(self.linear, nn.Linear):
            return (self.linear.out_features,)
        sizes = zip(input_shape[1:], self.linear.kernel_size, self.linear.stride, self.linear.padding)
        return (self.linear.out_channels, *((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in sizes))

    def forward(self, x: Tensor, mask: Optional[Tensor] = None, track: bool = True) -> Tensor:
        """The connection in the module's mode. `track=False` leaves the running statistics alone in training mode too."""
        y = self.linear(x)
        if track or not self.training:
            return masked(self.norm(y), mask)
        return masked(F.batch_norm(y, None, None, self.norm.weight, self.norm.bias, training=True, eps=self.norm.eps), mask)

    def frozen(self, mask: Optional[Tensor] = None, statistics_of: Optional[Tensor] = None) -> Callable[[Tensor], Tensor]:
        """The connection as a fixed affine map, batch norm folded into weight and bias, for use at every time step.

        It normalises with the running statistics, or, where an input `statistics_of` is given, with the mean and biased
        variance of that input's linear part. No running statistic changes.
        """
        mean, variance = self.norm.running_mean, self.norm.running_var
        if statistics_of is not None:
            y = self.linear(statistics_of)
            variance, mean = torch.var_mean(y, dim=[0, *range(2, y.dim())], correction=0)
        scale = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        weight = self.linear.weight * scale.view(-1, *[1] * (self.linear.weight.dim() - 1))
        bias = (self.linear.bias - mean) * scale + self.norm.bias
        if isinstance(self.linear, nn.Linear):
            return lambda x: masked(F.linear(x, weight, bias), mask)
        return lambda x: masked(F.conv2d(x, weight, bias, self.linear.stride, self.linear.padding), mask)
