"""A hidden connection and its layer's equilibrium rate, clamp(mask · BN(W x + b) / V_th, 0, 1), as one function in training.

PyTorch's own graph of these operations keeps four arrays of the layer's size for the gradient: the map's output, the rate, its slope and
the mask. This one keeps the output and a byte for each unit, from which the C or Triton kernels make the others again. Under
bf16_products on a GPU the output is bfloat16 as it comes from the map, and half as large.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.event_driven import kernel_layout
from modules.kernels import kernels_for
from modules.neuron import Neuron

if TYPE_CHECKING:
    from modules.connection import Connection

OPEN = 1  # as in native_norm.c and modules/triton_norm.py


def serves(connection: "Connection", neuron: Neuron, x: Tensor, mask: Optional[Tensor]) -> bool:
    """Whether `rate` can take a connection, x (batch, …) and a mask: in training, in float32, with kernels and no part changed."""
    linear, norm = connection.linear, connection.norm
    if not (connection.is_plain and norm.training and neuron.has_kernels) or x.is_cpu and torch.is_autocast_enabled("cpu"):
        return False
    shape = (len(x), *connection.output_shape(x.shape[1:]))
    fitting = x.dim() == linear.weight.dim() and math.prod(shape) > shape[1] and (mask is None or mask.shape == shape)
    tensors = [tensor for tensor in (x, linear.weight, norm.weight, norm.bias, mask) if tensor is not None]
    return fitting and all(kernels_for(tensor) and tensor.device == x.device for tensor in tensors)


def rate(connection: "Connection", neuron: Neuron, x: Tensor, mask: Optional[Tensor],
         source: Optional["SaturatedNorm"]) -> Tuple[Tensor, "SaturatedNorm"]:
    """The rate (batch, *layer shape) for the rate x of the layer before, and what recomputes it; running statistics advance.

    `source` is what recomputes x, if something does, so that x need not be kept.
    """
    linear, norm = connection.linear, connection.norm
    with torch.no_grad():
        value, saturated = SaturatedNorm.at(connection.linear_part(x), norm, mask, neuron.threshold)
        norm.num_batches_tracked += 1
        # As by PyTorch's batch norm, autograd is not told: another pass may have saved them, which needs no values of theirs in training.
        norm.running_mean.data.lerp_(saturated.mean, norm.momentum)
        norm.running_var.data.lerp_(saturated.variance, norm.momentum)
    return _Rate.apply(value, x, linear.weight, linear.bias, norm.weight, norm.bias, connection.map, saturated, source), saturated


class SaturatedNorm(NamedTuple):
    """A batch norm in training mode with the dropout mask and the clamp behind it, at the linear map's output y (batch, channels, …).

    `state` says where the clamp stands (native_norm.c), `keep` is the value of the mask where it is not 0. Statistics, γ and β are
    (channels,). `state` is int8, y of the products' dtype, all else float32. As a link's derivative it includes the gain.
    """

    y: Tensor
    state: Tensor
    mean: Tensor
    variance: Tensor
    inverse_std: Tensor
    gamma: Tensor
    beta: Tensor
    keep: Tensor
    threshold: float
    joint = False

    @classmethod
    def at(cls, y: Tensor, norm: nn.Module, mask: Optional[Tensor], threshold: float) -> Tuple[Tensor, "SaturatedNorm"]:
        """The rate for y, and what its gradient needs; no running statistic is updated.

        On a CPU it raises ValueError where the mask has several values beside 0.
        """
        y, gamma = kernel_layout(y), norm.weight.detach()
        rate, state = torch.empty_like(y, dtype=gamma.dtype), torch.empty_like(y, dtype=torch.int8)
        saturated = cls(y, state, *gamma.new_empty(3, len(gamma)), gamma, norm.bias.detach(), gamma.new_zeros(()), threshold)
        saturated._run("norm_forward", None if mask is None else kernel_layout(mask), norm.eps, rate)
        return rate, saturated

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self[:-1]

    def _run(self, kernel: str, *arguments: Any) -> None:
        # Autograd's hooks may have laid out tensors in another way.
        laid_out = SaturatedNorm(*map(kernel_layout, self.tensors), self.threshold)
        getattr(kernels_for(self.mean), kernel)(laid_out, *arguments)

    def rate(self) -> Tensor:
        """The rate once more, in the dtype of the products."""
        rate = torch.empty_like(kernel_layout(self.y))
        self._run("norm_rates", rate)
        return rate

    def __call__(self, v: Tensor) -> Tensor:
        """v ↦ BN'ᵀ (gain · v), in v's memory, which is dense and laid out as `kernel_layout` gives it."""
        if v.shape != self.y.shape or v.dtype != self.mean.dtype:
            raise ValueError(f"a product with Jᵀ meets values {tuple(v.shape)} of {v.dtype} in a layer {tuple(self.y.shape)}, "
                             f"{self.mean.dtype}")
        self._run("norm_backward", v, v, None, None)
        return v

    def gradients(self, v: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Those in y, γ and β for v, the one in the rate; each of the dtype of what it is the gradient in."""
        gradients = torch.empty_like(kernel_layout(self.y)), torch.empty_like(self.mean), torch.empty_like(self.mean)
        self._run("norm_backward", kernel_layout(v), *gradients)
        return gradients

    def forward_product(self, q: Tensor) -> Tensor:
        """q ↦ gain · BN'(q)."""
        through = torch.ops.aten.native_batch_norm_backward(q, self.y.to(q.dtype), self.gamma, None, None, self.mean, self.inverse_std,
                                                            True, 0.0, [True, False, False])[0]
        return through * self.state.eq(OPEN) * (self.keep / self.threshold)


class _Rate(torch.autograd.Function):
    """The rate, which comes without a graph, with its gradient in x and in the parameters."""

    @staticmethod
    def forward(ctx, rate, x, weight, bias, gamma, beta, map, saturated, source):
        ctx.map, ctx.input_shape, ctx.threshold, ctx.recomputes_x = map, x.shape[1:], saturated.threshold, source is not None
        # Here, as autograd frees them on the way back, and finds it an error if they have changed by then.
        ctx.save_for_backward(weight, *saturated.tensors, *(source.tensors if source else [x]))
        return rate.view_as(rate)

    @staticmethod
    @once_differentiable
    def backward(ctx, v):
        weight, *tensors = ctx.saved_tensors
        count = len(SaturatedNorm._fields) - 1
        own, before = tensors[:count], tensors[count:]
        of_y, of_gamma, of_beta = SaturatedNorm(*own, ctx.threshold).gradients(v)
        of_weight = of_x = None
        if ctx.needs_input_grad[2]:
            x = SaturatedNorm(*before, ctx.threshold).rate() if ctx.recomputes_x else before[0]
            of_weight = ctx.map.weight_gradient(of_y, x.to(of_y.dtype), weight).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            of_x = ctx.map.adjoint(of_y, weight.to(of_y.dtype), ctx.input_shape).to(v.dtype)
        # A constant before a batch norm changes nothing.
        return None, of_x, of_weight, torch.zeros_like(of_beta), of_gamma, of_beta, None, None, None
