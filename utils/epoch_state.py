"""How far an epoch of training is: what an interrupted one needs to go on as if nothing had happened."""

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Tuple, Union

from torch import Tensor

from modules.implicit import SolveTally
from utils.metrics import Metrics


@dataclass
class EpochState:
    """`iteration` is the next to run. The order of the samples is what PyTorch's CPU generator draws from `order_state`, its
    state at the epoch's start. `residuals` are the relative distances of some batches' firing rates from their
    equilibrium (`FeedbackSNN.residual`). `shape` is the number of samples and the batch size that the iterations count.
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

    @classmethod
    def from_state(cls, state: Dict[str, Any]) -> "EpochState":
        samples, size = state["shape"]
        return cls(int(state["iteration"]), state["order_state"], (int(samples), int(size)), Metrics.from_state(state["metrics"]),
                   SolveTally(**state["tally"]), [*map(float, state["residuals"])], int(state["skipped"]))
