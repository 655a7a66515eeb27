"""Loss and accuracy averaged over the samples seen so far."""

from typing import NamedTuple

import torch
from torch import Tensor


class Averages(NamedTuple):
    """Mean cross-entropy in nats, and top-1 and top-5 accuracy in percent."""

    loss: float
    top1: float
    top5: float


class Metrics:
    """Sums loss and hits on the device of the logits; only `averages` waits for the device."""

    def __init__(self):
        self.sums, self.count = None, 0

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Logits (batch, classes), labels (batch,) and the batch's mean loss ()."""
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (ranked == labels[:, None]).sum(0).float()
        batch = torch.stack([loss.detach() * len(labels), hits[0], hits.sum()]).double()
        self.sums = batch if self.sums is None else self.sums.add_(batch)
        self.count += len(labels)

    def averages(self) -> Averages:
        loss, top1, top5 = (self.sums / self.count).tolist()
        return Averages(loss, 100 * top1, 100 * top5)
