"""Convolutions of stride 1 as transposed ones, in parts of the batch, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from modules.linear_map import FEW_CHANNELS, SAMPLES_AT_ONCE, LinearMap
from tests.marks import needs_cuda

MAPS = [("convolutional", 3, (1, 1)), ("convolutional", 5, (0, 3)), ("convolutional", 1, (0, 0)), ("transposed", 3, (1, 1)),
        ("transposed", 4, (3, 0))]


def weight_of(kind, channels_in, channels_out, kernel, **options):
    return torch.randn(*((channels_in, channels_out) if kind == "transposed" else (channels_out, channels_in)), kernel, kernel, **options)


def by_pytorch(kind, x, weight, bias, padding):
    return (F.conv_transpose2d if kind == "transposed" else F.conv2d)(x, weight, bias, padding=padding)


@pytest.mark.parametrize("kind, kernel, padding", MAPS)
@pytest.mark.parametrize("batch", [3, SAMPLES_AT_ONCE + 6])
def test_transposed_form_in_parts(kind, kernel, padding, batch, monkeypatch):
    x, weight, bias = torch.randn(batch, 2, 6, 7).double(), weight_of(kind, 2, 3, kernel).double(), torch.randn(3).double()
    expected, parts, transposed = by_pytorch(kind, x, weight, bias, padding), [], F.conv_transpose2d
    monkeypatch.setattr(LinearMap, "_is_better_in_parts", lambda *_: True)
    monkeypatch.setattr(F, "conv_transpose2d", lambda x, *others: parts.append(len(x)) or transposed(x, *others))
    torch.testing.assert_close(LinearMap(kind, (1, 1), padding)(x, weight, bias), expected)
    assert parts == [3] if batch == 3 else parts == [SAMPLES_AT_ONCE, 6]


def test_autograd_keeps_no_other_form_of_the_weight(monkeypatch):
    """Which is one of each time step in back-propagation through time."""
    monkeypatch.setattr(LinearMap, "_is_better_in_parts", lambda *_: True)
    map, weight, kept = LinearMap("convolutional", (1, 1), (1, 1)), torch.randn(3, 2, 3, 3), []
    for wanted in ((True, False), (False, True)):
        x, own = torch.randn(4, 2, 5, 5).requires_grad_(wanted[0]), weight.clone().requires_grad_(wanted[1])
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda kept: None):
            map(x, own)
    assert weight.shape in kept and weight.transpose(0, 1).shape not in kept


@needs_cuda
@pytest.mark.parametrize("kind, kernel, padding", [*MAPS, ("convolutional", 1, (1, 1))])
def test_float32_convolutions_on_a_gpu(kind, kernel, padding, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, weight = torch.randn(SAMPLES_AT_ONCE + 6, FEW_CHANNELS + 4, 6, 7), weight_of(kind, FEW_CHANNELS + 4, 8, kernel)
    map, bias = LinearMap(kind, (1, 1), padding), torch.randn(8)
    in_parts = map._is_better_in_parts(x.cuda(), weight.cuda())
    assert in_parts == (padding != (1, 1) or kernel > 1) and not map._is_better_in_parts(x[:, :FEW_CHANNELS].cuda(), weight.cuda())
    expected = by_pytorch(kind, x.double(), weight.double(), bias.double(), padding)
    own = map(x.cuda().to(memory_format=torch.channels_last), weight.cuda(), bias.cuda())
    assert own.is_contiguous(memory_format=torch.channels_last)
    assert (own.cpu() - expected).norm() <= 1e-5 * expected.norm()
