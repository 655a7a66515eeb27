"""Augmentation and normalisation of whole batches of images, on the device where they lie."""

from typing import Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop_flip(images: Tensor, generator: Optional[torch.Generator] = None, padding: int = 4) -> Tensor:
    """Each image padded with zeros on all sides, cropped to its size at a random place and mirrored with probability ½.

    images: (N, C, H, W) of any dtype; the result has the same shape and dtype and shares no memory with it. Every image has
    its own draw: the offsets uniform in 0 … 2 · padding, down and across, and the flip, left to right. The draws come from
    `generator`, of the images' device, by default PyTorch's own there.
    """
    count, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, count, 1), device=device, generator=generator)
    flip = torch.randint(2, (count, 1), device=device, dtype=torch.bool, generator=generator)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    padded = F.pad(images, (padding,) * 4)
    # Where in the padded image each pixel of the result lies: one index per row and column, (N, H, 1) and (N, 1, W).
    rows = (top + rows)[:, :, None]
    columns = (left + torch.where(flip, columns.flip(0), columns))[:, None, :]
    places = (rows * padded.shape[3] + columns).flatten(1)[:, None].expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view_as(images)


def normalise(images: Tensor, mean: Union[float, Sequence[float]], std: Union[float, Sequence[float]]) -> Tensor:
    """(x / 255 − mean) / std in float32, for uint8 images (N, C, H, W), with one mean and std or one per channel."""
    result = images.float().div_(255)
    if isinstance(mean, (int, float)):
        return result.sub_(mean).div_(std)
    for channel, its_mean, its_std in zip(result.unbind(1), mean, std, strict=True):
        channel.sub_(its_mean).div_(its_std)
    return result
