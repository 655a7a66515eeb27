"""A new neuron: integrate-and-fire with a refractory step, so that its firing rate is at most 1/2.

    python -m examples.new_neuron -c checkpoints/refractory --epochs 2

A neuron is a subclass of Neuron with its time step and the rate that it settles at. The implicit gradient follows from the latter,
back-propagation through time (--gradient bptt) from the former. It runs in PyTorch; the C kernels know the built-in neuron alone.
"""

from dataclasses import replace

import fmnist_mlp
from modules.neuron import Neuron, NeuronState
from modules.zoo import f400
from utils.experiment import main


class Refractory(Neuron):
    """u(t) = u(t−1) − V_th s(t−1) + I(t);  s(t) = 1 if u(t) ≥ V_th and s(t−1) = 0, else 0."""

    name = "IF with a refractory step"

    def step(self, current, state, fire):
        potential = state.potential - self.threshold * state.spikes + current
        return NeuronState(potential, fire(potential, self.threshold) * (1 - state.spikes))

    def equilibrium(self, drive):
        rate = (drive / self.threshold).clamp(0, 0.5)
        slope = ((rate > 0) & (rate < 0.5)).to(drive.dtype) / self.threshold
        return rate, slope.detach()


def network(neuron, **settings):
    return f400(neuron=Refractory(neuron.threshold, leak=1.0), **settings)


RECIPE = replace(fmnist_mlp.RECIPE, description="F400 of refractory neurons on Fashion-MNIST", network=network)

if __name__ == "__main__":
    main(RECIPE)
