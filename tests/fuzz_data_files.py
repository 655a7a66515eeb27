"""Readers of data files to fuzz: valid files, how they are altered, and what holds for whatever is read."""

import gzip
import io
import json
import pickle
import struct
import zipfile

import cv2
import numpy as np
import torch

from tests.fuzz_alterations import altered, Evil, hostile_pickle, not_executed, refusal, Refused
from tests.small_data import write_small_nmnist
from utils.data import nmnist
from utils.data.cifar_files import parse_batch
from utils.data.cifar_sheets import repack_sheets, TRAIN_SHEETS
from utils.data.idx import read_idx
from utils.data.nmnist import load_nmnist
from utils.data.recordings import BINNINGS, DamagedRecording, FRAME_BYTES, raw_frames, raw_to_text, text_frames
from utils.errors import UserError


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
