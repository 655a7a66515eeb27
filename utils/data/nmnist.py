"""N-MNIST as binary frames in memory, eight pixels to a byte, unpacked batch by batch."""

import math
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch
from termcolor import cprint
from torch import Tensor

from utils.data.batches import Samples
from utils.data.nmnist_files import SPLITS, Decode, Recordings, damage_report, decoded, find_recordings, warn_of_other_md5
from utils.data.recordings import BINNINGS, FRAME_BYTES, SIDE, raw_frames, text_frames
from utils.errors import UserError

CACHE_VERSION = 1  # to be raised whenever the same recordings give other frames


class PackedSplit(NamedTuple):
    """Packed frames uint8 (N, T · 289), labels int64 (N,), and the warning about recordings that are left out, if any."""

    frames: np.ndarray
    labels: np.ndarray
    report: str


def load_nmnist(path: str, time_steps: int, binning: str = "paper") -> Tuple[Samples, Samples]:
    """Training and test samples: inputs packed, uint8 (N, T · 289), prepared as float32 frames (T, batch, 2, 34, 34) of 0 and 1.

    `path` or its parent holds the recordings (see `find_recordings`); `binning` is one of BINNINGS (see `raw_frames`). What has
    been read is kept in a cache beside the recordings, unless the folder is read-only. Raises UserError where none can be read.
    """
    if binning not in BINNINGS:
        raise UserError(f"--nmnist-binning {binning}: choose one of {', '.join(BINNINGS)}")
    folder, splits = find_recordings(path)
    decoders = {split: decoder(splits[split], time_steps, binning) for split in SPLITS}
    if binning == "paper" and time_steps == 1:
        cprint("warning: --time_step 1: the paper's binning leaves the last frame empty, so nothing is shown", "yellow")
    cache = cache_file(folder, time_steps, binning)
    key = " ".join([str(CACHE_VERSION), binning, str(time_steps), *(splits[split].fingerprint for split in SPLITS)])
    packed = _read_cache(cache, key, time_steps)
    if packed is None:
        print(f"Reading the recordings of N-MNIST in {folder} …", flush=True)
        warn_of_other_md5(splits)
        packed = {split: _pack(splits[split], decoders[split], time_steps) for split in SPLITS}
        _write_cache(cache, key, packed)
    for split in SPLITS:
        if packed[split].report:
            cprint(packed[split].report, "yellow")
    train, test = (Samples(torch.from_numpy(packed[split].frames), torch.from_numpy(packed[split].labels), unpack_frames)
                   for split in SPLITS)
    return train, test


def cache_file(folder: Path, time_steps: int, binning: str = "paper") -> Path:
    """Where the packed frames of the recordings in `folder` are kept."""
    return folder / f".cache-nmnist-{binning}-T{time_steps}.npz"


def unpack_frames(packed: Tensor) -> Tensor:
    """Binary frames, a new float32 (T, batch, 2, 34, 34), of packed frames, uint8 (batch, T · 289), on their device."""
    batch, time_steps = len(packed), packed.shape[1] // FRAME_BYTES
    by_step = packed.reshape(batch, time_steps, FRAME_BYTES).transpose(0, 1)
    bits = torch.arange(256, device=packed.device)[:, None] >> torch.arange(8, device=packed.device) & 1
    return bits.float().index_select(0, by_step.reshape(-1).int()).reshape(time_steps, batch, 2, SIDE, SIDE)


def decoder(recordings: Recordings, time_steps: int, binning: str) -> Decode:
    """What makes packed frames of the contents of these recordings. Raises UserError where they can't be binned so."""
    if not recordings.is_text:
        return lambda contents: raw_frames(contents, time_steps, binning)
    if binning != "paper":
        raise UserError(f"--nmnist-binning {binning}: the text layout in {recordings.where} has the bins of the paper only; "
                        "use --nmnist-binning paper, or name the raw recordings or their zips with --path")
    return lambda contents: text_frames(contents, time_steps)


def _pack(recordings: Recordings, decode: Decode, time_steps: int) -> PackedSplit:
    """Every recording's frames go straight to their place in one array, so that nothing is held twice."""
    count, width = len(recordings.entries), time_steps * FRAME_BYTES
    sound, damaged = 0, []
    try:
        # A system may promise more than there is, and end the program that uses it. NumPy has other exceptions for absurd sizes.
        if count * width > _physical_memory():
            raise MemoryError
        frames, labels = np.empty((count, width), np.uint8), np.empty(count, np.int64)
        for entry, frames_of_one in decoded(recordings, decode, damaged):
            frames[sound], labels[sound] = frames_of_one, entry.label
            sound += 1
    except MemoryError as error:
        need = f"{count:,d} recordings need {count * width // 2**30:,d} GiB of memory"
        raise UserError(f"--time_step {time_steps}: {need}, more than there is; use fewer steps") from error
    return PackedSplit(frames[:sound], labels[:sound], damage_report(recordings, damaged))


def _physical_memory() -> int:
    """Bytes; where the system does not tell, as many as can be addressed."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
        return os.sysconf("SC_PAGE_SIZE") * pages if pages > 0 else sys.maxsize
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def _read_cache(path: Path, key: str, time_steps: int) -> Optional[Dict[str, PackedSplit]]:
    """None where there is no cache, or one of other recordings, or a damaged one."""
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            packed = {split: PackedSplit(stored[f"{split}_frames"], stored[f"{split}_labels"], str(stored[f"{split}_report"]))
                      for split in SPLITS}
        width = time_steps * FRAME_BYTES
        sound = all(frames.dtype == np.uint8 and labels.dtype == np.int64 and frames.shape == (len(labels), width)
                    and len(labels) > 0 and 0 <= labels.min() and labels.max() <= 9 for frames, labels, _ in packed.values())
        return packed if sound else None
    except Exception:  # whatever a damaged file makes NumPy raise, the recordings are there to be read again
        return None


def _check_sizes(path: Path) -> None:
    """NumPy takes the memory that an array's header states; raises ValueError where the file holds less or is compressed."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                if member.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{member.filename} is not as this program writes it")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                    raise ValueError(f"{member.filename} has not the size that it states")


def _write_cache(path: Path, key: str, packed: Dict[str, PackedSplit]) -> None:
    """Uncompressed, as zlib would take longer than reading the recordings does. Where writing fails, there is just no cache."""
    arrays = {f"{split}_{name}": array for split in SPLITS for name, array in packed[split]._asdict().items()}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-cache-") as scratch:
            aside = Path(scratch) / path.name
            np.savez(aside, key=key, **arrays)
            os.replace(aside, path)
    except OSError:
        pass
