"""Firing rates and metrics against counts by hand."""

import pytest
import torch
import torch.nn.functional as F

from modules.neuron import make_neuron
from modules.zoo import alexnet_f, f400
from utils.instruments.firing_rate import FiringRates
from utils.metrics import Metrics


@pytest.mark.parametrize("leak", [0.5, 1.0])
def test_rates_that_can_be_counted_on_paper(leak):
    """Three neurons without feedback under constant currents 2, 1 and 0, V_th = 2: the plain mean, for LIF too.

    IF: the first spikes at every one of 4 steps, the second at every other. λ = 0.5: the first still at every step (soft reset
    to 0 each time); the second's u = 1, 1.5, 1.75, 1.875 never reaches 2.
    """
    network = f400(3, inputs=3, classes=2, neuron=make_neuron(2.0, leak), time_steps=4).eval()
    with torch.no_grad():
        network.input.linear.weight.copy_(torch.eye(3))
        network.input.norm.eps = 0.0
        network.feedback.w.zero_()
    rates = FiringRates(network.neuron_counts)
    with torch.inference_mode():
        for x in torch.tensor([[[2.0, 1.0, 0.0]], [[2.0, 1.0, 0.0]], [[2.0, 1.0, 0.0]]]):
            network(x, observe=rates)
    expected = (4 + (2 if leak == 1.0 else 0) + 0) / (3 * 4)
    assert rates.per_layer == [pytest.approx(expected)] and rates.total == pytest.approx(expected)


@pytest.mark.parametrize("leak,spikes", [(1.0, [7, 7, 2, 2, 2]), (0.5, [4, 4, 0, 0, 0])])
def test_five_layers_whose_spikes_can_be_counted_on_paper(leak, spikes):
    """Layers of 4, 4, 1, 1 and 1 neurons, V_th = 2, 4 steps; the feedback adds 1 to the last neuron of layer 1.

    Currents of layer 1 are 2, 1, 0 and 1/4. IF: the first neuron spikes at each step, the second at steps 1 and 3 (from 0);
    layer 2 copies layer 1; layer 3 gets 1 from the first neuron, so it spikes at 1 and 3; layers 4 and 5 copy it; fed back at
    step 2, the last neuron of layer 1 reaches 2 at step 3: 4 + 2 + 0 + 1 spikes. λ = 0.5: a current of 1 never reaches 2, so only
    the first neuron and its copy fire.
    """
    network = alexnet_f((1, 1, 1, 1, 1), size=4, classes=2, neuron=make_neuron(2.0, leak), time_steps=4).eval()
    with torch.no_grad():
        for connection, gain in zip((network.input, *network.hidden), (1, 2, 1, 2, 2)):
            connection.linear.weight.zero_()
            connection.linear.weight[0, :, 1, 1] = gain
            connection.norm.eps = 0.0
        network.input.linear.weight[0, 1:] = 0  # Only the first colour counts.
        network.feedback.w.zero_()[0, 0, 2, 2] = 1
        network.feedback.g.fill_(1)
        network.feedback.u.fill_(1)
    x = torch.zeros(2, 3, 4, 4)
    x[:, 0, ::2, ::2] = torch.tensor([[2.0, 1.0], [0.0, 0.25]])
    rates = FiringRates(network.neuron_counts)
    with torch.inference_mode():
        network(x, observe=rates)
    assert network.neuron_counts == [4, 4, 1, 1, 1]
    assert rates.per_layer == [count / (4 * neurons) for count, neurons in zip(spikes, network.neuron_counts)]
    assert rates.total == sum(spikes) / (4 * 11)


def test_several_layers_are_each_divided_once():
    rates = FiringRates([2, 6])
    for t in range(5):
        rates(t, [torch.ones(3, 2), torch.zeros(3, 6)])
    assert rates.per_layer == [1.0, 0.0] and rates.total == pytest.approx(0.25)
    assert "8 neurons   firing rate 0.250000" in rates.table()


def test_metrics_over_batches_of_different_size():
    logits, labels = torch.randn(23, 10), torch.randint(0, 10, (23,))
    metrics = Metrics()
    for part in (slice(0, 8), slice(8, 16), slice(16, 23)):
        metrics.add(logits[part], labels[part], F.cross_entropy(logits[part], labels[part]))
    loss, top1, top5 = metrics.averages()
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert top1 == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    in_top5 = [(row > row[label]).sum() < 5 for row, label in zip(logits, labels)]
    assert top5 == pytest.approx(100 * sum(map(bool, in_top5)) / 23)
