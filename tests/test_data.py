"""Readers, sources and batches of the data, and torchvision's late import."""

import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import torch

from tests.small_data import RAW, write_small_data
from utils import datasets
from utils.batches import Batches, Samples
from utils.datasets import load_fashion_mnist
from utils.idx import read_idx
from utils.sources import Source, fetch_from


def test_reads_raw_and_compressed_files_alike(tmp_path, capsys):
    raw = load_fashion_mnist(write_small_data(tmp_path))
    assert "md5 differs" in capsys.readouterr().out, "a re-packed copy is used, with a warning"
    for path in (tmp_path / RAW).iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = load_fashion_mnist(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(raw, packed))
    assert raw.train_images.dtype == torch.uint8 and raw.train_images.shape == (60, 28, 28) and raw.train_labels.dtype == torch.int64


def test_idx_by_hand(tmp_path):
    (tmp_path / "file").write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6]))
    assert read_idx(tmp_path / "file", 2).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_normalised_once_per_run(tmp_path):
    data = load_fashion_mnist(write_small_data(tmp_path))
    train, test = data.normalised(0.1307, 0.3081, flatten=True)
    assert train.inputs.shape == (60, 784) and test.inputs.dtype == torch.float32
    expected = (data.test_images[3].flatten().double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(test.inputs[3].double(), expected, atol=1e-6, rtol=1e-6)


def test_the_first_source_that_serves_is_used_and_nothing_is_half_there(tmp_path, monkeypatch, capsys):
    given = write_small_data(tmp_path / "given")
    names = [path.name for path in (given / RAW).iterdir()]
    monkeypatch.setattr(datasets, "FASHION_MNIST_MD5", {name: hashlib.md5((given / RAW / name).read_bytes()).hexdigest() for name in names})

    def torn(folder):
        (folder / names[0]).write_bytes(b"half")
        raise TimeoutError("the line went dead")

    def damaged(folder):
        for name in names:
            (folder / name).write_bytes((given / RAW / name).read_bytes() + b"x")

    def good(folder):
        (folder / "deep").mkdir()
        for name in names:
            (folder / "deep" / f"{name}.gz").write_bytes(gzip.compress((given / RAW / name).read_bytes()))

    monkeypatch.setattr(datasets, "FASHION_MNIST_SOURCES", (Source("torn", torn), Source("damaged", damaged), Source("good", good)))
    fetched = load_fashion_mnist(tmp_path / "new")
    assert "from good" in capsys.readouterr().out
    assert torch.equal(fetched.train_images, load_fashion_mnist(given).train_images)
    assert sorted(path.name for path in (tmp_path / "new").rglob("*") if path.is_file()) == sorted(names)


def test_batches_cover_every_sample_once_in_a_new_order():
    samples = Samples(torch.arange(10.)[:, None], torch.arange(10))
    epochs = [[labels.tolist() for _, labels in Batches(samples, 4, shuffled=True)] for _ in range(2)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 2] and sorted(sum(batches, [])) == list(range(10))
    assert epochs[0] != epochs[1]
    inputs = torch.cat([x for x, _ in Batches(samples, 3, shuffled=False)])
    assert torch.equal(inputs, samples.inputs)


def test_torchvision_is_imported_late_and_works():
    code = ("import sys, fmnist_mlp; assert 'torchvision' not in sys.modules;"
            "from utils.torchvision_import import import_torchvision as load; a = load(); assert load() is a;"
            "assert a.transforms.ToTensor() and a.datasets.FashionMNIST")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_sources_get_an_absolute_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    Path("scratch").mkdir()
    assert fetch_from([Source("here", seen.append)], Path("scratch"), lambda folder: None, "a data set") == "here"
    assert seen[0].is_absolute() and seen[0].is_dir()
