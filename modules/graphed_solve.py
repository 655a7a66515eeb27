"""The backward solve of a captured pass, in CUDA graphs of its own, as how many iterations it takes is known on the way only."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from modules import gpu
from modules.event_driven import kernel_layout
from modules.jacobian import TransposedJacobian
from modules.solvers import Anderson, Reading, Solution, iterate

if TYPE_CHECKING:
    from modules.implicit import BackwardSolver

# A residual that iterates of tf32 products still have, about, in float32.
ROUGH_RESIDUAL = 5e-4


class GraphedJacobian(TransposedJacobian):
    """A captured pass's Jᵀ, whose solve is captured too.

    It is made in a capture, in whose memory the solve's vectors then are, each like `like` (batch, *last layer's shape). What is captured
    is Anderson's method; solves by another one go product by product.
    """

    def __init__(self, jacobian: TransposedJacobian, solver: "BackwardSolver", like: Tensor):
        self.links, self.adjoints = jacobian.links, jacobian.adjoints
        self._iteration = _GraphedIteration(like) if solver.method == "anderson" else None

    @torch.no_grad()
    def rehearse(self) -> None:
        """Do once what will be captured, so that what libraries set up for it comes before any capture."""
        if self._iteration is not None:
            self._iteration.rehearse(self)

    @torch.no_grad()
    def capture(self, pool: Any) -> None:
        """Have later solves run in graphs; `pool` is for what a product with Jᵀ takes for itself."""
        if self._iteration is None:
            return
        try:
            self._iteration.capture(self, pool)
        except RuntimeError as error:
            self._iteration = None
            gpu.not_captured("the backward solve", error)

    @torch.no_grad()
    def solve(self, gradient: Tensor, tol: float, max_iterations: int) -> Optional[Solution]:
        if self._iteration is None:
            return None
        self._iteration.start(gradient)
        run = refined if True in self._iteration.visits else iterate
        return run(self._iteration, gradient, tol, max_iterations, ahead=True)


def refined(iteration: "_GraphedIteration", start: Tensor, tol: float, max_iterations: int, ahead: bool) -> Solution:
    """As `iterate`, with the iteration's `rough` products at first; the solution's residual is by the others.

    Float32 products take several times as long as tf32's. Those lead to a solution that one of float32 most often finds good enough.
    """
    iteration.rough = True
    rough = iterate(iteration, start, max(tol / 2, ROUGH_RESIDUAL), max_iterations // 2, ahead)
    iteration.rough = False
    iteration.go_on_from(rough.value)
    solution = iterate(iteration, rough.value, tol, max_iterations - rough.iterations, ahead)
    return solution._replace(iterations=rough.iterations + solution.iterations)


class _GraphedIteration:
    """As modules.solvers.Iteration of v = g + Jᵀ v by Anderson's method, in graphs: one for visits, and one for each state of the memory.

    Where products are float32, another graph's are tf32, for the visits while `rough` is set.
    """

    def __init__(self, like: Tensor):
        self.gradient, self.x, self.at, self.mapped, self.difference = (torch.empty_like(kernel_layout(like)) for _ in range(5))
        self.scale, self.residual = like.new_empty(()), like.new_empty(())
        self.proposer, self.proposals, self.visits, self.rough = Anderson(), {}, {}, False
        self.proposer.allocate(self.x)

    def rehearse(self, jacobian: TransposedJacobian) -> None:
        self.start(self.gradient.zero_())
        for rough in self._precisions:
            with gpu.tf32_products() if rough else nullcontext():
                self._visit(jacobian)
        self._propose()

    def capture(self, jacobian: TransposedJacobian, pool: Any) -> None:
        for rough in self._precisions:
            with gpu.tf32_products() if rough else nullcontext():
                self.visits[rough] = self._captured(lambda: self._visit(jacobian), pool)
        for count in range(2 * Anderson.memory):  # till the memory is full, and once round it
            self.proposer.count = count
            state = self._state
            self.proposals[state] = self._captured(self._propose, pool)

    @property
    def _precisions(self) -> Tuple[bool, ...]:
        """Whether products are rough, for each way in which they are done."""
        return (False,) if torch.backends.cudnn.allow_tf32 else (False, True)

    def _captured(self, work: Callable[[], None], pool: Any) -> "torch.cuda.CUDAGraph":
        with gpu.capturing(pool) as graph:
            work()
        return graph

    @property
    def _state(self) -> Tuple[int, int]:
        """Of Anderson's memory: the place that the next iterate takes, and how many are remembered."""
        return self.proposer.count % Anderson.memory, min(self.proposer.count, Anderson.memory)

    def _propose(self) -> None:
        self.x.copy_(self.proposer.propose(self.at, self.mapped, self.difference))

    def _visit(self, jacobian: TransposedJacobian) -> None:
        self.at.copy_(self.x)
        torch.add(self.gradient, jacobian(self.at), out=self.mapped)
        torch.sub(self.mapped, self.at, out=self.difference)
        torch.div(torch.linalg.vector_norm(self.difference), self.scale, out=self.residual)

    def start(self, gradient: Tensor) -> None:
        self.gradient.copy_(gradient)
        self.go_on_from(gradient)
        norm = torch.linalg.vector_norm(gradient)
        self.scale.copy_(torch.where(norm > 0, norm, torch.ones_like(norm)))

    def go_on_from(self, x: Tensor) -> None:
        self.x.copy_(x)
        self.proposer.count = 0

    def visit(self) -> Reading:
        self.visits[self.rough].replay()
        return Reading(self.residual)

    @property
    def visited(self) -> Tensor:
        return self.at.clone()

    def propose(self) -> None:
        self.proposals[self._state].replay()
        self.proposer.count += 1
