"""Bad input ends with one clear sentence and exit status 2, before any work, and nothing is overwritten."""

import gzip
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cifar_alexnetf
import cifar_cifarnetf
import fmnist_mlp
import get_rate_cifar_alexnetf
import mnist_conv
import nmnist_conv
from examples import new_neuron
from modules.neuron import make_neuron
from modules.solvers import METHODS, FixedPoint
from modules.zoo import f400
from tests.published_layout import published_file
from tests.small_data import RAW, command, write_idx, write_small_data
from utils import export_nir, report
from utils.data import idx_datasets
from utils.data.sources import Source
from utils.errors import UserError
from utils.trained import find_arguments


@pytest.fixture
def data(tmp_path):
    return write_small_data(tmp_path / "data")


@pytest.fixture
def trained(tmp_path, data):
    """A folder with a run of one epoch in it."""
    folder = tmp_path / "run"
    status, _, err = command("--path", data, "--epochs", 1, "-c", folder, "--device", "cpu")
    assert status == 0, err
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(named, *arguments, script=fmnist_mlp):
    status, out, err = command(*arguments, script=script)
    assert status == 2
    message = err.strip().splitlines()[-1]
    assert named in message and "error: " in message and "Traceback" not in err
    assert "epoch" not in out, "no work was done"


@pytest.mark.parametrize("arguments,named", [
    (["-t", "0"], "--time_step"), (["--time_step", "2.5"], "--time_step"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--lr", "0"], "--lr"), (["--vth", "0"], "--vth"), (["--leaky", "inf"], "--leaky"), (["--drop", "1"], "--drop"),
    (["--train-batch", "0"], "--train-batch"), (["--test-batch", "x"], "--test-batch"), (["--epochs", "0"], "--epochs"),
    (["--schedule", "-3"], "--schedule"), (["--gamma", "0"], "--gamma"), (["--momentum", "1"], "--momentum"),
    (["--wd", "-1"], "--wd"), (["--tol", "0"], "--tol"), (["--threshold", "0"], "--max-iterations"),
    (["--solver", "newton"], "--solver"),
    (["--optimizer", "LBFGS"], "--optimizer"), (["--manualSeed", "-1"], "--manualSeed"), (["--gpu-id", "x"], "--gpu-id"),
    (["--device", "tpu"], "--device"), (["--evaluate"], "--evaluate"), (["--nonsense"], "--nonsense"),
    (["--train-limit", "0"], "--train-limit"), (["--test-limit", "-5"], "--test-limit"), (["-d", "cifar10"], "--dataset"),
    (["--nmnist-binning", "time"], "--nmnist-binning"),
])
def test_flag(arguments, named, trained, data):
    before = contents(trained)
    assert_refused(named, "--path", data, "-c", trained, *arguments)
    assert contents(trained) == before


@pytest.mark.parametrize("flags", [["--train-batch", 1], ["--train-limit", 1], ["--train-batch", 20, "--train-limit", 41]])
def test_a_batch_of_one_sample_in_which_a_batch_norm_finds_no_variance(flags, trained, data):
    before = contents(trained)
    assert_refused("smallest batch has 1 samples, too few for a batch norm's statistics", "--path", data, "-c", trained, *flags)
    assert contents(trained) == before


def test_a_convolutional_network_trains_on_one_sample_at_a_time(tmp_path):
    data = write_small_data(tmp_path / "mnist", folder="MNIST/raw")
    status, _, err = command("--path", data, "-c", tmp_path / "run", "--train-batch", 1, "--train-limit", 2, "-t", 2, "--epochs", 1,
                             "--device", "cpu", script=mnist_conv)
    assert status == 0, err


@pytest.mark.parametrize("vth", ["1e-300", "1e-46", "1e300"])
def test_thresholds_beyond_float32_are_refused(vth, trained, data):
    assert_refused("--vth", "--path", data, "-c", trained, "--vth", vth)


def test_a_checkpoint_of_other_neurons(tmp_path, data, capsys):
    """Whose shapes tell nothing of that; and its script is found by the name of its file, too."""
    run, flags = tmp_path / "run", ["--path", data, "--device", "cpu"]
    assert command(*flags, "--epochs", 1, "-c", run, script=new_neuron)[0] == 0
    path = run / "checkpoint.pth.tar"
    for more in (["--evaluate"], ["-c", tmp_path / "more", "--epochs", 2]):
        assert_refused("its neurons are of the class Refractory", *flags, "--resume", path, *more)
    for tool, more in ((report, ["--path", data]), (export_nir, ["--out", tmp_path / "model.nir"])):
        with pytest.raises(SystemExit, match="2"):
            tool.main([*map(str, ["--resume", path, *more])])
        assert "its neurons are of the class Refractory" in capsys.readouterr().err and not (tmp_path / "model.nir").exists()
    for name in ("examples.new_neuron", "examples/new_neuron.py", "./examples/new_neuron.py"):
        assert find_arguments(path, name, {})[0] is new_neuron.RECIPE
    with pytest.raises(UserError, match="--experiment /examples/new_neuron.py: there is no training script"):
        find_arguments(path, "/examples/new_neuron.py", {})
    before = torch.load(path, weights_only=True)
    del before["neuron"]  # of an earlier version
    torch.save(before, path)
    assert command(*flags, "--resume", path, "--evaluate", script=new_neuron)[0] == 0


def test_a_checkpoint_with_the_solver_of_another_script(tmp_path, data, monkeypatch):
    with monkeypatch.context() as within:
        within.setitem(METHODS, "own", FixedPoint)
        assert command("--path", data, "--device", "cpu", "--epochs", 1, "-c", tmp_path, "--solver", "own")[0] == 0
    with pytest.raises(UserError, match="'own' is none of .*--experiment"):
        find_arguments(tmp_path / "checkpoint.pth.tar", None, {})


def test_gpu_that_is_not_there(trained, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = contents(trained)
    assert_refused("--device cuda", "--path", data, "-c", trained, "--device", "cuda")
    assert contents(trained) == before
    status, _, _ = command("--path", data, "-c", trained / "new", "--gpu-id", "0", "--epochs", 1)
    assert status == 0, "the published command lines all name a GPU and must run without one"


@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("part,harm,reason", [
    ("images-idx3", lambda old: old[:-1], "promises"), ("images-idx3", lambda old: old + b"x", "promises"),
    ("images-idx3", lambda old: b"", "not an IDX file"), ("images-idx3", lambda old: b"\x01" + old[1:], "not an IDX file"),
    ("images-idx3", lambda old: old[:4] + b"\xff" * 12 + old[16:], "promises"),
    ("labels-idx1", lambda old: old[:8] + b"\x0a" + old[9:], "label 10"),
])
def test_damaged_data_file(split, part, harm, reason, trained, data):
    path = data / RAW / f"{split}-{part}-ubyte"
    path.write_bytes(harm(path.read_bytes()))
    before = contents(trained) | contents(data)
    assert_refused(str(path), "--path", data, "-c", trained)
    assert reason in command("--path", data, "-c", trained)[2]
    assert contents(trained) | contents(data) == before


def test_damaged_compressed_file(data):
    path = data / RAW / "train-labels-idx1-ubyte"
    compressed = path.with_name(path.name + ".gz")
    compressed.write_bytes(gzip.compress(path.read_bytes())[:-5])
    path.unlink()
    assert_refused(str(compressed), "--path", data)


def test_images_and_labels_that_do_not_match(data):
    write_idx(data / RAW / "t10k-labels-idx1-ubyte", np.zeros(29, np.uint8))
    assert_refused("29 labels for 30 images", "--path", data)
    write_idx(data / RAW / "t10k-images-idx3-ubyte", np.zeros((30, 28, 27), np.uint8))
    assert_refused("28 × 27", "--path", data)


def test_missing_data_that_cannot_be_fetched(trained, data, tmp_path, monkeypatch):
    def refuse(folder):
        (folder / "half-a-file").write_bytes(b"x")
        raise ConnectionError("no route")

    sources = (Source("first mirror", refuse), Source("second mirror", refuse))
    monkeypatch.setattr(idx_datasets, "FASHION_MNIST", idx_datasets.FASHION_MNIST._replace(sources=sources))
    before = contents(trained)
    assert_refused("first mirror: no route; second mirror: no route", "--path", tmp_path / "nowhere", "-c", trained)
    assert contents(tmp_path / "nowhere") == {}
    missing = data / RAW / "t10k-labels-idx1-ubyte"
    missing.unlink()
    assert_refused("Fashion-MNIST could not be fetched", "--path", data, "-c", trained)
    assert contents(trained) == before


def test_data_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused("--path", "--path", tmp_path / "file" / "data")


def cut_short(path):
    torch.save({"weight": torch.zeros(3000)}, path)
    path.write_bytes(path.read_bytes()[:5000])


def other_network(path):
    network = f400(50, neuron=make_neuron(2, 1), time_steps=2)
    torch.save({"epoch": 1, "state_dict": network.state_dict(), "acc": 1.0, "best_acc": 1.0, "optimizer": {},
                "random_state": None, "arguments": {}}, path)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("make,reason", [
    (lambda path: None, "no such file"), (lambda path: path.mkdir(), "is a folder"),
    (lambda path: path.write_bytes(b""), "not a readable"),
    (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a readable"),
    (lambda path: path.write_bytes(pickle.dumps(Malicious())), "not a readable"),
    (lambda path: torch.save(Malicious(), path), "not a readable"),
    (cut_short, "its end is missing"), (lambda path: torch.save({"weight": torch.zeros(3)}, path), "it has no part 'state_dict'"),
    (lambda path: torch.save([1, 2], path), "holds no checkpoint"),
    (lambda path: torch.save({"state_dict": 3, "epoch": 1, "acc": 1, "best_acc": 1}, path), "holds no checkpoint"),
    (other_network, "another network"),
])
@pytest.mark.parametrize("more", [[], ["--evaluate"]])
def test_checkpoint(make, reason, more, trained, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.pth.tar"
    make(path)
    before = contents(trained)
    assert_refused(f"--resume {path}", "--path", data, "-c", trained, "--resume", path, *more)
    assert reason in command("--path", data, "-c", trained, "--resume", path, *more)[2]
    assert contents(trained) == before and not (tmp_path / "executed").exists()


def test_truncated_checkpoint(trained, data):
    path = trained / "checkpoint.pth.tar"
    whole = path.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_refused(f"--resume {path}", "--path", data, "-c", trained, "--resume", path)


def test_checkpoint_of_another_optimizer(trained, data):
    assert_refused("go on with --optimizer SGD", "--path", data, "-c", trained, "--epochs", 2, "--optimizer", "Adam",
                   "--resume", trained / "checkpoint.pth.tar")


def test_nothing_left_to_train(trained, data):
    before = contents(trained)
    assert_refused("--epochs 1", "--path", data, "-c", trained, "--epochs", 1, "--resume", trained / "checkpoint.pth.tar")
    assert contents(trained) == before


def test_folder_that_cannot_be_written(trained, data, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused("-c ", "--path", data, "-c", tmp_path / "file" / "run")
    rates = ["--resume", trained / "checkpoint.pth.tar", "--evaluate", "--firing-rate"]
    assert_refused("-c ", "--path", data, "-c", tmp_path / "file" / "run", *rates)


@pytest.mark.parametrize("more", [
    ["--resume", "none"], ["-c", "file/run"], ["--epochs", "1", "--resume", "run/checkpoint.pth.tar"],
    ["--optimizer", "Adam", "--epochs", "2", "--resume", "run/checkpoint.pth.tar"],
])
def test_refused_before_the_data_is_loaded(more, trained, tmp_path, monkeypatch):
    def load(args):
        raise AssertionError("the data was loaded")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    status, _, _ = command(*more, script=SimpleNamespace(RECIPE=replace(fmnist_mlp.RECIPE, data=load)))
    assert status == 2 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script,arguments,named", [
    (cifar_alexnetf, ["--dataset", "mnist"], "--dataset"), (mnist_conv, ["--dataset", "cifar10"], "--dataset"),
    (cifar_cifarnetf, ["--warmup", "-1"], "--warmup"), (nmnist_conv, ["--nmnist-binning", "saccade"], "--nmnist-binning"),
    (mnist_conv, ["--resume", "run/checkpoint.pth.tar"], "another network"), (get_rate_cifar_alexnetf, [], "--resume"),
    (nmnist_conv, ["--path", "nowhere"], "nowhere"), (cifar_alexnetf, ["--path", "file"], "file"),
])
def test_other_scripts(script, arguments, named, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    before = contents(trained)
    assert_refused(named, "-c", trained, *arguments, script=script)
    assert contents(trained) == before


def test_classes_of_another_data_set(tmp_path):
    network = cifar_alexnetf.RECIPE.network(classes=100, neuron=make_neuron(2, 1), time_steps=2)
    published_file(network, {name: {} for name, _ in network.named_parameters()}, tmp_path / "cifar100.pth.tar")
    for more in ([], ["--evaluate"]):
        assert_refused("another network", "--resume", tmp_path / "cifar100.pth.tar", *more, script=cifar_alexnetf)


def test_the_script_itself(data, tmp_path):
    """One case through the operating system: the status, the one sentence, no traceback."""
    script = Path(__file__).parents[1] / "fmnist_mlp.py"
    done = subprocess.run([sys.executable, script, "--path", data, "--resume", tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no such file" in done.stderr
