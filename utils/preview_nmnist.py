"""Draws a recording of N-MNIST as the network sees it: python -m utils.preview_nmnist --path PATH [--index 0] --out DIR

Writes its frames on one sheet (PNG) and as a short film (MP4), ON events in orange and OFF events in blue.
"""

import argparse
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch

from utils.arguments import place, whole
from utils.data.nmnist import decoder, unpack_frames
from utils.data.nmnist_files import SPLITS, Entry, damage_report, decoded, find_recordings
from utils.data.recordings import BIN, BINNINGS, SIDE
from utils.errors import UserError, told_in_a_sentence

PAPER, ON, OFF, BOTH = "#FFFFFF", "#D55E00", "#0072B2", "#000000"  # safe for colour-blind readers
COLUMNS = 10            # of the sheet
ZOOM = 12               # screen pixels of the film per pixel
FRAMES_PER_SECOND = 10  # of the film
MOST_FRAMES = 300       # that a sheet can show


def read_frames(path: str, split: str, index: int, time_steps: int, binning: str) -> Tuple[Entry, np.ndarray]:
    """The recording at a place in the split's order of numbers, its frames bool (T, 2, 34, 34). Raises UserError."""
    if time_steps > MOST_FRAMES:
        raise UserError(f"--time_step {time_steps}: at most {MOST_FRAMES} frames are drawn")
    recordings = find_recordings(path)[1][split]
    if index >= len(recordings.entries):
        raise UserError(f"--index {index}: {split} has the recordings 0 to {len(recordings.entries) - 1}")
    chosen, damaged = recordings._replace(entries=recordings.entries[index:index + 1]), []
    for entry, packed in decoded(chosen, decoder(recordings, time_steps, binning), damaged):
        return entry, unpack_frames(torch.from_numpy(packed)[None])[:, 0].bool().numpy()
    raise UserError(damage_report(chosen, damaged))


def coloured(frames: np.ndarray) -> np.ndarray:
    """Pictures uint8 RGB (T, 34, 34, 3), rows from top to bottom, of frames (T, 2, x, y)."""
    palette = np.array([list(bytes.fromhex(colour[1:])) for colour in (PAPER, OFF, ON, BOTH)], np.uint8)
    return palette[frames[:, 0] + 2 * frames[:, 1]].swapaxes(1, 2)


def draw_sheet(pictures: np.ndarray, names: Sequence[str], title: str, path: Path) -> None:
    """All pictures in reading order on one sheet, each under its name."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch
    rows = -(-len(pictures) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(COLUMNS, 1.2 * rows + 0.6), squeeze=False, layout="constrained")
    for axis in axes.flat[len(pictures):]:
        axis.remove()
    for axis, picture, name in zip(axes.flat, pictures, names):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(name, fontsize=7, pad=2)
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color="#BBBBBB", linewidth=0.5)
    figure.suptitle(title, fontsize=10)
    patches = [Patch(color=ON, label="ON"), Patch(color=OFF, label="OFF"), Patch(color=BOTH, label="both")]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_film(pictures: np.ndarray, names: Sequence[str], path: Path) -> None:
    """One picture after the other, enlarged, its name below."""
    side, foot = SIDE * ZOOM, 3 * ZOOM
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FRAMES_PER_SECOND, (side, side + foot))
    if not film.isOpened():
        raise UserError(f"{path}: this OpenCV can't write MP4 films")
    for picture, name in zip(pictures, names):
        canvas = np.full((side + foot, side, 3), 235, np.uint8)
        canvas[:side] = cv2.resize(picture, (side, side), interpolation=cv2.INTER_NEAREST)
        cv2.putText(canvas, name, (ZOOM, side + 2 * ZOOM), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (60, 60, 60), 1, cv2.LINE_AA)
        film.write(cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR))
    film.release()


def preview(args: argparse.Namespace) -> List[Path]:
    """Draw what the command line asks for; returns the files. Raises UserError."""
    entry, frames = read_frames(args.path, args.split, args.index, args.time_step, args.nmnist_binning)
    pictures, steps = coloured(frames), range(len(frames))
    times = [f"{BIN * step // 1000} to {BIN * (step + 1) // 1000} ms" for step in steps]
    names = times if args.nmnist_binning == "paper" else [f"step {step + 1} of {len(frames)}" for step in steps]
    title = f"N-MNIST {args.split}, recording {entry.number}: a {entry.label} (binning: {args.nmnist_binning}, T = {len(frames)})"
    stem = Path(args.out) / f"{args.split}-{entry.label}-{entry.number}-{args.nmnist_binning}-T{len(frames)}"
    sheet, film = stem.with_suffix(".png"), stem.with_suffix(".mp4")
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(pictures, names, title, sheet)
    except OSError as error:
        raise UserError(f"--out {args.out}: nothing can be written there ({error.strerror})") from error
    write_film(pictures, names, film)
    return [sheet, film]


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a recording of N-MNIST.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--path", type=place, required=True, default=argparse.SUPPRESS,
                        help="folder of the recordings or of their zips, as for the training script")
    parser.add_argument("--split", choices=SPLITS, default="Train", help="part of the data set")
    parser.add_argument("--index", type=whole(0), default=0, help="place of the recording in the split, by its number")
    parser.add_argument("-t", "--time_step", "--time-step", type=whole(1), default=30, help="time steps T")
    parser.add_argument("--nmnist-binning", choices=BINNINGS, default="paper", help="how events become frames")
    parser.add_argument("--out", type=place, required=True, default=argparse.SUPPRESS, metavar="DIR", help="folder for the PNG and the MP4")
    args = parser.parse_args(argv)
    with told_in_a_sentence():
        for path in preview(args):
            print(path)


if __name__ == "__main__":
    main()
