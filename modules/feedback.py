"""The feedback connection: a spectrally normalised weight without bias or batch norm (method section 3)."""

from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules import native
from modules.connection import unit_norm_filters_
from modules.linear_map import LinearMap

INITIAL_POWER_ITERATIONS = 10
# An operator's largest singular values lie close together, so that the first estimate takes longer.
INITIAL_OPERATOR_ITERATIONS = 50


def power_iteration(weight: Tensor, u: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """σ, u and v after one more iteration from u, v first: v = Wᵀu / ‖Wᵀu‖, σ = ‖W v‖ = uᵀ W v, u = W v / σ."""
    matrix = weight.flatten(1)
    if native.serves(matrix) and native.serves(u) and u.shape == matrix.shape[:1]:
        return native.power_iteration(matrix.contiguous(), u.contiguous())
    v = u @ matrix
    v = v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
    product = matrix @ v
    sigma = torch.linalg.vector_norm(product).clamp_min(torch.finfo(product.dtype).tiny)
    return sigma, product / sigma, v


class _SpectralNormalise(torch.autograd.Function):
    """clamp(g, −1, 1) · w / σ(w), where ∂σ/∂W = u vᵀ, as u and v are held constant."""

    @staticmethod
    def forward(ctx, w, g, sigma, u, v):
        gain = g.clamp(-1, 1)
        scale = gain / sigma
        ctx.save_for_backward(w, g == gain, scale, sigma, u, v)
        return w * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        w, unclamped, scale, sigma, u, v = ctx.saved_tensors
        if native.serves(gradient):
            gradient_w, along = native.normalised_backward(gradient.contiguous(), w.contiguous(), u, v, scale.item(), sigma.item())
            return gradient_w, along * unclamped, None, None, None
        along = (gradient * w).sum() / sigma  # torch.dot has cuBLAS take 32 MB for itself.
        gradient_w = (gradient * scale).flatten(1).addcmul_((u * (along * scale))[:, None], v, value=-1)  # addr_ is slow on a GPU
        return gradient_w.view_as(w), along * unclamped, None, None, None


class Feedback(nn.Module):
    """B = clamp(g, −1, 1) · w / σ(w), applied as a dense, convolutional or transposed convolutional map.

    σ(w) is the largest singular value of w reshaped to (w.shape[0], −1), estimated as uᵀ W v. The template `linear`
    gives the kind of map, its weight's shape and its stride and padding. Raises ValueError where it has a bias, and as `LinearMap.of` does.

    For a convolution that σ is not the norm of the operator, which can be several times larger. After `bound_operator`, σ(w) is the
    largest singular value of the operator itself, by power iteration on layers instead of on the reshaped weight.
    """

    def __init__(self, linear: Union[nn.Linear, nn.Conv2d, nn.ConvTranspose2d]):
        super().__init__()
        if linear.bias is not None:
            raise ValueError("a feedback connection has no bias: build its linear map with bias=False")
        self.map = LinearMap.of(linear)
        self.w = nn.Parameter(torch.empty_like(linear.weight))
        unit_norm_filters_(self.w, self.map.filter_dim())
        matrix = self.w.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(matrix.shape[1]), dim=0))
        for _ in range(INITIAL_POWER_ITERATIONS):
            sigma, u, v = power_iteration(self.w.detach(), self.u)
            self._store(u, v)
        self.g = nn.Parameter(sigma)
        self.operator_input: Optional[Tuple[int, ...]] = None

    def bound_operator(self, input_shape: Sequence[int]) -> None:
        """From now on σ is the norm of the operator on inputs of this shape, without the batch dimension; g starts at it anew.

        u and v take the shapes of the operator's output and input. For a dense map that is what σ is anyway.
        """
        self.operator_input = tuple(input_shape)
        self.u, self.v = self.w.new_empty(self.map.output_shape(input_shape, self.w)).normal_(), self.w.new_empty(self.operator_input)
        for _ in range(INITIAL_OPERATOR_ITERATIONS):
            sigma, u, v = self._operator_iteration()
            self._store(u, v)
        with torch.no_grad():
            self.g.copy_(sigma)

    @torch.no_grad()
    def _operator_iteration(self) -> Tuple[Tensor, Tensor, Tensor]:
        """As `power_iteration`, with the map and its adjoint in place of W and Wᵀ."""
        tiny = torch.finfo(self.w.dtype).tiny
        v = self.map.adjoint(self.u[None], self.w, self.operator_input)[0]
        v = v / torch.linalg.vector_norm(v).clamp_min(tiny)
        product = self.map(v[None], self.w)[0]
        sigma = torch.linalg.vector_norm(product).clamp_min(tiny)
        return sigma, product / sigma, v

    def normalised_weight(self) -> Tensor:
        """B for one forward pass, after one power iteration; differentiable in g and w with u and v held constant.

        Training stores the advanced vectors. Evaluation advances from the stored ones and leaves them, so that it changes
        nothing and its result does not depend on the number or the order of its batches.
        """
        sigma, u, v = power_iteration(self.w.detach(), self.u) if self.operator_input is None else self._operator_iteration()
        if self.training:
            self._store(u, v)
        if self.operator_input is not None:
            sigma = (u * self.map(v[None], self.w)[0]).sum().clamp_min(torch.finfo(self.w.dtype).tiny)
            return self.w * (self.g.clamp(-1, 1) / sigma)
        return _SpectralNormalise.apply(self.w, self.g, sigma, u, v)

    def _store(self, u: Tensor, v: Tensor) -> None:
        self.u.copy_(u)
        self.v.copy_(v)

    def forward(self, current: Tensor, rate: Tensor, weight: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """current + mask · B a, the first layer's drive, for rates a (batch, …) of the last layer and `weight` from `normalised_weight`."""
        product = self.map(rate, weight).to(rate.dtype)
        return current + product if mask is None else torch.addcmul(current, product, mask)
