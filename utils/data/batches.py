"""Batches of a data set that lies in memory as tensors."""

from typing import Callable, Iterator, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from modules.across_processes import process_count, process_rank


def as_they_are(inputs: Tensor) -> Tensor:
    return inputs


class Samples(NamedTuple):
    """Inputs (N, …) as they are kept and labels (N,) int64, on one device.

    `prepare` turns a batch of kept inputs into what the network takes (batch, …), or (T, batch, …) for events: unpacking,
    normalisation. Inputs that are kept ready to use need none. Before that `augment`, if there is one, changes the batch at random, by
    the generator that it is given.
    """

    inputs: Tensor
    labels: Tensor
    prepare: Callable[[Tensor], Tensor] = as_they_are
    augment: Optional[Callable[[Tensor, torch.Generator], Tensor]] = None

    def to(self, device: torch.device) -> "Samples":
        return self._replace(inputs=self.inputs.to(device), labels=self.labels.to(device))

    def first(self, count: Optional[int]) -> "Samples":
        """The first `count` samples; all of them for None."""
        return self._replace(inputs=self.inputs[:count], labels=self.labels[:count])


class Batches:
    """Iterates over `samples` in prepared batches of at most `size`; in a new random order each time if `shuffled`.

    The order comes from PyTorch's CPU generator, and so does the seed from which each batch's augmentation follows: a restored random
    state restores both, and a batch can be prepared before its turn. Of every batch, each process of a job takes the samples that are its
    share, in order and as many as any other's or one more, with an augmentation of their own; it may get an empty batch.
    """

    def __init__(self, samples: Samples, size: int, shuffled: bool):
        self.samples, self.size, self.shuffled = samples, size, shuffled

    def __len__(self) -> int:
        return -(-len(self.samples.labels) // self.size)

    @property
    def shape(self) -> Tuple[int, int]:
        """The number of samples and the batch size."""
        return len(self.samples.labels), self.size

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        return self._batches(0, *self._drawn())

    def after(self, done: int, order_state: Tensor) -> Iterator[Tuple[Tensor, Tensor]]:
        """The batches that follow the first `done`, in the order that was drawn when the generator's state was `order_state`."""
        now = torch.get_rng_state()
        torch.set_rng_state(order_state)
        drawn = self._drawn()
        torch.set_rng_state(now)
        return self._batches(done, *drawn)

    def _drawn(self) -> Tuple[Optional[Tensor], int]:
        """The samples' order, None for their own, and the seed of the first one's augmentation."""
        count, device = len(self.samples.labels), self.samples.labels.device
        order = torch.randperm(count).to(device) if self.shuffled else None
        return order, int(torch.empty((), dtype=torch.int64).random_()) if self.samples.augment else 0

    def _batches(self, done: int, order: Optional[Tensor], seed: int) -> Iterator[Tuple[Tensor, Tensor]]:
        inputs, labels, prepare, augment = self.samples
        generator = torch.Generator(labels.device)
        for start in range(done * self.size, len(labels), self.size):
            share = self._share(start)
            if order is None:
                kept, its_labels = inputs[share], labels[share]
            else:
                chosen = order[share]
                kept, its_labels = inputs.index_select(0, chosen), labels.index_select(0, chosen)
            if augment:
                kept = augment(kept, generator.manual_seed(seed + share.start))
            yield prepare(kept), its_labels

    def whole(self, iteration: int) -> int:
        """How many samples the iteration's batch has in all processes together."""
        return min(self.size, len(self.samples.labels) - iteration * self.size)

    def _share(self, start: int) -> slice:
        count, rank, processes = self.whole(start // self.size), process_rank(), process_count()
        return slice(start + count * rank // processes, start + count * (rank + 1) // processes)
