"""Solvers of the fixed-point equation x = map(x), behind one function.

A method is a small object that proposes the next x from x, map(x) and their difference; `solve` drives it, measures the true
residual ‖map(x) − x‖ of every x it visits, and returns the best. Each iteration evaluates the map once. All inner products
run over the whole batch: batch norm couples samples, so a method that iterates per sample would not converge.

For the linear maps of the implicit gradient, Anderson acceleration with an unlimited memory makes the iterates of GMRES
(Walker & Ni 2011), and a memory of 5 needs as many evaluations here, so there is no separate Krylov method.
"""

import math
from typing import Callable, Dict, List, NamedTuple, Type

import numpy as np
import torch
from torch import Tensor


class Solution(NamedTuple):
    """What `solve` found: `value` with its relative `residual`, after so many `iterations` (evaluations of the map)."""

    value: Tensor
    residual: float
    iterations: float
    converged: bool


class FixedPoint:
    """x ← map(x), the Neumann series for a linear map; converges only where the spectral radius is below 1."""

    def propose(self, x: Tensor, mapped: Tensor, residual: Tensor) -> Tensor:
        return mapped


class Anderson:
    """Anderson acceleration: the combination of recent map(x) whose combined residual is smallest in the L2 norm.

    The weights α, Σα = 1, minimise ‖Σ α_i r_i‖ over the `memory` latest residuals r_i = map(x_i) − x_i. The Gram matrix is
    scaled to unit diagonal before it is regularised, so the bias is relative to each residual, whatever the loss's scale.
    """

    memory = 5
    regularisation = 1e-9

    def __init__(self):
        self.mapped, self.residuals = [], []
        self.gram = np.zeros((self.memory, self.memory))
        self.count = 0

    def propose(self, x: Tensor, mapped: Tensor, residual: Tensor) -> Tensor:
        slot = self.count % self.memory
        self.count += 1
        self.mapped[slot:slot + 1], self.residuals[slot:slot + 1] = [mapped], [residual.flatten()]
        if self.count == 1 or self.memory == 1:
            self.gram[0, 0] = torch.dot(self.residuals[0], self.residuals[0]).item()
            return mapped
        products = torch.stack([torch.dot(earlier, self.residuals[slot]) for earlier in self.residuals]).tolist()
        used = len(products)
        self.gram[slot, :used] = self.gram[:used, slot] = products
        first, *others = zip(self.mapped, self._weights(used))
        combined = torch.mul(*first)
        for earlier, weight in others:
            combined.add_(earlier, alpha=weight)
        return combined

    def _weights(self, used: int) -> List[float]:
        gram = self.gram[:used, :used]
        scale = np.maximum(gram.diagonal(), np.finfo(float).tiny) ** -0.5
        scaled = gram * scale * scale[:, None]
        scaled.flat[::used + 1] += self.regularisation
        weights = np.linalg.solve(scaled, scale) * scale
        return (weights / weights.sum()).tolist()


class Broyden:
    """Broyden's good method on map(x) − x = 0 from the inverse Jacobian −1, updated by rank-one terms (Sherman–Morrison).

    H ← H + (Δx − H Δr) (Δxᵀ H) / (Δxᵀ H Δr), with H = −1 + Σ left_i right_iᵀ. It stores two vectors per iteration.
    """

    def __init__(self):
        self.left, self.right = [], []
        self.previous = None

    def propose(self, x: Tensor, mapped: Tensor, residual: Tensor) -> Tensor:
        residual = residual.flatten()
        if self.previous is not None:
            step, last_residual = self.previous
            change = residual - last_residual
            row = self._product(step, self.right, self.left)
            scale = torch.dot(row, change)
            if scale.abs() > torch.finfo(scale.dtype).tiny:
                self.left.append((step - self._product(change, self.left, self.right)) / scale)
                self.right.append(row)
        step = -self._product(residual, self.left, self.right)
        self.previous = (step, residual)
        return x + step.view_as(x)

    @staticmethod
    def _product(vector: Tensor, columns: list, rows: list) -> Tensor:
        """(−1 + Σ columns_i rows_iᵀ) vector, so H v with (left, right) and Hᵀ v with (right, left)."""
        product = -vector
        for column, row in zip(columns, rows):
            product.add_(column * torch.dot(row, vector))
        return product


METHODS: Dict[str, Type] = {"anderson": Anderson, "broyden": Broyden, "fixed-point": FixedPoint}


@torch.no_grad()
def solve(map: Callable[[Tensor], Tensor], start: Tensor, method: str = "anderson",
          tol: float = 1e-3, max_iterations: int = 30) -> Solution:
    """Solve x = map(x) from `start`.

    The residual ‖map(x) − x‖ is relative to ‖start‖ (to 1 where that is 0); iteration stops when it is at most `tol`, when it
    is no longer finite, or after `max_iterations` evaluations of the map, and the x of lowest residual is returned with
    that residual. `start` has any shape and floating dtype.
    """
    proposer = METHODS[method]()
    scale = torch.linalg.vector_norm(start).item() or 1.0
    best, x = Solution(start, math.inf, 0, False), start
    for iteration in range(1, max_iterations + 1):
        mapped = map(x)
        difference = mapped - x
        residual = torch.linalg.vector_norm(difference).item() / scale
        if residual < best.residual:
            best = Solution(x, residual, iteration, residual <= tol)
        if best.converged or not math.isfinite(residual) or iteration == max_iterations:
            break
        x = proposer.propose(x, mapped, difference)
    return best._replace(iterations=iteration)
