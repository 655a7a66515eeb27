"""Loss and accuracy averaged over the samples seen so far."""

from typing import NamedTuple

import torch
from torch import Tensor


COUNTED_TOGETHER = 64


class Averages(NamedTuple):
    """Mean cross-entropy in nats, and top-1 and top-5 accuracy in percent."""

    loss: float
    top1: float
    top5: float


class Metrics:
    """Sums loss and hits on the device of the logits; only `averages` waits for the device.

    What it is given is kept and counted for many batches together, as counting costs as much time for one as for many.
    """

    def __init__(self):
        self.sums, self.count, self.waiting = 0.0, 0, []

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Logits (batch, classes), labels (batch,) and the batch's mean loss ()."""
        self.waiting.append((logits.detach(), labels, loss.detach() * len(labels)))
        self.count += len(labels)
        if len(self.waiting) >= COUNTED_TOGETHER:
            self._count()

    @torch.no_grad()
    def _count(self) -> None:
        logits, labels, losses = zip(*self.waiting)
        logits, labels, self.waiting = torch.cat(logits), torch.cat(labels), []
        hits = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).sum(0)
        self.sums = torch.stack([torch.stack(losses).double().sum(), hits[0], hits.sum()]) + self.sums

    def averages(self) -> Averages:
        if self.waiting:
            self._count()
        loss, top1, top5 = (self.sums / self.count).tolist()
        return Averages(loss, 100 * top1, 100 * top5)
