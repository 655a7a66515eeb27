"""The readers to fuzz: each with a generator of valid input, the ways to alter it, and what holds for whatever is read."""

import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import cv2
import numpy as np
import torch

import cifar_alexnetf
import cifar_cifarnetf
import fmnist_mlp
import get_rate_cifar_alexnetf
import mnist_conv
import nmnist_conv
from modules.neuron import make_neuron
from modules.zoo import f400
from tests.published_layout import published_file
from tests.small_data import write_small_nmnist
from utils.arguments import parse_arguments
from utils.checkpoint import Checkpoint, load_checkpoint, random_state, restore_network, restore_optimizer, save_checkpoint
from utils.data import nmnist
from utils.data.cifar_files import parse_batch
from utils.data.cifar_sheets import TRAIN_SHEETS, repack_sheets
from utils.data.idx import read_idx
from utils.data.nmnist import load_nmnist
from utils.data.recordings import BINNINGS, FRAME_BYTES, DamagedRecording, raw_frames, raw_to_text, text_frames
from utils.epoch_state import EpochState
from utils.errors import UserError
from utils.log import COLUMNS, Log, read_log
from utils.run_record import _earlier_starts


class Refused(Exception):
    """The reader refused the input as it should."""


@contextlib.contextmanager
def refusal(*kinds):
    try:
        yield
    except kinds as error:
        assert str(error), "a refusal must say why"
        raise Refused from error


# Altered bytes

def altered(draw, data):
    """`data` with one to four alterations; now and then as it is, or wholly random."""
    kind = draw.random()
    if kind < 0.05:
        return data
    if kind < 0.10:
        return draw.randbytes(draw.choice((0, 1, 5, 30, 300)))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(ALTERATIONS)(draw, data, draw.randrange(min(len(data), draw.choice((16, 200, 10**9))) + 1))
    return data


def _span(draw):
    return draw.choice((1, 2, 8, 64, 1000))


NUMBERS = [struct.pack(order + kind, value) for order in "<>" for kind, value in
           (("I", 2**32 - 1), ("I", 2**31), ("I", 2**27), ("q", -1), ("q", 2**62), ("q", 2**40), ("i", 0), ("H", 65535), ("B", 255))]
ALTERATIONS = (
    lambda draw, data, at: data[:at] + bytes(b ^ 1 << draw.randrange(8) for b in data[at:at + 1]) + data[at + 1:],
    lambda draw, data, at: data[:at],
    lambda draw, data, at: data[:at] + draw.randbytes(_span(draw)) + data[at:],
    lambda draw, data, at: data[:at] + data[at + _span(draw):],
    lambda draw, data, at: data[:at] + data[at:at + _span(draw)] * draw.choice((2, 3, 50)) + data[at:],
    lambda draw, data, at: data[:at] + (number := draw.choice(NUMBERS)) + data[at + len(number):],
    lambda draw, data, at: data[:at] + draw.choice(PICKLE_PARTS) + data[at:],
)
PICKLE_PARTS = [b"cos\nsystem\n(S'touch executed'\ntR", b"\x82\x01", b"\x83\x01\x02", b"(ios\nsystem\n", b"b", b"}b", b"(", b"t", b"]" * 500,
                b"\x85" * 3000, b"g0\n", b"h\x00", b"j\xff\xff\xff\xff", b"2", b"0", b"R", b"\x81", b"Q", b"u", b"e", b"N", b"P1\n"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def hostile_pickle(draw):
    return draw.choice((
        lambda: pickle.dumps(Evil(), protocol=draw.randrange(6)),
        lambda: pickle.dumps({"data": Evil(), "labels": [1], "state_dict": Evil()}, protocol=draw.randrange(6)),
        lambda: b"\x80\x02\x82" + draw.randbytes(1) + b".",
        lambda: b"(" * 3000 + b"t" * 3000 + b".",
        lambda: b"]" * 3000 + b"a" * 2999 + b".",
        lambda: b"N" + b"\x85" * 3000 + b"}R.",
        lambda: b"]q\x00" + b"h\x00a" * 1000 + b".",
        lambda: b"\x80\x02\x8b" + struct.pack("<i", draw.choice((-1, 2**31 - 1))) + b".",
        lambda: b"\x80\x04\x8e" + struct.pack("<Q", draw.choice((2**40, 2**62, 2**64 - 1))) + b"x.",
        lambda: b"\x80\x04j" + struct.pack("<I", 2**32 - 1) + b".",
        lambda: b"Nr" + struct.pack("<I", 2**32 - 1) + b".",
        lambda: b"L" + b"9" * draw.choice((4000, 20_000)) + b"L\n.",
        lambda: b"(dp0\ng0\ng0\nsg0\nb.",
    ))()


def not_executed():
    assert not Path("executed").exists(), "the input was executed"


# Readers of data files

def idx(folder):
    bomb = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 4]) + bytes(2**27))

    def attempt(draw):
        sizes = [draw.randrange(4) for _ in range(draw.choice((1, 3)))]
        values = draw.randbytes(int(np.prod(sizes)))
        whole = bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + values
        given, packed = altered(draw, whole), draw.random() < 0.3
        if packed:
            given = bomb if draw.random() < 0.02 else altered(draw, gzip.compress(given, 1))
        for name in ("images", "images.gz"):
            (folder / name).unlink(missing_ok=True)
        (folder / ("images.gz" if packed else "images")).write_bytes(given)
        with refusal(UserError):
            array = read_idx(folder / "images", len(sizes))
        assert array.dtype == np.uint8 and array.ndim == len(sizes)
        assert given != whole or array.shape == tuple(sizes) and array.tobytes() == values
    return attempt


def cifar(folder):
    def attempt(draw):
        count = draw.randrange(1, 3)
        images = np.frombuffer(draw.randbytes(count * 3072), np.uint8).reshape(count, 3072)
        labels = [draw.randrange(10) for _ in images]
        record = {"data": images, "labels": labels}
        if draw.random() < 0.2:
            record["data"] = draw.choice((images[:, :-1], images.astype(np.float32), images[0], images.T, images.tolist(), None,
                                          images.astype("O"), images[:0], np.array(["a"])))
        if draw.random() < 0.2:
            record["labels"] = draw.choice(([10] * count, [-1] * count, ["1"] * count, labels * 2, None, [2**70] * count, [True] * count))
        as_meant = record["data"] is images and record["labels"] is labels
        whole = pickle.dumps(record, protocol=draw.randrange(6))
        given = hostile_pickle(draw) if draw.random() < 0.1 else altered(draw, whole)
        (folder / "data_batch_1").write_bytes(given)
        with refusal(UserError):
            batch = parse_batch(folder / "data_batch_1", given, "labels", 10)
        assert batch.images.dtype == np.uint8 and batch.images.shape == (len(batch.labels), 3072)
        assert 0 <= batch.labels.min() and batch.labels.max() <= 9
        assert given != whole or as_meant and np.array_equal(batch.images, images) and batch.labels.tolist() == labels
        not_executed()
    return attempt


def sheets(folder):
    def sheet(images):
        rgb = images.reshape(-1, 3, 1024).transpose(0, 2, 1)
        return cv2.imencode(".png", np.ascontiguousarray(rgb[:, :, ::-1]), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()

    whole = {"train_lables.json": json.dumps([*range(TRAIN_SHEETS)]).encode(), "test_lables.json": b"[7]"}
    for name in (*(f"data_batch_{number}.png" for number in range(1, TRAIN_SHEETS + 1)), "test_batch.png"):
        whole[name] = sheet(np.random.default_rng(0).integers(0, 256, (1, 3072)).astype(np.uint8))
    jsons = (b"[" * 50_000, b"{}", b"null", b"[[]]", b'["a"]', b"[1e400]", b"[NaN]", b"[" + b"9" * 6000 + b"]", b"\xff\xfe[")

    def attempt(draw):
        files = dict(whole)
        name = draw.choice(list(files))
        files[name] = draw.choice(jsons) if name.endswith("json") and draw.random() < 0.3 else altered(draw, files[name])
        for file, contents in files.items():
            (folder / file).write_bytes(contents)
        with refusal(ValueError):  # which a source turns into a UserError
            repack_sheets(folder)
        total = 0
        for number in range(1, TRAIN_SHEETS + 1):
            path = folder / f"data_batch_{number}"
            total += len(parse_batch(path, path.read_bytes(), "labels", 10).labels)
        assert total == TRAIN_SHEETS or "png" in name
    return attempt


def raw_recording(draw, sound=True):
    events = draw.randrange(1, 40)
    top = 34 if sound else 40
    return b"".join(bytes([draw.randrange(top), draw.randrange(top)]) + draw.choice((draw.randrange(300_000), draw.randrange(2**23)))
                    .to_bytes(3, "big") for _ in range(events))


def raw(folder):
    def attempt(draw):
        given = altered(draw, raw_recording(draw, draw.random() < 0.9))
        (folder / "1.bin").write_bytes(given)
        steps = draw.choice((1, 2, 7))
        with refusal(DamagedRecording):
            frames = raw_frames([given], steps, draw.choice(BINNINGS))
        assert frames.dtype == np.uint8 and frames.shape == (1, steps * FRAME_BYTES) and len(given) % 5 == 0
    return attempt


def text(folder):
    numbers = (b"9" * 30, b"9" * 5000, b"-1", b"0", b"2313", b"1e5", b"\xd9\xa1", b"\t\n", b"\n\n", b"1\t")

    def attempt(draw):
        try:
            given = raw_to_text(raw_recording(draw))
        except DamagedRecording:
            given = b"7\t3\t\n"
        given = altered(draw, given)
        if draw.random() < 0.3:
            at = draw.randrange(len(given) + 1)
            given = given[:at] + draw.choice(numbers) + given[at:]
        (folder / "1.dat").write_bytes(given)
        steps = draw.choice((1, 2, 7))
        with refusal(DamagedRecording):
            frames = text_frames([given], steps)
        assert frames.dtype == np.uint8 and frames.shape == (1, steps * FRAME_BYTES)
    return attempt


def zips(folder):
    def packed(draw, count):
        contents = io.BytesIO()
        with zipfile.ZipFile(contents, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)), compresslevel=1) as archive:
            for number in range(count):
                data = bytes(2**23) if draw.random() < 0.01 else raw_recording(draw, draw.random() < 0.9)
                archive.writestr(f"x/{draw.randrange(10)}/{number}.bin", data)
        return contents.getvalue()

    def attempt(draw):
        for cache in folder.glob(".cache*"):
            cache.unlink()
        counts = {split: draw.randrange(1, 4) for split in ("Train", "Test")}
        whole = {split: packed(draw, counts[split]) for split in counts}
        name = draw.choice(list(whole))
        whole[name] = packed_again(whole[name]) if draw.random() < 0.05 else altered(draw, whole[name])
        for split, data in whole.items():
            (folder / f"{split}.zip").write_bytes(data)
        with refusal(UserError):
            both = load_nmnist(str(folder), 3, draw.choice(BINNINGS))
        for samples in both:
            assert samples.inputs.dtype == torch.uint8 and samples.inputs.shape == (len(samples.labels), 3 * FRAME_BYTES)
            assert len(samples.labels) > 0 and 0 <= samples.labels.min() and samples.labels.max() <= 9
    return attempt


def packed_again(data):
    """A zip in a zip."""
    contents = io.BytesIO()
    with zipfile.ZipFile(contents, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/1/1.bin", data)
        archive.writestr("x/Train.zip", data)
    return contents.getvalue()


def cache(folder):
    load_nmnist(str(write_small_nmnist(folder / "recordings", 3, 3)), 2)
    stored = next((folder / "recordings").glob(".cache*"))
    whole = stored.read_bytes()
    arrays = dict(np.load(stored))
    key, path = str(arrays["key"]), folder / "cache.npz"
    others = (np.zeros((2**16, 8)), np.array([Evil()], "O"), np.zeros((3, 2 * FRAME_BYTES), np.float32), np.full(3, 10), np.zeros(0, int))

    def attempt(draw):
        given = altered(draw, whole)
        if draw.random() < 0.4:
            contents, changed = io.BytesIO(), draw.choice(list(arrays))
            with zipfile.ZipFile(contents, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)), compresslevel=1) as archive:
                for name, array in arrays.items():
                    part = io.BytesIO()
                    other = name == changed and draw.random() < 0.3
                    np.save(part, draw.choice(others[1:] if draw.random() < 0.99 else others) if other else array)
                    header = part.getvalue()[:128]
                    if name == changed and not other and draw.random() < 0.5:
                        header = header.replace(b"(3,", draw.choice((b"(3000000000,", b"(-1,", b"(4,", b"(3,3,", b"(True,")))
                    part = header + part.getvalue()[128:]
                    archive.writestr(f"{name}.npy", altered(draw, part) if name == changed and not other else part)
            given = contents.getvalue()
        path.write_bytes(given)
        packed = nmnist._read_cache(path, key, 2)
        not_executed()
        if packed is None:
            raise Refused
        for frames, labels, _ in packed.values():
            assert frames.dtype == np.uint8 and frames.shape == (len(labels), 2 * FRAME_BYTES) and set(labels) <= set(range(10))
    return attempt


def log(folder):
    rows = [[0.05, 2.0, 1.5, 30.0, 40.0]] * 3
    path = folder / "log.txt"

    def attempt(draw):
        path.unlink(missing_ok=True)
        written = Log(path)
        for row in rows:
            written.append(row)
        whole = path.read_bytes()
        given = altered(draw, whole)
        path.write_bytes(given)
        read = read_log(path)
        assert all(len(row) == len(COLUMNS) and all(type(cell) is float for cell in row) for row in read)
        assert given != whole or read == rows
        assert read_log(Log(path, read).path) == [[float(f"{cell:.6f}") for cell in row] for row in read]
    return attempt


def record(folder):
    path, whole = folder / "run.json", json.dumps({"date": "x", "arguments": {"lr": 0.1}, "earlier_starts": [{"date": "y"}]}).encode()
    others = (b"[" * 50_000, b"null", b"[]", b'{"earlier_starts": 3}', b"\xff", b'{"a":' * 20_000)

    def attempt(draw):
        path.write_bytes(draw.choice(others) if draw.random() < 0.1 else altered(draw, whole))
        assert type(_earlier_starts(path)) is list
    return attempt


# Checkpoints

def small(width=4):
    return f400(width, inputs=6, classes=3, neuron=make_neuron(2, 0.9), time_steps=2)


def trained():
    network = small()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return network, optimizer


def saved(contents, zipped=True):
    file = io.BytesIO()
    torch.save(contents, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


VALUES = (None, -1, 10**10, 2**70, "3", "", [], {}, float("nan"), float("inf"), True, 1.5, torch.zeros(2), torch.tensor(float("nan")), b"x")


def spoilt(draw, contents):
    """A checkpoint with a wrong value somewhere: nested tables are entered at random."""
    contents = copy.deepcopy(contents)
    table = contents
    while True:
        key = draw.choice(list(table))
        if isinstance(table[key], dict) and table[key] and draw.random() < 0.8:
            table = table[key]
            continue
        break
    value, kind = table[key], draw.randrange(5)
    if kind == 0:
        del table[key]
    elif kind == 1:
        table[draw.choice(("more", 7, "input.linear.more"))] = draw.choice(VALUES)
    elif isinstance(value, torch.Tensor) and kind < 4:
        table[key] = draw.choice((value.double(), value.half(), value.long(), value.flatten()[:1], value[None], value * float("nan"),
                                  value.to(torch.complex64), value.expand(10**6, *value.shape), value.to_sparse()))
    else:
        table[key] = draw.choice(VALUES)
    return contents


def repacked(draw, data):
    """A file of torch.save whose parts are altered and whose checksums are right all the same, or that unpacks to far more."""
    contents, bomb = io.BytesIO(), draw.random() < 0.02
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(contents, "w", compresslevel=1) as new:
        part = draw.choice([name for name in old.namelist()] + [next(name for name in old.namelist() if name.endswith("data.pkl"))] * 9)
        for name in old.namelist():
            given = old.read(name)
            if name == part:
                given = bytes(2**26) if bomb else hostile_pickle(draw) if draw.random() < 0.1 else altered(draw, given)
            new.writestr(name, given, zipfile.ZIP_DEFLATED if bomb and name == part else zipfile.ZIP_STORED)
    return contents.getvalue()


def checkpoint(folder):
    network, optimizer = trained()
    path, here = folder / "checkpoint.pth.tar", small()
    save_checkpoint(Checkpoint(2, network.state_dict(), 50.0, 60.0, optimizer.state_dict(), random_state=random_state(),
                               arguments={"optimizer": "SGD", "lr": 0.1, "schedule": [1, 2], "resume": None},
                               log_rows=[[0.1, 2.0, 1.0, 40.0, 50.0]] * 2,
                               partial=EpochState(3, torch.get_rng_state(), (60, 20), residuals=[0.5])), path)
    own = torch.load(path, weights_only=True)
    published_file(network, {name: {"momentum_buffer": torch.ones_like(p)} for name, p in network.named_parameters()}, path)
    published = torch.load(path, weights_only=True)
    files = {(id(contents), zipped): saved(contents, zipped) for contents in (own, published) for zipped in (True, False)}

    def attempt(draw):
        contents, zipped = draw.choice((own, published)), draw.random() < 0.8
        whole, kind = files[id(contents), zipped], draw.random()
        if kind < 0.4:
            given = saved(spoilt(draw, contents), zipped)
        elif kind < 0.7 and zipped:
            given = repacked(draw, whole)
        elif kind < 0.75:
            given = hostile_pickle(draw)
        else:
            given = altered(draw, whole)
        path.write_bytes(given)
        mine = torch.optim.SGD(here.parameters(), 0.1, 0.9)
        try:
            with refusal(UserError):
                loaded = load_checkpoint(path)
                restore_network(here, loaded, path)
                restore_optimizer(mine, here, loaded, path)
        finally:
            not_executed()
        assert type(loaded.epoch) is int and 0 <= loaded.epoch <= 10**9 and 0 <= loaded.best_acc < 101
        assert all(torch.isfinite(tensor).all() for tensor in here.state_dict().values())
        if given == whole:
            assert all(torch.equal(one, other) for one, other in zip(here.state_dict().values(), network.state_dict().values()))
        for parameter in here.parameters():
            parameter.grad = torch.ones_like(parameter)
        mine.step()
    return attempt


# The command line

SCRIPTS = (fmnist_mlp, mnist_conv, nmnist_conv, cifar_alexnetf, cifar_cifarnetf, get_rate_cifar_alexnetf)
FLAGS = ["--dataset", "-d", "--path", "-j", "--train-limit", "--test-limit", "--train-batch", "--test-batch", "-t", "--vth", "--leaky",
         "--drop", "--solver", "--tol", "--threshold", "--jacobian-bn", "--epochs", "--start-epoch", "--optimizer", "--lr", "--schedule",
         "--gamma", "--warmup", "--momentum", "--wd", "-c", "--resume", "-e", "--firing-rate", "--manualSeed", "--device", "--precision",
         "--gpu-id", "--nmnist-binning", "--t", "--", "-", "---x", "@file"]
TEXTS = ["", " ", "0", "1", "-1", "5", "0.5", "1e-3", "1e400", "-0", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "0x10", "1_0", "١", "½", "é",
         "\ud800", "\udcff", "a\0b", "\n", "cifar10", "CIFAR-100", "mnist", "sgd", "SGD", "cpu", "auto", ".", "/", "/dev/null", "a" * 5000,
         "%s", "%(prog)s", "{}", "none", "../x", "time"]


def arguments(folder):
    def attempt(draw):
        argv = []
        for _ in range(draw.randrange(1, 5)):
            argv += [draw.choice(FLAGS)] if draw.random() < 0.95 else []
            argv += [draw.choice(TEXTS) if draw.random() < 0.9 else "".join(chr(draw.randrange(0xD7FF)) for _ in range(draw.randrange(20)))
                     for _ in range(draw.choice((0, 1, 1, 1, 1, 2)))]
            if len(argv) > 1 and argv[-2].startswith("--") and draw.random() < 0.2:
                argv[-2:] = [f"{argv[-2]}={draw.choice((argv[-1], '--'))}"]
        (folder / "argv.txt").write_text(repr(argv), errors="backslashreplace")
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                args = parse_arguments(draw.choice(SCRIPTS).RECIPE, argv)
        except SystemExit as end:
            if end.code == 0:  # an abbreviation of --help
                return
            assert end.code == 2 and ": error: " in err.getvalue()
            raise Refused from end
        for name in ("epochs", "time_step", "train_batch", "test_batch", "threshold"):
            assert type(getattr(args, name)) is int and 1 <= getattr(args, name) <= 10**9
        for name in ("lr", "vth", "leaky", "dropout", "tol", "gamma", "momentum", "weight_decay"):
            assert np.isfinite(getattr(args, name))
        assert args.lr > 0 and args.vth > 0 and 0 <= args.dropout < 1 and 0 <= args.momentum < 1
        assert all(type(epoch) is int and 0 <= epoch <= 10**9 for epoch in args.schedule)
    return attempt


READERS = {  # shares of the inputs, and the readers
    "IDX": (20, idx), "CIFAR": (16, cifar), "CIFAR sheets": (5, sheets), "recording": (15, raw), "recordings as text": (14, text),
    "zips of recordings": (4, zips), "cache of recordings": (6, cache), "log.txt": (8, log), "run.json": (6, record),
    "checkpoint": (9, checkpoint), "command line": (6, arguments)}
