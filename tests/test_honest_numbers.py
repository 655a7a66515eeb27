"""Losses and weights that are not finite, distance from equilibrium, warnings, and the same numbers in every run."""

import os
import re

import pytest
import torch
from torch import nn

from modules.simulation import simulate
from tests.harmed_runs import after, BATCHES, data, spoil, train
from tests.networks import small_network
from tests.same_run import assert_same
from tests.small_data import command
from utils.checkpoint import BEST, LATEST, load_checkpoint
from utils.metrics import Metrics
from utils.optimizer import SGD


def test_a_loss_that_is_no_number_stops_the_run(train, monkeypatch):
    monkeypatch.setattr("utils.training.F.cross_entropy", lambda logits, labels: (logits * torch.inf).sum())
    status, _, err = train("run")
    assert status == 1 and "the loss is nan in epoch 1, iteration 1" in err and "no checkpoint was written before" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_no_number_stops_the_run(value, train, tmp_path, monkeypatch):
    spoil(monkeypatch, BATCHES + 4, value=value)
    status, _, err = train("run", "--checkpoint-every", 2)
    assert status == 1 and len(err.strip().splitlines()) == 1 and str(tmp_path / "run" / LATEST) in err
    assert "currents are not finite (while the loss" in err and "epoch 2, iteration 4" in err
    kept = load_checkpoint(tmp_path / "run" / LATEST)
    assert (kept.epoch, kept.iteration) == (1, 2) and all(tensor.isfinite().all() for tensor in kept.state_dict.values())
    assert load_checkpoint(tmp_path / "run" / BEST)


def test_batches_without_a_finite_loss_are_skipped_and_change_nothing(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        spoil(patched, 1, BATCHES + 2)
        status, out, err = train("run", "--on-nan", "skip")
    assert status == 0 and out.count("1 batches were skipped") == 2, err
    run = load_checkpoint(tmp_path / "run" / LATEST)
    assert all(tensor.isfinite().all() for tensor in run.state_dict.values())
    assert int(run.state_dict["input.norm.num_batches_tracked"]) == 2 * BATCHES - 2, "a skipped batch leaves no trace in batch norms"


def test_weights_that_are_not_finite_are_never_saved(train, after, tmp_path, monkeypatch):
    """A gradient that overflows, while the loss is still finite."""
    real, seen = SGD.step, [0]

    def step(optimizer):
        seen[0] += 1
        real(optimizer)
        if seen[0] == 4:
            optimizer.param_groups[0]["params"][0].data[0] = float("inf")
    monkeypatch.setattr(SGD, "step", step)
    status, _, err = train("run", "--checkpoint-every", 2)
    assert status == 1 and "input.linear.weight holds values that are not finite in epoch 1 after 4 iterations" in err
    assert load_checkpoint(tmp_path / "run" / LATEST).iteration == 2


@pytest.mark.parametrize("kind", ["dense", "convolutional", "multi-layer"])
def test_distance_from_equilibrium(kind):
    """‖f(a) − a‖ / max(‖a‖, ‖f(a)‖), with f evaluated apart; for a long simulation of IF neurons it falls towards 0."""
    residuals = []
    for time_steps in (4, 400):
        torch.manual_seed(0)
        network, x = small_network(kind, leak=1.0, time_steps=time_steps)
        network.eval().measures_residual = True
        network(x)
        with torch.no_grad():
            weight, current = network.feedback.normalised_weight(), network.input(x, None)
            rate = simulate(*network._loop(x, x, current, weight, network.draw_masks(x)), time_steps)
            mapped = network.equilibrium_map(rate, current, weight)
            expected = (mapped - rate).norm() / max(mapped.norm(), rate.norm())
        assert network.residual.item() == pytest.approx(expected.item(), rel=1e-6)
        residuals.append(expected.item())
    assert residuals[1] < 0.1 * residuals[0]


def test_warnings_of_numbers_that_mislead(train):
    _, out, _ = train("run", "--epochs", 1, "--tol", "1e-7", "--max-iterations", 1, "--time_step", 1)
    assert f"warning: {BATCHES} of {BATCHES} backward solves did not converge" in out and "far from their equilibrium" in out
    _, out, _ = train("run", "--epochs", 1)
    assert "backward solves did not" not in out and "far from their equilibrium" not in out


def test_deterministic_runs_are_the_same(train, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    for name in ("one", "other"):
        torch.rand(3)
        status, out, err = command("--path", tmp_path / "data", "-c", tmp_path / name, "--deterministic", "--epochs", 1,
                                   "--train-limit", 40, "--device", "cpu")
        assert status == 0 and "seed 0\n" in out and torch.are_deterministic_algorithms_enabled(), err
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # PyTorch refuses others.
    assert_same(tmp_path / "one", tmp_path / "other")
    train("third", "--epochs", 1)
    assert not torch.are_deterministic_algorithms_enabled()


def test_sums_do_not_depend_on_when_they_are_asked_for():
    logits, labels = torch.randn(200, 4, 10), torch.randint(10, (200, 4))
    once, often = Metrics(), Metrics()
    for number, (rows, truth) in enumerate(zip(logits, labels)):
        loss = nn.functional.cross_entropy(rows, truth)
        once.add(rows, truth, loss)
        often.add(rows, truth, loss)
        if number % 7 == 0:
            often.averages()
        if number % 50 == 3:
            often = Metrics.from_state(often.state_dict())
    assert once.averages() == often.averages()


def test_the_version_is_in_every_checkpoint(train, tmp_path):
    train("run", "--epochs", 1)
    saved = torch.load(tmp_path / "run" / LATEST, weights_only=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+", saved["project_version"]) and saved["torch_version"] == torch.__version__
    assert saved["arguments"]["lr"] == 0.02
