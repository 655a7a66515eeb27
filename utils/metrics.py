"""Loss and accuracy averaged over the samples seen so far."""

from typing import Any, Dict, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


COUNTED_TOGETHER = 64


class Averages(NamedTuple):
    """Mean cross-entropy in nats, and top-1 and top-5 accuracy in percent."""

    loss: float
    top1: float
    top5: float


class Metrics:
    """Sums loss and hits on the device of the logits; only `averages` and `state_dict` wait for the device.

    What it is given is kept and counted for many batches together, as counting costs as much time for one as for many. Each batch's
    loss is kept, so that the sum does not depend on when it is asked for.
    """

    def __init__(self):
        self.losses, self.hits, self.count, self.waiting = torch.zeros(0), torch.zeros(2, dtype=torch.int64), 0, []

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Logits (batch, classes), labels (batch,) and the batch's mean loss ()."""
        self.waiting.append((logits.detach(), labels, loss.detach()))
        self.count += len(labels)
        if len(self.waiting) >= COUNTED_TOGETHER:
            self._count()

    @torch.no_grad()
    def _count(self) -> None:
        if not self.waiting:
            return
        logits, labels, losses = zip(*self.waiting)
        losses = torch.stack([loss * len(own) for loss, own in zip(losses, labels)])
        logits, labels, self.waiting = torch.cat(logits), torch.cat(labels), []
        hits = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).sum(0)
        self.losses = torch.cat([self.losses.to(logits.device), losses])
        self.hits = self.hits.to(logits.device) + torch.stack([hits[0], hits.sum()])

    def averages(self) -> Averages:
        """NaN where nothing has been added."""
        self._count()
        if self.count == 0:
            return Averages(*3 * (float("nan"),))
        loss, top1, top5 = torch.stack([self.losses.double().sum(), *self.hits]).div(self.count).tolist()
        return Averages(loss, 100 * top1, 100 * top5)

    def merge(self, other: "Metrics") -> None:
        """Add another process's share of the same batches; a last one may have been too small for all to have a part in it."""
        self._count()
        other._count()
        batches = max(len(self.losses), len(other.losses))
        own, theirs = (F.pad(losses, (0, batches - len(losses))) for losses in (self.losses, other.losses))
        self.losses, self.hits, self.count = own + theirs, self.hits + other.hits, self.count + other.count

    def clear(self) -> None:
        """Hold nothing of the batches that were added, but their number."""
        self._count()
        self.losses, self.hits, self.count = torch.zeros_like(self.losses), torch.zeros_like(self.hits), 0

    def state_dict(self) -> Dict[str, Any]:
        self._count()
        return {"losses": self.losses.cpu(), "hits": self.hits.cpu(), "count": self.count}

    @classmethod
    def from_state(cls, state: Dict[str, Any]) -> "Metrics":
        metrics = cls()
        metrics.losses, metrics.hits, metrics.count = state["losses"].float(), state["hits"].long(), int(state["count"])
        return metrics
