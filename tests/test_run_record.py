"""Limits on the samples, and run.json, which says what a run was."""

import json
import platform

import numpy
import pytest
import torch

from tests.small_data import RAW, command, write_idx, write_small_data
from utils import run_record
from utils.checkpoint import load_checkpoint
from utils.data.datasets import load_fashion_mnist
from utils.run_record import git_commit
from utils.version import VERSION

FLAGS = ["--device", "cpu", "--manualSeed", 3, "--train-batch", 16]


@pytest.fixture
def data(tmp_path):
    return write_small_data(tmp_path / "data")


def train(data, folder, *more):
    status, out, err = command("--path", data, "-c", folder, *FLAGS, *more)
    assert status == 0, err
    return out


def record(folder):
    return json.loads((folder / "run.json").read_text())


def test_limits_take_the_first_samples_and_say_so(data, tmp_path):
    out = train(data, tmp_path / "limited", "--epochs", 1, "--train-limit", 32, "--test-limit", 7)
    assert "Training on 32 of 60 samples, testing on 7 of 30" in out and "0 of 2 not converged" in out, "two steps of 16 samples"
    images = load_fashion_mnist(data)
    for split, count, pixels, labels in (("train", 32, *images[:2]), ("t10k", 7, *images[2:])):
        write_idx(tmp_path / "first" / RAW / f"{split}-images-idx3-ubyte", pixels[:count].numpy())
        write_idx(tmp_path / "first" / RAW / f"{split}-labels-idx1-ubyte", labels[:count].to(torch.uint8).numpy())
    out = train(tmp_path / "first", tmp_path / "whole", "--epochs", 1)
    assert "Training on 32 of 32 samples, testing on 7 of 7" in out
    assert (tmp_path / "limited/log.txt").read_text() == (tmp_path / "whole/log.txt").read_text()
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("limited", "whole"))
    assert all(torch.equal(tensor, other.state_dict[name]) for name, tensor in one.state_dict.items())


def test_limits_beyond_the_data_set_and_with_evaluate(data, tmp_path):
    out = train(data, tmp_path / "run", "--epochs", 1, "--train-limit", 1000)
    assert "Training on 60 of 60 samples, testing on 30 of 30" in out
    out = train(data, tmp_path / "none", "--resume", tmp_path / "run/checkpoint.pth.tar", "--evaluate", "--test-limit", 5)
    assert "Testing on 5 of 30 samples" in out
    assert not (tmp_path / "none").exists(), "an evaluation without a chart writes nothing"


def test_run_record(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fmnist_mlp.py", "--path", "a folder", "-t", "4"])
    train(data, tmp_path / "run", "--epochs", 1, "--train-limit", 20, "-t", 4)
    run = record(tmp_path / "run")
    assert run["command"] == "fmnist_mlp.py --path 'a folder' -t 4"
    assert {"time_step": 4, "leaky": 0.95, "dataset": "fashionmnist", "train_limit": 20}.items() <= run["arguments"].items()
    assert run["seed"] == 3 and run["device"] == "cpu" and "threads" in run["device_name"] and run["date"][:2] == "20"
    assert run["training_samples"] == {"used": 20, "of": 60} and run["test_samples"] == {"used": 30, "of": 30}
    assert run["versions"] == {"project": VERSION, "python": platform.python_version(), "torch": torch.__version__,
                               "numpy": numpy.__version__}
    assert run["git_commit"] == git_commit() and run["earlier_starts"] == []


def test_a_drawn_seed_is_recorded(data, tmp_path):
    status, out, err = command("--path", data, "-c", tmp_path / "run", "--epochs", 1)
    assert status == 0 and f"seed {record(tmp_path / 'run')['seed']}\n" in out, err


def test_a_resumed_run_keeps_what_it_was_before(data, tmp_path):
    resume = ["--resume", tmp_path / "run/checkpoint.pth.tar"]
    for epochs, more in ((1, []), (2, resume), (3, resume)):
        train(data, tmp_path / "run", "--epochs", epochs, *more)
    run = record(tmp_path / "run")
    assert [start["arguments"]["epochs"] for start in run["earlier_starts"]] == [1, 2] and run["arguments"]["epochs"] == 3
    (tmp_path / "run/run.json").write_text("damaged")
    train(data, tmp_path / "run", "--epochs", 4, *resume)
    assert record(tmp_path / "run")["earlier_starts"] == []


def test_a_new_run_moves_record_and_chart_aside(data, tmp_path):
    train(data, tmp_path / "run", "--epochs", 1, "--firing-rate")
    before = (tmp_path / "run/run.json").read_text()
    train(data, tmp_path / "run", "--epochs", 1)
    assert (tmp_path / "run/earlier-1/run.json").read_text() == before and record(tmp_path / "run")["earlier_starts"] == []
    assert (tmp_path / "run/earlier-1/firing_rate.png").exists() and not (tmp_path / "run/firing_rate.png").exists()
    assert not list((tmp_path / "run").glob("*.part"))


def test_commit_outside_a_repository_or_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "__file__", str(tmp_path / "run_record.py"))
    assert git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
