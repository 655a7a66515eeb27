"""The readers under any input: round trips and refusals as properties, a share of the fuzz, and files made to do harm."""

import contextlib
import gzip
import os
import pickle
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import fmnist_mlp
import nmnist_conv
from tests import fuzz
from tests.fuzz_readers import READERS, SCRIPTS, Evil, Refused, saved, small, trained
from tests.published_layout import published_file
from tests.small_data import command, write_small_data, write_small_nmnist
from utils import convert_nmnist, preview_nmnist
from utils.arguments import parse_arguments
from utils.checkpoint import load_checkpoint, random_state, restore_network, restore_optimizer
from utils.data.cifar_files import pack_batch, parse_batch
from utils.data.cifar_sheets import read_sheet
from utils.data.idx import read_idx
from utils.data.inert_pickle import read_inert
from utils.data.nmnist import load_nmnist
from utils.errors import UserError
from utils.log import COLUMNS, Log, read_log

PLAIN = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Properties

@PLAIN
@given(array=arrays.arrays(np.uint8, arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)), packed=st.booleans())
def test_idx_gives_back_what_was_written(array, packed, tmp_path):
    contents = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    (tmp_path / "images").unlink(missing_ok=True)
    (tmp_path / "images.gz").write_bytes(gzip.compress(contents))
    if not packed:
        (tmp_path / "images").write_bytes(contents)
    read = read_idx(tmp_path / "images", array.ndim)
    assert read.dtype == np.uint8 and read.shape == array.shape and (read == array).all()


@PLAIN
@given(sizes=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), data=st.binary(max_size=40))
def test_an_idx_header_is_believed_only_if_the_file_holds_as_much(sizes, data, tmp_path):
    (tmp_path / "images").write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *sizes) + data)
    if sizes[0] * sizes[1] * sizes[2] == len(data) > 0:
        assert read_idx(tmp_path / "images", 3).shape == tuple(sizes)
    else:
        with contextlib.suppress(UserError):
            assert read_idx(tmp_path / "images", 3).shape == tuple(sizes) and not data and 0 in sizes


def test_an_empty_array_of_impossible_sizes(tmp_path):
    (tmp_path / "images").write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 0))
    with pytest.raises(UserError, match="larger than is meant"):
        read_idx(tmp_path / "images", 3)


@PLAIN
@given(labels=st.lists(st.integers(-2, 12), min_size=1, max_size=3), seed=st.integers(0, 2**32 - 1))
def test_cifar_gives_back_what_was_written_or_refuses_its_labels(labels, seed):
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072)).astype(np.uint8)
    contents = pack_batch("a batch", images, labels)
    if min(labels) < 0 or max(labels) > 9:
        with pytest.raises(UserError, match="labels"):
            parse_batch(Path("batch"), contents, "labels", 10)
    else:
        batch = parse_batch(Path("batch"), contents, "labels", 10)
        assert (batch.images == images).all() and batch.labels.tolist() == labels


DATA = st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4) | st.tuples(inner, inner))


@settings(PLAIN, max_examples=100)
@given(data=DATA, protocol=st.integers(2, 5))
def test_plain_data_comes_back_from_an_inert_pickle(data, protocol):
    assert read_inert(pickle.dumps(data, protocol)) == data


@PLAIN
@given(rows=st.lists(st.lists(st.floats(0, 1e6), min_size=len(COLUMNS), max_size=len(COLUMNS)), max_size=5), torn=st.integers(0, 200))
def test_a_torn_log_gives_back_its_whole_rows(rows, torn, tmp_path):
    path = tmp_path / "log.txt"
    path.unlink(missing_ok=True)
    log = Log(path)
    for row in rows:
        log.append(row)
    whole = path.read_text()
    path.write_text(whole[:max(0, len(whole) - torn)])
    read = read_log(path)
    expected = [[round(value, 6) for value in row] for row in rows][:len(read)]
    assert read[:-1] == expected[:-1] or np.allclose(read[:-1], expected[:-1], atol=1e-6)
    assert len(read) >= whole[:max(0, len(whole) - torn)].count("\n") - 1


@PLAIN
@given(contents=st.binary(max_size=400))
def test_any_log_is_read(contents, tmp_path):
    (tmp_path / "log.txt").write_bytes(contents)
    assert all(len(row) == len(COLUMNS) for row in read_log(tmp_path / "log.txt"))


@settings(PLAIN, max_examples=30)
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


ARGUMENTS = st.lists(st.sampled_from(["--lr", "-t", "--path", "--resume", "-c", "--schedule", "--seed", "--drop", "-e"]) | st.text(),
                     max_size=5)


@settings(max_examples=100, deadline=None)
@given(argv=ARGUMENTS, script=st.sampled_from(SCRIPTS))
def test_any_command_line_is_parsed_or_refused_with_status_2(argv, script):
    try:
        args = parse_arguments(script.RECIPE, argv)
        assert args.time_step >= 1 and args.lr > 0 and args.path
    except SystemExit as end:
        assert end.code == 2 or end.code == 0 and any("h" in text for text in argv)


# The fuzz

@pytest.mark.parametrize("name", READERS)
def test_a_share_of_the_fuzz(name, tmp_path):
    share, make = READERS[name]
    folder = tmp_path / "input"
    folder.mkdir()
    with fuzz.quiet():
        outcomes = fuzz.fuzz(name, make(folder), range(12 * share), 1, folder, tmp_path / "failed")
    assert outcomes["failed"] == 0, [path.read_text() for path in tmp_path.glob("failed/*/fault.txt")]
    assert outcomes["read"] > 0 and (outcomes["refused"] > 0 or name in ("log.txt", "run.json"))


def raises(draw):
    raise KeyError("x")


def hangs(draw):
    while True:
        pass


def grows(draw):
    np.ones(10**7)


def refuses(draw):
    raise Refused


@pytest.mark.parametrize("attempt,outcome", [(raises, "failed"), (hangs, "failed"), (grows, "failed"), (refuses, "refused"),
                                             (lambda draw: None, "read")])
def test_the_fuzz_tells_a_fault(attempt, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT_S", 0.1)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "file").write_bytes(b"x")
    assert fuzz.fuzz("a reader", attempt, range(2), 0, tmp_path / "input", tmp_path / "failed") == {outcome: 2}
    assert (tmp_path / "failed" / "a-reader-0-1" / "file").exists() == (outcome == "failed")


# Files that unpack to more than is meant

def test_compressed_bytes_that_unpack_to_far_more(tmp_path):
    bomb = zlib.compressobj(wbits=31)
    contents = bomb.compress(bytes([0, 0, 8, 1, 0, 0, 0, 4]))
    contents += b"".join(bomb.compress(bytes(2**20)) for _ in range(64)) + bomb.flush()
    (tmp_path / "labels.gz").write_bytes(contents)
    with pytest.raises(UserError, match="promises 4 bytes of data and it holds more"):
        read_idx(tmp_path / "labels", 1)


def test_a_sheet_that_states_a_gigantic_size(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 1024, 2**31 - 1, 8, 2, 0, 0, 0)
    (tmp_path / "sheet.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
    with pytest.raises(ValueError, match="no sheet"):
        read_sheet(tmp_path / "sheet.png")


# Checkpoints

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


def parts(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)


def test_checkpoints_that_claim_more_than_they_hold(tmp_path):
    path = tmp_path / "given.pth.tar"
    torch.save(contents_of_a_checkpoint(), path)
    files = parts(path)
    rewritten(path, files)
    resume(path)  # a rewritten file is read, so that what follows is refused for the reason that it gives
    storage = next(name for name in files if name.endswith("data/0"))
    for harmed, method, reason in [
            ({storage: bytes(2**27)}, zipfile.ZIP_DEFLATED, "compressed"), ({storage: files[storage][:-4]}, zipfile.ZIP_STORED, "storage 0"),
            ({storage: b""}, zipfile.ZIP_STORED, "storage 0")]:
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


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    path = tmp_path / "given.pth.tar"
    torch.save({"epoch": 1, "state_dict": {"w": torch.arange(64.0)}}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(np.arange(64, dtype=np.float32).tobytes()) + 100] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="part .* is damaged"):
        load_checkpoint(path)


# The command line

HUGE, LONG = "9" * 30, "a" * 5000
WHOLE = ["-j", "--train-limit", "--test-limit", "--train-batch", "--test-batch", "-t", "--threshold", "--epochs", "--start-epoch",
         "--schedule", "--warmup", "--manualSeed"]
REAL = ["--vth", "--leaky", "--drop", "--tol", "--lr", "--gamma", "--momentum", "--wd"]
CHOICE = ["-d", "--solver", "--jacobian-bn", "--optimizer", "--device", "--precision"]


@pytest.mark.parametrize("flag", [*WHOLE, *REAL, *CHOICE, "--path", "-c", "--resume"])
def test_absurd_values_of_every_flag(flag, capsys):
    values = ["", LONG, "a\0b", "\ud800"]
    if flag in WHOLE:
        values += [HUGE, "9" * 5000, "½", "é", "1e3", "nan", "-7", "inf", "0x10"]
    elif flag in REAL:
        values += ["nan", "inf", "-inf", "1e999", "½", "é", "1,5"]
    elif flag in CHOICE:
        values += ["é", HUGE, "-"]
    for script in (fmnist_mlp, nmnist_conv):
        for value in values:
            with pytest.raises(SystemExit) as end:
                parse_arguments(script.RECIPE, [f"{flag}={value}"] if flag.startswith("--") else [flag, value])
            message = capsys.readouterr().err.strip().splitlines()[-1]
            assert end.value.code == 2 and "error: argument " in message and flag.strip("-") in message, value
            assert len(message) < 400 or flag in CHOICE


def test_two_dashes_for_a_value(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(fmnist_mlp.RECIPE, ["--lr=--"])
    assert end.value.code == 2 and "--lr" in capsys.readouterr().err


@pytest.mark.parametrize("main,more", [(convert_nmnist.main, []), (preview_nmnist.main, [])])
@pytest.mark.parametrize("path", ["", "a\0b", LONG])
def test_paths_of_the_other_commands(main, more, path, capsys):
    for flags in (["--path", path, "--out", "x"], ["--path", "x", "--out", path]):
        with pytest.raises(SystemExit) as end:
            main([*flags, *more])
        assert end.value.code == 2 and "error: argument --" in capsys.readouterr().err


def test_folders_and_files_in_each_others_place(tmp_path):
    data, file = write_small_data(tmp_path / "data"), tmp_path / "file"
    file.write_text("x")
    images = data / "FashionMNIST/raw/train-images-idx3-ubyte"
    images.unlink()
    images.mkdir()
    for flags, named in [(["--path", data], str(images)), (["--path", data, "-c", file], "-c"), (["--path", file], "--path"),
                         (["--path", data, "--resume", tmp_path], "--resume")]:
        status, _, err = command(*flags, "--device", "cpu")
        assert status == 2 and named in err.splitlines()[-1] and "Traceback" not in err, (flags, err)


def test_files_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        data = write_small_data(Path(folder) / "data")
        for path in (data / "FashionMNIST/raw/train-images-idx3-ubyte", Path(folder) / "checkpoint"):
            path.touch()
            flags = ["--path", data, "--epochs", 1, *(["--resume", path] if path.name == "checkpoint" else [])]
            command(*flags, "-c", f"{folder}/run")  # imports what another user may not be able to
            path.chmod(0)
            with as_nobody():
                status, _, err = command(*flags, "-c", f"{folder}/other")
            assert status == 2 and str(path) in err and "Traceback" not in err
            path.chmod(0o600)


@contextlib.contextmanager
def as_nobody():
    """Root may read any file, so it is another user in here."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_cache_that_states_a_gigantic_array(tmp_path):
    folder = write_small_nmnist(tmp_path, 3, 3)
    first, _ = load_nmnist(str(folder), 2)
    cache = next(folder.glob(".cache*"))
    files = parts(cache)
    assert b"(3, 578), }       " in files["Train_frames.npy"]
    files["Train_frames.npy"] = files["Train_frames.npy"].replace(b"(3, 578), }       ", b"(9" + b"9" * 7 + b", 578), }")
    rewritten(cache, files)
    again, _ = load_nmnist(str(folder), 2)
    assert torch.equal(first.inputs, again.inputs)
