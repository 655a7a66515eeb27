"""The readers under any input: round trips and refusals as properties, and files that unpack to more than is meant."""

import contextlib
import gzip
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, HealthCheck, settings, strategies as st
from hypothesis.extra import numpy as arrays

from tests.rewritten_zip import parts, rewritten
from tests.small_data import write_small_nmnist
from utils.data.cifar_files import pack_batch, parse_batch
from utils.data.cifar_sheets import read_sheet
from utils.data.idx import read_idx
from utils.data.inert_pickle import read_inert
from utils.data.nmnist import load_nmnist
from utils.errors import UserError
from utils.log import COLUMNS, Log, read_log

PLAIN = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])



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
