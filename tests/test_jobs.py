"""Jobs of several processes by torchrun: one of them speaks and writes, a lost one ends the job, and what can't be shared is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import fmnist_mlp
import utils.processes
from tests.ports import free_port
from tests.small_data import command, write_small_data
from utils.checkpoint import LATEST, PREVIOUS, load_checkpoint, newest_checkpoint
from utils.device import choose_device
from utils.errors import UserError
from utils.experiment import main
from utils.log import read_log
from utils.processes import check_batches

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_data(tmp_path_factory.mktemp("data"))


def torchrun(*arguments):
    """A job of two processes on this machine, as a process that is its own group."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
                             ROOT / "fmnist_mlp.py", *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(job, seconds):
    """Exit status, standard output and error of the job, which must end within so many seconds."""
    try:
        out, err = job.communicate(timeout=seconds)
    finally:
        if job.poll() is None:
            job.terminate()
    return job.returncode, out, err


def test_torchrun_trains_and_evaluates_as_one_process_does(data, tmp_path):
    flags = ["--path", data, "--epochs", 2, "--train-batch", 20, "--test-batch", 8, "--drop", 0, "--manualSeed", 1, "--tol", 1e-6,
             "--device", "cpu"]
    status, out, err = ended(torchrun(*flags, "--sync-bn", "--firing-rate", "-c", tmp_path / "two"), 120)
    assert status == 0, err
    alone = command(*flags, "--firing-rate", "-c", tmp_path / "one")
    assert alone[0] == 0, alone
    assert len(re.findall("^epoch ", out, re.MULTILINE)) == 2 and out.count("Training on 60") == 1
    rates, rates_alone = (re.findall(r"firing rate (\S+)", text) for text in (out, alone[1]))
    assert [*map(float, rates)] == pytest.approx([*map(float, rates_alone)], rel=1e-3) and len(rates) == 2
    rows, rows_alone = (read_log(tmp_path / run / "log.txt") for run in ("two", "one"))
    assert len(rows) == 2
    for row, expected in zip(rows, rows_alone):
        assert row[:3] == pytest.approx(expected[:3], rel=1e-4) and row[3:] == expected[3:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    _, evaluated, _ = command("--path", data, "--resume", tmp_path / "two" / LATEST, "--evaluate", "--device", "cpu")
    assert f"top-1 {rows[-1][4]:.2f} %" in evaluated


def test_a_lost_process_ends_the_job_which_resumes_and_is_interrupted(data, tmp_path):
    flags = ["--path", data, "--train-batch", 20, "--epochs", 100000, "--checkpoint-every", 1, "-c", tmp_path, "--device", "cpu"]
    job = torchrun(*flags)
    wait_for(tmp_path / PREVIOUS, job)
    os.kill(process_of(job, rank=1), signal.SIGKILL)
    killed = time.monotonic()
    status, out, err = ended(job, 60)
    assert status != 0 and time.monotonic() - killed < 30
    assert "another process of the job has died" in err and f"--resume auto -c {tmp_path}" in err
    kept = newest_checkpoint(tmp_path)
    before = load_checkpoint(kept)

    job = torchrun(*flags, "--resume", "auto")
    wait_for(tmp_path / LATEST, job, newer_than=(tmp_path / LATEST).stat().st_mtime_ns)
    job.send_signal(signal.SIGTERM)
    status, out, err = ended(job, 60)
    assert status != 0 and out.count("Going on from") == 1 and err.count("Stopped by SIGTERM") == 1
    after = load_checkpoint(tmp_path / LATEST)
    assert (after.epoch, after.iteration) > (before.epoch, before.iteration)
    status, out, _ = command(*flags, "--resume", "auto", "--epochs", after.epoch + 1)
    assert status == 0 and "Going on from" in out


def wait_for(path, job, newer_than=0):
    deadline = time.monotonic() + 90
    while not path.exists() or path.stat().st_mtime_ns <= newer_than:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.1)


def process_of(job, rank):
    """The number of the job's process of this rank."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return next(int(child) for child in children
                if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"))


@pytest.mark.parametrize("train_batch,samples,sync,complaint", [
    (20, 60, False, None), (20, 64, False, None), (20, 63, True, None), (20, 62, True, None),
    (21, 60, False, "give a multiple of 2"), (20, 63, False, "smallest batch has 3 samples"),
    (20, 61, True, "smallest batch has 1 samples"),
])
def test_batches_that_two_processes_cannot_share_are_refused(monkeypatch, train_batch, samples, sync, complaint):
    monkeypatch.setattr(utils.processes, "process_count", lambda: 2)
    args = Namespace(train_batch=train_batch, sync_bn=sync)
    if complaint is None:
        return check_batches(args, samples)
    with pytest.raises(UserError, match=complaint):
        check_batches(args, samples)


@pytest.mark.parametrize("given", (["--gpu-id", "0,1"], ["--gpu-id=0,1"], ["--gpu", "0,1"]), ids=" ".join)
def test_several_gpus_are_refused_with_the_command_that_uses_them(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fmnist_mlp.py", "--gamma", "0.1", *given, "-c", "a folder"])
    with pytest.raises(SystemExit) as exit:
        main(fmnist_mlp.RECIPE)
    assert exit.value.code == 2
    assert (f"CUDA_VISIBLE_DEVICES=0,1 {sys.executable} -m torch.distributed.run --nproc_per_node 2 fmnist_mlp.py --gamma 0.1 "
            "-c 'a folder'") in capsys.readouterr().err


def test_a_process_without_a_device_of_its_own_says_so(monkeypatch):
    for name, value in dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 of this machine finds 1 CUDA device"):
        choose_device("auto", "0")
    assert choose_device("cpu", "0") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", "0") == torch.device("cuda", 1)
