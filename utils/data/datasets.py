"""The front door to the data sets of images: each is loaded into memory and fetched where it is missing."""

from utils.data.cifar import load_cifar
from utils.data.idx_datasets import load_fashion_mnist, load_mnist
from utils.data.images import Images

__all__ = ["Images", "load_cifar", "load_fashion_mnist", "load_mnist"]
