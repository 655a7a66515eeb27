"""The linear maps that connections are made of: dense, convolutional and transposed convolutional, apart from their weights."""

from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# On an H200 cuDNN's float32 convolutions of stride 1 take up to 1.5 GB for themselves. Transposed ones of 64 samples take about as long and
# a tenth of that. Of few channels either form takes less time for all samples at once; with kernels of more than 3 by 3, convolutions of
# values that lie channel by channel then take little. With autograd, which would keep another form of each call's weight, parts of the
# batch halve what a gradient in the weight takes.
SAMPLES_AT_ONCE, FEW_CHANNELS, SMALL_KERNEL = 64, 96, 3


class LinearMap(NamedTuple):
    """A kind of map with its geometry; weights and biases are arguments, in the shapes of the PyTorch module of that kind.

    Inputs and outputs are (batch, features) for "dense", else (batch, channels, height, width).
    """

    kind: str
    stride: Tuple[int, int] = (1, 1)
    padding: Tuple[int, int] = (0, 0)
    output_padding: Tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, module: nn.Module) -> "LinearMap":
        """The map that an nn.Linear, nn.Conv2d or nn.ConvTranspose2d applies.

        Raises ValueError for groups, dilation and another padding than that of a number of zeros, and for other modules.
        """
        if not isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            raise ValueError(f"a network's linear maps are nn.Linear, nn.Conv2d or nn.ConvTranspose2d, or of a class made from them, "
                             f"unlike {module}")
        if isinstance(module, nn.Linear):
            return cls("dense")
        if (module.groups, module.dilation, module.padding_mode) != (1, (1, 1), "zeros") or isinstance(module.padding, str):
            raise ValueError(f"a network's linear maps can't have groups, dilation, a padding mode or a padding given as a word: {module}")
        if isinstance(module, nn.Conv2d):
            return cls("convolutional", module.stride, module.padding)
        return cls("transposed", module.stride, module.padding, module.output_padding)

    def __call__(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """W x + b, (batch, *output shape), for x (batch, *input shape)."""
        if self.kind == "dense":
            return F.linear(x, weight, bias)
        if not self._needs_workspace(x):
            return self._convolution(x, weight, bias)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return self._in_parts(x, weight, bias)
        return self._without_gradient(x, weight, bias)

    def _without_gradient(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        kernel = weight.shape[2:]
        if any(pad >= k for pad, k in zip(self.padding, kernel)):
            return self._convolution(x, weight, bias)  # There is no other form.
        if x.shape[1] > FEW_CHANNELS:
            map, weight = self.in_form("transposed", weight)
            return map._in_parts(x, weight, bias)
        if min(kernel) <= SMALL_KERNEL:
            return self._convolution(x, weight, bias)
        map, weight = self.in_form("convolutional", weight)
        return map._convolution(x.contiguous(), weight.contiguous(), bias).contiguous(memory_format=torch.channels_last)

    def _in_parts(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        products = [self._convolution(part, weight, bias) for part in x.split(SAMPLES_AT_ONCE)]
        return products[0] if len(products) == 1 else torch.cat(products)

    def _convolution(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        if self.kind == "convolutional":
            return F.conv2d(x, weight, bias, self.stride, self.padding)
        return F.conv_transpose2d(x, weight, bias, self.stride, self.padding, self.output_padding)

    def _needs_workspace(self, x: Tensor) -> bool:
        """Whether cuDNN computes the map in float32 and with a stride of 1."""
        return (x.is_cuda and x.dtype == torch.float32 and self.stride == (1, 1) and not torch.backends.cudnn.allow_tf32
                and not torch.is_autocast_enabled("cuda"))

    def in_form(self, kind: str, weight: Tensor) -> Tuple["LinearMap", Tensor]:
        """A convolution of stride 1, transposed or not, as one of that kind, with its weight."""
        if self.kind == kind:
            return self, weight
        padding = tuple(k - 1 - pad for k, pad in zip(weight.shape[2:], self.padding))
        return LinearMap(kind, self.stride, padding), weight.transpose(0, 1).flip(2, 3)

    def adjoint(self, v: Tensor, weight: Tensor, input_shape: Sequence[int]) -> Tensor:
        """Wᵀ v, from (batch, *output shape) to (batch, *input_shape)."""
        mirrored, weight = self.mirrored(weight, input_shape)
        return mirrored(v, weight)

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """∂L/∂W, of the shape of `weight`, from ∂L/∂(W x) (batch, *output shape) and x (batch, *input shape)."""
        if self.kind == "dense":
            return gradient.t() @ x
        if self.kind == "transposed":  # The adjoint of a convolution: what comes out and what goes in change places.
            gradient, x = x, gradient
        return torch.nn.grad.conv2d_weight(x, weight.shape, gradient, self.stride, self.padding)

    def mirrored(self, weight: Tensor, input_shape: Sequence[int]) -> Tuple["LinearMap", Tensor]:
        """The adjoint as a map of its own, and its weight. `input_shape` settles what a stride leaves open."""
        if self.kind == "dense":
            return self, weight.t()
        if self.kind == "transposed":
            return LinearMap("convolutional", self.stride, self.padding), weight
        output_shape = self.output_shape(input_shape, weight)
        left_over = [size - ((out - 1) * s - 2 * pad + k) for size, out, k, s, pad
                     in zip(input_shape[1:], output_shape[1:], weight.shape[2:], self.stride, self.padding)]
        return LinearMap("transposed", self.stride, self.padding, tuple(left_over)), weight

    def output_shape(self, input_shape: Sequence[int], weight: Tensor) -> Tuple[int, ...]:
        """Shape of one sample's output for one sample's input, both without the batch dimension.

        Raises ValueError where the map takes no such input.
        """
        taken = weight.shape[0 if self.kind == "transposed" else 1]
        if len(input_shape) != (1 if self.kind == "dense" else 3) or input_shape[0] != taken:
            wanted = f"({taken},)" if self.kind == "dense" else f"({taken}, height, width)"
            raise ValueError(f"a {self.kind} map of this weight takes inputs of shape {wanted} from each sample, not {tuple(input_shape)}")
        if self.kind == "dense":
            return (weight.shape[0],)
        kernel = weight.shape[2:]
        if self.kind == "convolutional":
            sizes = [(size + 2 * pad - k) // s + 1 for size, k, s, pad in zip(input_shape[1:], kernel, self.stride, self.padding)]
            if min(sizes) < 1:
                raise ValueError(f"a kernel of {tuple(kernel)} is larger than an input of shape {tuple(input_shape)} with its padding")
            return (weight.shape[0], *sizes)
        sizes = [(size - 1) * s - 2 * pad + k + extra for size, k, s, pad, extra
                 in zip(input_shape[1:], kernel, self.stride, self.padding, self.output_padding)]
        return (weight.shape[1], *sizes)

    def filter_dim(self) -> int:
        """The dimension of the weight that counts output channels."""
        return 1 if self.kind == "transposed" else 0


def scaled_filters(map: LinearMap, weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` with each output channel's filter multiplied by its entry of `scale` (channels,)."""
    shape = [1] * weight.dim()
    shape[map.filter_dim()] = -1
    return torch.mul(weight, scale.view(shape))
