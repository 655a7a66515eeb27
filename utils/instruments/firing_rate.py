"""Firing-rate statistics: the plain mean of spikes over samples, neurons and time steps (method section 7)."""

from typing import List, Sequence

from torch import Tensor

from utils.processes import gathered


class FiringRates:
    """An observer of the simulation: pass the object itself as `observe`, over as many batches as wanted.

    >>> rates = FiringRates(network.neuron_counts)
    >>> network(x, observe=rates)
    >>> rates.per_layer, rates.total
    """

    def __init__(self, neuron_counts: Sequence[int]):
        self.neuron_counts = list(neuron_counts)
        self.spikes = None
        self.sample_steps = 0

    def __call__(self, t: int, spikes: List[Tensor]) -> None:
        # Sums of up to 2²⁴ spikes are exact in float32; the running count is kept in float64.
        counts = [layer.sum().double() for layer in spikes]
        self.spikes = counts if self.spikes is None else [total + count for total, count in zip(self.spikes, counts)]
        self.sample_steps += spikes[0].shape[0]

    def add_other_processes(self) -> None:
        """Have the counts of all processes of the job; all must ask together."""
        counts = gathered(([] if self.spikes is None else [total.cpu() for total in self.spikes], self.sample_steps))
        if len(counts) > 1:
            self.spikes = [sum(totals) for totals in zip(*(spikes for spikes, _ in counts if spikes))]
            self.sample_steps = sum(steps for _, steps in counts)

    @property
    def per_layer(self) -> List[float]:
        """Spikes per neuron, time step and sample of each layer."""
        return [total.item() / (neurons * self.sample_steps) for total, neurons in zip(self.spikes, self.neuron_counts)]

    @property
    def total(self) -> float:
        """All spikes / (all neurons · T · samples)."""
        return sum(total.item() for total in self.spikes) / (sum(self.neuron_counts) * self.sample_steps)

    def table(self) -> str:
        rows = [f"layer {i}   {neurons:9,d} neurons   firing rate {rate:.6f}"
                for i, (neurons, rate) in enumerate(zip(self.neuron_counts, self.per_layer), start=1)]
        return "\n".join([*rows, f"in total  {sum(self.neuron_counts):9,d} neurons   firing rate {self.total:.6f}"])
