"""How far an epoch of training is: what an interrupted one needs to go on as if nothing had happened."""

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Tuple, Union

from torch import Tensor

from modules.implicit import SolveTally
from utils.metrics import Metrics
from utils.processes import gathered, is_first


@dataclass
class EpochState:
    """`iteration` is the next to run. The order of the samples is what PyTorch's CPU generator draws from `order_state`, its
    state at the epoch's start. `residuals` are the relative distances of some batches' firing rates from their
    equilibrium (`FeedbackSNN.residual`). `shape` is the number of samples and the batch size that the iterations count.

    In a job of several processes each has a share of metrics, tally and residuals, which add up to the job's.
    """

    iteration: int = 0
    order_state: Optional[Tensor] = None
    shape: Tuple[int, int] = (0, 0)
    metrics: Metrics = field(default_factory=Metrics)
    tally: SolveTally = field(default_factory=SolveTally)
    residuals: List[Union[float, Tensor]] = field(default_factory=list)
    skipped: int = 0

    @property
    def mean_residual(self) -> float:
        return sum(map(float, self.residuals)) / max(len(self.residuals), 1)

    def state_dict(self) -> Dict[str, Any]:
        return {"iteration": self.iteration, "order_state": self.order_state, "shape": list(self.shape),
                "metrics": self.metrics.state_dict(), "tally": asdict(self.tally), "residuals": [*map(float, self.residuals)],
                "skipped": self.skipped}

    def of_all_processes(self) -> "EpochState":
        """The same for the whole job, from every process's share; all must ask together."""
        shares = gathered(self.state_dict())
        if len(shares) == 1:
            return self
        first, *others = map(EpochState.from_state, shares)
        for other in others:
            first.metrics.merge(other.metrics)
            first.tally.merge(other.tally)
            first.residuals = [mine + theirs for mine, theirs in zip(first.residuals, other.residuals)]
        return first

    def share_to_go_on_with(self) -> "EpochState":
        """What a process takes on of a whole job's state: the first one everything, so that the others count from nothing."""
        if is_first():
            return self
        state = EpochState.from_state(self.state_dict())
        state.metrics.clear()
        state.tally, state.residuals = SolveTally(), [0.0] * len(state.residuals)
        return state

    @classmethod
    def from_state(cls, state: Dict[str, Any]) -> "EpochState":
        samples, size = state["shape"]
        return cls(int(state["iteration"]), state["order_state"], (int(samples), int(size)), Metrics.from_state(state["metrics"]),
                   SolveTally(**state["tally"]), [*map(float, state["residuals"])], int(state["skipped"]))
