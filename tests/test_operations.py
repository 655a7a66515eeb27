"""Synaptic operations and energy against counts by hand and a loop over every spike and every weight."""

import itertools

import pytest
import torch
from torch import nn

from modules.linear_map import LinearMap
from modules.neuron import make_neuron
from modules.zoo import f400
from tests import naive
from tests.networks import KINDS, explicit_masks, small_network
from utils.instruments.observers import UnitSpikes
from utils.instruments.operations import count_operations, dense_macs, energies, fan_out
from utils.instruments.time_step_sweep import time_step_sweep

MAPS = {
    "dense": (lambda: nn.Linear(5, 3), (5,)),
    "convolutional": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 4)),
    "padded": (lambda: nn.Conv2d(2, 3, 5, padding=2), (2, 4, 6)),
    "strided": (lambda: nn.Conv2d(2, 3, 3, stride=2), (2, 6, 7)),
    "strided beyond its kernel": (lambda: nn.Conv2d(1, 2, 2, stride=3, padding=1), (1, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, bias=False), (2, 3, 4)),
    "transposed without padding": (lambda: nn.ConvTranspose2d(2, 1, 3, stride=3, bias=False), (2, 3, 3)),
}


def reached_weights(module, input_shape):
    """For each input unit, counted one by one, the pairs of an output unit and a kernel weight through which a spike passes."""
    counts = torch.zeros(input_shape, dtype=torch.float64)
    if isinstance(module, nn.Linear):
        return counts + module.out_features
    channels, height, width = input_shape
    (k, _), (s, _), (p, _) = module.kernel_size, module.stride, module.padding
    transposed = isinstance(module, nn.ConvTranspose2d)
    out_height, out_width = module(torch.zeros(1, *input_shape, dtype=module.weight.dtype)).shape[2:]
    for c, y, x, _, i, j in itertools.product(*map(range, (channels, height, width, module.out_channels, k, k))):
        if transposed:
            inside = 0 <= y * s - p + i < out_height and 0 <= x * s - p + j < out_width
        else:
            row, column = y + p - i, x + p - j
            inside = row % s == 0 and column % s == 0 and 0 <= row // s < out_height and 0 <= column // s < out_width
        counts[c, y, x] += inside
    return counts


@pytest.mark.parametrize("kind", MAPS)
def test_fan_out_is_counted_weight_by_weight(kind):
    build, shape = MAPS[kind]
    module = build()
    torch.testing.assert_close(fan_out(LinearMap.of(module), module.weight.detach(), shape), reached_weights(module, shape))


def test_fan_outs_that_can_be_seen():
    """3 × 3 kernel, padding 1, on 3 × 3 pixels: a corner's spike reaches 4 outputs, an edge's 6, the centre's 9."""
    module = nn.Conv2d(1, 2, 3, padding=1)
    expected = 2 * torch.tensor([[[4, 6, 4], [6, 9, 6], [4, 6, 4]]], dtype=torch.float64)
    torch.testing.assert_close(fan_out(LinearMap.of(module), module.weight.detach(), (1, 3, 3)), expected)
    assert dense_macs(LinearMap.of(module), module.weight, (1, 3, 3)) == 2 * 9 * 9


@pytest.mark.parametrize("kind", KINDS)
def test_operations_equal_a_loop_over_all_spikes(kind):
    network, x = small_network(kind, time_steps=5)
    network.eval()
    spikes, T = UnitSpikes(5), 5
    time_step_sweep(network, [(x, torch.zeros(5, dtype=torch.int64))], [T], spikes)
    events = x.sum((0, 1)) / 5 if network.events else None
    operations = count_operations(network, spikes, events)
    history, _ = naive.simulate(network, x, explicit_masks(network))

    def module_of_feedback():
        w = network.feedback.w
        if w.dim() == 2:
            return nn.Linear(*w.shape[::-1])
        if w.shape[2] == 5:
            return nn.Conv2d(w.shape[1], w.shape[0], 5, padding=2)
        return nn.ConvTranspose2d(w.shape[0], w.shape[1], 3, stride=2, padding=1, output_padding=1)

    def loop(source, module, shape):
        """Spikes, one after the other, of (sample, *shape) tensors."""
        reached = reached_weights(module, shape)
        return sum(reached[tuple(index[1:])].item() for step in source for index in step.nonzero().tolist()) / 5

    expected = [loop(x, network.input.linear, network.input_shape) if network.events
                else reached_weights(network.input.linear, network.input_shape).sum().item()]
    for layer, connection in enumerate(network.hidden):
        expected.append(loop([step[layer] for step in history], connection.linear, network.layer_shapes[layer]))
    expected.append(loop([step[-1] for step in history[:-1]], module_of_feedback(), network.layer_shapes[-1]))
    expected.append(4 * sum(step[-1].sum().item() for step in history) / 5)
    assert [entry.exact for entry in operations] == pytest.approx(expected, rel=1e-12) and min(expected) > 0
    source = sum(step[-1].sum().item() for step in history) / 5
    readout = operations[-1]
    assert readout.formula == pytest.approx(source * 4)
    feedback = operations[-2]
    positions = torch.Size(network.layer_shapes[-1][1:]).numel()
    assert feedback.formula == pytest.approx(source / network.neuron_counts[-1] * network.feedback.w.numel() * positions)


def test_energy_by_hand():
    """Three IF neurons, V_th = 2, under the currents 2, 1 and 0 for 4 steps; the feedback weights are 0, but are reached.

    The first spikes at steps 1 to 4, the second at 2 and 4: 6 spikes, of which 2 in the last step. Feedback: 4 spikes × 3 weights;
    readout: 6 × 2; input: 9 MACs.
    """
    network = f400(3, inputs=3, classes=2, neuron=make_neuron(2.0, 1.0), time_steps=4).eval()
    with torch.no_grad():
        network.input.linear.weight.copy_(torch.eye(3))
        network.input.norm.eps = 0.0
        network.feedback.w.zero_()
    spikes = UnitSpikes(4)
    time_step_sweep(network, [(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))], [4], spikes)
    operations = count_operations(network, spikes)
    assert [entry.exact for entry in operations] == [9, 12, 12] and [entry.formula for entry in operations] == [9, 18, 12]
    once, each, ann, ann_feedback = energies(operations, 4, events=False)
    assert (once.macs, once.acs, each.macs, each.acs) == (9, 24, 36, 24)
    assert once.nanojoules == pytest.approx((9 * 4.6 + 24 * 0.9) / 1000)
    assert each.nanojoules == pytest.approx((36 * 4.6 + 24 * 0.9) / 1000)
    assert (ann.macs, ann.acs, ann_feedback.macs) == (15, 0, 24)
    assert energies(operations, 4, events=False, formula=True)[0].acs == 30


def test_events_cost_no_macs():
    network, x = small_network("events")
    spikes = UnitSpikes(6)
    time_step_sweep(network, [(x, torch.zeros(5, dtype=torch.int64))], [6], spikes)
    operations = count_operations(network, spikes, x.sum((0, 1)) / 5)
    rows = energies(operations, 6, events=True)
    assert [row.name for row in rows] == ["spiking network", "ANN without feedback", "ANN with feedback, one lap"]
    assert rows[0].macs == 0 and rows[0].acs == pytest.approx(sum(entry.exact for entry in operations))
