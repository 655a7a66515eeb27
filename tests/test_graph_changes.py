"""What a captured pass takes for granted: when it is captured anew, and when a pass goes without a graph."""

import copy

import pytest
import torch

from modules import gpu
from modules.graphed import _kind
from modules.neuron import Neuron, make_neuron
from tests.graphed_pairs import assert_same_tensors, device, graphed_and_not
from tests.networks import small_network

pytestmark = pytest.mark.filterwarnings("error:.* could not be captured")


def test_under_an_autocast_of_the_callers_nothing_is_captured(device):
    """It would keep rounded copies of the weights, from which graphs would go on reading."""
    (network, _), x = graphed_and_not("multi-layer", device)
    with torch.autocast(device, torch.bfloat16):
        network(x).square().sum().backward()
    assert not network._graphed._captured and network.input.linear.weight.grad.norm() > 0


def test_hooks_on_connections_are_called(device):
    (network, _), x = graphed_and_not("multi-layer", device)
    seen = []
    network(x)
    network.hidden[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    network(x)
    assert seen


class Looking(Neuron):
    """Whose step looks at a value."""

    def step(self, current, state, fire):
        return super().step(current if current.max() > -1e9 else -current, state, fire)


@pytest.mark.filterwarnings("default:.* could not be captured")
def test_what_looks_at_a_value_goes_without_a_graph(device, monkeypatch):
    """It is noticed before a capture begins, so that other networks are captured as ever."""
    (looking, plain), x = graphed_and_not("multi-layer", device)
    other, begun, capturing = copy.deepcopy(plain), [], gpu.capturing
    monkeypatch.setattr(gpu, "capturing", lambda pool: begun.append(pool) or capturing(pool))
    for network in (looking, plain):
        network.neuron = Looking(*network.neuron)
    with pytest.warns(UserWarning, match="passes could not be captured"):
        looking(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_same_tensors(looking, plain)
    assert list(looking._graphed._captured.values()) == [None] and not begun
    other.uses_graphs = True
    other(x).square().sum().backward()
    assert all(other._graphed._captured.values()) and begun


def new_weight(network):
    network.input.linear.weight = torch.nn.Parameter(0.5 * network.input.linear.weight.detach())


def other_parameters_in_the_same_memory(network):
    network.load_state_dict(network.state_dict(), assign=True)


def of_each_norm(**settings):
    def change(network):
        for connection in (network.input, *network.hidden):
            for name, value in settings.items():
                setattr(connection.norm, name, value)
    return change


def other_memory(network):
    network.input.linear.weight.data = 0.5 * network.input.linear.weight.data


class Halved(Neuron):
    def step(self, current, state, fire):
        return super().step(current / 2, state, fire)


CHANGES = {
    "parameters": new_weight, "memory": other_memory, "parameters that are other objects": other_parameters_in_the_same_memory,
    "T": lambda network: setattr(network, "time_steps", 3), "evaluation": lambda network: network.eval(),
    "a frozen parameter": lambda network: network.feedback.g.requires_grad_(False),
    "one that no longer is": lambda network: network.feedback.w.requires_grad_(True),
    "the neuron's kind": lambda network: setattr(network, "neuron", Halved(*network.neuron)),
    "the threshold": lambda network: setattr(network, "neuron", make_neuron(0.5, 0.9)),
    "the Jacobian's batch norms": lambda network: setattr(network, "jacobian_bn", "eval"),
    "momentum": of_each_norm(momentum=0.5), "epsilon": of_each_norm(eps=0.1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_graph_takes_for_granted_may_change(what, device):
    """Before the second pass, and is noticed; a third pass replays."""
    pair, x = graphed_and_not("multi-layer", device)
    logits = []
    for network in pair:
        network.feedback.w.requires_grad_(what != "one that no longer is")
        network(x).sum().backward()
        CHANGES[what](network)
        network.zero_grad()
        for scale in (1.0, 0.8):
            logits.append(network(x * scale))
            logits[-1].sum().backward()
    for own, other in zip(logits[:2], logits[2:]):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
    assert_same_tensors(*pair)


def test_other_dropout_inference_and_deterministic_algorithms_are_other_kinds_of_pass():
    network, x = small_network("dense", dropout=0.3)
    kinds = [_kind(network, x)]
    network.dropout = 0.2
    kinds.append(_kind(network, x))
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            kinds.append(_kind(network, x))
    torch.use_deterministic_algorithms(True)
    try:
        kinds.append(_kind(network, x))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(kinds)) == 5 and kinds[1] == _kind(network, x)
