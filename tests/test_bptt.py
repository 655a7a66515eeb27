"""Back-propagation through time: the forward pass of the implicit network, and autograd's gradient of a naive loop."""

import copy

import pytest
import torch

from modules.bptt import SURROGATES
from modules.neuron import Neuron
from modules.zoo import f64c5_mnist, f400
from tests import naive
from tests.networks import KINDS, explicit_masks, small_network
from tests.small_data import command, write_small_data
from utils.checkpoint import load_checkpoint
from utils.instruments.observers import Trace


class NaiveSpike(torch.autograd.Function):
    """The spike and its surrogate derivative, written from their formulas."""

    @staticmethod
    def forward(ctx, u, threshold, surrogate):
        ctx.save_for_backward(u)
        ctx.threshold, ctx.surrogate = threshold, surrogate
        return (u >= threshold).to(u.dtype)

    @staticmethod
    def backward(ctx, gradient):
        distance = (ctx.saved_tensors[0] - ctx.threshold) / ctx.threshold
        if ctx.surrogate == "sigmoid":
            slope = 4 * torch.exp(-4 * distance) / (1 + torch.exp(-4 * distance)) ** 2
        else:
            slope = torch.where(distance.abs() < 1, 1 - distance.abs(), 0.0)
        return gradient * slope / ctx.threshold, None, None


def naive_loss(network, x, masks, spike):
    """The sum of squared logits through a loop over time with autograd, batch norm applied step by step from its definition."""
    weight, _, _ = naive.feedback_weight(network)
    connections = [network.input, *network.hidden]
    statistics = [(connection.norm.running_mean, connection.norm.running_var) for connection in connections]
    if network.training:
        statistics[0] = naive.batch_statistics(network.input.linear(naive.mean_input(network, x)))
    T, leak, threshold = network.time_steps, network.neuron.leak, network.neuron.threshold
    u, s, rate = [0.0] * len(connections), [0.0] * len(connections), 0.0
    for t in range(T):
        before = s[-1]
        for layer, connection in enumerate(connections):
            source = (x[t] if network.events else x) if layer == 0 else s[layer - 1]
            current = naive.batch_norm(connection.linear(source), connection.norm, *statistics[layer]) * masks[layer]
            if layer == 0 and t > 0:
                current = current + naive.apply_feedback(weight, before, naive.is_dense(network)) * masks[-1]
            u[layer] = leak * (u[layer] - threshold * s[layer]) + current
            s[layer] = spike(u[layer])
        rate = rate + leak ** (T - 1 - t) * s[-1]
    return network.readout((rate / sum(leak ** t for t in range(T))).flatten(1)).square().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leak", [0.9, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_forward_pass_and_running_statistics_are_the_implicit_networks(kind, leak, training):
    implicit, x = small_network(kind, leak, dropout=0.3)
    implicit.train(training)
    masks = explicit_masks(implicit)
    unrolled = copy.deepcopy(implicit)
    unrolled.surrogate = SURROGATES["sigmoid"]
    explicit_masks(unrolled, masks)
    seen, expected = [], []
    logits = unrolled(x, observe=lambda t, spikes: seen.extend(spikes))
    assert torch.equal(logits, implicit(x, observe=lambda t, spikes: expected.extend(spikes)))
    assert all(map(torch.equal, seen, expected)) and len(seen) == len(expected) > 0
    traces = Trace(), Trace()
    for network, trace in zip((unrolled, implicit), traces):
        torch.manual_seed(1)
        network(x, observe=trace)
    for (_, potentials), (_, its_potentials) in zip(*(trace.of_layers() for trace in traces), strict=True):
        torch.testing.assert_close(potentials, its_potentials, atol=1e-12, rtol=1e-12)
    for name, tensor in unrolled.state_dict().items():
        torch.testing.assert_close(tensor, implicit.state_dict()[name], atol=1e-15, rtol=1e-14, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_spikes_equal_the_fast_paths_in_float32(kind):
    implicit, x = small_network(kind, dropout=0.3)
    implicit, x = implicit.float(), x.float()
    unrolled = copy.deepcopy(implicit)
    unrolled.surrogate = SURROGATES["triangular"]
    spikes = [[], []]
    for network, seen in zip((implicit, unrolled), spikes):
        torch.manual_seed(1)  # The same dropout masks.
        network(x, observe=lambda t, layers: seen.append([layer.clone() for layer in layers]))
    assert all(torch.equal(one, other) for step, other_step in zip(*spikes) for one, other in zip(step, other_step))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("training", [True, False])
def test_gradient_equals_that_of_a_naive_loop(kind, surrogate, training):
    network, x = small_network(kind, dropout=0.3)
    network.surrogate = SURROGATES[surrogate]
    network.train(training)
    masks, reference = explicit_masks(network), copy.deepcopy(network)
    network(x).square().sum().backward()
    threshold = network.neuron.threshold
    naive_loss(reference, x, masks, lambda u: NaiveSpike.apply(u, threshold, surrogate)).backward()
    for (name, parameter), expected in zip(network.named_parameters(), reference.parameters()):
        # The bias before a batch norm with the statistics of the batch has no effect, so its gradient is rounding.
        assert expected.grad.norm() > 1e-6 or (training and name == "input.linear.bias"), name
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-9, rtol=1e-9, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_smooth_spike_equals_finite_differences(kind):
    network, x = small_network(kind, time_steps=4, dropout=0.3)
    network.surrogate = lambda potential, threshold: torch.sigmoid(3 * (potential - threshold))
    masks = explicit_masks(network)

    def loss():
        fresh = copy.deepcopy(network)  # Every evaluation starts from the same running statistics and power iteration.
        explicit_masks(fresh, masks)
        return fresh, fresh(x).square().sum()

    fresh, value = loss()
    value.backward()
    gradients = {name: parameter.grad for name, parameter in fresh.named_parameters()}
    for name, parameter in network.named_parameters():
        if name == "feedback.w":
            continue  # Its gradient holds the vectors of the power iteration constant; the naive loop above checks it.
        direction = torch.randn_like(parameter)
        direction, h = direction / direction.norm(), 1e-5
        around = []
        for step in (h, -2 * h):
            parameter.data.add_(direction, alpha=step)
            around.append(loss()[1].item())
        parameter.data.add_(direction, alpha=h)
        expected = (around[0] - around[1]) / (2 * h)
        assert abs((gradients[name] * direction).sum().item() - expected) < 1e-6 * (1 + abs(expected)), name


def test_memory_of_the_graph_grows_with_the_steps_and_the_implicit_gradients_does_not():
    def kept(time_steps, surrogate):
        network = f64c5_mnist(4, size=12, neuron=Neuron(0.8, 0.9), time_steps=time_steps, surrogate=surrogate)
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network(torch.randn(3, 1, 12, 12))
        return total

    assert kept(5, None) == kept(20, None)
    short, middle, long = (kept(steps, SURROGATES["sigmoid"]) for steps in (5, 10, 20))
    assert long - middle == 2 * (middle - short) > 0


def test_it_learns_where_one_step_of_feedback_matters():
    """A few steps of descent on a batch lower its loss."""
    network = f400(20, inputs=9, classes=4, neuron=Neuron(1.0, 0.9), time_steps=5, surrogate=SURROGATES["triangular"])
    x, labels = torch.randn(32, 9), torch.arange(32) % 4
    optimizer, losses = torch.optim.SGD(network.parameters(), 0.1, 0.9), []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_command_line_trains_by_it_and_goes_on_with_either(tmp_path):
    data = write_small_data(tmp_path / "data")
    flags = ["--path", data, "-c", tmp_path / "run", "--device", "cpu", "--seed", 1, "--train-batch", 20, "-t", 3]
    status, out, err = command(*flags, "--epochs", 1, "--gradient", "bptt", "--surrogate", "triangular")
    assert status == 0 and "back-propagation through time" in out and "not converged" not in out, err
    first = load_checkpoint(tmp_path / "run/checkpoint.pth.tar").state_dict
    status, out, err = command(*flags, "--epochs", 1)
    assert status == 0 and "0 of 3 not converged" in out, err
    other = load_checkpoint(tmp_path / "run/checkpoint.pth.tar")
    assert not torch.equal(first["input.linear.weight"], other.state_dict["input.linear.weight"]), "another gradient"
    status, out, err = command(*flags, "--epochs", 2, "--gradient", "bptt", "--resume", tmp_path / "run/checkpoint.pth.tar")
    assert status == 0, err


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_leave_their_batch_norms_their_gradients(kind):
    """In float32, where the C kernels, which know no gradient, must not serve."""
    network, x = small_network(kind)
    network.surrogate = SURROGATES["sigmoid"]
    exact = copy.deepcopy(network)
    for own, dtype in ((network.float(), torch.float32), (exact, torch.float64)):
        for connection in (own.input, *own.hidden):
            connection.linear.requires_grad_(False)
        own(x.to(dtype)).square().sum().backward()
    for connection, expected in zip((network.input, *network.hidden), (exact.input, *exact.hidden)):
        for name in ("weight", "bias"):
            gradient = getattr(expected.norm, name).grad
            assert gradient.norm() > 0
            own = getattr(connection.norm, name).grad.double()
            torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-4 * gradient.norm().item())
