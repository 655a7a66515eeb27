"""What looks on while a network is simulated: pass one as `observe`, or several as `together(…)`."""

from typing import Callable, Collection, List

import torch
from torch import Tensor

from modules.neuron import rate_normaliser
from modules.simulation import Observer


def together(*observers: Observer) -> Observer:
    """All of them, as one observer of spikes."""
    def observe(t: int, spikes: List[Tensor]) -> None:
        for observer in observers:
            observer(t, spikes)
    return observe


class RunningRates:
    """Calls `visit(T, rates)` with every layer's firing rate over the first T steps, for each T in `steps`.

    The rates are the weighted ones, Σ_t λ^(T−1−t) s(t) / Σ_t λ^(T−1−t), (batch, *layer shape) each. The last layer's is what the
    network would hand its readout if it ran for T steps only, so one long simulation shows all shorter ones.
    """

    def __init__(self, leak: float, steps: Collection[int], visit: Callable[[int, List[Tensor]], None]):
        self.leak, self.steps, self.visit = leak, set(steps), visit

    def __call__(self, t: int, spikes: List[Tensor]) -> None:
        if t == 0:
            self.totals = [torch.zeros_like(layer) for layer in spikes]
        for total, layer in zip(self.totals, spikes):
            total.mul_(self.leak).add_(layer)
        if t + 1 in self.steps:
            normaliser = rate_normaliser(t + 1, self.leak)
            self.visit(t + 1, [total / normaliser for total in self.totals])


class UnitSpikes:
    """Spikes of every unit in the first `time_steps` steps, over as many batches as wanted: float64 (*layer shape) for each layer.

    `fed_back` counts the last layer's without those of the last step, which no step follows.
    """

    def __init__(self, time_steps: int):
        self.time_steps, self.samples, self.counts, self.fed_back = time_steps, 0, None, None

    def __call__(self, t: int, spikes: List[Tensor]) -> None:
        if t >= self.time_steps:
            return
        counts = [layer.sum(0, dtype=torch.float64) for layer in spikes]
        if self.counts is None:
            self.counts = [torch.zeros_like(count) for count in counts]
            self.fed_back = torch.zeros_like(counts[-1])
        for total, count in zip(self.counts, counts):
            total += count
        if t < self.time_steps - 1:
            self.fed_back += counts[-1]
        self.samples += len(spikes[0]) if t == 0 else 0


class Trace:
    """Spikes and membrane potentials u(t), before the reset, of the batch's first sample: a list over layers of (T, neurons)."""

    def __init__(self):
        self._spikes, self._potentials = [], []

    def __call__(self, t: int, spikes: List[Tensor]) -> None:
        self._spikes.append([layer[0].flatten() for layer in spikes])

    def potentials(self, t: int, potentials: List[Tensor]) -> None:
        self._potentials.append([layer[0].flatten() for layer in potentials])

    def of_layers(self) -> List["tuple[Tensor, Tensor]"]:
        """(spikes, potentials) of each layer."""
        layers = zip(zip(*self._spikes), zip(*self._potentials))
        return [(torch.stack(spikes), torch.stack(potentials)) for spikes, potentials in layers]
