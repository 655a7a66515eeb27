"""Back-propagation through time with a surrogate derivative of the spike: the same simulation, its graph kept over all T steps.

The gradient goes through every path of the simulation: the input, the hidden and the feedback connections, the leak, the soft reset
and the statistics of the input connection's batch norm. Its memory grows with T, where that of the implicit gradient does not.
"""

from typing import Callable, Dict, Optional

import torch
from torch import Tensor

from modules.dropout import masked
from modules.neuron import Fire, rate_normaliser, reached
from modules.simulation import EventInput, Loop, Observer, StaticInput
from modules.synapses import Synapses

SIGMOID_SLOPE = 4.0


def sigmoid_derivative(x: Tensor) -> Tensor:
    """k σ(k x) (1 − σ(k x)) with k = 4: area 1, height 1, as high as the slope of the equilibrium rate."""
    sigmoid = torch.sigmoid(SIGMOID_SLOPE * x)
    return SIGMOID_SLOPE * sigmoid * (1 - sigmoid)


def triangular_derivative(x: Tensor) -> Tensor:
    """max(0, 1 − |x|): area 1, height 1, zero for potentials below 0 and from 2 V_th on."""
    return (1 - x.abs()).clamp_min(0)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, potential, threshold, derivative):
        ctx.save_for_backward(potential)
        ctx.threshold, ctx.derivative = threshold, derivative
        return reached(potential, threshold)

    @staticmethod
    def backward(ctx, gradient):
        potential, = ctx.saved_tensors
        return gradient * ctx.derivative(potential / ctx.threshold - 1) / ctx.threshold, None, None


def with_surrogate(derivative: Callable[[Tensor], Tensor]) -> Fire:
    """Spikes whose derivative in the potential u stands in as ∂s/∂u = derivative(u / V_th − 1) / V_th."""
    return lambda potential, threshold: _Spike.apply(potential, threshold, derivative)


SURROGATES: Dict[str, Fire] = {"sigmoid": with_surrogate(sigmoid_derivative), "triangular": with_surrogate(triangular_derivative)}


def unroll(loop: Loop, input: "StaticInput | EventInput", time_steps: int, fire: Fire, observe: Optional[Observer] = None) -> Tensor:
    """The rate that `modules.simulation.simulate` gives, with its graph; `fire` gives the spikes and their derivative."""
    total, states = 0.0, []
    for t in range(time_steps):
        before = states[-1].spikes if states else None
        for layer in range(len(loop.shapes)):
            if layer > 0:
                current = _current(loop.hidden[layer - 1], states[layer - 1].spikes, loop.masks.hidden[layer - 1])
            else:
                current = input.at(t)
                if before is not None:
                    current = current + _current(loop.feedback, before, loop.masks.feedback)
            if t == 0:
                states.append(loop.neuron.rest(current))
            states[layer] = loop.neuron.step(current, states[layer], fire)
        total = total * loop.neuron.leak + states[-1].spikes
        if observe is not None:
            observe(t, [state.spikes.detach() for state in states])
            if hasattr(observe, "potentials"):
                observe.potentials(t, [state.potential.detach() for state in states])
    return total / rate_normaliser(time_steps, loop.neuron.leak)


def _current(synapses: Synapses, spikes: Tensor, mask: Optional[Tensor]) -> Tensor:
    return masked(synapses(spikes).to(spikes.dtype), mask)
