"""The feedback connection: a spectrally normalised weight without bias or batch norm (method section 3)."""

from typing import Callable, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.connection import masked, unit_norm_filters_

INITIAL_POWER_ITERATIONS = 10


class Feedback(nn.Module):
    """B = clamp(g, −1, 1) · w / σ(w), applied as a dense, convolutional or transposed convolutional map.

    σ(w) is the largest singular value of w reshaped to (w.shape[0], −1), estimated as uᵀ W v. The template `linear`
    gives the kind of map, its weight's shape and its stride and padding; it must have no bias.
    """

    def __init__(self, linear: Union[nn.Linear, nn.Conv2d, nn.ConvTranspose2d]):
        super().__init__()
        if linear.bias is not None:
            raise ValueError("a feedback connection has no bias: build its linear map with bias=False")
        self.transposed = isinstance(linear, nn.ConvTranspose2d)
        self.apply_weight = _weighted_map(linear)
        self.w = nn.Parameter(torch.empty_like(linear.weight))
        unit_norm_filters_(self.w, output_dim=1 if self.transposed else 0)
        matrix = self.w.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(matrix.shape[1]), dim=0))
        for _ in range(INITIAL_POWER_ITERATIONS):
            self._power_iteration()
        self.g = nn.Parameter(torch.dot(self.u, matrix @ self.v))

    @torch.no_grad()
    def _power_iteration(self) -> None:
        matrix = self.w.flatten(1)
        self.v.copy_(F.normalize(matrix.t() @ self.u, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def normalised_weight(self) -> Tensor:
        """B for one forward pass, after one power iteration; differentiable in g and w with u and v held constant."""
        self._power_iteration()
        sigma = torch.dot(self.u.clone(), self.w.flatten(1) @ self.v.clone())
        return self.w * (self.g.clamp(-1, 1) / sigma)

    def forward(self, spikes: Tensor, weight: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """mask · B s for spikes or rates (batch, …) of the last layer, with `weight` from `normalised_weight`."""
        return masked(self.apply_weight(spikes, weight), mask)


def _weighted_map(linear: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The function (input, weight) → output of a linear layer without bias."""
    if isinstance(linear, nn.Linear):
        return F.linear
    if isinstance(linear, nn.Conv2d):
        return lambda x, weight: F.conv2d(x, weight, None, linear.stride, linear.padding)
    return lambda x, weight: F.conv_transpose2d(x, weight, None, linear.stride, linear.padding, linear.output_padding)
