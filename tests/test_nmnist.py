"""N-MNIST's files: folders, zips and text, damage, and the cache."""

import io
import os
import random

import numpy as np
import pytest
import torch

from tests.nmnist_forms import run, same, some_events, write_raw, write_zips
from tests.nmnist_oracle import parse_as_published, raw_bytes
from utils import convert_nmnist
from utils.data import nmnist
from utils.data.batches import Batches
from utils.data.nmnist import load_nmnist
from utils.data.nmnist_files import LARGEST
from utils.data.recordings import raw_to_text
from utils.errors import UserError


def test_raw_folder_zips_and_converted_text_give_the_same_samples(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw")
    train, test = load_nmnist(str(raw), 30)
    assert train.inputs.dtype == torch.uint8 and train.inputs.shape == (23, 8670) and train.labels.dtype == torch.int64
    assert len(test.labels) == 5
    for number, label in enumerate(train.labels):
        data = (raw / "Train" / str(int(label)) / f"{number + 2:05d}.bin").read_bytes()
        frames = train.prepare(train.inputs[number:number + 1])
        assert np.array_equal(frames[:, 0].permute(1, 2, 3, 0), parse_as_published(raw_to_text(data).decode(), 30))
    zips = write_zips(raw, tmp_path / "zips")
    for binning in ("paper", "time", "count"):
        assert same(load_nmnist(str(raw), 30, binning), load_nmnist(str(zips), 30, binning))
    assert "md5 differs" in capsys.readouterr().out
    assert run(convert_nmnist.main, "--path", zips, "--out", tmp_path / "text") == 0
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == ["Test", "Train"]
    assert (tmp_path / f"text/Train/{int(train.labels[0])}/2.dat").exists(), "k is the recording's number"
    assert same(load_nmnist(str(raw), 30), load_nmnist(str(tmp_path / "text"), 30))
    assert same(load_nmnist(str(raw), 7), load_nmnist(str(tmp_path / "text"), 7))


def test_prepare_gives_new_frames_time_first(tmp_path):
    train, _ = load_nmnist(str(write_raw(tmp_path)), 6, "count")
    kept = train.inputs.clone()
    frames, labels = next(iter(Batches(train, 4, shuffled=False)))
    assert frames.shape == (6, 4, 2, 34, 34) and frames.dtype == torch.float32 and frames.is_contiguous()
    assert set(frames.unique().tolist()) == {0.0, 1.0} and labels.tolist() == train.labels[:4].tolist()
    bits = np.unpackbits(train.inputs[:4].numpy(), axis=1, bitorder="little").reshape(4, 6, 2, 34, 34)
    assert np.array_equal(frames.numpy(), bits.swapaxes(0, 1))
    frames.zero_()
    assert torch.equal(train.inputs, kept)
    assert train.prepare(train.inputs[:0]).shape == (6, 0, 2, 34, 34)
    if torch.cuda.is_available():
        assert torch.equal(train.prepare(kept.cuda()).cpu(), train.prepare(kept))


def test_the_whole_data_set_fits_in_a_gigabyte(tmp_path):
    train, _ = load_nmnist(str(write_raw(tmp_path)), 30)
    assert 70_000 * train.inputs[0].nbytes == 606_900_000


def test_the_published_default_path_finds_what_lies_above_it(tmp_path, capsys):
    raw = write_raw(tmp_path / "NMNIST")
    default = tmp_path / "NMNIST" / "2312_3000_stable"
    expected = load_nmnist(str(raw), 30)
    assert same(load_nmnist(f"{default}/", 30), expected), "missing"
    (default / "Train" / "3").mkdir(parents=True)
    assert same(load_nmnist(str(default), 30), expected), "empty"
    assert run(convert_nmnist.main, "--path", raw, "--out", tmp_path / "text") == 0
    default.joinpath("Train", "3").rmdir()
    default.joinpath("Train").rmdir()
    for split in ("Train", "Test"):
        (tmp_path / "text" / split).rename(default / split)
    assert same(load_nmnist(str(default), 30), expected), "text"
    with pytest.raises(UserError, match="--nmnist-binning time"):
        load_nmnist(str(default), 30, "time")


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="468j46mzdv") as caught:
        load_nmnist(str(tmp_path / "NMNIST" / "2312_3000_stable"), 30)
    md5 = "20959b8e626244a1b502305a9e6e2031", "69ca8762b2fe404d9b9bad1103e97832"
    for part in ("No package", *md5, "CC BY-SA 4.0", str(tmp_path)):
        assert part in str(caught.value)
    write_raw(tmp_path / "half")
    for path in (tmp_path / "half" / "Test").rglob("*.bin"):
        path.unlink()
    with pytest.raises(UserError, match="none of Test"):
        load_nmnist(str(tmp_path / "half"), 30)
    with pytest.raises(UserError, match="--nmnist-binning fancy"):
        load_nmnist(str(tmp_path), 30, "fancy")
    write_raw(tmp_path / "whole")
    monkeypatch.setattr("utils.data.nmnist.np.empty", lambda *_: pytest.fail("memory that is not there was asked for"))
    with pytest.raises(UserError, match="--time_step 1000000000"):
        load_nmnist(str(tmp_path / "whole"), 10**9)


# ---- damage


def test_damaged_recordings_are_named_counted_and_left_out(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw")
    expected = load_nmnist(str(raw), 30)
    good = raw_bytes([(1, 2, 0, 4000), (10, 12, 1, 5000)])
    for name, data in {"1/90001": b"", "2/90002": good[:-1], "3/90003": good + bytes([34, 0, 0, 0, 1]),
                       "4/00000": good + bytes([0, 200, 0, 0, 1]), "5/90005": bytes(LARGEST + 5)}.items():
        (raw / "Train" / name).parent.mkdir(exist_ok=True)
        (raw / "Train" / f"{name}.bin").write_bytes(data)
    (raw / "Train" / "5" / "notes.txt").write_text("not a recording")
    zips = write_zips(raw, tmp_path / "zips")
    for folder in (raw, raw, zips):
        capsys.readouterr()
        assert same(load_nmnist(str(folder), 30), expected)
        out = capsys.readouterr().out
        assert "5 of 28 recordings" in out and "00000.bin" in out and "beyond" in out and "…" in out, "from the cache too"
    text = tmp_path / "text"
    assert run(convert_nmnist.main, "--path", raw, "--out", text) == 0
    assert "5 of 28 recordings" in capsys.readouterr().out
    for number, data in enumerate([b"", b"5\tx\t\n", b"0\t3\t\n", b"2313\t3\t\n", b"7\t\n", b"5\t3\t12", b"-5\t1\t\n",
                                   b"5\t" + b"9" * 30 + b"\t\n", b"5\t" + b"9" * 9999 + b"\t\n", b"\xff\xfe\x00"]):
        (text / "Test" / "1" / f"{number + 500}.dat").write_bytes(data)
    assert same(load_nmnist(str(text), 30), expected)
    assert "10 of 15 recordings" in capsys.readouterr().out


def test_a_data_set_without_any_usable_recording_is_refused(tmp_path):
    raw = write_raw(tmp_path, train=3)
    for path in (raw / "Train").rglob("*.bin"):
        path.write_bytes(b"1234")
    with pytest.raises(UserError, match="not one of its 3 recordings"):
        load_nmnist(str(raw), 30)


def test_any_zip_is_read_or_refused(tmp_path):
    zips = write_zips(write_raw(tmp_path / "raw", train=3, test=2, events=30), tmp_path / "zips")
    whole, chance = (zips / "Train.zip").read_bytes(), random.Random(2)
    flipped = [bytearray(whole) for _ in range(150)]
    for data in flipped:
        for _ in range(chance.choice([1, 3])):
            data[chance.choice([chance.randrange(len(data)), len(data) - 1 - chance.randrange(300)])] = chance.randrange(256)
    refused = 0
    for data in [b"", b"PK", b"no zip at all", whole[:-30], whole[50:], *map(bytes, flipped)]:
        (zips / "Train.zip").write_bytes(data)
        try:
            train, _ = load_nmnist(str(zips), 3)
            assert len(train.labels) <= 3
        except UserError as error:
            assert "Train" in str(error)
            refused += 1
    assert refused >= 3


# ---- the cache


def fails(*_):
    raise AssertionError("the recordings are read although the cache is good")


def test_the_cache_serves_until_any_recording_changes(tmp_path, monkeypatch):
    raw = write_raw(tmp_path)
    expected = load_nmnist(str(raw), 30)
    with monkeypatch.context() as patch:
        patch.setattr(nmnist, "_pack", fails)
        assert same(load_nmnist(str(raw), 30), expected)
        for changed in ((str(raw), 29), (str(raw), 30, "time")):
            with pytest.raises(AssertionError):
                load_nmnist(*changed)
    path = next((raw / "Train").rglob("*.bin"))
    before = path.stat()
    path.write_bytes(raw_bytes(some_events(np.random.default_rng(7), 120)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    changed = load_nmnist(str(raw), 30)
    assert not same(changed, expected), "same size, same time of modification, other events"
    other_label = raw / "Train" / str((int(path.parent.name) + 1) % 10)
    other_label.mkdir(exist_ok=True)
    path.rename(other_label / path.name)
    relabelled = load_nmnist(str(raw), 30)
    assert torch.equal(relabelled[0].inputs, changed[0].inputs) and not torch.equal(relabelled[0].labels, changed[0].labels)
    (other_label / path.name).unlink()
    assert len(load_nmnist(str(raw), 30)[0].labels) == 22
    assert sorted(file.name for file in raw.iterdir()) == [".cache-nmnist-paper-T30.npz", "Test", "Train"]


def test_a_damaged_cache_is_read_anew(tmp_path):
    raw = write_raw(tmp_path, train=4, test=2)
    expected = load_nmnist(str(raw), 3)
    cache, chance = raw / ".cache-nmnist-paper-T3.npz", random.Random(3)
    whole = cache.read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    damaged = [b"", b"x", whole[:-1], whole[:len(whole) // 2], array.getvalue()]
    for _ in range(60):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(data))
    for data in damaged:
        cache.write_bytes(data)
        assert same(load_nmnist(str(raw), 3), expected)
    assert same(load_nmnist(str(raw), 3), expected)


def test_a_read_only_folder_is_no_obstacle(tmp_path, monkeypatch, capfd):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(nmnist.tempfile, "TemporaryDirectory", denied)
    raw = write_raw(tmp_path)
    assert same(load_nmnist(str(raw), 30), load_nmnist(str(raw), 30))
    assert not list(raw.glob(".*")) and not capfd.readouterr().err
