"""Products with the transposed Jacobian Jᵀ of the equilibrium map, layer by layer, without an autograd graph (method section 6).

One lap round the loop is a chain of links, a_l = clamp(mask · BN(W a_{l−1}) / V_th, 0, 1), so v ↦ Jᵀ v runs backwards through
v ↦ Wᵀ BN'ᵀ (gain · v) with gain = mask / V_th where the clamp lets a change pass, else 0.
"""

import functools
from typing import TYPE_CHECKING, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from modules import native
from modules.event_driven import event_map, kernel_layout
from modules.linear_map import LinearMap
from modules.solvers import Anderson, Solution
from modules.synchronised_norm import SynchronisedNormDerivative

if TYPE_CHECKING:
    from modules.hidden_layer import SaturatedNorm

# The fraction of units whose equilibrium rate can change below which the C kernel's solve beats PyTorch's dense products, on F64C5.
EVENT_DRIVEN_SOLVE_BELOW = 0.7


class BatchNormDerivative(NamedTuple):
    """The transposed derivative of a batch norm in training mode, its samples' coupling through the statistics included.

        q ↦ γ/σ · (q − mean(q) − x̂ · mean(q x̂)),    means over the batch and space
    """

    input: Tensor
    weight: Optional[Tensor]
    eps: float
    mean: Tensor
    inverse_std: Tensor
    joint = False

    @classmethod
    def at(cls, input: Tensor, norm: nn.Module) -> Tuple[Tensor, "BatchNormDerivative"]:
        """The batch norm's output for `input` with the statistics of the batch, and its derivative there; no statistic is updated."""
        output, mean, inverse_std = torch.native_batch_norm(input, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
        return output, cls(input, None if norm.weight is None else norm.weight.detach(), norm.eps, mean, inverse_std)

    def __call__(self, q: Tensor) -> Tensor:
        return torch.ops.aten.native_batch_norm_backward(q, self.input, self.weight, None, None, self.mean, self.inverse_std, True,
                                                         self.eps, [True, False, False])[0]

    forward_product = __call__  # The derivative of a batch norm is its own transpose.


class Link(NamedTuple):
    """One layer's part of Jᵀ: v ↦ Wᵀ BN'ᵀ (gain · v), from (batch, *its shape) to (batch, *input_shape).

    `norm` is BN'ᵀ as a function that may overwrite its argument, with BN' as its `forward_product`; modules/hidden_layer.py has one that
    includes the gain.
    """

    map: LinearMap
    weight: Tensor
    input_shape: Sequence[int]
    gain: Optional[Tensor] = None
    norm: "BatchNormDerivative | SynchronisedNormDerivative | SaturatedNorm | None" = None

    def adjoint(self) -> Tuple[LinearMap, Tensor]:
        """Wᵀ as a map with its weight."""
        map, weight = self.map.mirrored(self.weight, self.input_shape)
        # A CPU's convolutions lay out the weight in their own way each time, so that a copy would only take memory.
        return map, kernel_layout(weight) if weight.is_cuda and map.kind != "dense" else weight

    def forward_product(self, u: Tensor) -> Tensor:
        """The link of J itself, u ↦ gain · BN'(W u)."""
        q = self.map(u, self.weight)
        q = q if self.norm is None else self.norm.forward_product(q)
        return q if self.gain is None else q * self.gain


class TransposedJacobian:
    """v ↦ Jᵀ v for the links of one lap in the order of the layers, the first holding the feedback.

    It keeps v's shape and dtype; its values lie channels last.
    """

    def __init__(self, links: Sequence[Link]):
        self.links = list(links)

    def taken_apart(self) -> Tuple[List[Tensor], Callable[[Sequence[Tensor]], "TransposedJacobian"]]:
        """Its tensors, and what makes it of them again but holds none itself."""
        leaves, shape = tree_flatten(self.links)
        are_tensors = [isinstance(leaf, Tensor) for leaf in leaves]
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]

        def put_together(tensors: Sequence[Tensor]) -> "TransposedJacobian":
            next_tensor, next_other = iter(tensors).__next__, iter(others).__next__
            return TransposedJacobian(tree_unflatten([next_tensor() if chosen else next_other() for chosen in are_tensors], shape))

        return [leaf for leaf in leaves if isinstance(leaf, Tensor)], put_together

    @property
    def joint(self) -> bool:
        """Whether batch norms couple this process's samples with those of others, so that only all together can solve with Jᵀ."""
        return any(link.norm is not None and link.norm.joint for link in self.links)

    @functools.cached_property
    def adjoints(self) -> List[Tuple[LinearMap, Tensor]]:
        """Every link's Wᵀ, made once for all products."""
        return [link.adjoint() for link in self.links]

    @torch.no_grad()
    def __call__(self, v: Tensor) -> Tensor:
        """Jᵀ v, of v's shape (batch, *last layer's shape) and dtype."""
        # Nothing else holds the values on the way: they may be overwritten, and each is freed as soon as the next one is there.
        v = v.clone(memory_format=torch.channels_last if v.dim() == 4 else torch.contiguous_format)
        for link, (map, weight) in zip(reversed(self.links), reversed(self.adjoints)):
            v = v if link.gain is None else v.mul_(link.gain)
            v = v if link.norm is None else link.norm(v)
            v = kernel_layout(map(v, weight).to(v.dtype))  # Autocast may be on.
        return v

    @torch.no_grad()
    def forward_product(self, u: Tensor) -> Tensor:
        """J u, of u's shape and dtype."""
        for link in self.links:
            u = link.forward_product(u)
        return u

    def solve(self, gradient: Tensor, tol: float, max_iterations: int) -> Optional[Solution]:
        """Solve v = gradient + Jᵀ v in a faster way than by products with Jᵀ; None where there is none.

        That is the C kernel's, for a single layer, sample by sample.
        """
        link = self.links[0]
        if len(self.links) > 1 or not native.serves(gradient) or Anderson.memory != native.ANDERSON_MEMORY:
            return None
        if native.more_active_than(link.gain, EVENT_DRIVEN_SOLVE_BELOW):
            return None
        value, residual, products = self._solve_layer(kernel_layout(gradient), tol, max_iterations)
        return Solution(value, residual, products, residual <= tol)

    def _solve_layer(self, gradient: Tensor, tol: float, max_iterations: int) -> Tuple[Tensor, float, float]:
        """v, its residual and the mean number of products, by the kernel for the only link."""
        link = self.links[0]
        adjoint = event_map(*link.map.mirrored(link.weight, link.input_shape), None, link.gain.shape[1:])
        return native.solve_layer(adjoint, kernel_layout(link.gain), gradient, tol, max_iterations, Anderson.regularisation)
