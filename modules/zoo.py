"""The paper's networks, each built in one call (method section 2); other widths give small ones for tests."""

from typing import Sequence

from torch import nn

from modules.connection import Connection
from modules.feedback import Feedback
from modules.network import FeedbackSNN


def f400(width: int = 400, inputs: int = 784, classes: int = 10, **settings) -> FeedbackSNN:
    """F400: Linear 784→400 with Linear 400→400 feedback. `settings` are FeedbackSNN's: neuron, time_steps, dropout, …"""
    return FeedbackSNN((inputs,), Connection(nn.Linear(inputs, width)), [], Feedback(nn.Linear(width, width, bias=False)),
                       classes, **settings)


def f64c5_mnist(width: int = 64, size: int = 28, classes: int = 10, **settings) -> FeedbackSNN:
    """F64C5 for MNIST: Conv 1→64, k5 s2 p2 (28→14), with Conv 64→64, k5 p2 feedback."""
    return _single_conv((1, size, size), width, padding=2, classes=classes, **settings)


def f64c5_nmnist(width: int = 64, size: int = 34, classes: int = 10, **settings) -> FeedbackSNN:
    """F64C5 for N-MNIST's events: Conv 2→64, k5 s2 p1 (34→16), with Conv 64→64, k5 p2 feedback."""
    return _single_conv((2, size, size), width, padding=1, classes=classes, events=True, **settings)


def alexnet_f(widths: Sequence[int] = (96, 256, 384, 384, 256), size: int = 32, classes: int = 10, **settings) -> FeedbackSNN:
    """AlexNet-F: five convolutional layers, the first and third of stride 2, and a transposed convolution back to the first."""
    return _five_conv(widths, size, classes, **settings)


def cifarnet_f(widths: Sequence[int] = (128, 256, 512, 1024, 512), size: int = 32, classes: int = 10, **settings) -> FeedbackSNN:
    """CIFARNet-F: AlexNet-F's shape with other widths."""
    return _five_conv(widths, size, classes, **settings)


def _single_conv(input_shape: Sequence[int], width: int, padding: int, classes: int, **settings) -> FeedbackSNN:
    return FeedbackSNN(input_shape, Connection(nn.Conv2d(input_shape[0], width, 5, stride=2, padding=padding)), [],
                       Feedback(nn.Conv2d(width, width, 5, padding=2, bias=False)), classes, **settings)


def _five_conv(widths: Sequence[int], size: int, classes: int, **settings) -> FeedbackSNN:
    strides = (1, 2, 1, 1)
    hidden = [Connection(nn.Conv2d(before, after, 3, stride, padding=1))
              for before, after, stride in zip(widths, widths[1:], strides)]
    feedback = nn.ConvTranspose2d(widths[-1], widths[0], 3, stride=2, padding=1, output_padding=1, bias=False)
    return FeedbackSNN((3, size, size), Connection(nn.Conv2d(3, widths[0], 3, stride=2, padding=1)), hidden,
                       Feedback(feedback), classes, **settings)
