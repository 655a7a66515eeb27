"""The worked examples: each is one file of under forty lines, trains by the command in its header, and is what it says it is."""

import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from examples import new_dataset, new_network, new_neuron, new_solver
from modules.bptt import SURROGATES
from modules.implicit import autograd_vjp
from modules.neuron import Neuron, resting_state
from modules.solvers import METHODS, solve
from modules.zoo import f400
from tests.small_data import command, write_small_data, write_small_mnist

# Other tests go through all of METHODS, and mean the project's own.
del METHODS["richardson"]
EXAMPLES = (new_neuron, new_solver, new_network, new_dataset)


@pytest.fixture(autouse=True)
def _with_richardson(monkeypatch):
    monkeypatch.setitem(METHODS, "richardson", new_solver.Richardson)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_it_is_short_and_its_command_trains(example, tmp_path):
    source = Path(example.__file__).read_text()
    assert len(source.splitlines()) < 40
    (shown,) = [line for line in source.splitlines() if line.startswith("    python -m ")]
    _, _, module, *flags = shlex.split(shown)
    assert module == example.__name__ and flags[0] == "-c"
    data = write_small_mnist(write_small_data(tmp_path / "data"))
    small = ["--device", "cpu", "--seed", 1, "--epochs", 1, "-t", 3, "--train-batch", 20, "--train-limit", 60]
    status, out, err = command(*flags[2:], "-c", tmp_path / "run", "--path", data, *small, script=example)
    assert status == 0 and "0 of 3 not converged" in out and (tmp_path / "run/checkpoint.pth.tar").exists(), out + err


def test_the_new_neuron_settles_at_its_equilibrium():
    neuron, drive = new_neuron.Refractory(2.0, 1.0), torch.tensor([-1.0, 0.3, 0.8, 1.1, 1.9, 5.0])
    state, spikes = resting_state(drive), []
    for _ in range(1000):
        state = neuron.step(drive, state, lambda u, threshold: (u >= threshold).float())
        spikes.append(state.spikes)
    torch.testing.assert_close(torch.stack(spikes).mean(0), neuron.equilibrium(drive)[0], atol=2e-3, rtol=0)
    assert not torch.stack(spikes)[1:].logical_and(torch.stack(spikes)[:-1]).any(), "never twice in a row"
    drive.requires_grad_()
    rate, slope = neuron.equilibrium(drive)
    assert torch.equal(torch.autograd.grad(rate.sum(), drive)[0], slope)


@pytest.mark.parametrize("surrogate", [None, SURROGATES["triangular"]], ids=["implicit", "bptt"])
def test_the_new_neurons_network_runs_it_and_has_its_gradient(surrogate):
    network = new_neuron.network(Neuron(0.5, 0.9), width=6, inputs=5, classes=3, time_steps=20, surrogate=surrogate)
    network.feedback.g.data.fill_(0.7)
    seen, x = [], torch.randn(4, 5)
    network(x, observe=lambda t, spikes: seen.append(spikes[0])).square().sum().backward()
    spikes = torch.stack(seen)
    assert 0.1 < spikes.mean() <= 0.5 and not (spikes[1:] * spikes[:-1]).any()
    assert all(parameter.grad.norm() > 0 for name, parameter in network.named_parameters() if name != "input.linear.bias")


def test_the_new_solver_solves():
    matrix = 0.5 * torch.randn(20, 20, dtype=torch.float64) / 20**0.5
    g = torch.randn(20, dtype=torch.float64)
    solution = solve(lambda v: g + matrix @ v, g, "richardson", 1e-10, 200)
    expected = torch.linalg.solve(torch.eye(20, dtype=torch.float64) - matrix, g)
    torch.testing.assert_close(solution.value, expected, atol=1e-8, rtol=1e-8)
    assert solution.converged and solution.iterations < 60


def test_the_new_networks_jacobian_equals_autograds():
    network = new_network.network(3, channels=(2, 3), neuron=Neuron(0.8, 0.9), time_steps=4).double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    masks = network.draw_masks(x)
    with torch.no_grad():
        current, weight = network.input(x), network.feedback.normalised_weight()
    point = torch.rand(2, *network.layer_shapes[-1], dtype=x.dtype)
    v = torch.randn_like(point)
    expected = autograd_vjp(lambda a: network.equilibrium_map(a, current, weight, masks), point)(v)
    assert network.layer_shapes == [(2, 14, 14), (3, 7, 7)] and expected.norm() > 0.01 * v.norm()
    torch.testing.assert_close(network.transposed_jacobian(point, current, weight, masks)(v), expected, atol=1e-12, rtol=1e-12)


def test_the_new_data_set_can_be_learnt():
    train, test = new_dataset.data(None)
    guess = test.inputs.view(-1, new_dataset.CLASSES, 36).mean(2).argmax(1)
    assert len(train.labels) == 2000 and torch.equal(guess, test.labels)


class Adaptive(NamedTuple):
    potential: torch.Tensor
    spikes: torch.Tensor
    raised: torch.Tensor  # the threshold, by the last spike


class Tiring(Neuron):
    rise = 0.5

    def rest(self, current):
        return Adaptive(*resting_state(current), torch.zeros_like(current))

    def step(self, current, state, fire):
        potential = state.potential - (self.threshold + state.raised) * state.spikes + current
        spikes = fire(potential - state.raised, self.threshold)
        return Adaptive(potential, spikes, 0.5 * state.raised + self.rise * spikes)


@pytest.mark.parametrize("surrogate", [None, SURROGATES["triangular"]], ids=["implicit", "bptt"])
def test_a_neuron_may_have_state_and_constants_of_its_own(surrogate):
    network = f400(neuron=Tiring(0.5, 1.0), width=6, inputs=5, classes=3, time_steps=8, surrogate=surrogate)
    seen, weights, x, normalised = [], [], torch.randn(4, 5), network.feedback.normalised_weight
    network.feedback.normalised_weight = lambda: weights.append(normalised()) or weights[-1]
    network(x, observe=lambda t, spikes: seen.append(spikes[0])).sum().backward()
    weight = weights[0].detach()
    current = (network.input.linear(x) - network.input.linear(x).mean(0)) / (network.input.linear(x).var(0, unbiased=False) + 1e-5).sqrt()
    potential = raised = spikes = torch.zeros(4, 6)
    for fired in seen:
        potential = potential - (0.5 + raised) * spikes + current.detach() + spikes @ weight.t()
        spikes, last = (potential - raised >= 0.5).float(), raised
        raised = 0.5 * last + 0.5 * spikes
        assert torch.equal(spikes, fired)
    assert 0 < torch.stack(seen).mean() < 1 and network.input.linear.weight.grad.norm() > 0
