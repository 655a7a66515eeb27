"""A hidden connection and its layer's equilibrium rate, clamp(mask · BN(W x + b) / V_th, 0, 1), as one function in training on a CPU.

PyTorch's own graph of these operations keeps four arrays of the layer's size for the gradient: the map's output, the rate, its slope and
the mask. This one keeps the output and a byte for each unit, from which the C kernels make the others again.
"""

import math
from typing import TYPE_CHECKING, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from modules import native
from modules.event_driven import kernel_layout
from modules.neuron import Neuron

if TYPE_CHECKING:
    from modules.connection import Connection

OPEN = 1  # of native_norm.c's states


def serves(connection: "Connection", neuron: Neuron, x: Tensor, mask: Optional[Tensor]) -> bool:
    """Whether `rate` can take a connection, x (batch, …) and a mask: in training, in float32 on a CPU, with no part changed."""
    linear, norm = connection.linear, connection.norm
    if not (connection.is_plain and norm.training and neuron.has_kernels) or torch.is_autocast_enabled("cpu"):
        return False
    shape = (len(x), *connection.output_shape(x.shape[1:]))
    fitting = shape[1] == norm.num_features and math.prod(shape) > shape[1] and (mask is None or mask.shape == shape)
    return fitting and all(tensor is None or native.serves(tensor) for tensor in (x, linear.weight, norm.weight, norm.bias, mask))


def rate(connection: "Connection", neuron: Neuron, x: Tensor, mask: Optional[Tensor],
         source: Optional["SaturatedNorm"]) -> Tuple[Tensor, "SaturatedNorm"]:
    """The rate (batch, *layer shape) for the rate x of the layer before, and what can make it again; running statistics advance.

    `source` is what can make x again, so that x need not be kept.
    """
    linear, norm = connection.linear, connection.norm
    with torch.no_grad():
        value, saturated = SaturatedNorm.at(linear(x), norm, mask, neuron.threshold)
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(saturated.mean, norm.momentum)
        norm.running_var.lerp_(saturated.variance, norm.momentum)
    return _Rate.apply(value, x, linear.weight, linear.bias, norm.weight, norm.bias, connection.map, saturated, source), saturated


class SaturatedNorm(NamedTuple):
    """A batch norm in training mode with the dropout mask and the clamp behind it, at one point.

    `struct` is what the C kernels see of it; the other fields are the memory behind that. As a link's derivative it includes the gain.
    """

    struct: native.NormStruct
    y: Tensor
    state: Tensor
    mean: Tensor
    variance: Tensor
    inverse_std: Tensor
    others: Sequence[Tensor]
    joint = False

    @classmethod
    def at(cls, y: Tensor, norm: nn.Module, mask: Optional[Tensor], threshold: float) -> Tuple[Tensor, "SaturatedNorm"]:
        """The rate for a linear map's output y (batch, channels, …), and what its gradient needs. No running statistic is updated."""
        y, mask, channels = kernel_layout(y), None if mask is None else kernel_layout(mask), y.shape[1]
        parameters = norm.weight.detach().contiguous(), norm.bias.detach().contiguous()
        rate, state = torch.empty_like(y), torch.empty_like(y, dtype=torch.int8)
        (mean, variance, inverse_std), keep = y.new_empty(3, channels).unbind(), y.new_empty(())
        struct = native.NormStruct(y.numel() // channels, channels, norm.eps, threshold,
                                   *native.pointers(y, mask, *parameters, mean, variance, inverse_std, keep, state))
        native.norm_forward(struct, rate)
        return rate, cls(struct, y, state, mean, variance, inverse_std, (*parameters, keep))

    def rate(self) -> Tensor:
        """The rate once more."""
        rate = torch.empty_like(self.y)
        native.norm_rates(self.struct, rate)
        return rate

    def __call__(self, v: Tensor) -> Tensor:
        """v ↦ BN'ᵀ (gain · v), in v's memory."""
        native.norm_backward(self.struct, v, v, None, None)
        return v

    def gradients(self, v: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Those in y, γ and β for v, the one in the rate."""
        gradients = torch.empty_like(self.y), torch.empty_like(self.mean), torch.empty_like(self.mean)
        native.norm_backward(self.struct, kernel_layout(v), *gradients)
        return gradients

    def forward_product(self, q: Tensor) -> Tensor:
        """q ↦ gain · BN'(q)."""
        weight, _, keep = self.others
        through = torch.ops.aten.native_batch_norm_backward(q, self.y, weight, None, None, self.mean, self.inverse_std, True, 0.0,
                                                            [True, False, False])[0]
        return through * self.state.eq(OPEN) * (keep / self.struct.threshold)


class _Rate(torch.autograd.Function):
    """The rate, without a graph of its own, with its gradient in x and in the parameters."""

    @staticmethod
    def forward(ctx, rate, x, weight, bias, gamma, beta, map, saturated, source):
        ctx.map, ctx.saturated, ctx.source, ctx.input_shape = map, saturated, source, x.shape[1:]
        ctx.save_for_backward(None if source else x, weight, gamma, beta)  # It is an error if they have changed by then.
        return rate.view_as(rate)

    @staticmethod
    def backward(ctx, v):
        x, weight, *_ = ctx.saved_tensors
        of_y, of_gamma, of_beta = ctx.saturated.gradients(v)
        of_weight = ctx.map.weight_gradient(of_y, ctx.source.rate() if x is None else x, weight)
        of_x = ctx.map.adjoint(of_y, weight, ctx.input_shape) if ctx.needs_input_grad[1] else None
        # A constant before a batch norm changes nothing.
        return None, of_x, of_weight, torch.zeros_like(of_beta), of_gamma, of_beta, None, None, None
