"""Integrate-and-fire neurons, with and without leak, as pure functions of (current, state)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Neuron(NamedTuple):
    """The constants of a spiking neuron: firing `threshold` V_th > 0 and `leak` λ.

    0 < λ < 1 is the leaky model (LIF); λ = 1 is the integrate-and-fire model without leak (IF).
    """

    threshold: float
    leak: float

    @property
    def name(self) -> str:
        return "IF" if self.leak == 1.0 else f"LIF {self.leak:g}"


class NeuronState(NamedTuple):
    """Membrane potential u(t) and spikes s(t), both of the layer's shape (batch, …) and in its floating dtype."""

    potential: Tensor
    spikes: Tensor


def make_neuron(threshold: float, leak: float) -> Neuron:
    """A neuron from the command line's values, where any leak ≥ 1 or ≤ 0 stands for the IF model."""
    if not threshold > 0:
        raise ValueError(f"the firing threshold must be above 0, not {threshold}")
    return Neuron(threshold, leak if 0 < leak < 1 else 1.0)


def resting_state(current: Tensor) -> NeuronState:
    """u(0⁻) = 0 and s(−1) = 0, of the shape and dtype of `current`."""
    return NeuronState(torch.zeros_like(current), torch.zeros_like(current))


def neuron_step(current: Tensor, state: NeuronState, neuron: Neuron) -> NeuronState:
    """One time step: soft reset, then leak, then the new current; a spike where the threshold is reached.

        u(t) = λ (u(t−1) − V_th s(t−1)) + I(t),    s(t) = 1 if u(t) ≥ V_th else 0

    `current` and the state's tensors have the layer's shape (batch, …).
    """
    potential = torch.sub(state.potential, state.spikes, alpha=neuron.threshold)
    if neuron.leak != 1.0:
        potential.mul_(neuron.leak)
    potential.add_(current)
    return NeuronState(potential, torch.ge(potential, neuron.threshold).to(potential.dtype))


def rate_weights(time_steps: int, leak: float, **tensor_options) -> Tensor:
    """Weights (T,) of the firing rate a = Σ_t w_t s(t), summing to 1: λ^(T−1−t) / Σ λ^(T−1−t), so 1/T for IF."""
    weights = torch.logspace(time_steps - 1, 0, time_steps, base=leak, dtype=torch.float64)
    return (weights / weights.sum()).to(**tensor_options)


class WeightedRate:
    """Running firing rate of a layer: after T calls of `add`, `value()` is Σ_t λ^(T−1−t) s(t) / Σ_t λ^(T−1−t)."""

    def __init__(self, leak: float):
        self.leak = leak
        self.total = None
        self.normaliser = 0.0

    def add(self, spikes: Tensor) -> None:
        self.normaliser = self.normaliser * self.leak + 1.0
        if self.total is None:
            self.total = spikes.clone()
            return
        if self.leak != 1.0:
            self.total.mul_(self.leak)
        self.total.add_(spikes)

    def value(self) -> Tensor:
        return self.total / self.normaliser
