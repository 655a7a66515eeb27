"""The data sets as tensors in memory, fetched where they are missing."""

import gzip
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Dict, NamedTuple, Sequence, Tuple

import torch
from termcolor import cprint
from torch import Tensor

from utils.batches import Samples
from utils.errors import UserError
from utils.idx import read_idx
from utils.sources import Source, debian_package, fetch_from, installed_folder, torchvision_download

FASHION_MNIST_SOURCES = (torchvision_download("FashionMNIST"), installed_folder("/usr/share/datasets/fashion-mnist"),
                         debian_package("dataset-fashion-mnist"))
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


class Images(NamedTuple):
    """A data set of images: uint8 (N, height, width) or (N, channels, height, width), and int64 labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def normalised(self, mean: float, std: float, flatten: bool = False) -> Tuple[Samples, Samples]:
        """Training and test samples in float32, (x / 255 − mean) / std; `flatten` gives (N, pixels)."""
        def samples(images: Tensor, labels: Tensor) -> Samples:
            inputs = images.float().div_(255).sub_(mean).div_(std)
            return Samples(inputs.flatten(1) if flatten else inputs, labels)

        return samples(self.train_images, self.train_labels), samples(self.test_images, self.test_labels)


def load_fashion_mnist(root: str) -> Images:
    """Fashion-MNIST from <root>/FashionMNIST/raw, torchvision's layout, raw or .gz; what is missing is fetched there.

    Raises UserError where a file is damaged, and where what is missing can't be fetched. No file that is there is overwritten.
    """
    folder = Path(root) / "FashionMNIST" / "raw"
    missing = {name: md5 for name, md5 in FASHION_MNIST_MD5.items() if not _is_there(folder, name)}
    if missing:
        _fetch_idx("Fashion-MNIST", FASHION_MNIST_SOURCES, missing, folder)
    _warn_of_other_md5(folder, FASHION_MNIST_MD5)
    return Images(*_read_split(folder, "train"), *_read_split(folder, "t10k"))


def _read_split(folder: Path, split: str) -> Tuple[Tensor, Tensor]:
    images_path, labels_path = folder / f"{split}-images-idx3-ubyte", folder / f"{split}-labels-idx1-ubyte"
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise UserError(f"{images_path}: holds {len(images)} images of {images.shape[1]} × {images.shape[2]}, not of 28 × 28")
    if len(images) != len(labels):
        raise UserError(f"{labels_path}: holds {len(labels)} labels for {len(images)} images; fetch both again with `make data`")
    if labels.max() > 9:
        raise UserError(f"{labels_path}: holds the label {labels.max()}, where 0 to 9 are meant; fetch it again with `make data`")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()).long()


def _warn_of_other_md5(folder: Path, md5: Dict[str, str]) -> None:
    """A re-packed copy may serve (shapes and labels are checked on reading), but it is not the published file."""
    for name, expected in md5.items():
        path = folder / name
        if path.exists() and hashlib.md5(path.read_bytes()).hexdigest() != expected:
            cprint(f"warning: {path} is not the published file (its md5 differs)", "yellow")


def _fetch_idx(what: str, sources: Sequence[Source], md5: Dict[str, str], folder: Path) -> None:
    """Fetch the raw files into `folder`, each under its name only once it is whole and of the right md5."""
    def place(fetched: Path) -> None:
        contents = {name: _raw_bytes(fetched, name) for name in md5}
        for name, data in contents.items():
            if hashlib.md5(data).hexdigest() != md5[name]:
                raise ValueError(f"{name} has the wrong md5")
        for name, data in contents.items():
            (fetched / "whole").write_bytes(data)
            os.replace(fetched / "whole", folder / name)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Fetching {what} into {folder} …", flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as scratch:
            source = fetch_from(sources, Path(scratch), place, what)
    except OSError as error:
        raise UserError(f"--path {folder.parent.parent}: the data can't be written there ({error.strerror})") from error
    print(f"Fetched {what} from {source}.", flush=True)


def _raw_bytes(folder: Path, name: str) -> bytes:
    """A fetched file's raw contents, wherever under `folder` the source has put it, unpacked if need be."""
    path = next((path for path in sorted(folder.rglob(f"{name}*")) if path.name in (name, name + ".gz")), None)
    if path is None:
        raise ValueError(f"{name} is not in it")
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _is_there(folder: Path, name: str) -> bool:
    return (folder / name).exists() or (folder / f"{name}.gz").exists()
