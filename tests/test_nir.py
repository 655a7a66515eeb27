"""A network written as NIR, read back from its file, and run by the reference runner and by nirtorch, spikes as ours do."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from modules.neuron import Neuron, make_neuron
from modules.zoo import f64c5_mnist, f64c5_nmnist, f400
from tests.networks import small_network
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.errors import UserError
from utils.export_nir import import_nir, main, nir_graph
from utils.instruments import nir_runner


@pytest.fixture
def nir():
    return pytest.importorskip("nir")


def ours(network, x):
    """Spikes (T, batch, *shape) and logits of the network in evaluation mode."""
    seen = []
    with torch.no_grad():
        logits = network.eval()(x, observe=lambda t, spikes: seen.append(spikes[0]))
    return torch.stack(seen).numpy(), logits.numpy()


def over_time(network, x):
    return (x if network.events else x.expand(network.time_steps, *x.shape)).numpy()


def through_a_file(nir, network, path, **settings):
    nir.write(str(path), nir_graph(network, **settings))
    return nir.read(str(path))


def full_size(kind, leak, time_steps=8):
    """F64C5 or F400 in the paper's size with lively batch norms, in float64, and two inputs."""
    make, shape = {"F400": (f400, (2, 784)), "F64C5, MNIST": (f64c5_mnist, (2, 1, 28, 28)),
                   "F64C5, N-MNIST": (f64c5_nmnist, (time_steps, 2, 2, 34, 34))}[kind]
    network = make(neuron=make_neuron(2.0, leak), time_steps=time_steps)
    with torch.no_grad():
        network.input.norm.running_mean.uniform_(-0.2, 0.2)
        network.input.norm.weight.uniform_(0.5, 1.5)
        network.input.norm.bias.uniform_(-0.3, 0.8)
        network.input.linear.bias.uniform_(-0.2, 0.2)
        network.feedback.g.fill_(0.9)
    return network.double(), (torch.rand(shape) < 0.1).double() if network.events else torch.randn(shape).double()


@pytest.mark.parametrize("leak", [0.95, 1.0])
@pytest.mark.parametrize("kind", ["F400", "F64C5, MNIST", "F64C5, N-MNIST"])
def test_the_reference_runner_gives_the_same_spikes(nir, kind, leak, tmp_path):
    network, x = full_size(kind, leak)
    spikes, logits = ours(network, x)
    graph = through_a_file(nir, network, tmp_path / "model.nir", dt=1e-3)
    given = nir_runner.run(graph, over_time(network, x), ("spikes", "output"))
    assert 0.02 < spikes.mean() < 0.9 and np.array_equal(given["spikes"], spikes)
    np.testing.assert_allclose(given["output"][-1], logits, atol=1e-10)


class Integrator(nn.Module):
    """I and LI for nirtorch, which leaves neurons to its users: forward Euler from their differential equations."""

    def __init__(self, keep, gain):
        super().__init__()
        self.keep, self.gain = keep, gain

    def forward(self, i, state=None):
        v = self.gain * i if state is None else self.keep * state + self.gain * i
        return v, v


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, i):
        return self.function(i)


def affine(node):
    module = nn.Linear(*node.weight.shape[::-1])
    module.weight.data, module.bias.data = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    return module


@pytest.mark.parametrize("leak", [0.95, 1.0])
@pytest.mark.parametrize("kind", ["F400", "F64C5, MNIST"])
def test_nirtorch_gives_the_same_spikes(nir, kind, leak, tmp_path):
    """nirtorch reads the file, builds and orders the graph, runs its convolutions, and delays the loop by one step by itself."""
    nirtorch = pytest.importorskip("nirtorch")
    dt = 1e-3
    network, x = full_size(kind, leak)
    spikes, logits = ours(network, x)
    nir.write(str(tmp_path / "model.nir"), nir_graph(network, dt))
    tensor = torch.from_numpy
    module = nirtorch.nir_to_torch(str(tmp_path / "model.nir"), {
        nir.I: lambda node: Integrator(1.0, dt * tensor(node.r)),
        nir.LI: lambda node: Integrator(1 - dt / tensor(node.tau), dt / tensor(node.tau) * tensor(node.r)),
        nir.Threshold: lambda node: Apply(lambda i, v=tensor(node.threshold): (i > v).double()),
        nir.Scale: lambda node: Apply(lambda i, s=tensor(node.scale): i * s),
        nir.Delay: lambda node: nn.Identity(),
        nir.Flatten: lambda node: nn.Flatten(int(node.start_dim) + 1),  # nirtorch's own counts the batch, NIR does not.
        nir.Affine: affine,  # nirtorch's own leaves the bias out.
    }, dtype=torch.float64)
    seen, state = [], None
    module.get_submodule("spikes").register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        for frame in tensor(over_time(network, x).copy()):
            output, state = module(frame, state)
    assert np.array_equal(torch.stack(seen).numpy(), spikes)
    np.testing.assert_allclose(output.numpy(), logits, atol=1e-10)


def test_a_spike_at_the_threshold_exactly(nir):
    network = f400(3, inputs=2, classes=2, neuron=Neuron(2.0, 1.0), time_steps=3).double().eval()
    with torch.no_grad():
        network.input.linear.weight.zero_()
        network.input.norm.bias.fill_(1.0)
        network.feedback.g.zero_()
    spikes, _ = ours(network, torch.zeros(1, 2).double())
    given = nir_runner.run(nir_graph(network), np.zeros((3, 1, 2)), ("spikes",))["spikes"]
    assert spikes[:, 0, 0].tolist() == given[:, 0, 0].tolist() == [0, 1, 0], "1, 2 = V_th, then 1 again"


def test_metadata_and_units(nir, tmp_path):
    network, _ = small_network("convolutional", leak=0.9)
    graph = through_a_file(nir, network, tmp_path / "model.nir", dt=2e-3)
    assert graph.metadata["dt"] == 2e-3 and graph.metadata["time_steps"] == 6 and graph.metadata["threshold"] == 0.8
    np.testing.assert_allclose(graph.nodes["membrane"].tau, 2e-3 / 0.1)
    np.testing.assert_allclose(graph.nodes["delay"].delay, 2e-3)
    assert type(graph.nodes["membrane"]).__name__ == "LI" and graph.nodes["membrane"].tau.shape == network.layer_shapes[0]


def test_the_runner_on_a_graph_by_hand(nir):
    """A leaky integrator of an impulse, two steps late, and a convolution counted by hand."""
    graph = nir.NIRGraph({"input": nir.Input(np.array([1])), "late": nir.Delay(np.array([0.2])), "output": nir.Output(np.array([1])),
                          "leaky": nir.LI(tau=np.array([0.2]), r=np.array([4.0]), v_leak=np.array([0.0]))},
                         [("input", "late"), ("late", "leaky"), ("leaky", "output")], metadata={"dt": 0.1})
    given = nir_runner.run(graph, np.array([1, 0, 0, 0, 0.0]).reshape(5, 1, 1))["output"]
    np.testing.assert_allclose(given.ravel(), [0, 0, 2, 1, 0.5])
    weight = np.arange(9.0).reshape(1, 1, 3, 3)
    graph = nir.NIRGraph({"input": nir.Input(np.array([1, 3, 3])), "output": nir.Output(np.array([1, 2, 2])),
                          "convolution": nir.Conv2d((3, 3), weight, 2, 1, 1, 1, np.array([0.5]))},
                         [("input", "convolution"), ("convolution", "output")], metadata={"dt": 0.1})
    given = nir_runner.run(graph, np.ones((1, 1, 1, 3, 3)))["output"]
    np.testing.assert_allclose(given.ravel(), [4 + 5 + 7 + 8.5, 3 + 4 + 6 + 7.5, 1 + 2 + 4 + 5.5, 0 + 1 + 3 + 4.5])


def test_what_the_runner_refuses(nir):
    def looped(*middle, edges=(), metadata={"dt": 0.1}):
        ends = {"input": nir.Input(np.array([1])), "output": nir.Output(np.array([1]))}
        nodes = {**ends, **{f"n{i}": node for i, node in enumerate(middle)}}
        return nir.NIRGraph(nodes, [("input", "n0"), *edges, ("n0", "output")], metadata=metadata)

    scale = nir.Scale(np.array([1.0]))
    for graph, message in ((looped(scale, scale, edges=[("n0", "n1"), ("n1", "n0")]), "loop without a delay"),
                           (looped(scale, metadata={}), "no dt"), (looped(nir.Delay(np.array([0.0]))), "at least a time step"),
                           (looped(nir.IF(*[np.array([1.0])] * 2)), "primitive IF")):
        with pytest.raises(UserError, match=message):
            nir_runner.run(graph, np.zeros((2, 1, 1)))


def saved(network, path, **arguments):
    save_checkpoint(Checkpoint(1, network.state_dict(), 0.0, 0.0, optimizer={}, arguments=arguments), path)
    return path


@pytest.mark.parametrize("kind", ["dense", "convolutional", "events"])
def test_the_command_writes_what_the_checkpoint_holds(nir, kind, tmp_path, capsys):
    network, x = small_network(kind, leak=0.9)
    path = saved(network.float(), tmp_path / "checkpoint.pth.tar", time_step=6, vth=0.8, leaky=0.9)
    main(["--resume", str(path), "--out", str(tmp_path / "model.nir")])
    assert "LIF 0.9 neurons, T = 6, dt = 0.0001 s" in capsys.readouterr().out
    graph = nir.read(str(tmp_path / "model.nir"))
    spikes, logits = ours(network.double(), x)
    given = nir_runner.run(graph, over_time(network, x), ("spikes", "output"))
    assert np.array_equal(given["spikes"], spikes)
    np.testing.assert_allclose(given["output"][-1], logits, atol=1e-4)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_what_the_command_refuses(nir, tmp_path, capsys):
    several, _ = small_network("multi-layer")
    path = saved(several, tmp_path / "several.pth.tar", time_step=6, vth=0.8, leaky=0.9)
    assert "transposed feedback can't be written as NIR" in refusal(capsys, "--resume", path, "--out", tmp_path / "model.nir")
    with pytest.raises(UserError, match="transposed feedback"):
        nir_graph(several)
    one, _ = small_network("dense")
    silent = saved(one, tmp_path / "silent.pth.tar")
    assert "give --time_step, --vth, --leaky" in refusal(capsys, "--resume", silent, "--out", tmp_path / "model.nir")
    assert "there is no folder" in refusal(capsys, "--resume", silent, "--out", tmp_path / "none/model.nir")
    assert "there is no such file" in refusal(capsys, "--resume", tmp_path / "none", "--out", tmp_path / "model.nir")
    assert not (tmp_path / "model.nir").exists()


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(UserError, match="pip install -r requirements-optional.txt"):
        import_nir()
