"""A network as a researcher's own code uses it: with other parameters, parts and settings than the scripts'."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from modules.connection import Connection
from modules.feedback import Feedback, power_iteration
from modules.implicit import BackwardSolver
from modules.network import FeedbackSNN
from modules.neuron import Neuron
from modules.solvers import METHODS
from modules.synchronised_norm import SynchronisedBatchNorm
from modules.zoo import f64c5_mnist
from tests.networks import KINDS, small_network


def gradients(network, x, call=None):
    logits = (call or network)(x)
    logits.square().sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("setting, value", [("time_steps", 0), ("time_steps", 6.0), ("dropout", 20), ("dropout", 1.0), ("dropout", -0.2),
                                            ("neuron", Neuron(0.0, 0.9)), ("neuron", Neuron(-1.0, 0.9)), ("neuron", Neuron(0.8, 1.5))])
def test_settings_that_make_no_sense_are_refused(setting, value):
    network, x = small_network("dense")
    setattr(network, setting, value)
    with pytest.raises(ValueError, match="threshold" if setting == "neuron" else setting):
        network(x)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_is_refused(kind):
    network, x = small_network(kind)
    with pytest.raises(ValueError, match="at least one sample"):
        network(x[:, :0] if network.events else x[:0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_parameters_for_one_call(kind, dtype):
    """They are those of a network that has these parameters, also after the call has put the old ones back."""
    network, x = small_network(kind, 0.9, tol=1e-9, max_iterations=100)
    network, x = network.to(dtype), x.to(dtype)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    given = {name: parameter.detach().clone().requires_grad_() for name, parameter in other.named_parameters()}
    functional_call(network, given, (x,)).square().sum().backward()
    for name, gradient in gradients(other, x).items():
        torch.testing.assert_close(given[name].grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind):
    """In evaluation mode, as in training a second pass has other statistics than the first."""
    network, x = small_network(kind, 0.9)
    network, x = network.float().eval(), x.float()
    expected = gradients(copy.deepcopy(network), x)
    for name, gradient in gradients(network, x, lambda x: checkpoint(network, x, use_reentrant=False)).items():
        assert torch.equal(gradient, expected[name])


def test_activation_checkpointing_of_a_dense_layer_in_training():
    """About the same gradients, as the power iteration has gone on in the second pass."""
    network, x = small_network("dense", 0.9)
    network, x = network.float(), x.float()
    expected = gradients(copy.deepcopy(network), x)
    for name, gradient in gradients(network, x, lambda x: checkpoint(network, x, use_reentrant=False)).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["events", "multi-layer"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_without_parameters(kind, training):
    """They are those whose scale is 1 and whose shift is 0."""
    network, x = small_network(kind, 0.9, threshold=0.3)
    network.train(training)
    bare = copy.deepcopy(network)
    for connection, other in zip((network.input, *network.hidden), (bare.input, *bare.hidden)):
        nn.init.ones_(connection.norm.weight), nn.init.zeros_(connection.norm.bias)
        other.norm.weight = other.norm.bias = None
    expected, actual = gradients(network, x), gradients(bare, x)
    assert expected["feedback.w"].norm() > 0
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name])


def test_hidden_batch_norms_need_running_statistics():
    network, x = small_network("multi-layer")
    network.hidden[0].norm = nn.BatchNorm2d(network.layer_shapes[1][0], track_running_stats=False)
    with pytest.raises(ValueError, match="track_running_stats=True"):
        network.float()(x.float())


def test_a_vector_with_gaps_between_its_elements():
    weight, vectors = torch.randn(6, 9), torch.randn(6, 2)
    for actual, expected in zip(power_iteration(weight, vectors[:, 0]), power_iteration(weight, vectors[:, 0].contiguous())):
        assert torch.equal(actual, expected)


def test_a_counter_of_another_type():
    network, x = small_network("dense")
    network, x = network.float(), x.float()
    numbers = torch.tensor([-1, 77], dtype=torch.int32)
    network.input.norm.num_batches_tracked = numbers[0]
    network(x)
    assert numbers.tolist() == [0, 77]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_for_all_modules_are_called(kind):
    network, x = small_network(kind)
    called, parts = set(), [network.input.linear, network.feedback, *(connection.norm for connection in network.hidden)]
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        network.float()(x.float())
    finally:
        handle.remove()
    assert called.issuperset(parts)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_tracing_is_refused():
    network, x = small_network("convolutional")
    with pytest.raises(RuntimeError, match="can't be traced"):
        torch.jit.trace(network, x)


@pytest.mark.parametrize("lacking", [dict(affine=False), dict(track_running_stats=False), dict(momentum=None)])
def test_a_batch_norm_that_several_processes_cannot_share_is_refused(lacking):
    with pytest.raises(ValueError, match="affine=True, track_running_stats=True and a number for momentum"):
        SynchronisedBatchNorm.of(nn.BatchNorm1d(3, **lacking))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_advance_in_training_mode_without_a_gradient_too(kind):
    """As torch.optim.swa_utils.update_bn counts on."""
    network, x = small_network(kind)
    network, x = network.float(), x.float()
    other = copy.deepcopy(network)
    logits = network(x)
    with torch.no_grad():
        assert torch.equal(other(x), logits)
    for (name, buffer), its_buffer in zip(network.named_buffers(), other.buffers()):
        torch.testing.assert_close(its_buffer, buffer, msg=name)
    assert all(module.num_batches_tracked == 1 for module in other.modules() if hasattr(module, "num_batches_tracked"))


def test_a_feedback_of_zeros_under_the_operators_norm():
    network = f64c5_mnist(4, size=8, neuron=Neuron(0.5, 0.9), time_steps=5, feedback_norm="operator")
    x, without = torch.randn(3, 1, 8, 8), copy.deepcopy(network)
    with torch.no_grad():
        network.feedback.w.zero_()
        without.feedback.g.zero_()
    torch.testing.assert_close(network(x), without(x))


class InPlace:
    def propose(self, x, mapped, residual):
        return x.add_(residual)


class Flattened:
    def propose(self, x, mapped, residual):
        return mapped.flatten()


class Nothing:
    def propose(self, x, mapped, residual):
        pass


@pytest.mark.parametrize("method", [InPlace, Flattened, Nothing])
def test_a_solver_that_proposes_no_new_x_is_refused(method, monkeypatch):
    monkeypatch.setitem(METHODS, "own", method)
    network, x = small_network("convolutional", method="own")
    with pytest.raises(ValueError, match=f"{method.__name__}.propose returns the next x"):
        network(x).sum().backward()


@pytest.mark.parametrize("setting, value", [("method", "none"), ("tol", -1), ("tol", float("nan")), ("max_iterations", 2.5),
                                            ("max_iterations", 0)])
def test_a_solvers_settings_are_checked_when_it_serves(setting, value):
    network, x = small_network("dense")
    setattr(network.solver, setting, value)
    with pytest.raises(ValueError, match="solver"):
        network(x).sum().backward()


@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 7), lambda: nn.Conv2d(4, 4, 3, padding=1)])
def test_one_connection_in_two_places(make):
    torch.manual_seed(0)
    connection, shape = Connection(make()), (7,) if isinstance(make(), nn.Linear) else (4, 6, 6)
    feedback = make()
    feedback.register_parameter("bias", None)
    network = FeedbackSNN(shape, connection, [connection], Feedback(feedback), 3, Neuron(0.6, 0.9), 8, solver=BackwardSolver(tol=1e-6))
    x, exact = torch.randn(6, *shape), copy.deepcopy(network).double()
    for name, gradient in gradients(exact, x.double()).items():
        own = gradients(copy.deepcopy(network), x)[name].double()
        assert (own - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


def test_a_part_of_another_geometry_in_a_parts_place():
    network, x = small_network("multi-layer", tol=1e-9, max_iterations=100)
    old = network.hidden[2].linear
    other = nn.Conv2d(old.in_channels, old.out_channels, 5, padding=2).double()
    network.hidden[2].linear = other
    built = copy.deepcopy(network)
    built.hidden[2] = Connection(copy.deepcopy(other))
    built.hidden[2].double().load_state_dict(network.hidden[2].state_dict())
    for name, gradient in gradients(built, x).items():
        torch.testing.assert_close(gradients(copy.deepcopy(network), x)[name], gradient, msg=name)
    network.hidden[2].linear = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, padding_mode="circular").double()
    with pytest.raises(ValueError, match="padding mode"):
        network(x)
    network.hidden[2].linear = nn.Identity()
    network.hidden[2].linear.weight, network.hidden[2].linear.bias = old.weight, old.bias
    with pytest.raises(ValueError, match="linear maps are nn.Linear"):
        network(x)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_inputs_that_are_no_floating_point_numbers_are_refused(dtype):
    network, x = small_network("events")
    with pytest.raises(ValueError, match="floating-point"):
        network(x.to(dtype))
