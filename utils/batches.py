"""Batches of a data set that lies in memory as tensors, already normalised."""

from typing import Iterator, NamedTuple, Optional, Tuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """Inputs (N, …) float32 and labels (N,) int64 on one device."""

    inputs: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Samples":
        return Samples(self.inputs.to(device), self.labels.to(device))


class Batches:
    """Iterates over `samples` in batches of at most `size`; in a new random order each time if `shuffled`.

    The order comes from PyTorch's CPU generator, so a restored random state restores it.
    """

    def __init__(self, samples: Samples, size: int, shuffled: bool):
        self.samples, self.size, self.shuffled = samples, size, shuffled

    def __len__(self) -> int:
        return -(-len(self.samples.labels) // self.size)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        inputs, labels = self.samples
        order = self._order()
        for start in range(0, len(labels), self.size):
            if order is None:
                yield inputs[start:start + self.size], labels[start:start + self.size]
            else:
                chosen = order[start:start + self.size]
                yield inputs.index_select(0, chosen), labels.index_select(0, chosen)

    def _order(self) -> Optional[Tensor]:
        return torch.randperm(len(self.samples.labels)).to(self.samples.labels.device) if self.shuffled else None
