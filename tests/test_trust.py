"""What a run survives: signals, damaged and half-written files, full disks, losses that are not numbers; and that nothing changes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.networks import small_network
from tests.same_run import assert_same, contents
from tests.small_data import command, write_small_data
from utils import checkpoint as checkpoints
from utils import files, fit, run_files
from utils.checkpoint import BEST, DAMAGED, LATEST, PREVIOUS, load_checkpoint, newest_checkpoint
from utils.data.batches import Batches
from utils.interruption import Interrupted, Interruption
from utils.metrics import Metrics

BATCHES = 6  # of 16 samples, the last one of 10


@pytest.fixture
def data(tmp_path):
    return write_small_data(tmp_path / "data", train=90)


@pytest.fixture
def train(data, tmp_path, monkeypatch):
    """Trains in the folder of a name, by default for 2 epochs and without plots; returns status, output and error output."""
    monkeypatch.setattr(run_files, "plot_log", lambda rows, path: [path.with_suffix(".png")])
    def run(name, *more):
        return command("--path", data, "-c", tmp_path / name, "--train-batch", 16, "--manualSeed", 5, "--device", "cpu", "--lr", 0.02,
                       "--warmup", 9, "--epochs", 2, *more)
    return run


@pytest.fixture
def after(monkeypatch):
    """after(n, act) has `act` called once, behind the n-th training iteration and what belongs to it."""
    def arrange(count, act):
        real, calls = fit.train_one_epoch, [0]

        def train_one_epoch(network, batches, optimizer, rate, state, after_iteration, on_nan, model):
            def counted():
                calls[0] += 1
                if calls[0] == count:
                    act()
                after_iteration()
            return real(network, batches, optimizer, rate, state, counted, on_nan, model)
        monkeypatch.setattr(fit, "train_one_epoch", train_one_epoch)
    return arrange


def epoch_line(out):
    """The second epoch's line without its seconds."""
    return next(line for line in out.splitlines() if line.startswith("epoch 2/2")).rpartition(" | ")[0]


def send(number):
    return lambda: os.kill(os.getpid(), number)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code catches it."""


def kill(*_):
    raise Killed


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_run_stopped_twice_equals_the_uninterrupted_one(optimizer, train, after, tmp_path):
    whole = train("whole", "--optimizer", optimizer)[1]
    for number, stopped_after, place in ((signal.SIGTERM, 4, "epoch 1 after 4"), (signal.SIGINT, 5, "epoch 2 after 3")):
        after(stopped_after, send(number))
        status, out, err = train("parts", "--optimizer", optimizer, "--resume", "auto")
        assert status == 128 + number and place in err and "--resume auto" in err and str(tmp_path / "parts" / LATEST) in err
        assert ("a new run starts" in out) == (number == signal.SIGTERM)
    status, out, _ = train("parts", "--optimizer", optimizer, "--resume", "auto")
    assert status == 0 and "in epoch 2 after 3 iterations" in out and "epoch 1/2" not in out
    assert epoch_line(out) == epoch_line(whole), "the epoch's solves and residuals are counted as if nothing had happened"
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_during_the_evaluation_loses_no_training(train, tmp_path, monkeypatch):
    train("whole")
    real = fit.evaluate

    def evaluate(*arguments, between):
        send(signal.SIGTERM)()
        return real(*arguments, between=between)
    with monkeypatch.context() as patched:
        patched.setattr(fit, "evaluate", evaluate)
        status, _, err = train("parts")
    assert status == 143 and f"epoch 1 after {BATCHES}" in err
    assert train("parts", "--resume", "auto")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_training_stops_at_once(number, train, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.experiment.load_samples", lambda *_: send(number)())
    status, out, err = train("run")
    assert status == 128 + number and "Stopped by" in err and not (tmp_path / "run").exists()


def test_a_second_signal_is_not_waited_for():
    before = signal.getsignal(signal.SIGINT)
    with Interruption.watched() as interruption, interruption.deferred():
        send(signal.SIGTERM)()
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == [signal.SIG_DFL] * 2
        with pytest.raises(Interrupted):
            interruption.stop_if_asked()
    assert signal.getsignal(signal.SIGINT) == before


def test_the_script_itself_stops_cleanly(data, tmp_path):
    script = Path(__file__).parents[1] / "fmnist_mlp.py"
    process = subprocess.Popen([sys.executable, script, "--path", data, "-c", tmp_path / "run", "--epochs", "10000", "--device", "cpu"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / LATEST).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err.count("\n") == 2 and "Stopped by SIGTERM" in err


@pytest.mark.parametrize("module,name", [(files, "_keep"), (os, "replace"), (files, "_flush_folder"), (run_files, "write_contents")])
def test_killed_while_files_are_written(module, name, train, tmp_path, monkeypatch):
    """Whichever step of the writing a run is killed before, and whichever time it comes to it."""
    whole = tmp_path / "whole"
    assert train("whole", "--checkpoint-every", 2)[0] == 0
    for time_of_death in (1, 3, 4):
        calls, real = [0], getattr(module, name)

        def dies(*arguments):
            calls[0] += 1
            if calls[0] == time_of_death and not (name == "replace" and arguments[0].name.startswith("run.json")):
                raise Killed
            return real(*arguments)
        with monkeypatch.context() as patched:
            patched.setattr(module, name, dies)
            try:
                train(f"killed-{time_of_death}", "--checkpoint-every", 2)
            except Killed:
                pass
        train(f"killed-{time_of_death}", "--checkpoint-every", 2, "--resume", "auto")
        assert_same(whole, tmp_path / f"killed-{time_of_death}")


def test_killed_before_the_best_network_and_the_log_are_written(train, tmp_path, monkeypatch):
    train("whole", "--epochs", 1)
    with monkeypatch.context() as patched:
        patched.setattr(run_files, "write_contents", kill)
        with pytest.raises(Killed):
            train("run", "--epochs", 1)
    (tmp_path / "run" / "log.txt").write_text("Learning Rate\t torn")
    (tmp_path / "run" / f"{LATEST}.part").write_bytes(b"torn")
    assert not (tmp_path / "run" / BEST).exists()
    assert train("run", "--epochs", 1, "--resume", "auto")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.part"))


def test_killed_after_the_last_epoch(train, tmp_path, monkeypatch):
    train("whole")
    with monkeypatch.context() as patched:
        patched.setattr("utils.run_files.RunFiles.plot", kill)
        with pytest.raises(Killed):
            train("run")
    before = (tmp_path / "run" / LATEST).read_bytes()
    status, out, _ = train("run", "--resume", "auto")
    assert status == 0 and "is finished: 2 epochs" in out
    assert (tmp_path / "run" / LATEST).read_bytes() == before
    assert_same(tmp_path / "whole", tmp_path / "run")
    status, out, _ = train("run", "--resume", "auto", "--firing-rate")
    assert status == 0 and "400 neurons" in out


@pytest.mark.parametrize("harm", [
    lambda old: old[:len(old) // 2], lambda old: b"", lambda old: old[:1000] + bytes([old[1000] ^ 1]) + old[1001:],
    lambda old: old[:len(old) // 2] + bytes([old[len(old) // 2] ^ 64]) + old[len(old) // 2 + 1:],
])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(harm, train, after, tmp_path):
    train("whole")
    after(BATCHES + 4, send(signal.SIGTERM))
    train("run", "--checkpoint-every", 2)
    latest, previous = tmp_path / "run" / LATEST, tmp_path / "run" / PREVIOUS
    assert load_checkpoint(previous).iteration == 4 and load_checkpoint(latest).iteration == 4
    latest.write_bytes(harm(latest.read_bytes()))
    status, out, err = train("run", "--resume", "auto")
    assert status == 0 and f"{latest} is damaged" in out and f"Going on from {previous}" in out
    assert load_checkpoint(latest) and load_checkpoint(previous), "the damaged one has not become the previous one"
    assert (tmp_path / "run" / DAMAGED).exists()
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_the_best_network_serves_where_both_others_are_damaged(train, tmp_path):
    train("whole")
    train("run")
    best = load_checkpoint(tmp_path / "run" / BEST)
    for name in (LATEST, PREVIOUS):
        (tmp_path / "run" / name).write_bytes(b"damaged")
    assert newest_checkpoint(tmp_path / "run").name == BEST
    status, out, _ = train("run", "--resume", "auto")
    assert status == 0 and out.count(" is damaged") == 2 and best.epoch in (1, 2)
    (tmp_path / "run" / BEST).write_bytes(b"damaged")
    (tmp_path / "run" / LATEST).write_bytes(b"damaged")
    (tmp_path / "run" / PREVIOUS).unlink(missing_ok=True)
    status, out, _ = train("run", "--resume", "auto")
    assert status == 0 and "a new run starts" in out and (tmp_path / "run/earlier-1" / LATEST).read_bytes() == b"damaged"


def test_every_flipped_bit_is_found_or_harmless(train, tmp_path):
    train("run", "--epochs", 1)
    path = tmp_path / "run" / LATEST
    whole, good = path.read_bytes(), contents(path)
    for place in torch.randint(len(whole), (30,)).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:])
        if newest_checkpoint(tmp_path / "run") == path:
            assert contents(path) == good


def test_other_hyperparameters_are_named_and_win(train, after, tmp_path):
    after(4, send(signal.SIGTERM))
    train("run")
    status, out, _ = train("run", "--resume", "auto", "--lr", 0.5, "--schedule", 7, 8, "--manualSeed", 9, "--checkpoint-every", 50)
    warning = next(line for line in out.splitlines() if "not as in the checkpoint" in line)
    assert "--lr was 0.02, is now 0.5; --schedule was 30 60 90, is now 7 8" in warning and "eed" not in warning and "every" not in warning
    assert status == 0 and "learning rate 0.5 " in out


def test_another_batch_size_begins_the_epoch_anew(train, after, tmp_path):
    after(4, send(signal.SIGTERM))
    train("run")
    status, out, _ = train("run", "--resume", "auto", "--train-batch", 30)
    assert status == 0 and "epoch 1 begins anew" in out and "0 of 3 not converged" in out


def test_a_full_disk_is_one_sentence_and_costs_nothing(train, after, tmp_path, monkeypatch):
    train("whole", "--checkpoint-every", 2)

    def full(path, previous=None):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        after(BATCHES + 3, lambda: patched.setattr(checkpoints, "written_aside", full))
        status, _, err = train("run", "--checkpoint-every", 2)
    assert status == 1 and len(err.strip().splitlines()) == 1 and "No space left on device" in err and LATEST in err
    assert load_checkpoint(tmp_path / "run" / LATEST).iteration == 2
    assert train("run", "--checkpoint-every", 2, "--resume", "auto")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "run")


def spoil(monkeypatch, *bad, value=float("nan")):
    """The bad-th batches (from 1) hold a value that is not finite."""
    real, calls = Batches._batches, [0]

    def batches(self, order, done):
        for x, labels in real(self, order, done):
            calls[0] += self.shuffled
            if self.shuffled and calls[0] in bad:
                x[0, 0] = value
            yield x, labels
    monkeypatch.setattr(Batches, "_batches", batches)


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
    real, seen = torch.optim.SGD.step, [0]

    def step(optimizer):
        seen[0] += 1
        real(optimizer)
        if seen[0] == 4:
            optimizer.param_groups[0]["params"][0].data[0] = float("inf")
    monkeypatch.setattr(torch.optim.SGD, "step", step)
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
            rate = network._simulate(x, x, current, weight, network._draw_masks(x), None)
            mapped = network.equilibrium_map(rate, current, weight)
            expected = (mapped - rate).norm() / max(mapped.norm(), rate.norm())
        assert network.residual.item() == pytest.approx(expected.item(), rel=1e-6)
        residuals.append(expected.item())
    assert residuals[1] < 0.1 * residuals[0]


def test_warnings_of_numbers_that_mislead(train):
    _, out, _ = train("run", "--epochs", 1, "--tol", "1e-7", "--threshold", 1, "--time_step", 1)
    assert f"warning: {BATCHES} of {BATCHES} backward solves did not converge" in out and "away from the equilibrium" in out
    _, out, _ = train("run", "--epochs", 1)
    assert "backward solves did not" not in out and "away from the equilibrium" not in out


def test_deterministic_runs_are_the_same(train, tmp_path):
    for name in ("one", "other"):
        torch.rand(3)
        status, out, err = command("--path", tmp_path / "data", "-c", tmp_path / name, "--deterministic", "--epochs", 1,
                                   "--train-limit", 40, "--device", "cpu")
        assert status == 0 and "seed 0\n" in out and torch.are_deterministic_algorithms_enabled(), err
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
