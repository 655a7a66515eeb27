"""The simulation equals a naive loop over time, spike for spike, and touches no state that it should leave alone."""

import copy

import pytest
import torch

from modules.neuron import Neuron, NeuronState, make_neuron, neuron_step, rate_weights
from modules.simulation import Masks
from tests import naive
from tests.networks import KINDS, explicit_masks, small_network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leak", [0.9, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_equals_naive_loop_spike_for_spike(kind, leak, training):
    network, x = small_network(kind, leak, dropout=0.3)
    network.train(training)
    masks = explicit_masks(network)
    expected, rate = naive.simulate(copy.deepcopy(network), x, masks)
    seen = []
    logits = network(x, observe=lambda t, spikes: seen.append(spikes))
    assert len(seen) == network.time_steps
    for step, expected_step in zip(seen, expected):
        for spikes, expected_spikes in zip(step, expected_step):
            assert torch.equal(spikes, expected_spikes)
    fired = [torch.stack([step[layer] for step in seen]).mean() for layer in range(len(seen[0]))]
    assert all(0.02 < rate < 0.98 for rate in fired), "the case must exercise every layer"
    torch.testing.assert_close(logits, network.readout(rate.flatten(1)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_training_updates_every_running_statistic_once_with_what_f_sees(kind):
    network, x = small_network(kind, dropout=0.3)
    masks = explicit_masks(network)
    before = copy.deepcopy(network)
    network(x)
    _, rate = naive.simulate(before, x, masks)
    weight, u, v = naive.feedback_weight(before)
    torch.testing.assert_close(network.feedback.u, u)
    torch.testing.assert_close(network.feedback.v, v)
    sources = [naive.mean_input(before, x)]
    y = before.input.linear(sources[0])
    current = naive.batch_norm(y, before.input.norm, *naive.batch_statistics(y)) * masks[0]
    a = torch.clamp((current + naive.apply_feedback(weight, rate, naive.is_dense(before)) * masks[-1]) / before.neuron.threshold, 0, 1)
    for connection, mask in zip(before.hidden, masks[1:-1]):
        sources.append(a)
        y = connection.linear(a)
        a = torch.clamp(naive.batch_norm(y, connection.norm, *naive.batch_statistics(y)) * mask / before.neuron.threshold, 0, 1)
    for connection, old, source in zip([network.input, *network.hidden], [before.input, *before.hidden], sources):
        y = old.linear(source).transpose(0, 1).flatten(1)
        torch.testing.assert_close(connection.norm.running_mean, 0.9 * old.norm.running_mean + 0.1 * y.mean(1))
        torch.testing.assert_close(connection.norm.running_var, 0.9 * old.norm.running_var + 0.1 * y.var(1))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_nothing_and_builds_no_graph(kind):
    network, x = small_network(kind)
    network.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.inference_mode():
        first = network(x)
        second = network(x)
    assert torch.equal(first, second) and not first.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_saved_statistics_are_not_changed_by_later_training():
    network, x = small_network("multi-layer")
    saved = {name: tensor.clone() for name, tensor in network.state_dict().items() if "running" in name}
    expected = {name: tensor.clone() for name, tensor in saved.items()}
    network(x)
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert not torch.equal(network.state_dict()["input.norm.running_mean"], saved["input.norm.running_mean"])


@pytest.mark.parametrize("leak", [0.9, 1.0])
def test_event_input_is_left_as_it_was(leak):
    network, x = small_network("events", leak)
    before = x.clone()
    network(x).sum().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("leak", [0.5, 1.0])
def test_weighted_mean_counts_every_step_once(leak):
    expected = [1 / 7, 2 / 7, 4 / 7] if leak == 0.5 else [1 / 3] * 3
    torch.testing.assert_close(rate_weights(3, leak), torch.tensor(expected, dtype=torch.float32), check_dtype=False)


def test_event_batch_norm_is_one_definition_in_simulation_and_map():
    """With input constant over time, events and static image are the same network: biased variance, the layer's own ε."""
    network, x = small_network("events", leak=1.0)
    network.input.norm.eps = 0.05
    constant = x[:1].expand(network.time_steps, *x.shape[1:]).contiguous()
    masks = explicit_masks(network)
    _, rate = naive.simulate(copy.deepcopy(network), constant, masks)
    static = copy.deepcopy(network)
    static.events = False
    torch.testing.assert_close(network(constant), static(x[0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(static(x[0]), static.readout(rate.flatten(1)), atol=1e-12, rtol=0)


def test_neuron_step_by_hand():
    neuron = Neuron(threshold=2.0, leak=0.5)
    state = neuron_step(torch.tensor([2.0, 1.9, 0.0]), NeuronState(torch.zeros(3), torch.zeros(3)), neuron)
    assert state.spikes.tolist() == [1, 0, 0], "a spike at u = V_th exactly"
    state = neuron_step(torch.tensor([1.0, 1.05, 5.0]), state, neuron)
    torch.testing.assert_close(state.potential, torch.tensor([1.0, 2.0, 5.0]))
    assert state.spikes.tolist() == [0, 1, 1]


@pytest.mark.parametrize("leak,expected", [(0.95, 0.95), (1, 1.0), (0, 1.0), (-3, 1.0), (7, 1.0)])
def test_leak_outside_0_and_1_is_the_if_model(leak, expected):
    assert make_neuron(2.0, leak).leak == expected


def test_input_of_a_wrong_shape_is_refused():
    network, x = small_network("events")
    with pytest.raises(ValueError, match=r"\(T=6, batch, 2, 8, 8\)"):
        network(x[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_products_leave_everything_else_in_float32(kind):
    network, x = small_network(kind, dropout=0.3)
    network, x = network.float(), x.float()
    masks = [torch.rand(5, *shape).ge(0.3) / 0.7 for shape in (*network.layer_shapes, network.layer_shapes[0])]
    explicit_masks(network, masks)
    rounded = copy.deepcopy(network)
    rounded.bf16_products = True
    seen = []
    logits, exact = rounded(x, observe=lambda t, spikes: seen.extend(spikes)), network(x)
    logits.square().sum().backward()
    assert logits.dtype == torch.float32 and {spikes.dtype for spikes in seen} == {torch.float32}
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in rounded.parameters())
    assert 0 < (logits - exact).abs().max() < 1, "rounded, and by little"


@pytest.mark.parametrize("kind", KINDS)
def test_masks_given_by_hand(kind):
    """Of another type and layout they give the same; of another shape they are refused, as kernels would read beyond them."""
    network, x = small_network(kind, 0.9, dropout=0.3)
    network, x = network.float(), x.float()
    masks, results = network.draw_masks(x), []
    for change in (lambda mask: mask, lambda mask: mask.double().contiguous().transpose(0, 1).contiguous().transpose(0, 1)):
        own, changed = copy.deepcopy(network), Masks(change(masks.input), list(map(change, masks.hidden)), change(masks.feedback))
        rate = own.rate(x, changed)
        results.append((rate.detach(), *torch.autograd.grad(rate.square().sum(), [own.feedback.w, own.input.linear.weight])))
    for first, second in zip(*results):
        assert torch.equal(first, second)
    wrong = [masks._replace(feedback=masks.feedback[:1]), masks._replace(input=masks.input[:, :1]),
             masks._replace(hidden=[*masks.hidden, masks.input])]
    if network.hidden:
        wrong += [masks._replace(hidden=masks.hidden[1:]), masks._replace(hidden=[mask[..., :1] for mask in masks.hidden])]
    for harmed in wrong:
        with pytest.raises(ValueError, match="mask of shape|masks of hidden layers"):
            network.rate(x, harmed)


@pytest.mark.parametrize("kind", KINDS)
def test_no_masks_are_those_of_evaluation(kind):
    network, x = small_network(kind, 0.9)
    network.eval()
    assert torch.equal(network.rate(x, Masks()), network.rate(x, network.draw_masks(x)))
