"""The C kernels against the PyTorch operations that they replace, and against a machine without a compiler."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules import native
from modules.implicit import BackwardSolver, DenseProduct
from modules.network import Masks
from modules.neuron import SpikingLayer, make_neuron
from modules.zoo import f400

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernel to compare")


@needs_compiler
@pytest.mark.parametrize("leak", [0.95, 1.0])
@pytest.mark.parametrize("parts", ["current", "synaptic", "current synaptic", "synaptic mask", "current synaptic mask"])
def test_neuron_step_equals_pytorch_bit_for_bit(leak, parts):
    shape, neuron = (37, 1031), make_neuron(2.0, leak)
    like = torch.empty(1)
    fast, plain = (SpikingLayer(shape, like, neuron, with_rate=True) for _ in range(2))
    assert fast._native
    plain._native = False
    for _ in range(8):
        given = {"current": torch.randn(shape) + 0.5, "synaptic": torch.randn(shape), "mask": torch.rand(shape).ge(0.2) / 0.8}
        given = {name: given[name] for name in parts.split()}
        fast.step(**given)
        plain.step(**given)
        assert torch.equal(fast.spikes, plain.spikes) and torch.equal(fast.potential, plain.potential)
    assert torch.equal(fast.rate(), plain.rate()) and 0 < fast.rate().mean() < 1


@needs_compiler
@pytest.mark.parametrize("leak", [0.95, 1.0])
@pytest.mark.parametrize("width,batch,time_steps", [(1, 1, 3), (7, 5, 1), (31, 17, 6), (32, 16, 6), (45, 33, 9), (400, 40, 5)])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_dense_simulation_spikes_as_the_plain_one(leak, width, batch, time_steps, dropped, threads):
    """Sums run in another order, so a potential may cross the threshold only if it comes within rounding of it; none does here."""
    torch.set_num_threads(threads)
    network = f400(width, inputs=3, neuron=make_neuron(1.0, leak), time_steps=time_steps)
    current, weight = torch.randn(batch, width) + 0.5, torch.randn(width, width) / width**0.5
    masks = Masks(feedback=torch.rand(batch, width).ge(0.3) / 0.7 if dropped else None, hidden=[])
    seen = {True: [], False: []}
    rates = {}
    for fast in (True, False):
        simulate = network._simulate_dense if fast else lambda *args: _plain(network, *args)
        rates[fast] = simulate(current, weight, masks, lambda t, spikes: seen[fast].append(spikes[0]))
    assert len(seen[True]) == len(seen[False]) == time_steps
    assert torch.equal(torch.stack(seen[True]), torch.stack(seen[False]))
    torch.testing.assert_close(rates[True], rates[False], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(network._simulate_dense(current, weight, masks, None), rates[True], atol=0, rtol=0)


def _plain(network, current, weight, masks, observe):
    layer = SpikingLayer(current.shape, current, network.neuron, with_rate=True)
    for t in range(network.time_steps):
        layer.step(current, network.feedback(layer.spikes, weight) if t else None, masks.feedback)
        observe(t, [layer.spikes.clone()])
    return layer.rate()


@needs_compiler
@pytest.mark.parametrize("width,batch", [(1, 1), (7, 5), (45, 33), (400, 40)])
@pytest.mark.parametrize("tol", [1e-2, 1e-5])
@pytest.mark.parametrize("threads", [1, 2])
def test_dense_solve_reaches_the_tolerance_and_says_so(width, batch, tol, threads):
    torch.set_num_threads(threads)
    weight, gain = torch.randn(width, width) / width**0.5, 0.6 * (torch.rand(batch, width) < 0.6)
    gradient = torch.randn(batch, width) * torch.logspace(-6, 0, batch)[:, None]
    solver = BackwardSolver(tol=tol, max_iterations=100)
    v = solver(DenseProduct(weight, gain), gradient)
    W, D, g = weight.double(), gain.double(), gradient.double()
    residual = (g + (v.double() * D) @ W - v.double()).norm() / g.norm()
    assert residual <= tol * 1.01 and abs(residual - solver.tally.worst_residual) < 1e-6
    assert solver.tally.not_converged == 0
    for sample in range(batch):
        exact = torch.linalg.solve(torch.eye(width, dtype=torch.float64) - W.t() * D[sample], g[sample])
        assert (v[sample] - exact).norm() <= 20 * tol * g.norm()


@needs_compiler
def test_dense_solve_that_does_not_converge_is_counted():
    weight, gain, gradient = 2 * torch.randn(30, 30), torch.ones(4, 30), torch.randn(4, 30)
    solver = BackwardSolver(tol=1e-6, max_iterations=3)
    v = solver(DenseProduct(weight, gain), gradient)
    residual = (gradient + (v * gain) @ weight - v).norm() / gradient.norm()
    assert solver.tally.not_converged == 1 and solver.tally.iterations == 3
    assert solver.tally.worst_residual == pytest.approx(residual.item(), rel=1e-4)
    broken = BackwardSolver()
    assert broken(DenseProduct(weight * float("nan"), gain), gradient).isfinite().all() and broken.tally.not_converged == 1
    zero = BackwardSolver()
    assert zero(DenseProduct(weight, gain), torch.zeros(4, 30)).eq(0).all() and zero.tally.not_converged == 0


def test_without_kernels_pytorch_serves():
    code = ("import torch; from modules import native; from modules.zoo import f400; from modules.neuron import make_neuron;"
            "assert native.library() is None; net = f400(9, inputs=4, neuron=make_neuron(1, 1), time_steps=3);"
            "net(torch.randn(5, 4)).sum().backward(); assert net.solver.tally.solves == 1")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], env={"FEEDBACK_SNN_NATIVE": "0", "PATH": ""})
