"""Readers, sources and batches of the data, and torchvision's late import."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.small_data import RAW, write_small_data, write_small_mnist
from utils import fetch_data
from utils.data import fetching, idx_datasets
from utils.data.batches import Batches, Samples
from utils.data.datasets import load_fashion_mnist, load_mnist
from utils.data.fetching import NotFetched, fetch, unpack
from utils.data.idx import read_idx
from utils.data.npm import npm_package
from utils.data.sources import Source, fetch_from
from utils.errors import UserError


def test_reads_raw_and_compressed_files_alike(tmp_path, capsys):
    raw = load_fashion_mnist(write_small_data(tmp_path))
    assert "md5 differs" in capsys.readouterr().out, "a re-packed copy is used, with a warning"
    for path in (tmp_path / RAW).iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = load_fashion_mnist(tmp_path)
    assert capsys.readouterr().out.count("md5 differs") == 4
    assert all(torch.equal(one, other) for one, other in zip(raw, packed))
    assert raw.train_images.dtype == torch.uint8 and raw.train_images.shape == (60, 28, 28)
    assert raw.train_labels.dtype == torch.int64


def test_idx_by_hand(tmp_path):
    (tmp_path / "file").write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6]))
    assert read_idx(tmp_path / "file", 2).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_normalised_once_per_run(tmp_path):
    data = load_fashion_mnist(write_small_data(tmp_path))
    train, test = data.normalised(0.1307, 0.3081, flatten=True)
    assert train.inputs.shape == (60, 784) and test.inputs.dtype == torch.float32
    expected = (data.test_images[3].flatten().double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(test.inputs[3].double(), expected, atol=1e-6, rtol=1e-6)
    images, _ = data.normalised(0.1307, 0.3081)
    assert torch.equal(images.inputs, train.inputs.view(60, 1, 28, 28)), "a grey image has a channel"


def test_mnist_has_the_same_layout_in_its_own_folder(tmp_path):
    write_small_mnist(tmp_path)
    write_small_data(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(load_mnist(tmp_path), load_fashion_mnist(tmp_path)))


def test_the_first_source_that_serves_is_used_and_nothing_is_half_there(tmp_path, monkeypatch, capsys):
    given = write_small_data(tmp_path / "given")
    names = [path.name for path in (given / RAW).iterdir()]
    md5 = {name: hashlib.md5((given / RAW / name).read_bytes()).hexdigest() for name in names}

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

    sources = (Source("torn", torn), Source("damaged", damaged), Source("good", good))
    monkeypatch.setattr(idx_datasets, "FASHION_MNIST", idx_datasets.FASHION_MNIST._replace(md5=md5, sources=sources))
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
            "from utils.data.torchvision_import import import_torchvision as load; a = load(); assert load() is a;"
            "assert a.transforms.ToTensor() and a.datasets.FashionMNIST")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_sources_get_an_absolute_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    Path("scratch").mkdir()
    assert fetch_from([Source("here", seen.append)], Path("scratch"), lambda folder: None, "a data set") == "here"
    assert seen[0].is_absolute() and seen[0].is_dir()


def test_an_interrupted_fetch_leaves_nothing_and_is_started_again(tmp_path):
    def interrupted(folder):
        (folder / "file").write_bytes(b"half")
        raise KeyboardInterrupt

    def good(folder):
        (folder / "file").write_bytes(b"whole")

    def collect(folder):
        return {"file": (folder / "file").read_bytes()}

    with pytest.raises(KeyboardInterrupt):
        fetch("a data set", [Source("interrupted", interrupted)], tmp_path, tmp_path / "there", collect)
    assert list(tmp_path.iterdir()) == []
    fetch("a data set", [Source("good", good)], tmp_path, tmp_path / "there", collect)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "there" / "file"]
    assert (tmp_path / "there" / "file").read_bytes() == b"whole"


def test_what_a_killed_fetch_has_left_is_removed_once_it_is_old(tmp_path):
    for name, hours in (("fetching-old", 25), ("fetching-new", 1), ("mine", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"half")
        then = fetching.time.time() - 3600 * hours
        os.utime(tmp_path / name, (then, then))
    with pytest.raises(NotFetched, match="nobody: .*data/README.md"):
        fetch("a data set", [Source("nobody", lambda folder: None)], tmp_path, tmp_path / "there",
              lambda folder: {"file": (folder / "file").read_bytes()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fetching-new", "mine"]


def write_archive(path, contents):
    with tarfile.open(path, "w:gz") as packed:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))


def test_no_path_in_an_archive_leads_out_of_the_folder(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    write_archive(tmp_path / "a.tar.gz", {"package/one": b"1", "../../two": b"2", str(tmp_path / "three"): b"3"})
    unpack(tmp_path / "a.tar.gz", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"one": b"1", "two": b"2", "three": b"3"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "deep"]
    monkeypatch.setattr(fetching, "LARGEST_ARCHIVE", 2)
    with pytest.raises(ValueError, match="more than 2 bytes"):
        unpack(tmp_path / "a.tar.gz", folder)


def test_npm_packages_are_packed_and_unpacked_without_installing(tmp_path, monkeypatch):
    write_archive(tmp_path / "packed.tgz", {"package/data/file": b"contents"})
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(rf"""#!/bin/sh
case "$*" in
  view\ thing@1.0.0\ *) ;;
  pack\ thing@1.0.0\ *--ignore-scripts*) cp "{tmp_path}/packed.tgz" thing-1.0.0.tgz ;;
  *) echo "npm error code E404" >&2; echo "npm error 404 Not Found" >&2; exit 1 ;;
esac
""")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(client.parent), prepend=os.pathsep)
    (tmp_path / "scratch").mkdir()
    npm_package("thing@1.0.0").fetch(tmp_path / "scratch")
    assert (tmp_path / "scratch" / "file").read_bytes() == b"contents"
    with pytest.raises(RuntimeError, match="npm view failed: code E404, 404 Not Found"):
        npm_package("other@1.0.0").fetch(tmp_path / "scratch")


def test_fetching_all_fails_only_where_another_source_should_have_served(tmp_path, monkeypatch, capsys):
    def raising(error):
        def load(root):
            raise error
        return load

    def status(*names):
        with pytest.raises(SystemExit) as exit:
            fetch_data.main(["--path", str(tmp_path), "--only", *names])
        return exit.value.code, capsys.readouterr()

    write_small_data(tmp_path)
    monkeypatch.setitem(fetch_data.LOADERS, "mnist", ("MNIST", raising(NotFetched("no route"))))
    monkeypatch.setitem(fetch_data.LOADERS, "cifar10", ("CIFAR-10", raising(UserError("damaged"))))
    monkeypatch.setitem(fetch_data.LOADERS, "cifar100", ("CIFAR-100", raising(NotFetched("get it by hand"))))
    code, (out, err) = status("fashion-mnist", "cifar100", "nmnist")
    assert code == 0 and "Fashion-MNIST: 60 training and 30 test samples" in out
    assert "warning: get it by hand" in err and "Train.zip" in err and "error:" not in err
    code, (_, err) = status("mnist", "fashion-mnist")
    assert code == 2 and "error: no route" in err
    monkeypatch.setitem(fetch_data.LOADERS, "cifar100", ("CIFAR-100", raising(UserError("damaged"))))
    assert status("cifar10")[0] == status("cifar100")[0] == 2
    (tmp_path / "NMNIST" / "Train").mkdir(parents=True)
    code, (out, err) = status("nmnist")
    assert code == 0 and "N-MNIST: in" in out and err == ""
