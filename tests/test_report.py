"""The report and the comparison of runs, through their command lines."""

import contextlib
import io
import re

import pytest
import torch

import cifar_cifarnetf
import fmnist_mlp
import mnist_conv
import nmnist_conv
from modules.neuron import make_neuron
from tests.published_layout import published_file
from tests.small_data import command, write_small_data, write_small_mnist, write_small_nmnist
from utils import compare, report
from utils.arguments import parse_arguments
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.trained import find_arguments

FIGURES = ("accuracy_over_time", "confusion", "firing_rate", "membranes", "raster", "residual_over_time", "solvers", "spectrum")


def run(module, *arguments):
    """Status, standard output and standard error of a command's main."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as exit:
            status = exit.code
    return status, out.getvalue(), err.getvalue()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two short runs of F400 with their data."""
    root = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    data = write_small_data(root / "data")
    for name, more in (("lif", []), ("if", ["--leaky", 1, "-t", 7])):
        status, _, err = command("--path", data, "--epochs", 2, "--manualSeed", 1, "-c", root / name, "--device", "cpu", *more)
        assert status == 0, err
    return root


def row(text, name):
    """The numbers of a table's first row of this name."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [float(cell.replace(",", "")) for cell in line.split("|")[2:-1]]


def test_report_of_a_run_by_its_checkpoint_alone(trained, tmp_path):
    resume = trained / "if/model_best.pth.tar"
    before = contents(trained / "if")
    status, out, err = run(report, "--resume", resume, "--out", tmp_path / "out", "--check-gradient", "--time-step-sweep", 1, 12)
    assert status == 0, err
    text = (tmp_path / "out/report.md").read_text()
    assert out.splitlines()[-1] == str(tmp_path / "out/report.md") and contents(trained / "if") == before
    assert text.startswith("# F400 on Fashion-MNIST, IF\n") and "T = 7. Testing on 30 of 30 samples" in text
    for figure in FIGURES:
        assert f"({figure}.png)" in text
        assert all((tmp_path / "out" / f"{figure}.{kind}").stat().st_size > 2000 for kind in ("png", "pdf"))
    assert row(text, "T") == [1, 7, 12], "of the sweep"
    status, out, _ = command("--path", trained / "data", "--resume", resume, "--evaluate", "--firing-rate", "--leaky", 1, "-t", 7,
                             "-c", tmp_path / "rates")
    assert row(text, "test accuracy (%)")[1] == float(re.search(r"top-1 ([\d.]+)", out)[1])
    rate = float(re.search(r"in total .* firing rate ([\d.]+)", out)[1])
    assert row(text, "layer 1")[:2] == [400, pytest.approx(rate, abs=1e-4)]
    errors = re.search(r"\| feedback\.w \| \S+ \| (\S+) \| (\S+) \|", text)
    assert float(errors[1]) > 0.9999 and float(errors[2]) < 1e-2


@pytest.mark.parametrize("recipe", [mnist_conv.RECIPE, nmnist_conv.RECIPE, cifar_cifarnetf.RECIPE], ids=lambda r: r.description)
@pytest.mark.parametrize("norm", ["matrix", "operator"])
def test_experiment_is_found_by_data_set_and_shapes(recipe, norm, tmp_path):
    args = parse_arguments(recipe, ["--leaky", "1", "-t", "9", "--feedback-norm", norm])
    with torch.device("meta"):
        network = recipe.network(classes=10, neuron=make_neuron(2, 1), time_steps=9, feedback_norm=norm)
    tensors = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in network.state_dict().items()}
    save_checkpoint(Checkpoint(1, tensors, 1.0, 1.0, {}, random_state=None, arguments=vars(args)), tmp_path / "file")
    found, arguments = find_arguments(tmp_path / "file", None, dict(path="elsewhere", vth=None))
    assert found is recipe
    assert (arguments.leaky, arguments.time_step, arguments.path, arguments.vth) == (1.0, 9, "elsewhere", 2.0)
    assert arguments.feedback_norm == norm and arguments.dataset == next(iter(recipe.datasets))


def test_report_of_a_published_file_at_settings_of_ones_own(trained, tmp_path):
    network = fmnist_mlp.RECIPE.network(classes=10, neuron=make_neuron(2, 0.95), time_steps=5)
    network.load_state_dict(load_checkpoint(trained / "lif/model_best.pth.tar").state_dict)
    published_file(network, {name: {"momentum_buffer": torch.zeros_like(p)} for name, p in network.named_parameters()}, tmp_path / "file")
    status, out, err = run(report, "--resume", tmp_path / "file", "--path", trained / "data", "-t", 3, "--leaky", 0.5,
                           "--time-step-sweep", 2, "--test-limit", 8, "--samples", 4)
    assert status == 0 and out.splitlines()[-1] == str(tmp_path / "report/report.md"), err
    text = (tmp_path / "report/report.md").read_text()
    assert "F400 on Fashion-MNIST, LIF 0.5" in text and "T = 3. Testing on 8 of 30 samples; equilibrium and solvers on the first 4" in text
    recipe, args = find_arguments(tmp_path / "file", None, {})
    assert recipe is fmnist_mlp.RECIPE and (args.leaky, args.time_step, args.dataset) == (0.95, 5, "fashionmnist")


def test_report_of_events_takes_no_more_steps_than_there_are_frames(tmp_path):
    data = write_small_nmnist(tmp_path / "data")
    flags = ["--path", data, "-t", 4, "--epochs", 1, "--train-limit", 8, "-c", tmp_path / "run", "--device", "cpu"]
    status, _, err = command(*flags, script=nmnist_conv)
    assert status == 0, err
    status, _, err = run(report, "--resume", tmp_path / "run/checkpoint.pth.tar", "--samples", 2, "--time-step-sweep", 2, 50)
    assert status == 0, err
    text = (tmp_path / "run/report/report.md").read_text()
    assert row(text, "T") == [2, 4] and "| input to layer 1 | AC |" in text and "| spiking network | 0 |" in text


def test_operator_norm_from_the_command_line(tmp_path):
    data = write_small_mnist(tmp_path / "data", train=16, test=8)
    flags = ["--path", data, "-t", 2, "--train-batch", 8, "-c", tmp_path / "run", "--device", "cpu", "--feedback-norm", "operator"]
    status, _, err = command(*flags, "--epochs", 1, script=mnist_conv)
    assert status == 0, err
    status, out, err = command(*flags, "--epochs", 2, "--resume", tmp_path / "run/checkpoint.pth.tar", script=mnist_conv)
    assert status == 0 and "epoch 2/2" in out, err
    status, _, err = command(*flags[:-1], "matrix", "--resume", tmp_path / "run/checkpoint.pth.tar", "-e", script=mnist_conv)
    assert status == 2 and "feedback.u" in err


@pytest.mark.parametrize("more,named", [
    (["--resume", "none"], "--resume none"), (["--experiment", "none"], "--experiment none"), (["--out", "file/out"], "--out file/out"),
    (["--time-step-sweep", "0"], "--time-step-sweep"), (["--experiment", "mnist_conv"], "another network"),
    (["--path", "file"], "file"), (["--samples", "0"], "--samples"), (["--resume", "other"], "--experiment"),
])
def test_report_refuses(more, named, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    save_checkpoint(Checkpoint(1, {"readout.bias": torch.zeros(3)}, 1.0, 1.0, {}, random_state=None), tmp_path / "other")
    before = contents(tmp_path)
    status, _, err = run(report, "--resume", trained / "if/model_best.pth.tar", "--out", "out", *more)
    assert status == 2 and named in err.strip().splitlines()[-1] and contents(tmp_path) == before


def test_compare(trained, tmp_path):
    status, out, err = run(compare, trained / "lif", trained / "if/log.txt", "--out", tmp_path / "new/curves")
    assert status == 0, err
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"curves.png", "curves.pdf"}
    best = max(float(line.split()[-1]) for line in (trained / "if/log.txt").read_text().splitlines()[1:])
    assert re.search(rf"^if +2 epochs +test accuracy: best {best:.2f} %", out, re.MULTILINE) and "lif " in out


@pytest.mark.parametrize("arguments,named", [
    (["none"], "none"), (["lif", "if", "--names", "one"], "--names"), (["empty"], "log.txt"), (["lif"] * 8, "8 runs"),
    (["lif", "--out", "lif/log.txt/figure"], "--out"),
])
def test_compare_refuses(arguments, named, trained, monkeypatch):
    monkeypatch.chdir(trained)
    (trained / "empty").mkdir(exist_ok=True)
    (trained / "empty/log.txt").write_text("Learning Rate\t\n")
    status, _, err = run(compare, *arguments)
    assert status == 2 and named in err
