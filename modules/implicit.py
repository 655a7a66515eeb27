"""The gradient of an equilibrium by implicit differentiation (method section 6).

At a = f(a, θ) the loss's gradient g = ∂L/∂a reaches the parameters as vᵀ ∂f/∂θ, where (I − Jᵀ) v = g and J = ∂f/∂a.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.across_processes import InnerProducts, process_rank
from modules.event_driven import kernel_layout
from modules.jacobian import TransposedJacobian
from modules.solvers import METHODS, Anderson, Solution, solve


@dataclass
class SolveTally:
    """Counts of backward solves since the last `reset`: for a progress bar and the epoch's report."""

    solves: int = 0
    iterations: float = 0
    not_converged: int = 0
    worst_residual: float = 0.0

    def add(self, solution: Solution) -> None:
        self.solves += 1
        self.iterations += solution.iterations
        self.not_converged += not solution.converged
        self.worst_residual = max(self.worst_residual, solution.residual)

    def merge(self, other: "SolveTally") -> None:
        """Add another process's counts."""
        self.solves += other.solves
        self.iterations += other.iterations
        self.not_converged += other.not_converged
        self.worst_residual = max(self.worst_residual, other.worst_residual)

    @property
    def mean_iterations(self) -> float:
        return self.iterations / max(self.solves, 1)


class BackwardSolver:
    """Solves v = g + Jᵀ v from v = g to a relative residual `tol`, in at most `max_iterations` products with Jᵀ.

    A residual of 1e-3 gives the parameters' gradient to about 1e-3, less than what stands between the rates after T steps and
    the true equilibrium. `tally` counts the solves and those that did not converge. On a CPU, the samples of a single-layer network,
    which are independent, are solved one by one by a C kernel to the same joint residual; the iterations counted are then their mean.
    With a tolerance of 1e-3 or more a matrix unit's products in this pass have a relative error of 4e-6, root mean square.
    Where synchronised batch norms couple the samples of several processes, these solve together, and the first one counts it. Raises
    ValueError for an unknown method, a tolerance of 0 or less, and less than one iteration.
    """

    def __init__(self, method: str = "anderson", tol: float = 1e-3, max_iterations: int = 30):
        self.method, self.tol, self.max_iterations = method, tol, max_iterations
        self._check_settings()
        self.tally = SolveTally()

    def _check_settings(self) -> None:
        """Raises ValueError where the method is unknown, the tolerance not above 0, or the most iterations no whole number from 1."""
        if self.method not in METHODS:
            raise ValueError(f"unknown solver {self.method!r}: choose one of {', '.join(METHODS)}")
        if not self.tol > 0 or not isinstance(self.max_iterations, Integral) or self.max_iterations < 1:
            raise ValueError(f"a solver needs a tolerance above 0 and a whole number of iterations, at least one, not {self.tol} and "
                             f"{self.max_iterations}")

    def __call__(self, vjp: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
        """v for g = `gradient`, of its shape (batch, *last layer's shape) and dtype; `vjp` is v ↦ Jᵀ v.

        Raises ValueError as __init__ does, as settings may have been changed.
        """
        self._check_settings()
        kind = gradient.device.type
        if torch.is_autocast_enabled(kind):  # where somebody calls backward() under it
            with torch.autocast(kind, enabled=False):
                return self(vjp, gradient)
        solution, joint = None, isinstance(vjp, TransposedJacobian) and vjp.joint
        gradient = kernel_layout(gradient)
        if METHODS[self.method] is Anderson and isinstance(vjp, TransposedJacobian):
            solution = vjp.solve(gradient, self.tol, self.max_iterations)
        if solution is None:
            solution = solve(lambda v: gradient + vjp(v), gradient, self.method, self.tol, self.max_iterations,
                             products=InnerProducts(joint))
        if not joint or process_rank() == 0:
            self.tally.add(solution)
        return solution.value

    def reset_tally(self) -> SolveTally:
        """Start counting anew and return the counts so far."""
        finished, self.tally = self.tally, SolveTally()
        return finished


class _ImplicitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rate, mapped, vjp, solver):
        tensors, ctx.vjp, ctx.solver = [], lambda tensors: vjp, solver
        if type(vjp) is TransposedJacobian and len(vjp.links) > 1:  # A single layer's is one array.
            tensors, ctx.vjp = vjp.taken_apart()  # Autograd frees them after the solve, unless it is to retain the graph.
        ctx.save_for_backward(*tensors)
        return rate.view_as(rate)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return None, ctx.solver(ctx.vjp(ctx.saved_tensors), gradient), None, None


class Pass(NamedTuple):
    """What a pass computes before the readout: the last layer's rate and, for its gradient, `mapped` = f(rate, θ) and Jᵀ."""

    rate: Tensor
    mapped: Optional[Tensor] = None
    jacobian: Optional[TransposedJacobian] = None

    def with_gradient(self, solver: BackwardSolver) -> Tensor:
        return self.rate if self.mapped is None else attach_gradient(self.rate, self.mapped, self.jacobian, solver)


def autograd_vjp(map: Callable[[Tensor], Tensor], point: Tensor) -> Callable[[Tensor], Tensor]:
    """v ↦ Jᵀ v for J = ∂map/∂x at `point`, for any map, from the graph of one evaluation, kept for as long as the function lives."""
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        mapped = map(point)
    return lambda v: torch.autograd.grad(mapped, point, v, retain_graph=True)[0]


def attach_gradient(rate: Tensor, mapped: Tensor, vjp: Callable[[Tensor], Tensor], solver: BackwardSolver) -> Tensor:
    """`rate` itself, carrying the gradient of its equilibrium in the parameters.

    `mapped` is f(rate, θ) with its graph in θ alone (its value is discarded), `vjp` the product v ↦ Jᵀ v, which keeps the shape
    (batch, …) and dtype of `rate`.
    """
    return _ImplicitGradient.apply(rate, mapped, vjp, solver)
