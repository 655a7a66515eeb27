"""Damaged checkpoints, full disks, and runs that go on with other flags."""

import signal

import pytest
import torch

from tests.harmed_runs import after, BATCHES, data, send, train
from tests.same_run import assert_same, contents
from utils import checkpoint as checkpoints
from utils.checkpoint import BEST, DAMAGED, LATEST, load_checkpoint, newest_checkpoint, PREVIOUS


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
