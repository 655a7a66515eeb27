"""N-MNIST: binning and formats against loops over single events in fractions, then files, zips, damage, cache and commands."""

import io
import os
import random
import zipfile
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils import convert_nmnist, preview_nmnist
from utils.data import nmnist
from utils.data.batches import Batches
from utils.data.nmnist import load_nmnist, unpack_frames
from utils.data.nmnist_files import LARGEST
from utils.data.recordings import DamagedRecording, raw_frames, raw_to_text, text_frames
from utils.errors import UserError

# ---- oracles: one event at a time, straight from the description of the formats


def raw_bytes(events):
    """events: (x, y, on, t in µs)."""
    return b"".join(bytes([x, y]) + (on << 23 | t).to_bytes(3, "big") for x, y, on, t in events)


def half_away_from_zero(value):
    return floor(value + Fraction(1, 2)) if value >= 0 else -floor(-value + Fraction(1, 2))


def channel_of(x, y, on, t):
    """1..2312, or None for an event that leaves the field."""
    T, x, y = 105_000, Fraction(x + 1), Fraction(y + 1)
    if t <= T:
        x, y = x - Fraction(7, 2) * t / T, y - Fraction(7) * t / T
    elif t <= 2 * T:
        x, y = x - (Fraction(7, 2) + Fraction(7, 2) * (t - T) / T), y - (7 - Fraction(7) * (t - T) / T)
    else:
        x -= 7 - Fraction(7) * (t - 2 * T) / T
    x, y = half_away_from_zero(x), half_away_from_zero(y)
    return (x - 1) * 34 + y + 1156 * on if 1 <= x <= 34 and 1 <= y <= 34 else None


def oracle_text(events):
    lines = {}
    for x, y, on, t in events:
        channel = channel_of(x, y, on, t)
        if channel is not None:
            lines.setdefault(channel, []).append(-(-t // 3000))
    return "".join(f"{channel}\t" + "".join(f"{bin}\t" for bin in lines[channel]) + "\n" for channel in sorted(lines)).encode()


def parse_as_published(text, time_steps):
    """The frames (2, 34, 34, T) of a text recording, line by line and event by event."""
    frames = np.zeros((2, 34, 34, time_steps), np.float32)
    for line in text.split("\n"):
        values = line.split()
        if not values:
            continue
        position = int(values[0]) - 1
        polarity = 1 if position >= 1156 else 0
        position -= 1156 * polarity
        x, y = position // 34, position % 34
        for value in values[1:]:
            bin = int(value)
            if 1 <= bin <= time_steps - 1:
                frames[polarity, x, y, bin - 1] = 1
    return frames


def oracle_slices(events, time_steps, binning):
    """The frames (2, 34, 34, T) of binning `time` or `count`."""
    frames = np.zeros((2, 34, 34, time_steps), np.float32)
    times = [t for *_, t in events]
    first, duration = min(times), max(times) - min(times) + 1
    for rank, place in enumerate(sorted(range(len(events)), key=times.__getitem__)):
        x, y, on, t = events[place]
        channel = channel_of(x, y, on, t)
        if channel is None:
            continue
        part = Fraction(t - first, duration) if binning == "time" else Fraction(rank, len(events))
        position = channel - 1 - 1156 * on
        frames[on, position // 34, position % 34, floor(part * time_steps)] = 1
    return frames


def unpacked(packed):
    """Packed frames of n recordings as an array (n, 2, 34, 34, T)."""
    return unpack_frames(torch.from_numpy(packed)).permute(1, 2, 3, 4, 0).numpy()


EDGES = [edge + more for edge in (0, 3000, 7500, 15_000, 87_000, 90_000, 105_000, 112_500, 210_000, 292_500, 315_000)
         for more in (0, 1, 2)]
TIMES = st.one_of(st.sampled_from(EDGES), st.integers(0, 120_000), st.integers(0, 2**23 - 1))
EVENTS = st.lists(st.tuples(st.integers(0, 33), st.integers(0, 33), st.integers(0, 1), TIMES), min_size=1, max_size=40)
IN_VIEW = EVENTS.filter(lambda events: any(channel_of(*event) for event in events))
ANY_BYTES = st.one_of(st.binary(max_size=60), st.text("0123456789\t\n\r -.x", max_size=60).map(str.encode))
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@FEW
@given(st.lists(IN_VIEW, min_size=1, max_size=3), st.integers(1, 40))
def test_paper_binning_from_raw_and_from_text_equals_the_oracle(recordings, time_steps):
    raw = [raw_bytes(events) for events in recordings]
    text = [raw_to_text(data) for data in raw]
    assert text == [oracle_text(events) for events in recordings]
    packed = raw_frames(raw, time_steps)
    assert packed.dtype == np.uint8 and packed.shape == (len(raw), -(-time_steps * 2 * 34 * 34 // 8))
    assert np.array_equal(packed, text_frames(text, time_steps))
    assert np.array_equal(unpacked(packed), [parse_as_published(data.decode(), time_steps) for data in text])
    assert not unpacked(packed)[..., -1].any(), "the published reading leaves the last frame empty"


@FEW
@given(st.lists(IN_VIEW, min_size=1, max_size=3), st.integers(1, 40), st.sampled_from(["time", "count"]))
def test_time_and_count_binning_equal_the_oracle(recordings, time_steps, binning):
    frames = unpacked(raw_frames([raw_bytes(events) for events in recordings], time_steps, binning))
    assert np.array_equal(frames, [oracle_slices(events, time_steps, binning) for events in recordings])


WORKED = [(10, 20, 0, 0),         # (11, 21): bin 0
          (10, 20, 0, 7500),      # (10.75, 20.5): half away from zero, so (11, 21); bin 2.5, so 3
          (10, 20, 0, 7501),      # (10.75, 20.4999): (11, 20); bin 3
          (10, 20, 1, 3000),      # (10.9, 20.8): (11, 21), ON; bin 1 exactly
          (10, 20, 1, 3000),      # again: kept
          (10, 20, 0, 105_000),   # (7.5, 14): (8, 14); bin 35
          (10, 20, 0, 210_000),   # (4, 21); bin 70
          (10, 20, 0, 315_000),   # back at (11, 21); bin 105
          (0, 0, 0, 15_000)]      # (0.5, 0): out of view


def test_the_text_format_to_the_byte():
    assert raw_to_text(raw_bytes(WORKED)) == b"123\t70\t\n252\t35\t\n360\t3\t\n361\t0\t3\t105\t\n1517\t1\t1\t\n"


def test_frames_by_hand():
    frames = unpacked(raw_frames([raw_bytes(WORKED)], 4))[0]
    assert [tuple(place) for place in np.argwhere(frames)] == [(0, 10, 19, 2), (0, 10, 20, 2), (1, 10, 20, 0)]
    assert not unpacked(raw_frames([raw_bytes(WORKED)], 3))[0][0].any(), "bin 3 is bin T: left out"
    counted = unpacked(raw_frames([raw_bytes(WORKED)], 3, "count"))[0]
    assert counted.sum(axis=(0, 1, 2)).tolist() == [2, 2, 3], "two events on one pixel; one out of view; three"


def test_frames_without_events_in_the_first_steps_are_valid_and_dark():
    assert not raw_frames([raw_bytes([(15, 15, 1, 200_000)])], 30).any()


def test_a_recording_of_which_nothing_stays_in_view_is_damaged():
    data = raw_bytes([(0, 0, 0, 80_000), (1, 1, 1, 200_000)])
    both = [raw_bytes(WORKED), data]
    for decode in (lambda: raw_to_text(data), lambda: raw_frames(both, 30), lambda: raw_frames([data], 3, "time")):
        with pytest.raises(DamagedRecording, match="in view"):
            decode()


# ---- a small data set in every form


def some_events(generator, count):
    times = np.sort(generator.integers(0, 310_000, count))
    return [(int(x), int(y), int(on), int(t)) for x, y, on, t in zip(*generator.integers(0, 34, (2, count)),
                                                                    generator.integers(0, 2, count), times)]


def write_raw(folder, train=23, test=5, events=120):
    generator = np.random.default_rng(1)
    for split, count in (("Train", train), ("Test", test)):
        for number in range(count):
            path = folder / split / str(generator.integers(0, 10)) / f"{number + 2:05d}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw_bytes(some_events(generator, events)))
    return folder


def write_zips(raw, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("Train", "Test"):
        with zipfile.ZipFile(folder / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"__MACOSX/{split}/1/00001.bin", b"not a recording")
            for path in sorted((raw / split).rglob("*.bin")):
                archive.write(path, path.relative_to(raw))
    return folder


def same(one, other):
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels) for a, b in zip(one, other))


def run(main, *arguments):
    try:
        main([str(argument) for argument in arguments])
        return 0
    except SystemExit as exit:
        return exit.code


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


def test_what_is_missing_is_said(tmp_path):
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


@FEW
@given(ANY_BYTES, st.sampled_from(["paper", "time", "count"]))
def test_any_bytes_are_a_recording_or_a_damaged_one(data, binning):
    for decode in (lambda: raw_frames([data], 4, binning), lambda: text_frames([data], 4), lambda: raw_to_text(data)):
        try:
            decode()
        except DamagedRecording:
            pass


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


# ---- commands


def test_commands_refuse_with_a_sentence(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw")
    text = tmp_path / "text"
    assert run(convert_nmnist.main, "--path", raw, "--out", text) == 0
    (tmp_path / "file").write_text("")
    for main, arguments, part in ((convert_nmnist.main, ("--path", tmp_path / "no" / "thing", "--out", text), "468j46mzdv"),
                                  (convert_nmnist.main, ("--path", raw, "--out", text), "--out"),
                                  (convert_nmnist.main, ("--path", text, "--out", tmp_path / "new"), "already"),
                                  (convert_nmnist.main, ("--path", raw, "--out", tmp_path / "file"), "--out"),
                                  (preview_nmnist.main, ("--path", raw, "--index", 23, "--out", tmp_path), "--index 23"),
                                  (preview_nmnist.main, ("--path", raw, "--time-step", 5000, "--out", tmp_path), "--time_step"),
                                  (preview_nmnist.main, ("--path", raw, "--out", tmp_path / "file"), "--out"),
                                  (preview_nmnist.main, ("--path", text, "--nmnist-binning", "time", "--out", raw), "binning")):
        capsys.readouterr()
        assert run(main, *arguments) == 2
        err = capsys.readouterr().err
        assert part in err and "Traceback" not in err and err.count("\n") == 1


def test_preview_draws_a_sheet_and_a_film(tmp_path, capsys):
    import cv2
    raw = write_raw(tmp_path / "raw")
    arguments = ("--path", raw, "--split", "Test", "--index", 2, "--time-step", 6, "--out", tmp_path / "out")
    assert run(preview_nmnist.main, *arguments) == 0
    sheet, film = capsys.readouterr().out.split()
    picture = cv2.imread(sheet)
    assert sheet.endswith(".png") and min(picture.shape[:2]) > 200 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 3
    assert cv2.VideoCapture(film).get(cv2.CAP_PROP_FRAME_COUNT) == 6


def test_a_picture_shows_x_to_the_right_and_y_downwards():
    frames = np.zeros((1, 2, 34, 34), bool)
    frames[0, 1, 30, 2] = True
    assert np.argwhere((preview_nmnist.coloured(frames)[0] != 255).any(axis=-1)).tolist() == [[2, 30]]
