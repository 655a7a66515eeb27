"""The yardstick does the project's work: the same logits and gradients, so that timing one against the other means something."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.epoch import multiply_adds
from benchmarks.yardstick import copy_weights, yardstick_alexnet_f, yardstick_f64c5, yardstick_f400
from modules.implicit import BackwardSolver
from modules.neuron import make_neuron
from modules.zoo import alexnet_f, f64c5_mnist, f400

WIDTHS = (3, 4, 5, 5, 4)


@pytest.mark.parametrize("build,yardstick,shape", [
    (lambda **s: f400(20, **s), lambda: yardstick_f400(6, 0.9, 0.0, width=20), (8, 784)),
    (lambda **s: f64c5_mnist(3, **s), lambda: yardstick_f64c5(6, 0.9, 0.0, width=3), (8, 1, 28, 28)),
    (lambda **s: alexnet_f(WIDTHS, **s), lambda: yardstick_alexnet_f(6, 0.9, 0.0, WIDTHS), (8, 3, 32, 32)),
])
def test_same_logits_and_gradients(build, yardstick, shape):
    network = build(neuron=make_neuron(2, 0.9), time_steps=6, solver=BackwardSolver(tol=1e-7, max_iterations=60)).double()
    plain = yardstick().double()
    for norm in (network.input.norm, *(connection.norm for connection in network.hidden)):
        torch.nn.init.uniform_(norm.bias, 0.2, 0.8)
    copy_weights(plain, network)
    x, labels = torch.randn(shape, dtype=torch.float64), torch.randint(0, 10, shape[:1])
    logits = [model(x) for model in (network, plain)]
    for out in logits:
        F.cross_entropy(out, labels).backward()
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)
    for ours, theirs in ((network.feedback.w, plain.feedback.linear.weight), (network.input.linear.weight, plain.blocks[0].linear.weight),
                         (network.input.norm.weight, plain.blocks[0].norm.weight), (network.readout.weight, plain.classifier.weight)):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * ours.grad.norm()
        assert ours.grad.norm() > 0


def test_multiply_adds_by_hand():
    simulation = 784 * 400 + 4 * 400 * 400 + 4000
    training = simulation + 400 * 400 + 5 * 400 * 400 + 784 * 400 + 400 * 400 + 8000
    assert multiply_adds(5.0) == 60_000 * training + 10_000 * simulation
