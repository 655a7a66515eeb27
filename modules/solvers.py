"""Solvers of the fixed-point equation x = map(x), behind one function.

A method is a small object that proposes the next x from x, map(x) and their difference; `solve` drives it, measures the true
residual ‖map(x) − x‖ of every x it visits, and returns the best. Each iteration evaluates the map once. All inner products
run over the whole batch: batch norm couples samples, so a method that iterates per sample would not converge.

For the linear maps of the implicit gradient, Anderson acceleration with an unlimited memory makes the iterates of GMRES
(Walker & Ni 2011), and a memory of 5 needs as many evaluations here, so there is no separate Krylov method.
"""

import math
from typing import Callable, Dict, NamedTuple, Optional, Type

import torch
from torch import Tensor

from modules import gpu
from modules.across_processes import InnerProducts


class Solution(NamedTuple):
    """What `solve` found: `value` with its relative `residual`, after so many `iterations` (evaluations of the map)."""

    value: Tensor
    residual: float
    iterations: float
    converged: bool


def as_it_lies(tensor: Tensor, like: Tensor) -> Tensor:
    """The values of `tensor` as a vector in the order in which `like`, of the same shape and dense, lies in memory."""
    if tensor.stride() != like.stride():
        tensor = torch.empty_like(like).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


class FixedPoint:
    """x ← map(x), the Neumann series for a linear map; converges only where the spectral radius is below 1."""

    def propose(self, x: Tensor, mapped: Tensor, residual: Tensor) -> Tensor:
        """The next x, a new tensor, from x, map(x) and map(x) − x, all of one shape and dtype; so do the other methods'."""
        return mapped


class Anderson:
    """Anderson acceleration: the combination of recent map(x) whose combined residual is smallest in the L2 norm.

    The weights α, Σα = 1, minimise ‖Σ α_i r_i‖ over the `memory` latest residuals r_i = map(x_i) − x_i. The Gram matrix is
    scaled to unit diagonal before it is regularised, so the bias is relative to each residual, whatever the loss's scale.
    native_solve.c has the method once more, for single layers on a CPU; it serves with this memory alone, and shows no change of the rest.
    """

    memory = 5
    regularisation = 1e-9
    products = InnerProducts()

    def __init__(self):
        self.count, self.mapped = 0, None

    def allocate(self, x: Tensor) -> None:
        """Make room for the memory of vectors like x."""
        self.mapped, self.residuals = (x.new_empty(self.memory, x.numel()) for _ in range(2))
        self.gram = torch.zeros(self.memory, self.memory, dtype=torch.float64, device=x.device)
        self.kernels = gpu.kernels_for(x)

    def propose(self, x: Tensor, mapped: Tensor, residual: Tensor) -> Tensor:
        if self.mapped is None:
            self.allocate(x)
        slot, self.count = self.count % self.memory, self.count + 1
        used = min(self.count, self.memory)
        self.mapped[slot], self.residuals[slot] = as_it_lies(mapped, x), as_it_lies(residual, x)
        products = self.products.dot(self.residuals[:used], self.residuals[slot])
        if self.kernels:
            weights = self.kernels.anderson_weights(self.gram, products, slot, self.regularisation)
        else:
            self.gram[slot, :used] = self.gram[:used, slot] = products.double()
            weights = self._weights(self.gram[:used, :used]).to(x.dtype)
        return (weights @ self.mapped[:used]).as_strided(x.shape, x.stride())

    def _weights(self, gram: Tensor) -> Tensor:
        """Everything stays on the device: no value is waited for."""
        scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
        regularised = gram * scale * scale[:, None] + self.regularisation * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve_ex(regularised, scale)[0] * scale
        return weights / weights.sum()


class Broyden:
    """Broyden's good method on map(x) − x = 0 from the inverse Jacobian −1, updated by rank-one terms (Sherman–Morrison).

    H ← H + (Δx − H Δr) (Δxᵀ H) / (Δxᵀ H Δr), with H = −1 + Σ left_i right_iᵀ. It stores two vectors per iteration.
    """

    products = InnerProducts()

    def __init__(self):
        self.left, self.right = [], []
        self.previous = None

    def propose(self, x: Tensor, mapped: Tensor, residual: Tensor) -> Tensor:
        residual = residual.flatten()
        if self.previous is not None:
            step, last_residual = self.previous
            change = residual - last_residual
            row = self._product(step, self.right, self.left)
            scale = self.products.dot(row, change)
            if scale.abs() > torch.finfo(scale.dtype).tiny:
                self.left.append((step - self._product(change, self.left, self.right)) / scale)
                self.right.append(row)
        step = -self._product(residual, self.left, self.right)
        self.previous = (step, residual)
        return x + step.view_as(x)

    def _product(self, vector: Tensor, columns: list, rows: list) -> Tensor:
        """(−1 + Σ columns_i rows_iᵀ) vector, so H v with (left, right) and Hᵀ v with (right, left)."""
        product = -vector
        for column, row in zip(columns, rows):
            product.add_(column * self.products.dot(row, vector))
        return product


METHODS: Dict[str, Type] = {"anderson": Anderson, "broyden": Broyden, "fixed-point": FixedPoint}


class Reading:
    """A scalar on its way from the device to the host, so that waiting for it does not wait for later work."""

    def __init__(self, scalar: Tensor):
        self.host, self.arrived = scalar, None
        if scalar.is_cuda:
            self.host = torch.empty((), dtype=scalar.dtype, pin_memory=True).copy_(scalar, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def value(self) -> float:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.item()


def _version(x: Tensor) -> Optional[int]:
    """How often x has been changed in place; None in inference mode, which does not count."""
    return None if x.is_inference() else x._version


class Iteration:
    """x, which is visited, then replaced by what a method proposes: the work of `solve`, apart from its decisions."""

    def __init__(self, map: Callable[[Tensor], Tensor], start: Tensor, method: str, products: InnerProducts):
        self.map, self.x, self.proposer, self.products = map, start, METHODS[method](), products
        self.proposer.products = products
        norm = products.norm(start)
        self.scale = torch.where(norm > 0, norm, torch.ones_like(norm))

    def visit(self) -> Reading:
        """The relative residual ‖map(x) − x‖ of x."""
        self.visited, self.mapped = self.x, self.map(self.x)
        self.difference = self.mapped - self.x
        return Reading(self.products.norm(self.difference) / self.scale)

    def propose(self) -> None:
        """Raises ValueError where the method has changed x in place, which may be the best so far, or returns something else than an x."""
        version = _version(self.visited)
        self.x = self.proposer.propose(self.visited, self.mapped, self.difference)
        if _version(self.visited) != version or not isinstance(self.x, Tensor) or self.x.shape != self.visited.shape:
            raise ValueError(f"{type(self.proposer).__name__}.propose returns the next x, a new tensor of the same shape, and leaves x as "
                             "it is")


@torch.no_grad()
def solve(map: Callable[[Tensor], Tensor], start: Tensor, method: str = "anderson", tol: float = 1e-3, max_iterations: int = 30,
          ahead: Optional[bool] = None, products: InnerProducts = InnerProducts()) -> Solution:
    """Solve x = map(x) from `start`.

    The residual ‖map(x) − x‖ is relative to ‖start‖ (to 1 where that is 0); iteration stops when it is at most `tol`, when it
    is no longer finite, or after `max_iterations` evaluations of the map, and the x of lowest residual is returned with
    that residual. `start` has any shape and floating dtype, and is dense.

    With `ahead`, by default on a GPU alone, the next x is proposed before the residual is read, so that the device has that to work on
    while the host decides. `products` says whether the vectors are joint ones of several processes, which then visit the same x and
    stop together; the method finds it in its attribute `products`. Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown solver {method!r}: choose one of {', '.join(METHODS)}")
    return iterate(Iteration(map, start, method, products), start, tol, max_iterations, start.is_cuda if ahead is None else ahead)


def iterate(iteration: Iteration, start: Tensor, tol: float, max_iterations: int, ahead: bool) -> Solution:
    """The decisions of `solve`."""
    best, count = Solution(start, math.inf, 0, False), 0
    for count in range(1, max_iterations + 1):
        reading = iteration.visit()
        if ahead:
            iteration.propose()
        residual = reading.value()
        if residual < best.residual:
            best = Solution(iteration.visited, residual, count, residual <= tol)
        if best.converged or not math.isfinite(residual) or count == max_iterations:
            break
        if not ahead:
            iteration.propose()
    return best._replace(iterations=count)
