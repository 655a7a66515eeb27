"""The Triton kernels against PyTorch: on a CUDA device, or else in Triton's interpreter, where that is installed."""

import copy
import functools
import math

import pytest
import torch

from modules import gpu
from modules.connection import Connection
from modules.dropout import random_draws
from modules.event_driven import kernel_layout
from modules.hidden_layer import SaturatedNorm
from modules.linear_map import LinearMap
from modules.neuron import NeuronState, make_neuron, neuron_step, resting_state
from modules.solvers import Anderson
from modules.synapses import Synapses
from tests.marks import needs_cuda, needs_interpreter, run_in_interpreter
from tests.networks import explicit_masks, wide_network


def compare_neuron_step_with_pytorch(device):
    from modules.triton_kernels import State, neuron_step as kernel
    shape = (3, 700)
    for leak in (0.95, 1.0):
        neuron = make_neuron(2.0, leak)
        own, expected_total = State(*(torch.zeros(shape, device=device) for _ in range(3))), torch.zeros(shape, device=device)
        state = resting_state(own.potential)
        for parts in 2 * ("current synaptic mask", "current", "synaptic", "synaptic bias mask", "current synaptic bias"):
            given = {"current": torch.randn(shape) + 0.5, "synaptic": torch.randn(shape) + 0.5, "bias": torch.randn(shape[1]),
                     "mask": torch.rand(shape).ge(0.2) / 0.8}
            given = {name: tensor.to(device) if name in parts else None for name, tensor in given.items()}
            kernel(**given, state=own, threshold=neuron.threshold, leak=leak)
            product = torch.zeros(shape, device=device) if given["synaptic"] is None else given["synaptic"]
            state = NeuronState(*neuron_step(drive_of(product, **given), state, neuron))
            expected_total = expected_total * neuron.leak + state.spikes
            torch.testing.assert_close(own.potential, state.potential, atol=1e-6, rtol=1e-6)
            assert torch.equal(own.spikes, state.spikes)
            torch.testing.assert_close(own.total, expected_total)
        assert 0 < own.spikes.mean() < 1
    at_threshold = State(*(torch.zeros(shape, device=device) for _ in range(3)))
    for current, spikes in ((2.0, 1.0), (0.0, 0.0)):
        kernel(torch.full(shape, current, device=device), None, None, None, at_threshold, 2.0, 1.0)
        assert at_threshold.spikes.eq(spikes).all()
    assert at_threshold.potential.eq(0).all(), "a potential at the threshold spikes, and is reset to 0"


def drive_of(product, current, bias, mask, **_):
    if bias is not None:
        product = product + bias.view(-1, *[1] * (product.dim() - 2))
    product = product if mask is None else product * mask
    return product if current is None else current + product


def compare_bias_per_channel_with_pytorch(device):
    """Images lie channels last; spikes may be bfloat16."""
    from modules.triton_kernels import State, neuron_step as kernel
    layout = dict(device=device, memory_format=torch.channels_last)
    synaptic, bias = torch.randn(2, 5, 3, 4).to(**layout), torch.randn(5, device=device)
    state = State(torch.zeros(2, 5, 3, 4).to(**layout), torch.zeros(2, 5, 3, 4, dtype=torch.bfloat16).to(**layout), None)
    kernel(synaptic, None, bias, None, state, 0.5, 1.0)
    expected = synaptic + bias.view(5, 1, 1)
    torch.testing.assert_close(state.potential, expected)
    assert torch.equal(state.spikes, expected.ge(0.5).bfloat16()) and 0 < state.spikes.float().mean() < 1


def compare_convolutions_with_pytorch(device):
    """Convolutions and transposed ones over shapes, strides and paddings, two steps each; units at −∞ stay silent."""
    from modules.triton_kernels import State, convolution_step, pack_convolution
    layout = dict(device=device, memory_format=torch.channels_last)
    cases = [("convolutional", 3, (1, 1), (1, 1), (0, 0), (6, 5)), ("convolutional", 3, (2, 2), (1, 1), (0, 0), (7, 8)),
             ("convolutional", 5, (1, 1), (2, 2), (0, 0), (4, 4)), ("convolutional", 2, (1, 2), (0, 1), (0, 0), (4, 6)),
             ("transposed", 3, (2, 2), (1, 1), (1, 1), (4, 3)), ("transposed", 3, (1, 1), (1, 1), (0, 0), (4, 5)),
             ("transposed", 5, (2, 1), (2, 1), (1, 0), (3, 4)), ("transposed", 2, (3, 3), (0, 0), (1, 2), (2, 3))]
    for case, (kind, kernel, stride, padding, output_padding, size) in enumerate(cases):
        channels_in, channels_out, digits = 32 * (1 + case % 3), (8, 70, 130)[case % 3], 2 + case % 2
        map = LinearMap(kind, stride, padding, output_padding)
        shape = (channels_in, channels_out) if kind == "transposed" else (channels_out, channels_in)
        weight = 0.2 * torch.randn(*shape, kernel, kernel, device=device)
        packed = pack_convolution(map, weight, digits)
        kept = weight_of(packed)
        assert (kept - weight).abs().max() <= 2.0**-(8 * digits - 1) * weight.abs().max() and (kept - weight).any()
        x = torch.rand(3, channels_in, *size).lt(0.3).to(torch.int8).to(**layout)
        out_shape = (3, *map.output_shape(x.shape[1:], weight))
        given = {"current": torch.randn(out_shape).to(**layout) if case % 2 else None,
                 "bias": torch.randn(channels_out, device=device) if case % 3 else None,
                 "mask": torch.rand(out_shape).ge(0.2).div(0.8).to(**layout) if case % 4 < 2 else None}
        total = torch.zeros(out_shape).to(**layout) if case % 2 else None
        state = State(torch.zeros(out_shape).to(**layout), torch.full(out_shape, -1.0).to(x.dtype).to(**layout), total)
        silent = torch.rand(out_shape, device=device) < 0.1
        state.potential.masked_fill_(silent, -math.inf)
        expected, sum_of_spikes = NeuronState(state.potential.double(), torch.zeros_like(state.potential.double())), 0
        clear = ~silent  # the units that were never within rounding of the threshold
        for _ in range(2):
            convolution_step(packed, x, **given, state=state, threshold=0.7, leak=0.9)
            drive = drive_of(map(x.double(), kept), **given)
            expected = NeuronState(*neuron_step(drive, expected, make_neuron(0.7, 0.9)))
            sum_of_spikes = 0.9 * sum_of_spikes + expected.spikes
            clear &= (expected.potential - 0.7).abs() > 1e-4
        torch.testing.assert_close(state.potential[clear].double(), expected.potential[clear], atol=5e-5, rtol=1e-5)
        assert torch.equal(state.spikes[clear].double(), expected.spikes[clear]) and not state.spikes[silent].any()
        assert 0 < state.spikes.float().mean() < 1 and clear.float().mean() > 0.8
        if total is not None:
            torch.testing.assert_close(total[clear].double(), sum_of_spikes[clear], atol=1e-5, rtol=1e-5)


def compare_the_digits_of_a_precision(device):
    """Three of a weight under fp32, which is 24 bits, and two under tf32 and bf16."""
    from modules import triton_kernels
    weight = torch.randn(32, 32, 3, 3, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "kernels_for", lambda tensor: triton_kernels)
        for tf32, bf16, digits in ((False, False, 3), (True, False, 2), (False, True, 2)):
            patch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
            with torch.autocast(weight.device.type, torch.bfloat16, enabled=bf16):
                packed = Synapses(LinearMap("convolutional", (1, 1), (1, 1)), weight, None, (32, 8, 8)).convolution
            assert (packed.lowest is not None) == (digits == 3)


def weight_of(packed):
    """The numbers that are written in a packed convolution, in float64 and its weight's order."""
    low, high = packed.upper.double().unbind(3)
    number = 256 * high + low  # (kernel, kernel, out, in)
    if packed.lowest is not None:
        number = 256 * number + packed.lowest.double().squeeze(3)
    number = number * packed.scale.double()[:, None]
    return number.permute(3, 2, 0, 1) if packed.map.kind == "transposed" else number.permute(2, 3, 0, 1)


def compare_equilibrium_rates_with_pytorch(device):
    from modules.triton_kernels import saturate
    drive = torch.tensor([-1.0, 0.0, 0.3, 2.0, 2.1, math.inf, -math.inf, math.nan] * 200, device=device).view(2, 5, 10, 16)
    for mask in (None, torch.rand_like(drive).ge(0.2) / 0.75):
        rate, slope = saturate(drive, mask, 2.0)
        keep = torch.ones_like(drive) if mask is None else mask
        scaled = drive * keep / 2.0
        torch.testing.assert_close(rate, scaled.clamp(0, 1), equal_nan=True)
        torch.testing.assert_close(slope, scaled.clamp(0, 1).eq(scaled) * keep / 2.0)


def compare_batch_norms_with_pytorch(device):
    """Rates behind batch norm, mask and clamp with their gradients, against autograd in float64, over several parts of the rows."""
    from modules import triton_kernels
    from modules.triton_norm import ROWS
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        for shape, drop in (((3, 40, 7, 9), 0.3), ((2 * ROWS + 1, 5), 0.0), ((33 * ROWS + 1, 3), 0.3), ((1, 33, 2, 5), 0.5),
                            ((2, 64, 16, 16), 0.3)):
            # Far from 0 in some channels, where squares about anything but the mean would cancel.
            far = torch.linspace(0, 50 if dtype == torch.float32 else 1, shape[1]).view(-1, *[1] * (len(shape) - 2))
            y, v = kernel_layout((torch.randn(shape) + far).to(device, dtype)), kernel_layout(torch.randn(shape, device=device))
            mask = kernel_layout(torch.rand(shape).ge(drop).div(1 - drop).to(device)) if drop else None
            norm = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(shape[1]).to(device)
            with torch.no_grad():
                norm.weight.uniform_(-1, 1)
                norm.bias.uniform_(-0.1, 0.8)
            exact, input, dims = copy.deepcopy(norm).double(), y.double().requires_grad_(), [0, *range(2, len(shape))]
            scaled = exact(input) * (1 if mask is None else mask.double()) / 0.7
            expected, (variance, mean) = scaled.clamp(0, 1), torch.var_mean(y.double(), dims)
            v *= ((scaled - 0.5).abs() - 0.5).abs() > 1e-4  # The clamp's corners hang on roundings.
            wanted = torch.autograd.grad(expected, [input, exact.weight, exact.bias], v.double())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gpu, "kernels_for", lambda tensor: triton_kernels)
                rate, saturated = SaturatedNorm.at(y, norm, mask, 0.7)
                again, gradients, product = saturated.rate(), saturated.gradients(v), saturated(v.clone())
            assert 0.05 < rate.mean() < 0.95 and (rate.dtype, again.dtype, gradients[0].dtype) == (torch.float32, dtype, dtype)
            torch.testing.assert_close(rate.double(), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(again.double(), expected, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(saturated.mean.double(), mean, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(saturated.variance.double(), variance, atol=1e-6, rtol=1e-5)
            for own, other in zip((*gradients, product), (*wanted, wanted[0])):
                assert (own - other).norm() <= (tolerance if own is gradients[0] else 1e-5) * other.norm() + 1e-6


def compare_anderson_weights_with_pytorch(device):
    """Over two rounds of the memory, with vectors that are nearly dependent and of very different lengths."""
    from modules.triton_kernels import anderson_weights
    torch.manual_seed(0)
    memory, expected = Anderson(), torch.zeros(5, 5, dtype=torch.float64)
    gram, vectors = torch.zeros(5, 5, dtype=torch.float64, device=device), torch.zeros(5, 40, dtype=torch.float64)
    for count in range(11):
        slot, used = count % 5, min(count + 1, 5)
        vectors[slot] = (vectors[slot - 1] + 0.01 * torch.randn(40) if count % 2 else torch.randn(40)) * 0.1**count
        products = (vectors[:used] @ vectors[slot]).float()
        expected[slot, :used] = expected[:used, slot] = products.double()
        weights = anderson_weights(gram, products.to(device), slot, 1e-9).cpu()
        torch.testing.assert_close(weights, memory._weights(expected[:used, :used]).float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gram.cpu(), expected)
    gram.zero_()
    for slot in (0, 1):  # the same residual twice
        weights = anderson_weights(gram, torch.ones(slot + 1, device=device), slot, 1e-9).cpu()
    torch.testing.assert_close(weights, torch.full((2,), 0.5), atol=1e-4, rtol=1e-4)


def compare_a_training_step_with_pytorch(device):
    """A network wide enough for the convolution kernel, its dropout folded into potentials and weights.

    Once more with f's and Jᵀ's hidden maps in bfloat16, as they come from bf16_products.
    """
    from modules import triton_kernels
    torch.manual_seed(0)
    network, x = wide_network(device)
    masks = [mask.float().to(device) for mask in explicit_masks(network)]
    names = ("convolution_step", "norm_forward", "norm_rates", "norm_backward")

    def step(rounded, served):
        """Logits, gradients, and how often each kernel was called."""
        calls, own = dict.fromkeys(names, 0), copy.deepcopy(network)
        own.uses_graphs = False
        explicit_masks(own, masks)

        def counted(name, real):
            def kernel(*given):
                calls[name] += 1
                real(*given)
            return kernel

        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(triton_kernels, name, counted(name, getattr(triton_kernels, name)))
            patch.setattr(torch.backends.cudnn, "allow_tf32", False)
            patch.setattr(gpu, "kernels_for", lambda tensor: triton_kernels if served and tensor.dtype == torch.float32 else None)
            if rounded:
                patch.setattr(Connection, "linear_part", lambda self, x: in_bfloat16(self, x).detach())
                for connection in own.hidden:
                    connection.linear.forward = functools.partial(in_bfloat16, connection)
            logits = own(x)
            logits.square().sum().backward()
        # What precedes a batch norm has no gradient in its bias, only rounding.
        return calls, logits.detach(), {name: parameter.grad for name, parameter in own.named_parameters()
                                        if not name.endswith("linear.bias")}

    for rounded, tolerance in ((False, 1e-3), (True, 0.05)):
        (unserved, logits, gradients), (calls, own_logits, own_gradients) = (step(rounded, served) for served in (False, True))
        assert all(calls.values()) and not any(unserved.values()) and logits.std() > 0.01
        torch.testing.assert_close(own_logits, logits, atol=1e-4, rtol=1e-3)
        for name, gradient in gradients.items():
            assert (own_gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


def in_bfloat16(connection, x):
    return connection.map(*(tensor.bfloat16() for tensor in (x, connection.linear.weight, connection.linear.bias)))


def compare_masks_with_pytorch(device):
    from modules.triton_kernels import keep_mask
    for count, drop in ((21, 13107), (90, 0), (120_000, 50_000)):
        least, scale = drop - 32768, 65536 / (65536 - drop)
        for seed in (1, -1, 2**63 - 1, -2**63, 12345678901234567):
            expected = random_draws(seed, count, torch.device("cpu")).float().ge_(least).mul_(scale)
            assert torch.equal(keep_mask(torch.tensor(seed, device=device), count, least, scale).cpu(), expected)


COMPARISONS = {"neuron step": compare_neuron_step_with_pytorch, "bias per channel": compare_bias_per_channel_with_pytorch,
               "convolutions": compare_convolutions_with_pytorch,
               "digits of a precision": compare_the_digits_of_a_precision, "rates at equilibrium": compare_equilibrium_rates_with_pytorch,
               "batch norms": compare_batch_norms_with_pytorch, "training step": compare_a_training_step_with_pytorch,
               "Anderson's weights": compare_anderson_weights_with_pytorch, "dropout masks": compare_masks_with_pytorch}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are tested as they run on the CUDA device")
@needs_interpreter
@pytest.mark.parametrize("name", COMPARISONS)
def test_triton_kernels_in_the_interpreter(name):
    run_in_interpreter(f"from tests.test_triton_kernels import COMPARISONS; COMPARISONS[{name!r}]('cpu')")


@needs_cuda
@pytest.mark.parametrize("name", COMPARISONS)
def test_triton_kernels_equal_pytorch(name):
    COMPARISONS[name]("cuda")
