"""The paper's networks have the paper's sizes, take their inputs, and learn."""

import pytest
import torch

from modules.neuron import make_neuron
from modules.zoo import alexnet_f, cifarnet_f, f64c5_mnist, f64c5_nmnist, f400

SETTINGS = dict(neuron=make_neuron(2.0, 0.95), time_steps=3)


@pytest.mark.parametrize("build,parameters", [(f400, 478_811), (f64c5_mnist, 229_643), (alexnet_f, 3_709_515)])
def test_trainable_parameters(build, parameters):
    assert sum(p.numel() for p in build(**SETTINGS).parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize("build,layers", [
    (f400, [400]), (f64c5_mnist, [64 * 14 * 14]), (f64c5_nmnist, [64 * 16 * 16]),
    (alexnet_f, [96 * 256, 256 * 256, 384 * 64, 384 * 64, 256 * 64]),
    (cifarnet_f, [128 * 256, 256 * 256, 512 * 64, 1024 * 64, 512 * 64]),
])
def test_neurons(build, layers):
    assert build(**SETTINGS).neuron_counts == layers


@pytest.mark.parametrize("build,thousands", [(f64c5_mnist, 13), (alexnet_f, 156), (cifarnet_f, 229)])
def test_neurons_in_all(build, thousands):
    assert round(sum(build(**SETTINGS).neuron_counts) / 1000) == pytest.approx(thousands, abs=4)


@pytest.mark.parametrize("build,shape", [
    (lambda **s: f400(8, **s), (4, 784)), (lambda **s: f64c5_mnist(3, **s), (4, 1, 28, 28)),
    (lambda **s: f64c5_nmnist(3, **s), (3, 4, 2, 34, 34)), (lambda **s: alexnet_f((3, 4, 5, 5, 4), **s), (4, 3, 32, 32)),
    (lambda **s: cifarnet_f((3, 4, 5, 6, 5), **s), (4, 3, 32, 32)),
])
def test_a_step_of_training_reaches_every_parameter(build, shape):
    network = build(neuron=make_neuron(0.5, 0.95), time_steps=3, dropout=0.2)
    with torch.no_grad():
        network.feedback.g.fill_(0.9)
    network(torch.rand(shape)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
