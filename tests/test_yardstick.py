"""The yardstick does the project's work: the same logits and gradients, so that timing one against the other means something."""

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import multiply_adds, results
from benchmarks.worker import OnGpu, Worker
from benchmarks.yardstick import copy_weights, yardstick_alexnet_f, yardstick_f64c5, yardstick_f400
from modules.implicit import BackwardSolver
from modules.neuron import make_neuron
from modules.zoo import alexnet_f, f64c5_mnist, f64c5_nmnist, f400
from tests.marks import needs_cuda

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
    network = f400(neuron=make_neuron(2, 0.95), time_steps=5)
    simulation = 784 * 400 + 4 * 400 * 400 + 4000
    assert multiply_adds.evaluation(network) == simulation
    assert multiply_adds.training_step(network, 5.0) == simulation + 400 * 400 + 5 * 400 * 400 + 784 * 400 + 400 * 400 + 8000
    network = alexnet_f(WIDTHS, neuron=make_neuron(2, 0.99), time_steps=7)
    hidden = 9 * (256 * 3 * 4 + 64 * 4 * 5 + 64 * 5 * 5 + 64 * 5 * 4)
    lap, inputs, readout = hidden + 9 * 64 * 4 * 3, 9 * 256 * 3 * 3, 4 * 64 * 10
    simulation = inputs + 6 * 9 * 64 * 4 * 3 + 7 * hidden + readout
    assert multiply_adds.evaluation(network) == simulation
    assert multiply_adds.training_step(network, 3.0) == simulation + 2 * lap + 3 * lap + inputs + lap + hidden + 2 * readout


def test_multiply_adds_of_events_by_hand():
    """The input's current is another one at every step."""
    network = f64c5_nmnist(width=3, neuron=make_neuron(2, 0.95), time_steps=5)
    inputs, feedback, readout = 25 * 2 * 3 * 16 * 16, 25 * 3 * 3 * 16 * 16, 3 * 16 * 16 * 10
    assert multiply_adds.evaluation(network) == 5 * inputs + 4 * feedback + readout


def test_workers_take_turns_and_tell_their_memory():
    worker = Worker(list, [3, 1, 2])
    worker.call("sort")
    assert worker.call("pop") == 3 and worker.call("pop") == 2
    worker.close()
    assert 45 < Worker(b"x".__mul__, 50 * 2**20).close() < 60
    with pytest.raises(RuntimeError, match="pop from empty list"):
        Worker(list, []).call("pop")


def test_a_row_of_results_is_replaced_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for seconds in (1.0, 2.0):
        row = results.make_row("a", [seconds, 9.0, seconds], [4.0, 9.0, 6.0], [0.5, 1.0, 0.25], 100.0, 200.0, 0.1)
        path = results.save_rows("cpu", [row, {**row, "name": "b"}])
    rows = json.loads(path.read_text())
    assert [entry["name"] for entry in rows] == ["a", "b"] and "machine" in rows[0] and "date" in rows[0]
    del rows[0]["machine"], rows[0]["date"]
    assert rows[0] == dict(name="a", project_s=2.0, yardstick_s=6.0, floor_s=0.5, speedup=2.0, over_floor=8.0, project_peak_mb=100.0,
                           yardstick_peak_mb=200.0, firing_rate=0.1)
    assert results.describe_row(rows[0]).split() == ["a", "2.0000", "6.0000", "0.5000", "2.0", "8.00", "100", "200", "0.1000"]


@needs_cuda
def test_contestants_on_a_gpu_tell_their_own_memory():
    for megabytes in (60, 40):
        contestant = OnGpu(on_gpu, megabytes)
        assert contestant.call("numel") == megabytes * 2**20 and megabytes <= contestant.close() < megabytes + 30


def on_gpu(megabytes):
    return torch.zeros(megabytes * 2**20, dtype=torch.uint8, device="cuda")
