"""A new network: two convolutional layers, the second fed back to the first by a transposed convolution, on MNIST.

    python -m examples.new_network -c checkpoints/two_layers --epochs 2 --train-limit 2000 --test-limit 1000

A network is a function that puts an input connection, hidden connections and a feedback together; the shapes of the layers follow. The
feedback must lead from the last layer's shape back to the first's.
"""

from dataclasses import replace

from torch import nn

import mnist_conv
from modules.connection import Connection
from modules.feedback import Feedback
from modules.network import FeedbackSNN
from utils.experiment import main


def network(classes, channels=(16, 32), **settings):
    first, second = channels
    return FeedbackSNN(
        input_shape=(1, 28, 28),
        input=Connection(nn.Conv2d(1, first, 5, stride=2, padding=2)),                                     # 28 → 14
        hidden=[Connection(nn.Conv2d(first, second, 3, stride=2, padding=1))],                             # 14 → 7
        feedback=Feedback(nn.ConvTranspose2d(second, first, 4, stride=2, padding=1, bias=False)),         # 7 → 14
        classes=classes, **settings)


RECIPE = replace(mnist_conv.RECIPE, description="Two convolutional layers on MNIST", network=network)

if __name__ == "__main__":
    main(RECIPE)
