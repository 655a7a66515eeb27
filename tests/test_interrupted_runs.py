"""Signals, and a run killed at any moment: nothing is lost, and the end is as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.harmed_runs import after, BATCHES, data, epoch_line, kill, Killed, send, train
from tests.same_run import assert_same
from utils import experiment, files, fit, run_files
from utils.checkpoint import BEST, LATEST
from utils.interruption import Interrupted, Interruption


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


def test_a_run_stopped_within_an_epoch_goes_on_with_the_same_augmentation(train, after, tmp_path, monkeypatch):
    real = experiment.load_samples

    def noisy(*arguments):
        samples, *others = real(*arguments)
        return samples._replace(augment=lambda x, generator: x + torch.randn(x.shape, generator=generator)), *others
    monkeypatch.setattr(experiment, "load_samples", noisy)
    assert train("whole")[0] == 0
    after(3, send(signal.SIGTERM))
    assert train("parts")[0] == 143
    assert train("parts", "--resume", "auto")[0] == 0
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


@pytest.mark.parametrize("module,name", [(files, "_second_name"), (os, "replace"), (files, "_flush_folder"), (run_files, "write_contents")])
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
