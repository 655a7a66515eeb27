"""A new data set: made images of bars, told apart by their place, and a small dense network for them.

    python -m examples.new_dataset -c checkpoints/bars --epochs 5

A data set is a function from the parsed flags to training and test `Samples`: inputs as the network takes them, here (N, features),
and whole-number labels. A batch may be prepared where it lies (third argument), augmented before (fourth). A recipe says what trains on it.
"""

import torch

from modules.zoo import f400
from utils.data.batches import Samples
from utils.experiment import main
from utils.recipe import Recipe

SIDE, CLASSES = 12, 4


def bars(count, seed):
    """Noisy images, three rows of which are bright; the label says which three."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    images = torch.rand(count, CLASSES, SIDE // CLASSES, SIDE, generator=random)
    images[torch.arange(count), labels] += 1
    return Samples((images - 0.75).flatten(1), labels)


def data(args):
    return bars(2000, seed=0), bars(500, seed=1)


def network(classes, **settings):
    return f400(width=50, inputs=SIDE * SIDE, classes=classes, **settings)


RECIPE = Recipe(description="F50 on bars", network=network, data=data, datasets={"bars": CLASSES}, defaults=dict(time_step=5))

if __name__ == "__main__":
    main(RECIPE)
