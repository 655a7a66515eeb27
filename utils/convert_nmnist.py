"""Converts raw recordings of N-MNIST to the published scripts' text layout: python -m utils.convert_nmnist --path RAW --out DIR

RAW is what --path of the training script takes: the official zips or folders of .bin files. Recording NNNNN.bin of a label
becomes DIR/{Train,Test}/<label>/<k>.dat, k its number without leading zeros. Train and Test appear only once they are whole.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import List, Optional, Sequence

from termcolor import cprint

from utils.arguments import place
from utils.data.nmnist_files import SPLITS, Recordings, damage_report, decoded, find_recordings
from utils.data.recordings import raw_to_text
from utils.errors import UserError, told_in_a_sentence


def convert(path: str, out: str) -> None:
    """Write all sound recordings found at `path` as text under `out`; raises UserError where they can't be read or written."""
    folder, splits = find_recordings(path)
    if any(recordings.is_text for recordings in splits.values()):
        raise UserError(f"--path {path}: {folder} holds the text layout already; name the raw recordings or their zips")
    there = [split for split in SPLITS if (Path(out) / split).exists()]
    if there:
        raise UserError(f"--out {out}: there is a {there[0]} already; name another folder")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".converting-") as scratch:
            for split in SPLITS:
                print(f"{split}: {_convert_split(splits[split], Path(scratch) / split):,d} recordings", flush=True)
            for split in SPLITS:
                os.replace(Path(scratch) / split, Path(out) / split)
    except OSError as error:
        raise UserError(f"--out {out}: the text can't be written there ({error.strerror})") from error
    print(f"The text layout is in {out}")


def _convert_split(recordings: Recordings, folder: Path) -> int:
    def decode(contents: List[bytes]) -> List[bytes]:
        return [raw_to_text(data) for data in contents]

    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    written, damaged = 0, []
    for entry, text in decoded(recordings, decode, damaged):
        (folder / str(entry.label) / f"{entry.number}.dat").write_bytes(text)
        written += 1
    report = damage_report(recordings, damaged)
    if report:
        cprint(report, "yellow")
    return written


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description="Convert raw recordings of N-MNIST to the text layout of the published scripts.")
    parser.add_argument("--path", type=place, required=True, metavar="RAW", help="folder of Train.zip and Test.zip, or of Train/ and Test/")
    parser.add_argument("--out", type=place, required=True, metavar="DIR", help="folder for the text layout, without Train and Test in it")
    args = parser.parse_args(argv)
    with told_in_a_sentence():
        convert(args.path, args.out)


if __name__ == "__main__":
    main()
