"""Readers of a run's files to fuzz: log.txt, run.json and checkpoints."""

import copy
import io
import json
import zipfile

import torch

from modules.neuron import make_neuron
from modules.zoo import f400
from tests.fuzz_alterations import altered, hostile_pickle, not_executed, refusal
from tests.published_layout import published_file
from utils.checkpoint import Checkpoint, load_checkpoint, random_state, restore_network, restore_optimizer, save_checkpoint
from utils.epoch_state import EpochState
from utils.errors import UserError
from utils.log import COLUMNS, Log, read_log
from utils.run_record import _earlier_starts


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
