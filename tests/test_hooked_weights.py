"""Weights that a hook makes anew whenever its module is called: pruned ones, and those of PyTorch's older norms."""

import copy

import pytest
import torch
from torch.nn.utils import prune, spectral_norm, weight_norm

from modules.hooks import has_hooks
from tests.networks import KINDS, small_network


def weights_of(network):
    """The modules with a weight between neurons, and its name."""
    return [(network.input.linear, "weight"), *((connection.linear, "weight") for connection in network.hidden), (network.feedback, "w")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_weights_are_trained(kind, dtype):
    """As those of a network whose weights are set to 0 by hand, after an update and in evaluation too."""
    network, x = small_network(kind, 0.9, tol=1e-9, max_iterations=100)
    network, x = network.to(dtype), x.to(dtype)
    by_hand = copy.deepcopy(network)
    for module, name in weights_of(network):
        prune.l1_unstructured(module, name, 0.3)
    network(x)
    with torch.no_grad():
        wanted = by_hand.state_dict()
        by_hand.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name in wanted}, strict=False)
        for (module, name), (other, _) in zip(weights_of(network), weights_of(by_hand)):
            getattr(module, f"{name}_orig").mul_(1.25)  # an update
            getattr(other, name).copy_(getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask"))
    logits, expected = network(x), by_hand(x)
    torch.testing.assert_close(logits, expected)
    for each in (logits, expected):
        each.square().sum().backward()
    for (module, name), (other, _) in zip(weights_of(network), weights_of(by_hand)):
        torch.testing.assert_close(getattr(module, f"{name}_orig").grad, getattr(other, name).grad * getattr(module, f"{name}_mask"),
                                   atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(network.eval()(x), by_hand.eval()(x))


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
@pytest.mark.parametrize("kind", ["dense", "multi-layer"])
def test_older_norms_follow_their_parameters(norm, kind, recwarn):
    network, x = small_network(kind, 0.9)
    for module, name in weights_of(network):
        norm(module, name)
    optimizer = torch.optim.SGD(network.parameters(), 0.001)
    for _ in range(3):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()
        origins = [parameter for name, parameter in network.named_parameters() if name.endswith(("_v", "_orig"))]
        assert len(origins) == len(weights_of(network)) and all(origin.grad.norm() > 0 for origin in origins)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook",
                                      "register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
def test_hooks_for_all_modules_are_seen(register):
    module = torch.nn.Linear(2, 2)
    assert not has_hooks(module)
    handle = getattr(torch.nn.modules.module, register)(lambda *_: None)
    try:
        assert has_hooks(module)
    finally:
        handle.remove()
    assert not has_hooks(module)
