"""Convolutions of stride 1 in parts of the batch, as transposed ones where no gradient is wanted, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from modules.linear_map import FEW_CHANNELS, SAMPLES_AT_ONCE, SMALL_KERNEL, LinearMap
from tests.marks import needs_cuda

MAPS = [("convolutional", 3, (1, 1)), ("convolutional", 5, (0, 3)), ("convolutional", 1, (0, 0)), ("transposed", 3, (1, 1)),
        ("transposed", 4, (3, 0))]


def weight_of(kind, channels_in, channels_out, kernel, **options):
    return torch.randn(*((channels_in, channels_out) if kind == "transposed" else (channels_out, channels_in)), kernel, kernel, **options)


def by_pytorch(kind, x, weight, bias, padding):
    return (F.conv_transpose2d if kind == "transposed" else F.conv2d)(x, weight, bias, padding=padding)


def recorded(function, name, computed):
    def compute(x, *others, **settings):
        computed.append((name, len(x), x.is_contiguous()))
        return function(x, *others, **settings)
    return compute


@pytest.fixture
def products(monkeypatch):
    """What is computed by which of PyTorch's convolutions, for how many samples, whether they lie channel by channel, where cuDNN would
    need much memory."""
    computed = []
    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, name, recorded(getattr(F, name), name, computed))
    monkeypatch.setattr(LinearMap, "_needs_workspace", lambda *_: True)
    return computed


@pytest.mark.parametrize("kind, kernel, padding", MAPS)
@pytest.mark.parametrize("batch", [3, SAMPLES_AT_ONCE + 6])
def test_transposed_form_in_parts(kind, kernel, padding, batch, products):
    channels = FEW_CHANNELS + 1
    x, weight, bias = torch.randn(batch, channels, 6, 7).double(), weight_of(kind, channels, 3, kernel).double(), torch.randn(3).double()
    expected = by_pytorch(kind, x, weight, bias, padding)
    products.clear()
    torch.testing.assert_close(LinearMap(kind, (1, 1), padding)(x, weight, bias), expected)
    assert [product[:2] for product in products] == [("conv_transpose2d", size) for size in ([3] if batch == 3 else [SAMPLES_AT_ONCE, 6])]


@pytest.mark.parametrize("kind", ["convolutional", "transposed"])
@pytest.mark.parametrize("channels", [2, FEW_CHANNELS + 1])
def test_gradients_of_parts(kind, channels, products):
    """In the input and the weight, of a convolution that stays what it is."""
    x, weight = torch.randn(SAMPLES_AT_ONCE + 6, channels, 6, 7).double(), weight_of(kind, channels, 3, 3).double()
    x.requires_grad_(), weight.requires_grad_()
    expected = by_pytorch(kind, x, weight, None, (1, 1))
    v = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, (x, weight), v)
    products.clear()
    product = LinearMap(kind, (1, 1), (1, 1))(x, weight)
    torch.testing.assert_close(product, expected)
    torch.testing.assert_close(torch.autograd.grad(product, (x, weight), v), expected_gradients)
    own = "conv2d" if kind == "convolutional" else "conv_transpose2d"
    assert [product[:2] for product in products] == [(own, SAMPLES_AT_ONCE), (own, 6)]


@pytest.mark.parametrize("kind, kernel, padding", [*MAPS, ("transposed", 5, (2, 2)), ("convolutional", 5, (2, 2))])
def test_few_channels_stay_whole_without_a_gradient(kind, kernel, padding, products):
    """As convolutions channel by channel where the kernel is large, else as they are."""
    x, weight = torch.randn(SAMPLES_AT_ONCE + 6, FEW_CHANNELS, 6, 7).double(), weight_of(kind, FEW_CHANNELS, 3, kernel).double()
    bias = torch.randn(3).double()
    expected = by_pytorch(kind, x, weight, bias, padding)
    products.clear()
    x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    product = LinearMap(kind, (1, 1), padding)(x, weight, bias)
    torch.testing.assert_close(product, expected)
    assert product.is_contiguous(memory_format=torch.channels_last)
    form = "conv2d" if kernel > SMALL_KERNEL or kind == "convolutional" else "conv_transpose2d"
    assert products == [(form, SAMPLES_AT_ONCE + 6, kernel > SMALL_KERNEL)]


@pytest.mark.parametrize("kind", ["convolutional", "transposed"])
@pytest.mark.parametrize("channels, kernel, padding", [(FEW_CHANNELS + 1, (1, 1), (1, 1)), (2, (5, 4), (1, 4)), (2, (5, 3), (1, 0))])
def test_maps_that_stay_what_they_are(kind, channels, kernel, padding, products):
    """With more padding than a kernel of the other form can have, or with a kernel that is small in one direction."""
    shape = (channels, 3) if kind == "transposed" else (3, channels)
    x, weight = torch.randn(4, channels, 7, 8).double(), torch.randn(*shape, *kernel).double()
    expected = by_pytorch(kind, x, weight, None, padding)
    products.clear()
    torch.testing.assert_close(LinearMap(kind, (1, 1), padding)(x, weight), expected)
    assert [product[:2] for product in products] == [("conv2d" if kind == "convolutional" else "conv_transpose2d", 4)]


def test_autograd_keeps_no_other_form_of_the_weight(monkeypatch):
    """Which is one of each time step in back-propagation through time."""
    monkeypatch.setattr(LinearMap, "_needs_workspace", lambda *_: True)
    channels = FEW_CHANNELS + 1
    map, weight, kept = LinearMap("convolutional", (1, 1), (1, 1)), torch.randn(3, channels, 3, 3), []
    for wanted in ((True, False), (False, True)):
        x, own = torch.randn(4, channels, 5, 5).requires_grad_(wanted[0]), weight.clone().requires_grad_(wanted[1])
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda kept: None):
            map(x, own)
    assert weight.shape in kept and weight.transpose(0, 1).shape not in kept


@needs_cuda
@pytest.mark.parametrize("kind, kernel, padding", [*MAPS, ("convolutional", 1, (1, 1))])
@pytest.mark.parametrize("channels", [FEW_CHANNELS, FEW_CHANNELS + 4])
def test_float32_convolutions_on_a_gpu(kind, kernel, padding, channels, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, weight = torch.randn(SAMPLES_AT_ONCE + 6, channels, 6, 7), weight_of(kind, channels, 8, kernel)
    map, bias = LinearMap(kind, (1, 1), padding), torch.randn(8)
    assert map._needs_workspace(x.cuda()) and not LinearMap(kind, (2, 1), padding)._needs_workspace(x.cuda())
    expected = by_pytorch(kind, x.double(), weight.double(), bias.double(), padding)
    own = map(x.cuda().to(memory_format=torch.channels_last), weight.cuda(), bias.cuda())
    assert own.is_contiguous(memory_format=torch.channels_last)
    assert (own.cpu() - expected).norm() <= 1e-5 * expected.norm()
