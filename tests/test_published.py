"""Published checkpoints of every network, made from random weights: evaluation, firing rates and resuming by the right script."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import cifar_alexnetf
import cifar_cifarnetf
import fmnist_mlp
import get_rate_cifar_alexnetf
import mnist_conv
import nmnist_conv
from modules.neuron import make_neuron
from tests.published_layout import published_file
from tests.small_data import command, write_small_cifar, write_small_data, write_small_mnist, write_small_nmnist
from utils.arguments import parse_arguments
from utils.checkpoint import load_checkpoint
from utils.data.batches import Batches

CIFAR, CIFAR100 = (partial(write_small_cifar, dataset=dataset, train=5, test=3) for dataset in ("cifar10", "cifar100"))
CASES = {
    "F400": (fmnist_mlp, write_small_data, []),
    "F64C5": (mnist_conv, partial(write_small_mnist, train=10, test=6), []),
    "F64C5-events": (nmnist_conv, partial(write_small_nmnist, train=10, test=6), []),
    "AlexNet-F": (cifar_alexnetf, CIFAR, []),
    "AlexNet-F-100": (cifar_alexnetf, CIFAR100, ["--dataset", "cifar100"]),
    "CIFARNet-F": (cifar_cifarnetf, CIFAR, []),
    "CIFARNet-F-100": (cifar_cifarnetf, CIFAR100, ["--dataset", "cifar100"]),
}
FLAGS = ["--time_step", "4", "--vth", "0.6", "--leaky", "0.9", "--device", "cpu"]


def published(network, path, momentum=None):
    """Save `network` in the published format, with the given momentum buffers or zeros, by parameter name."""
    zeros = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    published_file(network, {name: {"momentum_buffer": buffer} for name, buffer in (momentum or zeros).items()}, path)
    return path


def lively(script, flags):
    """The script's network with random weights, every layer of which fires."""
    args = parse_arguments(script.RECIPE, flags)
    network = script.RECIPE.network(classes=script.RECIPE.datasets[args.dataset], neuron=make_neuron(args.vth, args.leaky),
                                    time_steps=args.time_step)
    with torch.no_grad():
        for connection in (network.input, *network.hidden):
            connection.norm.weight.uniform_(0.5, 1.5)
            connection.norm.bias.uniform_(0.1, 0.6)
            connection.norm.running_var.uniform_(0.5, 1.5)
        network.feedback.g.fill_(0.9)
    return network, args


def counted(script, network, args):
    """Loss, accuracy, and the firing rate of each layer and in total, counted spike by spike in float64."""
    _, test = script.RECIPE.data(args)
    (x, labels), = Batches(test, len(test.labels), shuffled=False)
    steps = []
    with torch.inference_mode():
        logits = network.eval()(x, observe=lambda t, spikes: steps.append([layer.double().flatten(1) for layer in spikes]))
    layers = [torch.stack(layer) for layer in zip(*steps)]
    total = sum(layer.sum() for layer in layers) / sum(layer.numel() for layer in layers)
    accuracy = 100 * (logits.argmax(1) == labels).double().mean()
    return F.cross_entropy(logits, labels).item(), accuracy.item(), [layer.mean().item() for layer in layers], total.item()


def printed(out):
    """The same from what a script prints."""
    loss, accuracy = re.search(r"test loss ([\d.]+) \| top-1 ([\d.]+) %", out).groups()
    rates = [float(rate) for rate in re.findall(r"layer \d .*firing rate ([\d.]+)", out)]
    return float(loss), float(accuracy), rates, float(re.search(r"in total .*firing rate ([\d.]+)", out)[1])


def assert_prints(out, expected):
    loss, accuracy, rates, total = printed(out)
    assert loss == pytest.approx(expected[0], abs=1e-4) and accuracy == pytest.approx(expected[1], abs=5e-3)
    assert rates == pytest.approx(expected[2], abs=1e-6) and total == pytest.approx(expected[3], abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_evaluates_gives_rates_and_resumes(case, tmp_path):
    script, write, more = CASES[case]
    flags = [*FLAGS, *more, "--path", str(write(tmp_path / "data"))]
    network, args = lively(script, flags)
    momentum = {name: 1e4 * torch.rand_like(parameter) for name, parameter in network.named_parameters()}
    path = published(network, tmp_path / "published.pth.tar", momentum)

    status, out, err = command(*flags, "--resume", path, "--evaluate", "--firing-rate", "-c", tmp_path / "rates", script=script)
    assert status == 0, err
    expected = counted(script, network, args)
    assert all(rate > 0.02 for rate in expected[2]), "the case must exercise every layer"
    assert_prints(out, expected)

    status, out, err = command(*flags, "--resume", path, "--epochs", 4, "-c", tmp_path / "run", "--train-batch", 100,
                               "--lr", 1e-9, "--wd", 0, "--momentum", 0.5, script=script)
    assert status == 0 and "epoch 4/4" in out and "epoch 3/4" not in out, err
    resumed = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")
    assert (resumed.epoch, resumed.best_acc) == (4, max(60.0, resumed.acc))
    for number, (name, buffer) in enumerate(momentum.items()):
        # One step with a gradient that is small beside the momentum, which must have been this parameter's.
        assert (resumed.optimizer["state"][number]["momentum_buffer"] - 0.5 * buffer).abs().max() < 100, name


def test_get_rate_with_the_published_command_line(tmp_path, monkeypatch):
    """Layers under constant currents 2, 1, 0.5, 0 and 1.5, V_th = 2, no leak, by hand; the published script printed a fifth."""
    network, _ = lively(cifar_alexnetf, FLAGS)
    with torch.no_grad():
        for connection, current in zip((network.input, *network.hidden), (2.0, 1.0, 0.5, 0.0, 1.5)):
            connection.norm.weight.zero_()
            connection.norm.bias.fill_(current)
        network.feedback.g.zero_()
    path = published(network, tmp_path / "published.pth.tar")
    write_small_cifar(tmp_path / "data", train=5, test=3)
    monkeypatch.chdir(tmp_path)
    status, out, err = command("--gpu-id", 0, "--dataset", "cifar10", "--path", "data", "--time_step", 4, "--leaky", 1,
                               "--resume", path, script=get_rate_cifar_alexnetf)
    assert status == 0, err
    rates, neurons = (1.0, 0.5, 0.25, 0.0, 0.75), (24_576, 65_536, 24_576, 24_576, 16_384)
    total = sum(rate * count for rate, count in zip(rates, neurons)) / 155_648
    assert printed(out)[2:] == (pytest.approx(rates, abs=1e-6), pytest.approx(total, abs=1e-6))
    for layer, (rate, count) in enumerate(zip(rates, neurons), start=1):
        assert re.search(rf"layer {layer} +{count:,d} neurons +firing rate {rate:.6f}", out), out
    assert "in total    155,648 neurons" in out and "Testing on 3 of 3 samples" in out
    assert "bar chart: checkpoint/firing_rate.png, checkpoint/firing_rate.pdf" in out
    assert (tmp_path / "checkpoint/firing_rate.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "checkpoint/firing_rate.pdf").read_bytes()[:4] == b"%PDF"
    assert sorted(file.name for file in (tmp_path / "checkpoint").iterdir()) == ["firing_rate.pdf", "firing_rate.png"]


@pytest.mark.parametrize("script,write,more", [(cifar_alexnetf, CIFAR, ["--dataset", "cifar10"]),
                                               (mnist_conv, partial(write_small_mnist, train=4, test=2), [])])
def test_published_command_lines(script, write, more, tmp_path):
    """Training, then --resume FILE --evaluate of the checkpoint that it leaves, as the published code's users type them."""
    path = write(tmp_path / "data")
    flags = ["--gpu-id", "0", *more, "--path", path, "--time_step", "30", "--leaky", "0.99", "-c", tmp_path / "run"]
    status, _, err = command(*flags, "--epochs", 1, script=script)  # The one addition: nobody waits for 100 epochs here.
    assert status == 0, err
    status, out, err = command(*flags, "--resume", tmp_path / "run" / "checkpoint.pth.tar", "--evaluate", script=script)
    assert status == 0 and "test loss" in out and "firing rate" not in out, err
