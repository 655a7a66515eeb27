"""Passes captured in graphs against those without: on a CUDA device, and with the stand-in for its graphs on a CPU."""

import copy

import pytest
import torch

from modules.across_processes import InnerProducts
from modules.graphed import GraphedPasses
from modules.graphed_solve import _GraphedIteration, refined
from modules.solvers import Iteration
from tests.graphed_pairs import assert_same_tensors, device, graphed_and_not
from tests.marks import needs_cuda, needs_interpreter, run_in_interpreter
from tests.networks import KINDS, small_network, wide_network
from tests.recorded_graphs import stand_in_with_triton

pytestmark = pytest.mark.filterwarnings("error:.* could not be captured")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_graph_replays_what_the_loop_computes(kind, without_gradients, device):
    network, x = small_network(kind)
    network, x = network.float().to(device).eval(), x.float().to(device)
    with without_gradients():
        stepwise = network(x, observe=lambda t, spikes: None)
        for _ in range(2):
            torch.testing.assert_close(network(x), stepwise, atol=1e-5, rtol=1e-5)
    assert all(network._graphed._captured.values()) and len(network._graphed._captured) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_advance_without_a_gradient_too(kind, device):
    pair, x = graphed_and_not(kind, device)
    with torch.no_grad():
        for scale in (1.0, 0.8, 0.6):
            torch.testing.assert_close(*[network(x * scale) for network in pair], atol=1e-5, rtol=1e-5)
    assert all(connection.norm.num_batches_tracked == 3 for connection in (pair[0].input, *pair[0].hidden))
    assert all(pair[0]._graphed._captured.values())
    assert_same_tensors(*pair)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_add_up_and_statistics_advance_as_without_graphs(kind, device):
    pair, x = graphed_and_not(kind, device)
    for network in pair:
        for scale in (1.0, 0.8, 1.2):
            (3 * network(x * scale).square().sum()).backward()
    assert_same_tensors(*pair)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_before_the_first_ones_gradient(kind, device):
    """Two passes of one loss, with a test in between."""
    pair, x = graphed_and_not(kind, device)
    for network in pair:
        for _ in range(2):
            network.zero_grad()
            first = network(x)
            with torch.no_grad():
                network.eval()(0.9 * x)
            (first.square().sum() + network.train()(0.8 * x).square().sum()).backward()
    assert_same_tensors(*pair)


def test_a_solve_that_is_stopped_early_gives_its_best_iterate(device):
    """Here J is so large that the first one is better than the second."""
    pair, x = graphed_and_not("multi-layer", device, max_iterations=2)
    for network in pair:
        with torch.no_grad():
            for connection in network.hidden:
                connection.norm.weight.fill_(1.5)
                connection.norm.bias.fill_(0.4)
    first = copy.deepcopy(pair[1])
    first.solver.max_iterations = 1
    for network in (*pair, first):
        network(x).square().sum().backward()
    assert first.solver.tally.worst_residual == pytest.approx(pair[1].solver.tally.worst_residual, rel=1e-4)
    assert_same_tensors(*pair)


def test_float32_products_refine_what_rough_ones_found(device, monkeypatch):
    monkeypatch.setattr(_GraphedIteration, "_precisions", (False, True))
    pair, x = graphed_and_not("multi-layer", device)
    for network in pair:
        for scale in (1.0, 0.8):
            network(x * scale).square().sum().backward()
        network.solver.tally.iterations = 0  # Beginning anew takes some more.
    assert_same_tensors(*pair)


def test_the_residual_after_rough_products_is_that_of_the_others():
    class Rough(Iteration):
        accurate_visits = 0

        def visit(self):
            self.map = (lambda v: start + matrix @ v + 1e-4 * torch.sin(1e3 * v)) if self.rough else (lambda v: start + matrix @ v)
            self.accurate_visits += not self.rough
            return super().visit()

        def go_on_from(self, x):
            self.__init__(self.map, x, "anderson", InnerProducts())
            self.scale = start.norm()

    matrix, start = torch.randn(60, 60, dtype=torch.float64) / 12, torch.randn(60, dtype=torch.float64)
    for tol, most in ((1e-3, 2), (1e-8, 30)):
        iteration = Rough(None, start, "anderson", InnerProducts())
        solution = refined(iteration, start, tol, 60, ahead=True)
        true_residual = (start + matrix @ solution.value - solution.value).norm() / start.norm()
        assert solution.converged and solution.residual <= tol and abs(true_residual - solution.residual) <= 1e-9
        assert 1 <= iteration.accurate_visits <= most < solution.iterations


def test_another_kind_of_pass_is_captured_while_the_loss_of_the_last_is_alive(device):
    pair, x = graphed_and_not("multi-layer", device, dropout=0.0)
    for network in pair:
        network.draw_masks = type(network).draw_masks.__get__(network)
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


def test_masks_and_random_numbers_are_those_of_a_pass_without_graphs(device):
    """In the pass that captures, in those that replay, and in tests between them."""
    network, x = small_network("multi-layer", dropout=0.3)
    results = []
    for graphs in (True, False):
        own = copy.deepcopy(network).float().to(device)
        own.uses_graphs = graphs
        torch.manual_seed(1)
        found = []
        for training in (True, True, False, True):
            with torch.set_grad_enabled(training):
                logits = own.train(training)(x.float().to(device))
            if training:
                logits.sum().backward()
            found.append(logits.detach())
        results.append((torch.stack(found), torch.get_rng_state()))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    assert torch.equal(results[0][1], results[1][1])


def test_a_gradient_whose_pass_was_overwritten_is_refused(device):
    (network, _), x = graphed_and_not("convolutional", device)
    loss = network(x).sum()
    loss.backward(retain_graph=True)
    network(0.5 * x)
    with pytest.raises(RuntimeError, match="a later pass has overwritten"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_one_pass_can_be_taken_twice(kind, device):
    pair, x = graphed_and_not(kind, device)
    for network in pair:
        loss = network(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_tensors(*pair)


@pytest.mark.parametrize("training", [True, False])
def test_rates_that_a_hook_keeps_are_not_overwritten(training, device):
    (network, plain), x = graphed_and_not("multi-layer", device)
    for own in (network, plain):
        own.kept = []
        own.readout.register_forward_pre_hook(lambda module, inputs, own=own: own.kept.append(inputs[0]))
        with torch.set_grad_enabled(training):
            for scale in (1.0, 0.8):
                logits = own.train(training)(scale * x)
                if training:
                    logits.sum().backward()
    for rate, expected in zip(network.kept, plain.kept):
        torch.testing.assert_close(rate, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_in_the_input(kind, device):
    """No graph gives it, so such a pass goes without, and the next one with its graph again."""
    pair, x = graphed_and_not(kind, device)
    found = []
    for network in pair:
        for own in (x, x.clone().requires_grad_(), x):
            network(own).square().sum().backward()
            found.append(own.grad)
    assert found[0] is found[2] is None and found[1].norm() > 0
    torch.testing.assert_close(found[1], found[4], atol=1e-4, rtol=1e-3)
    assert_same_tensors(*pair)
    assert len(pair[0]._graphed._captured) == 1


def test_only_the_readout_is_trained(device):
    """Statistics advance, and passes are captured as those without a gradient are."""
    pair, x = graphed_and_not("multi-layer", device)
    for network in pair:
        network.requires_grad_(False).readout.requires_grad_(True)
        for scale in (1.0, 0.8):
            network(x * scale).square().sum().backward()
    assert pair[1].readout.weight.grad.norm() > 0 and all(pair[0]._graphed._captured.values()) and not pair[0]._graphed._busy
    assert_same_tensors(*pair)


def test_a_parameter_that_is_not_used_has_no_gradient(device):
    pair, x = graphed_and_not("dense", device)
    for network in pair:
        network.unused = torch.nn.Parameter(torch.ones(3, device=device))
        for _ in range(2):
            network(x).square().sum().backward()
        assert network.unused.grad is None
    assert_same_tensors(*pair)


def test_products_in_bfloat16_are_captured(device):
    pair, x = graphed_and_not("multi-layer", device, tol=1e-3)
    for network in pair:
        network.bf16_products = True
        for scale in (1.0, 0.8):
            network(x * scale).square().sum().backward()
    for (name, own), other in zip(pair[0].named_parameters(), pair[1].parameters()):
        assert (own.grad - other.grad).norm() <= 0.02 * other.grad.norm() + 1e-4, name


def compare_captured_steps_of_a_wide_network(device):
    """With Triton's kernels for everything that there is one for, and float32 products that refine rough ones."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            stand_in_with_triton(patch)
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        torch.manual_seed(0)
        network, x = wide_network(device)
        pair = network, copy.deepcopy(network)
        pair[1].uses_graphs = False
        for network in pair:
            torch.manual_seed(1)
            for scale in (1.0, 0.8):
                network(x * scale).square().sum().backward()
            network.solver.tally.iterations = 0
    assert_same_tensors(*pair)
    graph, = pair[0]._graphed._captured.values()
    assert len(graph.passed.jacobian._iteration.visits) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is tested on the CUDA device")
@needs_interpreter
def test_captured_steps_of_a_wide_network_in_the_interpreter():
    run_in_interpreter("from tests.test_graphed import compare_captured_steps_of_a_wide_network as compare; compare('cpu')")


@needs_cuda
def test_captured_steps_of_a_wide_network():
    compare_captured_steps_of_a_wide_network("cuda")


def test_a_network_can_be_copied_with_its_graphs():
    network, x = small_network("dense")
    copied = copy.deepcopy(network)
    assert isinstance(copied._graphed, GraphedPasses) and copied._graphed is not network._graphed
    torch.testing.assert_close(copied.eval()(x), network.eval()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_pass_leaves_its_distance_from_equilibrium(kind, device):
    pair, x = graphed_and_not(kind, device)
    for scale in (1.0, 0.5):
        for network in pair:
            network.measures_residual = True
            network(x * scale).sum().backward()
        own, other = (network.residual.item() for network in pair)
        assert own == pytest.approx(other, rel=1e-4) and 0 < own < 1
