"""Checkpoints with wrong values, damaged, or made to do harm."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_alterations import Evil
from tests.fuzz_run_files import saved, small, trained
from tests.published_layout import published_file
from tests.rewritten_zip import parts, rewritten
from tests.small_data import command, write_small_data
from utils import checkpoint_file
from utils.checkpoint import load_checkpoint, random_state, restore_network, restore_optimizer
from utils.errors import UserError


def contents_of_a_checkpoint():
    network, optimizer = trained()
    return {"epoch": 2, "acc": 50.0, "best_acc": 60.0, "state_dict": dict(network.state_dict()), "optimizer": optimizer.state_dict(),
            "momentum": {}, "random_state": random_state(), "arguments": {"optimizer": "SGD"}}


def resume(path):
    checkpoint, network = load_checkpoint(path), small()
    restore_network(network, checkpoint, path)
    restore_optimizer(torch.optim.SGD(network.parameters(), 0.1, 0.9), network, checkpoint, path)


def changed(part, change):
    def make():
        contents = contents_of_a_checkpoint()
        change(contents[part])
        return contents
    return make


def replaced(part, value):
    return lambda: {**contents_of_a_checkpoint(), part: value}


WEIGHT = "input.linear.weight"


@pytest.mark.parametrize("make,reason", [
    (replaced("epoch", -1), "epoch is -1"), (replaced("epoch", 10**9 + 1), "epoch is 1000000001"), (replaced("epoch", "3"), "epoch is '3'"),
    (replaced("epoch", True), "epoch is True"), (replaced("epoch", 2.5), "epoch is 2.5"),
    (replaced("acc", float("nan")), "accuracy"), (replaced("best_acc", "x"), "accuracy"), (replaced("best_acc", 1e9), "accuracy"),
    (replaced("state_dict", [1]), "named tensors"), (replaced("state_dict", {"w": 1}), "named tensors"),
    (replaced("random_state", {"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": []}), "random_state"),
    (replaced("random_state", 7), "random_state"), (replaced("arguments", None), "arguments"), (replaced("optimizer", []), "optimizer"),
    (changed("state_dict", lambda state: state[WEIGHT][0].fill_(float("nan"))), f"{WEIGHT} holds NaN"),
    (changed("state_dict", lambda state: state["input.norm.running_var"].fill_(float("inf"))), "running_var holds NaN or infinity"),
    (changed("state_dict", lambda state: state.update({WEIGHT: state[WEIGHT][:2]})), "another network"),
    (changed("state_dict", lambda state: state.pop(WEIGHT)), "missing in the file"),
    (changed("state_dict", lambda state: state.update(more=torch.zeros(1))), "missing in this network"),
    (changed("state_dict", lambda state: state.update({WEIGHT: state[WEIGHT].long()})), "int64 in the file"),
    (changed("state_dict", lambda state: state.update({WEIGHT: state[WEIGHT].half()})), "float16 in the file"),
    (changed("optimizer", lambda state: state["state"][0].update(momentum_buffer=torch.zeros(7))), "of another network"),
    (changed("optimizer", lambda state: state["state"].update({99: {"momentum_buffer": torch.zeros(7)}})), "of another network"),
    (changed("optimizer", lambda state: state["state"][0].update(momentum_buffer=state["state"][0]["momentum_buffer"].long())),
     "another type of numbers"),
    (changed("optimizer", lambda state: state["state"][0]["momentum_buffer"].fill_(float("nan"))), "NaN"),
    (changed("optimizer", lambda state: state.pop("state")), "table of buffers"),
])
def test_a_checkpoint_with_a_wrong_value(make, reason, tmp_path):
    path = tmp_path / "given.pth.tar"
    torch.save(contents_of_a_checkpoint(), path)
    resume(path)
    torch.save(make(), path)
    with pytest.raises(UserError) as refusal:
        resume(path)
    assert str(refusal.value).startswith(f"--resume {path}: ") and reason in str(refusal.value)


def test_a_published_checkpoint_with_the_momentum_of_another_network(tmp_path):
    network = small()
    path = tmp_path / "published.pth.tar"
    published_file(network, {name: {"momentum_buffer": torch.zeros(3)} for name, _ in network.named_parameters()}, path)
    with pytest.raises(UserError, match="of another network"):
        resume(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_checkpoint_is_refused_and_executes_nothing(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.pth.tar"
    path.write_bytes(saved({**contents_of_a_checkpoint(), "arguments": Evil()}, zipped))
    with pytest.raises(UserError, match="it names 'posix system'"):
        load_checkpoint(path)
    data = write_small_data(tmp_path / "data")
    status, _, err = command("--path", data, "--resume", path, "--evaluate")
    assert status == 2 and "not a readable checkpoint" in err and "Traceback" not in err
    assert not Path("executed").exists()
    torch.load(path, weights_only=False)
    assert Path("executed").exists(), "the file must be one that does harm where it is trusted"


def test_checkpoints_that_claim_more_than_they_hold(tmp_path):
    path = tmp_path / "given.pth.tar"
    torch.save(contents_of_a_checkpoint(), path)
    files = parts(path)
    rewritten(path, files)
    resume(path)  # a rewritten file is read, so that what follows is refused for the reason that it gives
    storage = next(name for name in files if name.endswith("data/0"))
    for harmed, method, reason in [
            ({storage: bytes(2**27)}, zipfile.ZIP_DEFLATED, "compressed"),
            ({storage: files[storage][:-4]}, zipfile.ZIP_STORED, "storage 0"), ({storage: b""}, zipfile.ZIP_STORED, "storage 0")]:
        rewritten(path, files | harmed, method)
        with pytest.raises(UserError, match=reason):
            load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_storage_that_is_larger_than_the_file(zipped, tmp_path):
    """24 elements of a float32 storage, written as 2 ** 31 − 1 of them."""
    contents = saved({"state_dict": {"w": torch.zeros(24)}}, zipped)
    path = tmp_path / "given"
    path.write_bytes(contents)
    name = next((name for name in parts(path) if name.endswith("data.pkl")), None) if zipped else None
    data = parts(path)[name] if zipped else contents
    place = data.index(b"K\x18")  # BININT1 24: the number of elements in the storage's description
    harmed = data[:place] + b"J\xff\xff\xff\x7f" + data[place + 2:]
    if zipped:
        rewritten(path, parts(path) | {name: harmed})
    else:
        path.write_bytes(harmed)
    with pytest.raises(UserError, match="storage 0 has not the size" if zipped else "larger than the file"):
        load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_newer_checkpoint_may_take_its_place_while_it_is_read(zipped, tmp_path, monkeypatch):
    path, newer = tmp_path / "checkpoint.pth.tar", tmp_path / "newer"
    real = checkpoint_file._check_zip if zipped else checkpoint_file._check_legacy
    torch.save({"weights": torch.arange(5000.0)}, path, _use_new_zipfile_serialization=zipped)
    torch.save({"weights": torch.zeros(3)}, newer, _use_new_zipfile_serialization=zipped)

    def check(*arguments):
        newer.replace(path)
        real(*arguments)

    monkeypatch.setattr(checkpoint_file, real.__name__, check)
    assert checkpoint_file.read_tensors(path)["weights"].equal(torch.arange(5000.0))
    monkeypatch.undo()
    assert checkpoint_file.read_tensors(path)["weights"].equal(torch.zeros(3))


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    path = tmp_path / "given.pth.tar"
    torch.save({"epoch": 1, "state_dict": {"w": torch.arange(64.0)}}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(np.arange(64, dtype=np.float32).tobytes()) + 100] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="part .* is damaged"):
        load_checkpoint(path)



HUGE, LONG = "9" * 30, "a" * 5000


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(epoch=st.integers(0, 10**9), accuracy=st.floats(0, 100), seed=st.integers(0, 100))
def test_a_checkpoint_comes_back(epoch, accuracy, seed, tmp_path):
    torch.manual_seed(seed)
    tensors = {name: torch.rand(tensor.shape).to(tensor.dtype) for name, tensor in small().state_dict().items()}
    torch.save({**contents_of_a_checkpoint(), "epoch": epoch, "acc": accuracy, "best_acc": accuracy, "state_dict": tensors},
               tmp_path / "given")
    read = load_checkpoint(tmp_path / "given")
    network = small()
    restore_network(network, read, tmp_path / "given")
    assert (read.epoch, read.acc, read.best_acc) == (epoch, accuracy, accuracy)
    assert all(torch.equal(network.state_dict()[name], tensors[name]) for name in tensors)
