"""The paper's networks have the paper's sizes, take their inputs, and learn."""

import math

import pytest
import torch
from torch import nn

from modules.connection import Connection
from modules.feedback import Feedback
from modules.network import FeedbackSNN
from modules.neuron import make_neuron
from modules.zoo import alexnet_f, cifarnet_f, f64c5_mnist, f64c5_nmnist, f400

SETTINGS = dict(neuron=make_neuron(2.0, 0.95), time_steps=3)


def trainable(network):
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("build,parameters", [(f400, 478_811), (f64c5_mnist, 229_643), (alexnet_f, 3_709_515)])
def test_trainable_parameters(build, parameters):
    """The paper's numbers."""
    assert trainable(build(**SETTINGS)) == parameters


@pytest.mark.parametrize("build,classes,connections,feedback,features", [
    (f64c5_nmnist, 10, [(2, 64, 5)], 64 * 64 * 25, 64 * 256),
    (alexnet_f, 100, [(3, 96, 3), (96, 256, 3), (256, 384, 3), (384, 384, 3), (384, 256, 3)], 256 * 96 * 9, 256 * 64),
    (cifarnet_f, 10, [(3, 128, 3), (128, 256, 3), (256, 512, 3), (512, 1024, 3), (1024, 512, 3)], 512 * 128 * 9, 512 * 64),
    (cifarnet_f, 100, [(3, 128, 3), (128, 256, 3), (256, 512, 3), (512, 1024, 3), (1024, 512, 3)], 512 * 128 * 9, 512 * 64),
])
def test_trainable_parameters_by_hand(build, classes, connections, feedback, features):
    """Weights, bias and batch norm of each connection; the feedback's weights and g; the readout."""
    forward = sum(before * after * kernel**2 + 3 * after for before, after, kernel in connections)
    assert trainable(build(classes=classes, **SETTINGS)) == forward + feedback + 1 + classes * (features + 1)


@pytest.mark.parametrize("build,layers", [
    (f400, [400]), (f64c5_mnist, [64 * 14 * 14]), (f64c5_nmnist, [64 * 16 * 16]),
    (alexnet_f, [96 * 256, 256 * 256, 384 * 64, 384 * 64, 256 * 64]),
    (cifarnet_f, [128 * 256, 256 * 256, 512 * 64, 1024 * 64, 512 * 64]),
])
def test_neurons(build, layers):
    assert build(**SETTINGS).neuron_counts == layers


@pytest.mark.parametrize("build,spiking,with_inputs,thousands", [
    (f64c5_mnist, 12_544, 13_328, 13), (alexnet_f, 155_648, 158_720, 159), (cifarnet_f, 229_376, 232_448, 232),
])
def test_neurons_in_all(build, spiking, with_inputs, thousands):
    """The paper's thousands count the input's units (28 · 28, 3 · 32 · 32) among the neurons."""
    network = build(**SETTINGS)
    assert sum(network.neuron_counts) == spiking
    assert spiking + math.prod(network.input_shape) == with_inputs and round(with_inputs / 1000) == thousands


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
        # A bias before a batch norm, which takes it out again, has no gradient but rounding.
        assert parameter.grad.abs().max() > 0 or name.startswith("hidden") and name.endswith("linear.bias"), name


@pytest.mark.parametrize("settings", [dict(groups=2), dict(dilation=2), dict(padding="same"), dict(padding_mode="circular")], ids=str)
def test_convolutions_of_another_kind_are_refused(settings):
    with pytest.raises(ValueError, match="can't have groups, dilation, a padding mode"):
        Connection(nn.Conv2d(4, 4, 3, **settings))
    if "groups" in settings:
        with pytest.raises(ValueError, match="groups=2"):
            Feedback(nn.ConvTranspose2d(4, 4, 3, bias=False, **settings))


@pytest.mark.parametrize("feedback", [
    nn.Linear(300, 400, bias=False), nn.Linear(400, 300, bias=False), nn.Linear(400, 1, bias=False), nn.Conv2d(400, 400, 1, bias=False)])
def test_a_feedback_of_another_shape_is_refused(feedback):
    with pytest.raises(ValueError, match="must lead from the last layer|takes inputs of shape"):
        FeedbackSNN((784,), Connection(nn.Linear(784, 400)), [], Feedback(feedback), classes=10, **SETTINGS)


@pytest.mark.parametrize("hidden,feedback", [
    ([nn.Conv2d(8, 8, 3, padding=1)], nn.Conv2d(8, 8, 3, bias=False)),  # 14 → 12
    ([nn.Conv2d(4, 8, 3, padding=1)], nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    ([nn.Conv2d(8, 8, 15)], nn.Conv2d(8, 8, 15, bias=False)),
    ([nn.Linear(8 * 14 * 14, 20)], nn.Linear(20, 20, bias=False)),
])
def test_layers_that_do_not_fit_together_are_refused(hidden, feedback):
    with pytest.raises(ValueError, match="must lead from the last layer|takes inputs of shape|larger than an input"):
        FeedbackSNN((1, 28, 28), Connection(nn.Conv2d(1, 8, 5, stride=2, padding=2)), list(map(Connection, hidden)), Feedback(feedback),
                    classes=10, **SETTINGS)


def test_every_output_channel_of_a_connection_starts_with_unit_norm():
    for linear in (nn.Linear(7, 4), nn.Conv2d(3, 4, 5), nn.ConvTranspose2d(3, 4, 5)):
        connection = Connection(linear)
        filters = connection.linear.weight.detach().movedim(connection.map.filter_dim(), 0).flatten(1)
        torch.testing.assert_close(filters.norm(dim=1), torch.ones(4))
    with pytest.raises(ValueError, match="bias=True"):
        Connection(nn.Linear(7, 4, bias=False))
