"""Published checkpoints land under the right names, momentum included; ours are whole files at any time."""

from pathlib import Path

import pytest
import torch

from modules.neuron import make_neuron
from modules.zoo import alexnet_f, f64c5_mnist, f400
from tests.published_layout import published_file
from tests.small_data import command, write_small_data
from utils.checkpoint import Checkpoint, load_checkpoint, restore_network, restore_optimizer, save_checkpoint
from utils.errors import UserError

NETWORKS = {"dense": lambda: f400(6, **SETTINGS), "convolutional": lambda: f64c5_mnist(3, **SETTINGS),
            "multi-layer": lambda: alexnet_f((3, 4, 5, 5, 4), **SETTINGS)}
SETTINGS = dict(neuron=make_neuron(2, 0.95), time_steps=2)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_published_tensors_and_optimizer_states_reach_their_parameters(kind, prefix, optimizer, tmp_path):
    saved, network = NETWORKS[kind](), NETWORKS[kind]()
    parts = ["momentum_buffer"] if optimizer == "SGD" else ["exp_avg", "exp_avg_sq"]
    states = {name: {part: torch.rand_like(parameter) for part in parts} for name, parameter in saved.named_parameters()}
    if optimizer == "Adam":
        states = {name: {**state, "step": torch.tensor(7.0)} for name, state in states.items()}
    path = tmp_path / "published.pth.tar"
    published_file(saved, states, path, prefix)
    checkpoint = load_checkpoint(path)
    assert (checkpoint.epoch, checkpoint.acc, checkpoint.best_acc) == (3, 50.0, 60.0)
    restore_network(network, checkpoint, path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    ours = torch.optim.SGD(network.parameters(), 0.1, 0.9) if optimizer == "SGD" else torch.optim.Adam(network.parameters())
    restore_optimizer(ours, network, checkpoint, path)
    for name, parameter in network.named_parameters():
        for part in states[name]:
            assert torch.equal(ours.state[parameter][part], states[name][part]), (name, part)
    network(torch.rand(2, *network.input_shape)).sum().backward()
    ours.step()
    other = torch.optim.Adam(network.parameters()) if optimizer == "SGD" else torch.optim.SGD(network.parameters(), 0.1, 0.9)
    with pytest.raises(UserError, match=f"--optimizer {optimizer}"):
        restore_optimizer(other, network, checkpoint, path)


def test_published_file_through_the_command_line(tmp_path):
    data = write_small_data(tmp_path / "data")
    network = f400(**SETTINGS)
    states = {name: {"momentum_buffer": torch.zeros_like(parameter)} for name, parameter in network.named_parameters()}
    path = tmp_path / "published.pth.tar"
    published_file(network, states, path)
    status, out, err = command("--path", data, "--resume", path, "--evaluate", "--firing-rate", "-c", tmp_path / "rates")
    assert status == 0 and "test loss" in out and "400 neurons" in out, err
    status, out, err = command("--path", data, "--resume", path, "--epochs", 4, "-c", tmp_path / "run")
    assert status == 0 and "epoch 4/4" in out and "epoch 3/4" not in out, err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar").best_acc >= 60.0


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth.tar"
    checkpoint = Checkpoint(1, {"w": torch.zeros(3)}, 1.0, 2.0, optimizer={}, random_state=None, arguments={})
    save_checkpoint(checkpoint, path)
    before = path.read_bytes()

    def torn(contents, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError):
        save_checkpoint(checkpoint, path)
    assert path.read_bytes() == before
    assert [file.name for file in Path(tmp_path).iterdir()] == ["checkpoint.pth.tar"]


def test_what_is_loaded_lies_on_the_cpu(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(Checkpoint(1, {"w": torch.zeros(3, device="meta")}, 1.0, 2.0, {}, {}, None, {}), path)
    assert torch.load(path, weights_only=True)["epoch"] == 1
    network = f400(6, **SETTINGS)
    save_checkpoint(Checkpoint(1, network.state_dict(), 1.0, 2.0, {}, {}, None, {}), path)
    assert all(tensor.device.type == "cpu" for tensor in load_checkpoint(path).state_dict.values())


def test_an_earlier_name_of_a_flag_is_read(tmp_path):
    earlier = Checkpoint(1, {"w": torch.zeros(3)}, 1.0, 2.0, optimizer={}, random_state=None, arguments={"threshold": 60, "tol": 0.1})
    save_checkpoint(earlier, tmp_path / "file")
    assert load_checkpoint(tmp_path / "file").arguments == {"max_iterations": 60, "tol": 0.1}
