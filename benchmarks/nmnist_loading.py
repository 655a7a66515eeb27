"""Times the loading of N-MNIST: raw recordings, vectorised and cached, against text files parsed one sample at a time.

    python -m benchmarks.nmnist_loading --path data/NMNIST [--time-step 30] [--turns 3]

The parser is what one writes for the published text layout: a file per sample, a NumPy row per line. The two take turns, in CPU
seconds of one thread, on the same recordings, converted to text in a scratch folder first.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Callable

import numpy as np

from utils.convert_nmnist import main as convert
from utils.data.nmnist import cache_file, load_nmnist
from utils.data.nmnist_files import find_recordings


def parse(path: Path, time_steps: int) -> np.ndarray:
    """The frames (2, 34, 34, T) of a text recording."""
    frames = np.zeros((2, 34, 34, time_steps), np.float32)
    for line in path.read_text().splitlines():
        values = np.array(line.split(), dtype=np.int64)
        polarity, position = divmod(values[0] - 1, 1156)
        bins = values[1:]
        frames[polarity, position // 34, position % 34, bins[(bins >= 1) & (bins < time_steps)] - 1] = 1
    return frames


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="./data/NMNIST", help="folder of the raw recordings")
    parser.add_argument("--time-step", type=int, default=30, help="time steps T")
    parser.add_argument("--turns", type=int, default=3, help="how often each is timed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert(["--path", args.path, "--out", f"{scratch}/text"])
        files = sorted(Path(scratch).rglob("*.dat"))
        parsing, first, cached = [], [], []
        for _ in range(args.turns):
            cache_file(find_recordings(args.path)[0], args.time_step).unlink(missing_ok=True)
            first.append(seconds(lambda: load_nmnist(args.path, args.time_step)))
            cached.append(seconds(lambda: load_nmnist(args.path, args.time_step)))
            parsing.append(seconds(lambda: [parse(path, args.time_step) for path in files]))
    for name, times in (("first reading, cache written", first), ("from the cache", cached)):
        ratio = statistics.median([slow / fast for slow, fast in zip(parsing, times)])
        print(f"{name}: {statistics.median(times):.3f} s for {len(files)} recordings, {ratio:.0f} times faster than the text")
    print(f"text, one sample at a time: {statistics.median(parsing):.3f} s")


if __name__ == "__main__":
    main()
