"""Every script: its defaults are the paper's, each published flag is there, and the commands in its header are right."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cifar_alexnetf
import cifar_cifarnetf
import fmnist_mlp
import get_rate_cifar_alexnetf
import mnist_conv
import nmnist_conv
from tests.small_data import write_small_data
from utils.arguments import parse_arguments

TRAINING = (fmnist_mlp, mnist_conv, nmnist_conv, cifar_alexnetf, cifar_cifarnetf)
SCRIPTS = (*TRAINING, get_rate_cifar_alexnetf)
PUBLISHED_FLAGS = """-d --dataset --path -j --workers -t --time_step --vth --leaky --epochs --start-epoch --train-batch
    --test-batch --lr --learning-rate --warmup --drop --dropout --schedule --gamma --momentum --weight-decay --wd --optimizer
    -c --checkpoint --resume --manualSeed -e --evaluate --gpu-id""".split()
OUR_FLAGS = "--firing-rate --train-limit --test-limit --solver --tol --max-iterations --threshold --jacobian-bn --device".split()

SHARED = dict(optimizer="SGD", momentum=0.9, weight_decay=5e-4, lr=0.05, gamma=0.1, epochs=100, train_batch=128, test_batch=200,
              dropout=0.2, vth=2.0, max_iterations=30, warmup=0, path="./data", schedule=[30, 60, 90], leaky=0.95, time_step=30,
              train_limit=None, test_limit=None)
CIFAR = dict(dataset="cifar10", time_step=100, leaky=0.99, schedule=[50, 75], warmup=400)
DIFFERENT = {fmnist_mlp: dict(time_step=5), mnist_conv: {}, cifar_alexnetf: CIFAR, cifar_cifarnetf: CIFAR,
             nmnist_conv: dict(path="./data/NMNIST/2312_3000_stable/", nmnist_binning="paper"),
             get_rate_cifar_alexnetf: {**CIFAR, "evaluate": True, "firing_rate": True}}


def file_of(script):
    return Path(script.__file__)


def name(script):
    return script.__name__


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_defaults_are_the_papers(script):
    args = vars(parse_arguments(script.RECIPE, ["--resume", "FILE"]))
    expected = SHARED | DIFFERENT[script]
    assert {flag: args[flag] for flag in expected} == expected


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_help_shows_every_flag_and_the_scripts_own_defaults(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(file_of(script)), "--help"])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file_of(script)), run_name="__main__")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for flag in PUBLISHED_FLAGS + OUR_FLAGS + ["--nmnist-binning"] * (script is nmnist_conv):
        assert re.search(rf"(^|[ ,]){flag}[ ,]", text, re.MULTILINE), flag
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=-)", text)]
    for attribute in ("time_step", "leaky", "warmup", "schedule", "path"):
        entry = next(entry for entry in entries if re.match(rf"(-\w [A-Z_]+, )?--{attribute}[ ,]", entry))
        assert f"(default: {(SHARED | DIFFERENT[script])[attribute]})" in entry


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_reads_on_one_screen(script):
    assert len(file_of(script).read_text().splitlines()) <= 45


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_commands_in_the_header_parse(script):
    commands = re.findall(r"^ +python (\w+)\.py(.*?)(?:   .*)?$", script.__doc__, re.MULTILINE)
    assert len(commands) >= 2
    for called, arguments in commands:
        parse_arguments(sys.modules[called].RECIPE, shlex.split(arguments))


@pytest.mark.parametrize("script,accepted", [
    (fmnist_mlp, ["fashionmnist", "Fashion-MNIST"]), (mnist_conv, ["mnist", "MNIST"]), (nmnist_conv, ["nmnist", "N-MNIST"]),
    (cifar_alexnetf, ["cifar10", "cifar100", "CIFAR-100"]), (cifar_cifarnetf, ["cifar10", "cifar100"]),
], ids=lambda value: name(value) if value in TRAINING else "")
def test_dataset(script, accepted, capsys):
    for dataset in accepted:
        assert parse_arguments(script.RECIPE, ["-d", dataset]).dataset == dataset.lower().replace("-", "")
    with pytest.raises(SystemExit):
        parse_arguments(script.RECIPE, ["-d", "imagenet"])
    assert "--dataset" in capsys.readouterr().err


def test_training_imports_neither_torch_compile_nor_torchvision(tmp_path):
    """They would take a second or two and 70 MB of every run."""
    command = [sys.executable, "-X", "importtime", file_of(fmnist_mlp), "--path", write_small_data(tmp_path), "-c", tmp_path / "run",
               "--epochs", "1", "--device", "cpu"]
    imports = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert re.search(r"\| +torch$", imports, re.MULTILINE)
    assert not re.search(r"\| +(torch\._dynamo|torch\._inductor|torchvision)\b", imports)
