"""The backward solve of a captured pass, in CUDA graphs of its own, as how many iterations it takes is known on the way only."""

from typing import Optional

import torch
from torch import Tensor

from modules.event_driven import kernel_layout
from modules.gpu import capturing, not_captured
from modules.jacobian import TransposedJacobian
from modules.solvers import Anderson, Reading, Solution, iterate


class GraphedJacobian(TransposedJacobian):
    """A captured pass's Jᵀ, whose solve is captured too."""

    def __init__(self, jacobian: TransposedJacobian):
        self.links, self.adjoints, self._iteration, self._capturable = jacobian.links, jacobian.adjoints, None, True

    @torch.no_grad()
    def solve(self, gradient: Tensor, tol: float, max_iterations: int) -> Optional[Solution]:
        if not self._capturable:
            return None
        try:
            self._iteration = self._iteration or _GraphedIteration(self, gradient)
            self._iteration.start(gradient)
            return iterate(self._iteration, gradient, tol, max_iterations, ahead=True)
        except RuntimeError as error:
            self._capturable = False
            return not_captured("the backward solve", error)


class _GraphedIteration:
    """As modules.solvers.Iteration of v = g + Jᵀ v by Anderson's method, in graphs: one for visits, and one for each state of the memory."""

    def __init__(self, jacobian: TransposedJacobian, gradient: Tensor):
        self.pool = torch.cuda.graph_pool_handle()
        self.gradient, self.x, self.at = (torch.empty_like(kernel_layout(gradient)) for _ in range(3))
        self.scale, self.proposer, self.proposals = gradient.new_ones(()), Anderson(), {}
        # Not in the graphs' memory, where another graph's intermediate results would overwrite what is remembered.
        self.proposer.allocate(self.x)
        self.start(gradient)
        self._visit(jacobian)
        self.proposer.propose(self.at, self.mapped, self.difference)  # What its libraries set up comes before the capture.
        self.visits = torch.cuda.CUDAGraph()
        with capturing(self.visits, self.pool):
            self._visit(jacobian)

    def _visit(self, jacobian: TransposedJacobian) -> None:
        self.at.copy_(self.x)
        self.mapped = self.gradient + jacobian(self.at)
        self.difference = self.mapped - self.at
        self.residual = torch.linalg.vector_norm(self.difference) / self.scale

    def start(self, gradient: Tensor) -> None:
        self.gradient.copy_(gradient)
        self.x.copy_(gradient)
        norm = torch.linalg.vector_norm(gradient)
        self.scale.copy_(torch.where(norm > 0, norm, torch.ones_like(norm)))
        self.proposer.count = 0

    def visit(self) -> Reading:
        self.visits.replay()
        return Reading(self.residual)

    @property
    def visited(self) -> Tensor:
        return self.at.clone()

    def propose(self) -> None:
        count = self.proposer.count
        state = count % Anderson.memory, min(count, Anderson.memory)
        if state not in self.proposals:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self.pool):
                self.x.copy_(self.proposer.propose(self.at, self.mapped, self.difference))
            self.proposals[state] = graph
        self.proposals[state].replay()
        self.proposer.count = count + 1
