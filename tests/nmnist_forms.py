"""A small N-MNIST in every form: raw recordings and zips."""

import zipfile

import numpy as np
import torch

from tests.nmnist_oracle import raw_bytes


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
