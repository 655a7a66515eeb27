"""The C kernels against the PyTorch operations that they replace."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn

from modules import native
from modules.bptt import SURROGATES
from modules.connection import Connection
from modules.dropout import dropout_mask, masked, random_draws
from modules.event_driven import event_map, kernel_layout
from modules.feedback import Feedback
from modules.linear_map import LinearMap
from modules.neuron import equilibrium_rate, make_neuron
from modules.simulation import SpikingLayer, StaticInput, _expectations, simulate
from modules.synapses import Synapses
from tests import naive
from tests.marks import needs_compiler
from tests.networks import KINDS, explicit_masks, small_network

pytestmark = needs_compiler


@pytest.mark.parametrize("leak", [0.95, 1.0])
@pytest.mark.parametrize("with_current", [True, False])
def test_neuron_step_equals_pytorch_bit_for_bit(leak, with_current, monkeypatch):
    shape, neuron = (37, 1031), make_neuron(2.0, leak)
    fast = SpikingLayer(shape, torch.empty(1), neuron, with_rate=True)
    with monkeypatch.context() as plainly:
        plainly.setattr(native, "serves", lambda tensor: False)
        plain = SpikingLayer(shape, torch.empty(1), neuron, with_rate=True)
    assert fast.native and not plain.native
    source = SpikingLayer(shape, torch.empty(1), neuron)
    for mask in (None, torch.rand(shape).ge(0.2) / 0.8) * 4:
        synaptic = torch.randn(shape) + 0.5

        class Given:
            event_driven = staticmethod(lambda rate: None)
            __call__ = staticmethod(lambda spikes: synaptic)

        current = torch.randn(shape) + 0.5 if with_current else None
        for layer in (fast, plain):
            layer.step(current, Given(), source, mask)
        assert torch.equal(fast.spikes, plain.spikes) and torch.equal(fast.potential, plain.potential)
        assert fast.fired == pytest.approx(plain.spikes.mean().item())
    assert torch.equal(fast.rate(), plain.rate()) and 0 < fast.rate().mean() < 1


@st.composite
def linear_maps(draw):
    """A linear module of any kind, and an input shape for it."""
    channels, out, kernel = draw(st.integers(1, 40)), draw(st.integers(1, 140)), draw(st.sampled_from([1, 2, 3, 5]))
    stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, kernel - 1))
    size = [draw(st.integers(kernel, 9)) for _ in range(2)]
    kind = draw(st.sampled_from(["dense", "convolutional", "transposed"]))
    if kind == "dense":
        return nn.Linear(channels, out), (channels,)
    if kind == "convolutional":
        return nn.Conv2d(channels, out, kernel, stride, padding), (channels, *size)
    return nn.ConvTranspose2d(channels, out, kernel, stride, padding, draw(st.integers(0, stride - 1))), (channels, *size)


@settings(max_examples=150, deadline=None)
@given(linear_maps(), st.integers(1, 19), st.floats(0, 1), st.integers(1, 2), st.booleans())
def test_event_driven_map_equals_the_dense_one(module_and_shape, batch, rate, threads, spiking):
    torch.set_num_threads(threads)
    module, shape = module_and_shape
    map = LinearMap.of(module)
    x = (torch.rand(batch, *shape) < rate).float()
    x = x if spiking else x * torch.randn(batch, *shape)
    with torch.no_grad():
        expected = module.double()(x.double())
        module.float()
        assert map.output_shape(shape, module.weight) == expected.shape[1:]
        ours = native.product(event_map(map, module.weight, module.bias, shape), kernel_layout(x))
    torch.testing.assert_close(ours.double(), expected, atol=3e-5, rtol=3e-5)


@settings(max_examples=50, deadline=None)
@given(linear_maps(), st.integers(1, 5), st.sampled_from([0.2, 0.9]), st.booleans())
def test_equilibrium_of_a_layer_and_its_gradient_equal_the_plain_ones(module_and_shape, batch, share, with_mask):
    (module, shape), neuron = module_and_shape, make_neuron(0.7, 0.9)
    map, rates = LinearMap.of(module), torch.rand(batch, *shape) * (torch.rand(batch, *shape) < share)
    weights = [module.weight.detach().clone().requires_grad_() for _ in range(2)]
    currents = [torch.randn(batch, *map.output_shape(shape, weights[0]))]
    currents.append(currents[0].clone().requires_grad_())
    currents[0].requires_grad_()
    mask = torch.rand(currents[0].shape).ge(0.3) / 0.7 if with_mask else None
    fast = Synapses(map, weights[0].detach(), None, shape).equilibrium(currents[0], rates, weights[0], mask, neuron)
    if (rates[:16] != 0).float().mean() > 0.4:
        assert fast is None, "dense products are faster"
        return
    mapped, slope = equilibrium_rate(currents[1] + masked(map(rates, weights[1]), mask), neuron)
    near = (mapped - 1).abs().minimum(mapped.abs()).lt(1e-5) & (mapped != 0) & (mapped != 1)
    assume(not near.any())  # There the two may take different sides of the clamp.
    torch.testing.assert_close(fast, (mapped, masked(slope, mask)), atol=3e-5, rtol=3e-5)
    probe = torch.randn_like(mapped)
    for value in fast[0], mapped:
        (value * probe).sum().backward()
    for own, plain in (currents, weights):
        torch.testing.assert_close(own.grad, plain.grad, atol=3e-4, rtol=3e-4)


def test_a_map_that_no_cache_holds_equals_the_dense_one():
    """It goes through its kernel row by row, and adds up."""
    module, x = nn.Conv2d(128, 128, 3, padding=1), (torch.rand(3, 128, 5, 6) < 0.2).float()
    with torch.no_grad():
        ours = native.product(event_map(LinearMap.of(module), module.weight, module.bias, x.shape[1:]), kernel_layout(x))
        torch.testing.assert_close(ours.double(), module.double()(x.double()), atol=3e-5, rtol=3e-5)


def test_outputs_that_see_no_input_have_the_bias_alone():
    for module in (nn.ConvTranspose2d(3, 40, 1, stride=3, output_padding=1), nn.Conv2d(3, 40, 2, padding=3)):
        spikes = kernel_layout(torch.ones(2, 3, 4, 4))
        with torch.no_grad():
            maps = event_map(LinearMap.of(module), module.weight, module.bias, (3, 4, 4))
            torch.testing.assert_close(native.product(maps, spikes), module(spikes))


@pytest.mark.parametrize("kind,settings,shape", [(nn.Linear, (40, 70), (40,)), (nn.Conv2d, (5, 40, 3, 2, 1), (5, 8, 8)),
                                                 (nn.ConvTranspose2d, (5, 33, 3, 2, 1, 1), (5, 4, 4))])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("with_current", [True, False])
@pytest.mark.parametrize("known", ["rate", "count"])
def test_steps_with_expected_spikes_equal_those_without(kind, settings, shape, with_mask, with_current, known):
    module, neuron, like, batch = kind(*settings), make_neuron(1.0, 0.9), torch.empty(1), 5
    synapses = Synapses(LinearMap.of(module), module.weight.detach(), module.bias.detach(), shape)
    source = SpikingLayer((batch, *shape), like, neuron, with_rate=known == "rate", with_count=True)
    output = (batch, *synapses.map.output_shape(shape, module.weight))
    own, other = (SpikingLayer(output, like, neuron, with_count=True) for _ in range(2))
    mask = kernel_layout(torch.rand(output).ge(0.3) / 0.7) if with_mask else None
    incoming = (kernel_layout(torch.rand(output)) if with_current else None), synapses, source, mask
    rates = torch.rand(batch, *shape).pow(4)  # a few units fire at most steps
    touched, counts, total = {}, [0, 0], 0
    for t in range(14):
        if t in (3, 6):
            often = total / sum(0.9**k for k in range(t)) if known == "rate" else counts[0] / t
            assert torch.equal(source.fired_often(), often.ge(0.5).to(torch.int8))
            own.expect(*incoming)
        # The current that brings each potential to 1 or −1.
        source.step(kernel_layout((torch.rand(rates.shape) < rates) * 2.0 - 1 - 0.9 * (source.potential - source.spikes)))
        assert source.fired < 0.4, "at more, dense products would serve"
        for layer in own, other:
            layer.step(*incoming)
        torch.testing.assert_close(own.potential, other.potential, atol=2e-5, rtol=1e-4)
        assert ((own.spikes == other.spikes) | ((other.potential - 1).abs() < 1e-4)).all()
        for state in "potential", "spikes":  # Where a spike differs by rounding, later ones would.
            getattr(own, state).copy_(getattr(other, state))
        counts, total = [count + layer.spikes for count, layer in zip(counts, (source, own))], 0.9 * total + source.spikes
        assert torch.equal(own.count, counts[1]) and (known == "rate" or torch.equal(source.count, counts[0]))
        if t >= 6:
            touched[t] = (source.spikes != own.expected.spikes).sum(), source.spikes.sum()
    departures, spikes = map(sum, zip(*touched.values()))
    assert own.expected.spikes.sum() > 0 and departures < 0.9 * spikes and other.expected is None


def plain_and_fast(network, x, monkeypatch):
    """(spikes of every step and layer, gradients by name) without the kernels and with them."""
    results = []
    for serves in (lambda tensor: False, native.serves):
        own, seen = copy.deepcopy(network), []
        own.draw_masks = network.draw_masks
        with monkeypatch.context() as patched:
            patched.setattr(native, "serves", serves)
            own(x, observe=lambda t, spikes: seen.append(spikes)).square().sum().backward()
        results.append((seen, {name: parameter.grad for name, parameter in own.named_parameters()}))
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leak", [0.9, 1.0])
@pytest.mark.parametrize("threshold", [0.4, 0.8, 2.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_spikes_and_gradients_equal_the_plain_ones(kind, leak, threshold, threads, monkeypatch):
    """Sums run in another order, so a neuron may fire differently only where its potential comes within rounding of the threshold."""
    torch.set_num_threads(threads)
    network, x = small_network(kind, leak, time_steps=12, dropout=0.3, threshold=threshold, tol=1e-6, max_iterations=100)
    masks, potentials = explicit_masks(network), []
    naive.simulate(copy.deepcopy(network), x, masks, potentials)
    network, x = network.float(), x.float()
    masks = explicit_masks(network, [mask.float() for mask in masks])
    (plain, plain_gradients), (fast, fast_gradients) = plain_and_fast(network, x, monkeypatch)
    differing = set()
    for step, (one, other, exact) in enumerate(zip(plain, fast, potentials)):
        for layer_plain, layer_fast, u in zip(one, other, exact):
            for index in (layer_plain != layer_fast).nonzero().tolist():
                near = abs(u[tuple(index)].item() - threshold) < 1e-4
                assert near or index[0] in differing, "away from the threshold, or after an earlier difference, spikes are the same"
                differing.add(index[0])
    assert len(differing) <= 1
    if not differing:
        for name, gradient in plain_gradients.items():
            assert (fast_gradients[name] - gradient).norm() <= 1e-4 * max(g.norm() for g in plain_gradients.values()), name
    rates = [torch.stack([step[layer] for step in fast]).mean().item() for layer in range(len(fast[0]))]
    assert max(rates) > 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("event_driven_below", [1.1, 0.4, 0.1])
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_and_whole_simulations_do_not_change_the_result(kind, training, event_driven_below, threads, monkeypatch):
    """Unobserved, a simulation runs in chunks of samples, or all its steps in one kernel; observed, step by step over the batch."""
    torch.set_num_threads(threads)
    for module in ("simulation", "synapses"):
        monkeypatch.setattr(f"modules.{module}.EVENT_DRIVEN_BELOW", event_driven_below)
    network, x = small_network(kind, dropout=0.3, time_steps=14)
    # Two chunks of seven samples and a last one of one.
    network, x = network.float().train(training), torch.cat([x.float()] * 3, dim=1 if network.events else 0)
    masks = [torch.rand(15, *shape).ge(0.3) / 0.7 for shape in (*network.layer_shapes, network.layer_shapes[0])]
    explicit_masks(network, masks if training else [None] * len(masks))
    with torch.no_grad():
        whole = copy.deepcopy(network)(x, observe=lambda t, layers: None)
        monkeypatch.setattr("modules.simulation.LEAST_CHUNK_PER_THREAD", 7)
        monkeypatch.setattr("modules.simulation.CHUNK_BYTES", 1)
        torch.testing.assert_close(network(x), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])  # whose pass is another: tests/test_dense_layer.py
def test_the_kernels_serve_in_training_too(kind, monkeypatch):
    network, x = small_network(kind)
    network, loops = network.float().train(), []
    monkeypatch.setattr("modules.network.simulate", lambda loop, *rest: (loops.append(loop), simulate(loop, *rest))[1])
    network(x.float()).sum().backward()
    (loop,) = loops
    assert loop.feedback.native and all(synapses.native for synapses in loop.hidden)
    if kind != "events":
        assert _expectations(loop, StaticInput(torch.ones(1)), 2000) == [3 * 2**k for k in range(7)], "a byte counts to 255"


@pytest.mark.parametrize("shape", [(3, 5), (300, 400), (7, 33, 5, 3)])
def test_dropout_masks_equal_pytorchs_and_lie_as_the_kernels_read_them(shape, monkeypatch):
    fast = dropout_mask(shape, 0.2, torch.empty(0), torch.tensor(-7))
    assert fast.shape == shape and kernel_layout(fast).data_ptr() == fast.data_ptr()
    monkeypatch.setattr(native, "serves", lambda tensor: False)
    assert torch.equal(fast, dropout_mask(shape, 0.2, torch.empty(0), torch.tensor(-7)))


def test_random_draws_are_those_of_splitmix64():
    """The first words of SplitMix64 from 1234567, as its reference implementation gives them."""
    words = 6457827717110365317, 3203168211198807973, 9817491932198370423
    draws = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    assert [draw & 0xFFFF for draw in random_draws(1234567, 11, torch.device("cpu")).tolist()] == draws[:11]


@pytest.mark.parametrize("rows,columns", [(1, 1), (5, 7), (33, 200), (400, 400), (64, 1600)])
@pytest.mark.parametrize("g", [0.7, 1.5])
def test_spectral_normalisation_equals_pytorchs_in_float64(rows, columns, g):
    weights, values = [], []
    w, u, probe = torch.randn(rows, columns), torch.nn.functional.normalize(torch.randn(rows), dim=0), torch.randn(rows, columns)
    for dtype in (torch.float32, torch.float64):
        feedback = Feedback(nn.Linear(columns, rows, bias=False)).to(dtype)
        with torch.no_grad():
            feedback.w.copy_(w), feedback.u.copy_(u), feedback.g.fill_(g)
        weight = feedback.normalised_weight()
        (weight * probe.to(dtype)).sum().backward()
        weights.append(weight)
        values.append([weight, feedback.u, feedback.v, feedback.w.grad, feedback.g.grad])
    assert native.serves(weights[0]) and not native.serves(weights[1])
    for fast, exact in zip(*values):
        torch.testing.assert_close(fast.double(), exact, atol=2e-6 * max(1, exact.abs().max().item()), rtol=2e-5)


def test_saturation_equals_pytorch(monkeypatch):
    drive = torch.cat([torch.randn(50, 40) * 3, torch.tensor([[0.0, 2.0, -0.0] * 13 + [2.5]])]).t()
    fast = equilibrium_rate(drive, make_neuron(2.0, 1))
    monkeypatch.setattr(native, "serves", lambda tensor: False)
    for one, other in zip(fast, equilibrium_rate(drive, make_neuron(2.0, 1))):
        assert torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_input_under_an_autocast(kind, training, monkeypatch):
    network, x = small_network(kind)
    network, x, logits = network.float().train(training), x.to(torch.bfloat16), []
    for fast in (True, False):
        own = copy.deepcopy(network)
        if not fast:
            monkeypatch.setattr(native, "serves", lambda tensor: False)
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(own(x).float())
    assert (logits[0] - logits[1]).norm() <= 0.2 * logits[1].norm()  # A rounding may move a spike.


def test_an_input_connection_of_another_size_is_an_error():
    network, x = small_network("convolutional")
    network, x = network.float().eval(), x.float()
    wanted = network.input.linear
    narrower = nn.Conv2d(wanted.in_channels, wanted.out_channels - 1, wanted.kernel_size, wanted.stride, wanted.padding)
    network.input = Connection(narrower).eval()
    with pytest.raises(ValueError, match="make another network"):
        network(x)


def test_the_gradient_in_events_through_a_frozen_connection(monkeypatch):
    network, x = small_network("events")
    network, gradients = network.float().eval(), []
    network.surrogate = SURROGATES["sigmoid"]
    network.input.requires_grad_(False)
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(native, "serves", lambda tensor: False)
        own = x.float().requires_grad_()
        network(own).square().sum().backward()
        gradients.append(own.grad)
    assert gradients[1].norm() > 0
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
