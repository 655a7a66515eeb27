"""The equilibrium's instruments against naive computations, dense Jacobians and separate runs."""

import copy

import numpy as np
import pytest
import torch

from modules.implicit import BackwardSolver
from modules.neuron import make_neuron
from modules.solvers import METHODS
from modules.zoo import f400
from tests import naive
from tests.networks import KINDS, explicit_masks, small_network
from utils.data.batches import Batches, Samples
from utils.instruments.equilibrium import (check_gradient, equilibrium_residuals, is_zero, jacobian_spectrum, operator_norm, solver_traces,
                               spectral_radius)
from utils.instruments.observers import RunningRates, Trace, UnitSpikes
from utils.instruments.time_step_sweep import accuracy, lasting, time_step_sweep


def naive_lap(network, a, x, weight):
    """Every layer's rate on the lap from a, with running statistics."""
    def normed(connection, source):
        return naive.batch_norm(connection.linear(source), connection.norm, connection.norm.running_mean, connection.norm.running_var)

    drive = normed(network.input, naive.mean_input(network, x)) + naive.apply_feedback(weight, a, naive.is_dense(network))
    rates = [torch.clamp(drive / network.neuron.threshold, 0, 1)]
    for connection in network.hidden:
        rates.append(torch.clamp(normed(connection, rates[-1]) / network.neuron.threshold, 0, 1))
    return rates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leak", [0.9, 1.0])
@torch.no_grad()
def test_residual_of_each_layer(kind, leak):
    network, x = small_network(kind, leak, time_steps=8)
    network.eval()
    residuals = equilibrium_residuals(network, x, [2, 5, 8])
    assert sorted(residuals) == [2, 5, 8]
    masks = explicit_masks(network)
    history, _ = naive.simulate(network, x, masks)
    weight, _, _ = naive.feedback_weight(network)
    for T, values in residuals.items():
        weights = [leak ** (T - 1 - t) for t in range(T)]
        rates = [sum(w * step[layer] for w, step in zip(weights, history)) / sum(weights) for layer in range(len(values))]
        lap = naive_lap(network, rates[-1], x[:T] if network.events else x, weight)
        expected = [((rate - mapped).norm() / rate.norm()).item() for rate, mapped in zip(rates, lap)]
        assert values == pytest.approx(expected, rel=1e-9) and max(values) > 1e-3


@pytest.mark.parametrize("kind", ["dense", "convolutional", "multi-layer"])
def test_residual_falls_like_one_over_t_for_if_and_levels_off_for_lif(kind):
    """The slope in T on logarithmic axes, over two decades."""
    slopes = {}
    for leak in (1.0, 0.8):
        torch.manual_seed(1)
        network, x = small_network(kind, leak)
        steps = [20, 50, 100, 200, 500, 1000, 2000]
        residuals = equilibrium_residuals(lasting(network, steps[-1]), x, steps)
        last = [residuals[T][-1] for T in steps]
        slopes[leak] = np.polyfit(np.log(steps), np.log(last), 1)[0]
    assert slopes[1.0] == pytest.approx(-1, abs=0.15) and slopes[0.8] > -0.3


@pytest.mark.parametrize("kind", KINDS)
def test_radius_and_norm_are_those_of_a_dense_jacobian(kind):
    network, x = small_network(kind)
    network.eval()
    spectrum = jacobian_spectrum(network, x, iterations=400)
    rates = []
    with torch.no_grad():
        weight = network.feedback.normalised_weight()
        _, rate = naive.simulate(network, x, explicit_masks(network))
    for sample in range(len(rate)):
        one = x[:, sample:sample + 1] if network.events else x[sample:sample + 1]
        a = rate[sample:sample + 1]
        point = naive_lap(network, a, one, weight)[-1].detach() if network.hidden else a
        J = torch.autograd.functional.jacobian(lambda z: naive_lap(network, z, one, weight.detach())[-1], point)
        J = J.reshape(a.numel(), a.numel()).numpy()
        rates.append(np.abs(np.linalg.eigvals(J)).max())
        # A nilpotent part of J leaves eigenvalues near 0 uncertain, in NumPy's as in ours.
        assert spectrum.radius[sample].item() == pytest.approx(rates[-1], rel=1e-6, abs=1e-5)
        assert spectrum.norm[sample].item() == pytest.approx(np.linalg.norm(J, 2), rel=1e-4)
    assert max(rates) > 0.02 and spectrum.residual.max() < 1e-6


class Dense:
    """Any matrices (batch, n, n) in the place of a network's J."""

    def __init__(self, J):
        self.J = J

    def __call__(self, v):
        return torch.einsum("bij,bi->bj", self.J, v)

    def forward_product(self, u):
        return torch.einsum("bij,bj->bi", self.J, u)


def test_radius_in_fewer_steps_than_dimensions_says_how_good_it_is():
    J = torch.randn(3, 200, 200, dtype=torch.float64) / 200**0.5
    J[0] += 2 * torch.eye(200)[:, :1] @ torch.eye(200)[:1]
    J[1] = 0
    start = torch.randn(3, 200, dtype=torch.float64)
    exact = np.abs(np.linalg.eigvals(J.numpy())).max(1)
    radius, residual = spectral_radius(Dense(J), start, 60)
    assert radius[0].item() == pytest.approx(exact[0], rel=1e-6) and residual[0] < 1e-5
    assert radius[1] == 0 and residual[1] == 0
    assert radius[2].item() == pytest.approx(exact[2], rel=0.1) and residual[2] > abs(radius[2] - exact[2])
    norms = operator_norm(Dense(J), start, 2000)
    assert norms.tolist() == pytest.approx(np.linalg.norm(J.numpy(), 2, axis=(1, 2)).tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_product_is_the_adjoint_of_the_transposed_one(kind):
    network, x = small_network(kind, dropout=0.3)
    masks = network.draw_masks(x)
    with torch.no_grad():
        current, weight = network.input(network._mean_input(x), masks.input), network.feedback.normalised_weight()
        jacobian = network.transposed_jacobian(torch.rand(len(current), *network.layer_shapes[-1], dtype=x.dtype), current, weight, masks)
        u, v = (torch.randn(len(current), *network.layer_shapes[-1], dtype=x.dtype) for _ in range(2))
    assert (jacobian.forward_product(u) * v).sum().item() == pytest.approx((u * jacobian(v)).sum().item(), rel=1e-9)


def test_solver_traces_start_and_end_as_the_solvers_do():
    network, x = small_network("multi-layer")
    before = copy.deepcopy(network.state_dict())
    labels = torch.randint(0, 4, (len(x),))
    traces = solver_traces(network, x, labels, iterations=25)
    assert list(traces) == list(METHODS)
    first = {trace[0] for trace in traces.values()}
    assert len(first) == 1 and first.pop() > 1e-3, "all start at v = g, with the residual ‖Jᵀ g‖ / ‖g‖"
    assert traces["anderson"][-1] < 1e-6 and traces["broyden"][-1] < 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()), "the network stays as it is"
    network.solver = BackwardSolver("broyden", tol=1e-3)
    torch.nn.functional.cross_entropy(network(x), labels).backward()
    products = next(number for number, residual in enumerate(traces["broyden"], start=1) if residual <= 1e-3)
    assert network.solver.tally.iterations == products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tol", [1e-3, 1e-8])
def test_gradient_check_finds_the_solvers_tolerance(kind, tol):
    network, x = small_network(kind, tol=tol, max_iterations=200)
    labels = torch.randint(0, 4, (5,))
    before = copy.deepcopy(network.state_dict())
    errors = check_gradient(network, x, labels)
    assert {error.name for error in errors} == {name for name, _ in network.named_parameters()}
    compared = [error for error in errors if not is_zero(error, errors)]
    # Every bias stands in front of a batch norm.
    assert len(errors) - len(compared) == 1 + len(network.hidden)
    assert max(error.error for error in compared) < 20 * tol and min(error.cosine for error in compared) > 1 - 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()), "the network stays as it is"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", ["no solve", "a wrong operator"])
def test_gradient_check_finds_a_broken_gradient(kind, broken):
    network, x = small_network(kind)
    solver = BackwardSolver(tol=1e-10, max_iterations=200)
    network.solver = {"no solve": lambda vjp, g: g, "a wrong operator": lambda vjp, g: solver(lambda v: 0.5 * vjp(v), g)}[broken]
    errors = {error.name: error for error in check_gradient(network, x, torch.randint(0, 4, (5,)))}
    assert errors["input.linear.weight"].error > 0.01
    assert errors["readout.weight"].error < 1e-9, "the readout's gradient needs no solve"


@pytest.mark.parametrize("kind", ["dense", "events", "multi-layer"])
@pytest.mark.parametrize("leak", [0.9, 1.0])
def test_sweep_equals_separate_runs(kind, leak):
    network, x = small_network(kind, leak, time_steps=9)
    network.eval()
    labels, steps = torch.randint(0, 4, (5,)), [1, 3, 4, 9]
    batches, spikes = [(x, labels), (x.flip(1 if network.events else 0), labels)], UnitSpikes(4)
    matrices = time_step_sweep(network, batches, steps, spikes)
    assert list(matrices) == steps and network.time_steps == 9
    for T in steps:
        expected = torch.zeros(4, 4, dtype=torch.int64)
        for inputs, classes in batches:
            with torch.no_grad():
                predicted = lasting(network, T)(inputs[:T] if network.events else inputs).argmax(1)
            for label, prediction in zip(classes, predicted):
                expected[label, prediction] += 1
        assert torch.equal(matrices[T], expected) and accuracy(expected) == pytest.approx(100 * expected.diag().sum().item() / 10)
    logits = {}
    with torch.no_grad():
        network(x, observe=RunningRates(leak, steps, lambda T, rates: logits.update({T: network.readout(rates[-1].flatten(1))})))
        for T in steps:
            torch.testing.assert_close(logits[T], lasting(network, T)(x[:T] if network.events else x), atol=1e-12, rtol=0)
    assert (logits[4] - logits[9]).abs().max() > 1e-3, "T matters in this case"
    history = [step for inputs, _ in batches for step in naive.simulate(network, inputs, explicit_masks(network))[0][:4]]
    for layer, count in enumerate(spikes.counts):
        torch.testing.assert_close(count, sum(step[layer].sum(0) for step in history))
    torch.testing.assert_close(spikes.fed_back, sum(step[-1].sum(0) for t, step in enumerate(history) if t % 4 < 3))
    assert spikes.samples == 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trace_shows_the_membrane_potentials(kind, dtype):
    network, x = small_network(kind)
    network.to(dtype).eval()
    trace, potentials = Trace(), []
    with torch.no_grad():
        network(x.to(dtype), observe=trace)
        masks = explicit_masks(network, [torch.ones(())] * (2 + len(network.hidden)))
        history, _ = naive.simulate(network, x.to(dtype), masks, potentials)
    for layer, (spikes, potential) in enumerate(trace.of_layers()):
        assert torch.equal(spikes, torch.stack([step[layer][0].flatten() for step in history]))
        torch.testing.assert_close(potential, torch.stack([step[layer][0].flatten() for step in potentials]), atol=1e-5, rtol=1e-5)


def test_residual_of_a_silent_layer():
    network = f400(3, inputs=3, classes=2, neuron=make_neuron(1.0, 1.0), time_steps=2)
    residuals = equilibrium_residuals(network, torch.zeros(2, 3), [1, 2])
    assert residuals == {1: [0.0], 2: [0.0]}


def test_batches_of_samples_are_swept_alike():
    network, x = small_network("dense")
    samples = Samples(x, torch.randint(0, 4, (5,)))
    whole, split = (time_step_sweep(network, Batches(samples, size, shuffled=False), [2, 6]) for size in (5, 2))
    assert all(torch.equal(whole[T], split[T]) for T in (2, 6))
