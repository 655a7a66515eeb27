"""A dense layer's training pass by its own kernels, against the one module by module, which other tests hold against the naive one."""

import copy

import pytest
import torch
from torch import nn

from modules import dense_layer, native
from modules.implicit import BackwardSolver
from modules.neuron import Neuron, make_neuron
from modules.synchronised_norm import synchronise_batch_norms
from modules.zoo import f400
from tests.networks import explicit_masks


class OtherNeuron(Neuron):
    pass


def network_and_input(width=40, inputs=23, batch=11, leak=0.9, dropout=0.3, g=0.7, time_steps=7, method="anderson"):
    network = f400(width, inputs=inputs, neuron=make_neuron(0.8, leak), time_steps=time_steps, dropout=dropout,
                   solver=BackwardSolver(method, tol=1e-6, max_iterations=100))
    with torch.no_grad():
        network.input.linear.bias.uniform_(-0.2, 0.2)
        network.input.norm.weight.uniform_(0.5, 1.5)
        network.input.norm.bias.uniform_(-0.6, 0.1)
        network.input.norm.running_mean.uniform_(-0.2, 0.2)
        network.feedback.g.fill_(g)
    masks = [torch.rand(batch, width).ge(dropout) / (1 - dropout) if dropout else None for _ in range(2)]
    explicit_masks(network, masks)
    network.measures_residual = True
    return network, torch.randn(batch, inputs)


def step(network, x, monkeypatch, fast):
    """Whether each pass was served by the layer's kernels, and what a training step leaves: logits, residual, gradients and buffers."""
    served, real = [], native.layer_forward
    monkeypatch.setattr(native, "layer_forward", lambda layer: served.append(real(layer)) or served[-1])
    monkeypatch.setattr(dense_layer, "serves", dense_layer.serves if fast else lambda *parts: False)
    logits = network(x)
    logits.square().sum().backward()
    monkeypatch.undo()
    return served, {"logits": logits.detach(), "residual": network.residual,
                    **{name: parameter.grad for name, parameter in network.named_parameters()},
                    **{name: buffer.float() for name, buffer in network.named_buffers()}}


def record_solves(monkeypatch):
    """What the kernels' solves return, for the next step alone."""
    solves, real = [], native.layer_solve
    monkeypatch.setattr(native, "layer_solve", lambda *parts: solves.append(real(*parts)) or solves[-1])
    return solves


def compare(network, x, monkeypatch):
    plain = copy.deepcopy(network)
    plain.draw_masks = network.draw_masks
    served, fast = step(network, x, monkeypatch, fast=True)
    never, slow = step(plain, x, monkeypatch, fast=False)
    assert never == []
    scale = max(gradient.norm() for name, gradient in slow.items() if name.endswith(("weight", ".w")))
    for name, value in slow.items():
        assert (fast[name] - value).norm() <= 1e-5 * value.norm() + 1e-6 * scale, name
    assert min(slow[name].norm() for name in ("readout.weight", "input.linear.weight", "feedback.g")) > 0 or abs(network.feedback.g) > 1
    return served


# Panels of the kernels are 32 and 16 columns wide and added in pairs, their tiles 10 or 3 rows high, and a thread takes 16 units.
@pytest.mark.parametrize("width,inputs,batch", [(40, 23, 11), (48, 64, 32), (16, 5, 2), (65, 100, 33), (400, 784, 24), (7, 1, 50),
                                                (96, 30, 21), (110, 40, 12), (144, 17, 9), (32, 20, 40)])
@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_equals_the_pass_module_by_module(width, inputs, batch, leak, monkeypatch):
    network, x = network_and_input(width, inputs, batch, leak)
    assert compare(network, x, monkeypatch) == [True]


@pytest.mark.parametrize("settings", [
    dict(dropout=0.0), dict(g=1.5), dict(g=-1.5), dict(g=-0.4), dict(g=0.0), dict(time_steps=1), dict(time_steps=25),
    dict(method="broyden"), dict(method="fixed-point"),
], ids=str)
def test_equals_it_at_the_edges_of_its_settings(settings, monkeypatch):
    network, x = network_and_input(**settings)
    assert compare(network, x, monkeypatch) == [True]


def test_a_layer_that_is_too_active_runs_module_by_module_and_advances_once(monkeypatch):
    network, x = network_and_input()
    with torch.no_grad():
        network.input.norm.bias.fill_(2.0)
    assert compare(network, x, monkeypatch) == [False]
    assert network.input.norm.num_batches_tracked == 1


def test_a_quiet_layer_whose_rates_could_nearly_all_change_is_solved_by_dense_products(monkeypatch):
    network, x = network_and_input(time_steps=1, dropout=0.05)
    with torch.no_grad():
        network.input.norm.weight.fill_(0.05)
        network.input.norm.bias.fill_(0.4)[:4] = 0.9  # Below the threshold, but for four of 40 units.
    solves = record_solves(monkeypatch)
    assert compare(network, x, monkeypatch) == [True]
    assert solves == []


def test_the_solve_is_one_call(monkeypatch):
    network, x = network_and_input()
    solves = record_solves(monkeypatch)
    assert compare(network, x, monkeypatch) == [True]
    (value, residual, products), = solves
    assert value.shape == (len(x), 40) and residual <= 1e-6 and products > 2
    plain = copy.deepcopy(network)
    plain.draw_masks, plain.solver = network.draw_masks, BackwardSolver(tol=1e-6, max_iterations=100)
    step(plain, x, monkeypatch, fast=False)
    assert products == pytest.approx(plain.solver.tally.iterations, rel=0.3), "the mean over the samples"
    assert network.solver.tally.solves == 1 and network.solver.tally.iterations == products


@pytest.mark.parametrize("solver", [lambda jacobian, gradient: gradient, BackwardSolver(), BackwardSolver(tol=1e-6)])
def test_several_threads_give_the_same_numbers(solver):
    results = []
    for threads in (1, 2, 3):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        network, x = network_and_input(200, 300, 64)
        passed = dense_layer.run(network.input, network.feedback, network.neuron, x, network.draw_masks(x), network.time_steps)
        v = torch.randn(passed.rate.shape) * torch.rand(len(x), 1)
        passed.with_gradient(solver).backward(v)
        gradients = [parameter.grad for name, parameter in network.named_parameters() if not name.startswith("readout")]
        results.append([passed.rate, passed.mapped, *gradients, *network.buffers()])
    assert results[0][0].sum() > 0
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("change", [
    lambda network: network.eval(), lambda network: network.input.eval(), lambda network: network.double(), synchronise_batch_norms,
    lambda network: setattr(network, "neuron", OtherNeuron(*network.neuron)), lambda network: setattr(network.input.norm, "momentum", None),
    lambda network: setattr(network.input, "linear", nn.Sequential(network.input.linear)),
    lambda network: setattr(network, "bf16_products", True),
    lambda network: network.input.norm.register_forward_hook(lambda *_: None),
    lambda network: network.feedback.register_forward_hook(lambda *_: None),
    lambda network: setattr(network.input, "norm", nn.BatchNorm1d(40, affine=False)),
    lambda network: setattr(network.input, "linear", nn.Linear(23, 40, bias=False)),
], ids=["evaluation", "frozen batch norm", "float64", "synchronised batch norm", "neuron", "momentum", "linear", "bfloat16", "hook",
        "hook on the feedback", "no weight in the batch norm", "no bias"])
def test_what_it_does_not_know_runs_module_by_module(change, monkeypatch):
    network, x = network_and_input()
    change(network)
    monkeypatch.setattr(native, "layer_forward", None)
    explicit_masks(network, [mask.to(network.feedback.w.dtype) for mask in (torch.ones(11, 40), torch.ones(11, 40))])
    network(x.to(network.feedback.w.dtype)).square().sum().backward()
    assert network.feedback.w.grad.norm() > 0 or not network.training


def test_an_input_that_wants_a_gradient_gets_it():
    network, x = network_and_input()
    network(x.requires_grad_()).square().sum().backward()
    assert x.grad.norm() > 0


def test_the_gradient_can_be_taken_twice_but_not_after_an_update():
    network, x = network_and_input()
    loss = network(x).square().sum()
    loss.backward(retain_graph=True)
    once = network.feedback.w.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(network.feedback.w.grad, 2 * once)
    with torch.no_grad():
        network.input.linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("wrong", [lambda v: v[:-1], lambda v: v.double()], ids=["shape", "dtype"])
def test_a_solver_that_returns_something_else_is_an_error(wrong):
    network, x = network_and_input()
    network.solver = lambda jacobian, gradient: wrong(gradient)
    loss = network(x).square().sum()
    with pytest.raises(RuntimeError, match=r"of the gradient's shape \(11, 40\) and dtype, float32, not"):
        loss.backward()


def test_masks_and_weights_that_do_not_fit_are_left_to_pytorch(monkeypatch):
    network, x = network_and_input()
    monkeypatch.setattr(native, "layer_forward", None)
    explicit_masks(network, [torch.ones(1, 40), torch.ones(11, 40)])  # One mask for all samples is as good.
    network.input(x, network.draw_masks(x).input).sum().backward()
    assert not dense_layer.serves(network.input, network.feedback, network.neuron, x, network.draw_masks(x))
    explicit_masks(network, [torch.ones(11, 40), torch.ones(11, 40)])
    norm = network.input.norm
    for name in "weight", "bias":
        fitting = getattr(norm, name)
        setattr(norm, name, nn.Parameter(torch.ones(1)))
        with pytest.raises(RuntimeError, match="weight|bias"):
            network(x)
        setattr(norm, name, fitting)
    network.input.linear = nn.Linear(23, 39)
    with pytest.raises((RuntimeError, ValueError), match="size|shape|match|dimension|running_mean"):
        network(x)


def of_float64(network):
    network.feedback.g = nn.Parameter(network.feedback.g.detach().double())


def expanded(network):
    network.input.norm.weight = nn.Parameter(torch.ones(1).expand(40))


def uncounted(network):
    network.input.norm.num_batches_tracked = None


@pytest.mark.parametrize("change", [of_float64, expanded, uncounted])
def test_vectors_that_the_kernels_cannot_read_go_to_pytorch(change, monkeypatch):
    network, x = network_and_input()
    change(network)
    monkeypatch.setattr(native, "layer_forward", lambda layer: pytest.fail("a kernel was called"))
    network(x).square().sum().backward()
    assert network.feedback.w.grad.norm() > 0


def test_singular_vectors_of_another_size_are_an_error():
    network, x = network_and_input()
    network.feedback.u = torch.randn(3)
    with pytest.raises(RuntimeError):
        for _ in range(20):
            network(x)


@pytest.mark.parametrize("change", ["input", "parameters"])
def test_what_the_backward_pass_needs_may_not_have_changed(change):
    network, x = network_and_input()
    loss = network(x).square().sum()
    if change == "input":
        x.zero_()
    else:
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
    with pytest.raises(RuntimeError, match="inplace operation|other memory"):
        loss.backward()


def test_a_single_sample_gets_pytorchs_message():
    network, x = network_and_input(batch=1, dropout=0.0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(x)
