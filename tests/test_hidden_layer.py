"""Hidden layers' rates by the C kernels, against the same layers module by module, which other tests hold against the naive network."""

import copy
import weakref

import pytest
import torch
from torch import nn

from modules import hidden_layer, native
from modules.connection import Connection
from modules.feedback import Feedback
from modules.implicit import BackwardSolver
from modules.network import FeedbackSNN
from modules.neuron import Neuron, make_neuron
from modules.synchronised_norm import synchronise_batch_norms
from modules.zoo import alexnet_f
from tests.networks import explicit_masks

DROPOUT = 0.3


class OtherNeuron(Neuron):
    pass


def dense(widths, **settings):
    inputs, *layers = widths
    hidden = [Connection(nn.Linear(before, after)) for before, after in zip(layers, layers[1:])]
    return FeedbackSNN((inputs,), Connection(nn.Linear(inputs, layers[0])), hidden, Feedback(nn.Linear(layers[-1], layers[0], bias=False)),
                       4, **settings)


def network_and_input(make=alexnet_f, widths=(5, 17, 33, 8, 16), batch=6, size=8, leak=0.9, threshold=0.8, dropout=DROPOUT, momentum=0.1,
                      **settings):
    network = make(widths, **({} if make is dense else dict(size=size, classes=4)), neuron=make_neuron(threshold, leak), time_steps=7,
                   dropout=dropout, solver=BackwardSolver(tol=1e-6, max_iterations=100), **settings)
    with torch.no_grad():
        for connection in (network.input, *network.hidden):
            connection.linear.bias.uniform_(-0.2, 0.2)
            connection.norm.weight.uniform_(0.3, 0.8).mul_(torch.rand(len(connection.norm.weight)).gt(0.2) * 2 - 1)
            connection.norm.bias.uniform_(-0.1, 0.5)
            connection.norm.running_mean.uniform_(-0.2, 0.2)
            connection.norm.momentum = momentum
        network.feedback.g.fill_(0.5)
    masks = [torch.rand(batch, *shape).ge(dropout) / (1 - dropout) if dropout else None
             for shape in (*network.layer_shapes, network.layer_shapes[0])]
    explicit_masks(network, masks)
    return network, torch.randn(batch, *network.input_shape)


def step(network, x, monkeypatch, fast):
    """How often the kernels served, and what a training step leaves: logits, gradients and buffers."""
    served, real = [], native.norm_forward
    with monkeypatch.context() as patched:
        patched.setattr(native, "norm_forward", lambda *parts: served.append(real(*parts)))
        if not fast:
            patched.setattr(hidden_layer, "serves", lambda *parts: False)
        logits = network(x)
        logits.square().sum().backward()
    return len(served), {"logits": logits.detach(), **{name: parameter.grad for name, parameter in network.named_parameters()},
                         **{name: buffer.float() for name, buffer in network.named_buffers()}}


def compare(network, x, monkeypatch):
    plain = copy.deepcopy(network)
    plain.draw_masks = network.draw_masks
    times, fast = step(network, x, monkeypatch, fast=True)
    never, slow = step(plain, x, monkeypatch, fast=False)
    assert never == 0 and network.solver.tally.not_converged == plain.solver.tally.not_converged == 0
    scale = max(gradient.norm() for name, gradient in slow.items() if name.endswith(("weight", ".w")))
    for name, value in slow.items():
        assert (fast[name] - value).norm() <= 2e-5 * value.norm() + 2e-6 * scale, name
    assert min(slow[name].norm() / scale for name in slow if name.endswith("weight")) > 1e-4
    return times


@pytest.mark.parametrize("settings", [
    dict(), dict(leak=1.0), dict(dropout=0.0), dict(threshold=2.0), dict(momentum=0.3), dict(widths=(3, 4, 4, 3, 3)),
    dict(widths=(1, 70, 2, 40, 9), batch=1),
    dict(widths=(16, 64, 32, 48, 16), batch=13, size=12), dict(make=dense, widths=(9, 20, 33, 7), batch=50),
    dict(make=dense, widths=(9, 20, 33, 7), batch=3), dict(make=dense, widths=(30, 300, 200), batch=400),
], ids=str)
def test_equals_the_layers_module_by_module(settings, monkeypatch):
    network, x = network_and_input(**settings)
    assert compare(network, x, monkeypatch) == 2 * len(network.hidden), "f and Jᵀ have a lap each"


def test_a_current_that_is_the_threshold_itself_can_still_change(monkeypatch):
    """As in PyTorch's clamp, the gradient passes there."""
    network, x = network_and_input(dropout=0.0, threshold=1.0)
    with torch.no_grad():
        norm = network.hidden[1].norm
        norm.weight[:4], norm.bias[:4] = 0, 1
    compare(network, x, monkeypatch)
    assert network.hidden[1].norm.bias.grad[:4].abs().min() > 0


def test_another_neurons_rate_and_slope_are_masked():
    drive, mask = torch.randn(3, 50), torch.rand(3, 50).ge(0.4) / 0.6
    for own, expected in zip(OtherNeuron(0.7, 0.9).masked_equilibrium(drive, mask), Neuron(0.7, 0.9).masked_equilibrium(drive, mask)):
        torch.testing.assert_close(own, expected)
        assert 0 < own.count_nonzero() < mask.count_nonzero()


def test_batch_norms_on_running_statistics_in_the_jacobian_are_left_to_pytorch(monkeypatch):
    network, x = network_and_input(jacobian_bn="eval")
    with torch.no_grad():
        for connection in network.hidden:
            connection.norm.running_var.fill_(4.0)
    assert compare(network, x, monkeypatch) == len(network.hidden)


def test_both_products_of_the_jacobian_equal_those_in_float64(monkeypatch):
    network, x = network_and_input()
    masks = network.draw_masks(x)
    with torch.no_grad():
        current, weight = network.input(x, masks.input), network.feedback.normalised_weight()
        point, v = torch.rand(len(x), *network.layer_shapes[-1]), torch.randn(len(x), *network.layer_shapes[-1])
        fast = network.transposed_jacobian(point, current, weight, masks)
        assert all(isinstance(link.norm, hidden_layer.SaturatedNorm) for link in fast.links[1:])
        exact_masks = masks._replace(hidden=[mask.double() for mask in masks.hidden], feedback=masks.feedback.double())
        exact = copy.deepcopy(network).double().transposed_jacobian(point.double(), current.double(), weight.double(), exact_masks)
        before = v.clone()
        for own, expected in ((fast(v), exact(v.double())), (fast.forward_product(v), exact.forward_product(v.double()))):
            assert (own - expected).norm() <= 1e-5 * expected.norm() and expected.norm() > 0.01 * v.norm()
    assert torch.equal(v, before), "a product leaves its factor as it is"


def test_several_threads_give_the_same_numbers():
    norm, results = nn.BatchNorm2d(65), []
    y, mask, v = torch.randn(9, 65, 11, 11) + 3, torch.rand(9, 65, 11, 11).ge(0.5) * 2.0, torch.randn(9, 65, 11, 11)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        rate, saturated = hidden_layer.SaturatedNorm.at(y, norm, mask, 0.7)
        assert torch.equal(rate, saturated.rate()), "made again, the rates are the same"
        results.append([rate, saturated.mean, saturated.variance, saturated.inverse_std, *saturated.gradients(v)])
    assert 0.1 < results[0][0].mean() < 0.9
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_statistics_of_values_far_from_zero():
    """Against float64: squares are summed about a block's mean, so nothing cancels."""
    y = torch.randn(40, 3, 5, 5) + torch.tensor([0.0, 1e2, -1e3]).view(-1, 1, 1)
    _, saturated = hidden_layer.SaturatedNorm.at(y, nn.BatchNorm2d(3), None, 1.0)
    variance, mean = torch.var_mean(y.double(), (0, 2, 3))
    torch.testing.assert_close(saturated.variance, variance.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(saturated.mean, mean.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", [
    lambda network: network.eval(), lambda network: network.hidden.eval(), lambda network: network.double(), synchronise_batch_norms,
    lambda network: setattr(network, "neuron", OtherNeuron(*network.neuron)),
    lambda network: [setattr(connection.norm, "momentum", None) for connection in network.hidden],
    lambda network: [setattr(connection, "norm", nn.GroupNorm(1, len(connection.norm.weight))) for connection in network.hidden],
    lambda network: setattr(network, "bf16_products", True),
    lambda network: [connection.linear.register_forward_hook(lambda *_: None) for connection in network.hidden],
    lambda network: [setattr(connection.norm, "bias", None) for connection in network.hidden],
    lambda network: [setattr(connection.norm, "track_running_stats", False) for connection in network.hidden],
    lambda network: [setattr(connection.norm, "weight", nn.Parameter(torch.ones(1))) for connection in network.hidden],
    lambda network: [setattr(connection.norm, "weight", nn.Parameter(torch.ones(1).expand_as(connection.norm.weight)))
                     for connection in network.hidden],
    lambda network: [setattr(connection.norm, "num_batches_tracked", None) for connection in network.hidden],
], ids=["evaluation", "frozen batch norms", "float64", "synchronised batch norms", "neuron", "momentum", "another norm", "bfloat16",
        "hooks", "no bias in the batch norm", "no running statistics", "a weight that does not fit", "an expanded weight",
        "batches that are not counted"])
def test_what_it_does_not_know_runs_module_by_module(change, monkeypatch):
    network, x = network_and_input(dropout=0.0)
    change(network)
    monkeypatch.setattr(native, "norm_forward", None)
    with torch.no_grad():
        current, weight = network.input(x.to(network.feedback.w.dtype)), network.feedback.normalised_weight()
        if network.hidden[0].norm.weight.shape == (1,):
            with pytest.raises(RuntimeError, match="weight"):
                network.lap(torch.rand(len(x), *network.layer_shapes[-1]), current, weight)
            return
        with network._rounded_products(x):
            rates = network.lap(torch.rand(len(x), *network.layer_shapes[-1], dtype=weight.dtype), current, weight)
    assert len(rates) == 5 and rates[-1].norm() > 0


def test_one_hidden_layer_may_be_another_than_the_kernels():
    network, x = network_and_input()
    network.hidden[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    seen = []
    network(x).square().sum().backward()
    assert len(seen) == 1 and all(parameter.grad is not None for parameter in network.parameters())


def test_the_gradient_can_be_taken_twice_but_not_after_an_update():
    network, x = network_and_input()
    loss = network(x).square().sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in network.parameters()]
    loss.backward(retain_graph=True)
    for parameter, gradient in zip(network.parameters(), once):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    with torch.no_grad():
        network.hidden[2].norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("values", [(0.0, 1.0, 2.0), (0.0, -1.0)])
def test_a_mask_of_several_values_is_an_error(values):
    network, x = network_and_input()
    shapes = (*network.layer_shapes, network.layer_shapes[0])
    masks = [torch.tensor(values)[torch.randint(len(values), (len(x), *shape))] for shape in shapes]
    explicit_masks(network, masks)
    with pytest.raises(ValueError, match="mask has one value"):
        network(x)


def test_a_batch_of_one_value_gets_pytorchs_message():
    network, _ = network_and_input(dense, (9, 20, 7), batch=1, dropout=0.0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network.hidden[0].rate(torch.rand(1, 20), network.neuron, None)


@pytest.mark.parametrize("replace", [torch.Tensor.clone, lambda tensor: tensor.clone(memory_format=torch.contiguous_format)])
def test_saved_tensors_may_come_back_in_another_place_and_layout(replace):
    """As PyTorch's own hooks that keep them elsewhere do."""
    gradients = []
    for pack in (lambda tensor: tensor, replace):
        torch.manual_seed(3)
        network, x = network_and_input()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_the_way_back_may_be_under_autocast():
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(3)
        network, x = network_and_input()
        network.solver = BackwardSolver(tol=1e-2)
        loss = network(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    exact, rounded = gradients
    assert 1e-6 < (rounded - exact).norm() / exact.norm() < 0.05


def test_a_product_with_values_of_another_batch_is_an_error():
    network, x = network_and_input()
    with torch.no_grad():
        current, weight = network.input(x), network.feedback.normalised_weight()
        jacobian = network.transposed_jacobian(torch.rand(len(x), *network.layer_shapes[-1]), current, weight)
        for wrong in (torch.rand(1, *network.layer_shapes[-1]), torch.rand(len(x), *network.layer_shapes[-1], dtype=torch.float64)):
            with pytest.raises(ValueError, match="product with Jᵀ"):
                jacobian(wrong)


def test_what_a_pass_keeps_is_freed_on_the_way_back():
    network, x = network_and_input()
    kept, real = [], hidden_layer.SaturatedNorm.at.__func__

    def recording(cls, *parts):
        rate, saturated = real(cls, *parts)
        kept.extend(map(weakref.ref, (saturated.y, saturated.state)))
        return rate, saturated

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hidden_layer.SaturatedNorm, "at", classmethod(recording))
        loss = network(x).square().sum()
    assert len(kept) == 16 and all(reference() is not None for reference in kept)
    loss.backward()
    assert loss.grad_fn is not None and all(reference() is None for reference in kept)
