"""Passes on a CUDA device, captured in graphs, against the CPU's and against those without graphs."""

import copy

import pytest
import torch
import torch.nn.functional as F

from modules.graphed import GraphedPasses
from tests.marks import needs_cuda
from tests.networks import KINDS, explicit_masks, small_network


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leak", [0.9, 1.0])
def test_a_training_step_equals_the_cpus(kind, leak):
    """Twice, as the second step replays the graph that the first one captured."""
    network, x = small_network(kind, leak, dropout=0.3, tol=1e-6, max_iterations=100)
    masks = [mask.float() for mask in explicit_masks(network)]
    cpu, gpu = network.float(), copy.deepcopy(network).float().cuda()
    explicit_masks(cpu, masks)
    explicit_masks(gpu, [mask.cuda() for mask in masks])
    labels = torch.arange(x.shape[1 if network.events else 0]) % 4
    for scale in (1.0, 0.8):
        results = []
        for own, device in ((cpu, "cpu"), (gpu, "cuda")):
            own.zero_grad()
            logits = own(x.float().to(device) * scale)
            F.cross_entropy(logits, labels.to(device)).backward()
            results.append((logits.cpu(), {name: parameter.grad.cpu() for name, parameter in own.named_parameters()}))
        (logits, gradients), (on_gpu, gpu_gradients) = results
        torch.testing.assert_close(on_gpu, logits, atol=1e-4, rtol=1e-4)
        largest = max(gradient.norm() for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert (gpu_gradients[name] - gradient).norm() <= 1e-3 * largest, name


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_what_the_loop_computes(kind):
    network, x = small_network(kind)
    network, x = network.float().cuda().eval(), x.float().cuda()
    with torch.no_grad():
        stepwise = network(x, observe=lambda t, spikes: None)
        for _ in range(2):
            torch.testing.assert_close(network(x), stepwise, atol=1e-5, rtol=1e-5)


def graphed_and_not(kind, **settings):
    """The same network twice on a GPU, the second without graphs, with fixed masks, and an input."""
    network, x = small_network(kind, dropout=0.3, tol=1e-6, max_iterations=100, **settings)
    masks = [mask.float().cuda() for mask in explicit_masks(network)]
    graphed, plain = (copy.deepcopy(network).float().cuda() for _ in range(2))
    plain.uses_graphs = False
    for own in (graphed, plain):
        explicit_masks(own, masks)
    return (graphed, plain), x.float().cuda()


def assert_same_tensors(graphed, plain):
    for (name, own), other in zip(graphed.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4, msg=name)
    for (name, own), other in zip(graphed.named_parameters(), plain.parameters()):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_add_up_and_statistics_advance_as_without_graphs(kind):
    pair, x = graphed_and_not(kind)
    for network in pair:
        for scale in (1.0, 0.8, 1.2):
            network(x * scale).square().sum().backward()
    assert_same_tensors(*pair)


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_passes_before_the_first_ones_gradient(kind):
    """Two passes of one loss, with a test in between."""
    pair, x = graphed_and_not(kind)
    for network in pair:
        for _ in range(2):
            network.zero_grad()
            first = network(x)
            with torch.no_grad():
                network.eval()(0.9 * x)
            (first.square().sum() + network.train()(0.8 * x).square().sum()).backward()
    assert_same_tensors(*pair)


@needs_cuda
def test_another_kind_of_pass_is_captured_while_the_loss_of_the_last_is_alive():
    network, x = small_network("multi-layer", tol=1e-6, max_iterations=100)
    pair, x = [copy.deepcopy(network).float().cuda() for _ in range(2)], x.float().cuda()
    pair[1].uses_graphs = False
    for network in pair:
        for samples in (len(x), 3):
            loss = network(x[:samples]).square().sum()
            loss.backward()
    assert_same_tensors(*pair)
    assert len(pair[0]._graphed._captured) == 2 and all(pair[0]._graphed._captured.values())


def test_a_pass_draws_as_many_random_numbers_as_it_has_masks():
    network, x = small_network("multi-layer", dropout=0.3)
    network.eval()
    before = torch.get_rng_state()
    network(x)
    assert network.draw_seeds().shape == (0,) and torch.equal(torch.get_rng_state(), before)
    network.train()(x)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert network.draw_seeds().shape == (len(network.layer_shapes) + 1,) and torch.equal(torch.get_rng_state(), after)


@needs_cuda
def test_masks_and_random_numbers_are_those_of_a_pass_without_graphs():
    """In the pass that captures, in those that replay, and in tests between them."""
    network, x = small_network("multi-layer", dropout=0.3)
    results = []
    for graphs in (True, False):
        own = copy.deepcopy(network).float().cuda()
        own.uses_graphs = graphs
        torch.manual_seed(1)
        found = []
        for training in (True, True, False, True):
            with torch.set_grad_enabled(training):
                logits = own.train(training)(x.float().cuda())
            if training:
                logits.sum().backward()
            found.append(logits.detach())
        results.append((torch.stack(found), torch.get_rng_state()))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    assert torch.equal(results[0][1], results[1][1])


@needs_cuda
def test_a_gradient_whose_pass_was_overwritten_is_refused():
    (network, _), x = graphed_and_not("convolutional")
    loss = network(x).sum()
    loss.backward(retain_graph=True)
    network(0.5 * x)
    with pytest.raises(RuntimeError, match="a later pass has overwritten"):
        loss.backward()


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_one_pass_can_be_taken_twice(kind):
    pair, x = graphed_and_not(kind)
    for network in pair:
        loss = network(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_tensors(*pair)


@needs_cuda
def test_under_an_autocast_of_the_callers_nothing_is_captured():
    """It would keep rounded copies of the weights, from which graphs would go on reading."""
    (network, _), x = graphed_and_not("multi-layer")
    with torch.autocast("cuda", torch.bfloat16):
        network(x).square().sum().backward()
    assert not network._graphed._captured and network.input.linear.weight.grad.norm() > 0


@needs_cuda
def test_hooks_on_connections_are_called():
    (network, _), x = graphed_and_not("multi-layer")
    seen = []
    network(x)
    network.hidden[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    network(x)
    assert seen


@needs_cuda
def test_what_a_graph_takes_for_granted_may_change():
    """New parameters in place of old ones, another T, frozen parameters, evaluation and back."""
    pair, x = graphed_and_not("multi-layer")
    for network in pair:
        network(x).sum().backward()
        network.input.linear.weight = torch.nn.Parameter(0.5 * network.input.linear.weight.detach())
        network.zero_grad()
        network(x).sum().backward()
        network.time_steps = 3
        network.feedback.g.requires_grad_(False)
        network.zero_grad(set_to_none=False)
        network(x).sum().backward()
    assert_same_tensors(*pair)


def test_a_network_can_be_copied_with_its_graphs():
    network, x = small_network("dense")
    copied = copy.deepcopy(network)
    assert isinstance(copied._graphed, GraphedPasses) and copied._graphed is not network._graphed
    torch.testing.assert_close(copied.eval()(x), network.eval()(x))
