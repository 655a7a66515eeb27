"""Integrate-and-fire neurons, with and without leak, as pure functions of (current, state)."""

import functools
from typing import Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from modules.dropout import masked
from modules.kernels import kernels_for

# Spikes from membrane potentials and the threshold.
Fire = Callable[[Tensor, float], Tensor]


class Neuron(NamedTuple):
    """The constants of a spiking neuron: firing `threshold` V_th > 0 and `leak` λ.

    0 < λ < 1 is the leaky model (LIF); λ = 1 is the integrate-and-fire model without leak (IF). Another neuron is a subclass with its
    own `step` and `equilibrium`, whose `leak` weighs the firing rate over time; docs/extending.md shows one. The C and Triton kernels have
    these equations once more: what is changed here alone shows only where PyTorch serves.
    """

    threshold: float
    leak: float

    @property
    def name(self) -> str:
        return "IF" if self.leak == 1.0 else f"LIF {self.leak:g}"

    @property
    def has_kernels(self) -> bool:
        """Whether the C and Triton kernels compute this neuron; a subclass runs in PyTorch."""
        return type(self) is Neuron

    def rest(self, current: Tensor) -> "NeuronState":
        """The state before the first step, for a current of that shape; of a subclass also one with more than potential and spikes."""
        return resting_state(current)

    def step(self, current: Tensor, state: "NeuronState", fire: Fire) -> "NeuronState":
        """The state one time step later; `fire` gives the spikes, by which back-propagation through time brings its surrogate."""
        return neuron_step(current, state, self, fire)

    def equilibrium(self, drive: Tensor) -> Tuple[Tensor, Tensor]:
        """The rate that the neuron settles at under a constant current, differentiable, and its slope in the current, which is not."""
        return equilibrium_rate(drive, self)

    def masked_equilibrium(self, drive: Tensor, mask: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """`equilibrium` under the current mask · drive, and its slope in the drive; a mask of None is all 1."""
        if self.has_kernels:
            return equilibrium_rate(drive, self, mask)
        rate, slope = self.equilibrium(masked(drive, mask))
        return rate, masked(slope, mask)


class NeuronState(NamedTuple):
    """Membrane potential u(t) and spikes s(t), both of the layer's shape (batch, …) and in its floating dtype."""

    potential: Tensor
    spikes: Tensor


def make_neuron(threshold: float, leak: float) -> Neuron:
    """A neuron from the command line's values, where any leak ≥ 1 or ≤ 0 stands for the IF model.

    Raises ValueError where the threshold is not above 0.
    """
    if not threshold > 0:
        raise ValueError(f"the firing threshold must be above 0, not {threshold}")
    return Neuron(threshold, leak if 0 < leak < 1 else 1.0)


def resting_state(current: Tensor) -> NeuronState:
    """u(0⁻) = 0 and s(−1) = 0, of the shape, dtype and memory layout of `current`."""
    return NeuronState(torch.zeros_like(current), torch.zeros_like(current))


def reached(potential: Tensor, threshold: float) -> Tensor:
    """1 where the potential is at or above the threshold, else 0, without a gradient."""
    # A comparison written straight to floats is several times faster on a CPU than a boolean tensor and its conversion.
    return torch.ge(potential, threshold, out=torch.empty_like(potential))


def neuron_step(current: Tensor, state: NeuronState, neuron: Neuron, fire: Fire = reached) -> NeuronState:
    """One time step: soft reset, then leak, then the new current; a spike where the threshold is reached.

        u(t) = λ (u(t−1) − V_th s(t−1)) + I(t),    s(t) = 1 if u(t) ≥ V_th else 0

    `current` and the state's tensors have the layer's shape (batch, …). `fire(u, V_th)` gives the spikes.
    """
    potential = torch.sub(state.potential, state.spikes, alpha=neuron.threshold)
    if neuron.leak != 1.0:
        potential.mul_(neuron.leak)
    potential.add_(current)
    return NeuronState(potential, fire(potential, neuron.threshold))


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, drive, mask, threshold):
        kernels = kernels_for(drive)
        if kernels:
            rate, slope = kernels.saturate(drive, mask, threshold)
        else:
            scaled = masked(drive, mask) / threshold
            rate = scaled.clamp(0, 1)
            slope = masked(torch.eq(rate, scaled, out=torch.empty_like(rate)).div_(threshold), mask)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(slope)
        return rate, slope

    @staticmethod
    def backward(ctx, gradient, _):
        return gradient * ctx.saved_tensors[0], None, None


def equilibrium_rate(drive: Tensor, neuron: Neuron, mask: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """The rate that a neuron settles at under a constant current, clamp(mask · drive / V_th, 0, 1), and its slope in the drive.

    Both have the shape and dtype of `drive`, as has the mask (1 where it is None); the rate is differentiable, the slope (mask/V_th or 0)
    is not.
    """
    return _Saturate.apply(drive, mask, neuron.threshold)


@functools.lru_cache(maxsize=None)
def rate_weights(time_steps: int, leak: float, **tensor_options) -> Tensor:
    """Weights (T,) of the firing rate a = Σ_t w_t s(t), summing to 1: λ^(T−1−t) / Σ λ^(T−1−t), so 1/T for IF. Kept, not to be changed."""
    with torch.inference_mode(False):  # What is kept serves in training too.
        weights = torch.logspace(time_steps - 1, 0, time_steps, base=leak, dtype=torch.float64)
        return (weights / weights.sum()).to(**tensor_options)


@functools.lru_cache(maxsize=None)
def rate_normaliser(time_steps: int, leak: float) -> float:
    """Σ_t λ^(T−1−t): what a neuron that spikes at every step sums up."""
    return sum(leak**t for t in range(time_steps))
