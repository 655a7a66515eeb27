"""A data set of images in memory, and the samples that a network trains and is tested on."""

from typing import NamedTuple, Sequence, Tuple, Union

from torch import Tensor

from utils.data.augment import normalise, random_crop_flip
from utils.data.batches import Samples


class Images(NamedTuple):
    """A data set of images: uint8 (N, height, width) or (N, channels, height, width), and int64 labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def normalised(self, mean: Union[float, Sequence[float]], std: Union[float, Sequence[float]],
                   flatten: bool = False) -> Tuple[Samples, Samples]:
        """Training and test samples in float32, (x / 255 − mean) / std, with one mean and std or one per channel.

        Inputs are (N, channels, height, width), with a channel of its own for grey images; `flatten` gives (N, pixels).
        """
        return (_ready(self.train_images, self.train_labels, mean, std, flatten),
                _ready(self.test_images, self.test_labels, mean, std, flatten))

    def augmented(self, mean: Sequence[float], std: Sequence[float]) -> Tuple[Samples, Samples]:
        """Samples of colour images, normalised per channel; the training images cropped and flipped anew in each batch.

        The training inputs stay uint8 (N, channels, height, width), a quarter of the memory, and are prepared batch by batch
        where they lie. The zero padding comes before the normalisation: what a crop reaches beyond an image is black.
        """
        def prepare(images: Tensor) -> Tensor:
            return normalise(images, mean, std)

        train = Samples(self.train_images, self.train_labels, prepare, random_crop_flip)
        return train, _ready(self.test_images, self.test_labels, mean, std)


def _ready(images: Tensor, labels: Tensor, mean: Union[float, Sequence[float]], std: Union[float, Sequence[float]],
           flatten: bool = False) -> Samples:
    inputs = normalise(images if images.dim() == 4 else images[:, None], mean, std)
    return Samples(inputs.flatten(1) if flatten else inputs, labels)
