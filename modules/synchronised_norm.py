"""Batch normalisation over a batch that is spread over several processes, and its derivative in Jᵀ."""

from typing import NamedTuple, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.across_processes import total


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """In training it takes the statistics of all processes' samples, of which each may hold another number, but at least one.

    Parameters, buffers and values are those of nn.BatchNorm1d or 2d on the whole batch. Unlike nn.SyncBatchNorm it runs on CPUs too.
    """

    @classmethod
    def of(cls, norm: Union[nn.BatchNorm1d, nn.BatchNorm2d]) -> "SynchronisedBatchNorm":
        """The same normalisation with the parameters and statistics of `norm`. Raises ValueError where it lacks some of them."""
        if norm.weight is None or norm.running_mean is None or norm.momentum is None:
            raise ValueError("a batch norm over several processes needs weight, bias, running statistics and a momentum: build it with "
                             f"affine=True, track_running_stats=True and a number for momentum, unlike {norm}")
        own = cls(norm.num_features, norm.eps, norm.momentum).to(norm.weight)
        own.load_state_dict(norm.state_dict())
        return own

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        mean, variance, count = spread_statistics(x)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(x.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(x.dtype), self.momentum)
        inverse_std = torch.rsqrt(variance + self.eps).to(x.dtype)
        return (x - _channels(mean.to(x.dtype), x)) * _channels(inverse_std * self.weight, x) + _channels(self.bias, x)


class SynchronisedNormDerivative(NamedTuple):
    """`jacobian.BatchNormDerivative` with means over the samples of all processes; `input` is the normalised x̂, `scale` γ/σ."""

    input: Tensor
    scale: Tensor
    count: Tensor
    joint = True

    @classmethod
    def at(cls, input: Tensor, norm: SynchronisedBatchNorm) -> Tuple[Tensor, "SynchronisedNormDerivative"]:
        """The batch norm's output for `input` with the statistics of the batch, and its derivative there; no statistic is updated."""
        mean, variance, count = spread_statistics(input)
        inverse_std = torch.rsqrt(variance + norm.eps).to(input.dtype)
        normalised = (input - _channels(mean.to(input.dtype), input)) * _channels(inverse_std, input)
        output = normalised * _channels(norm.weight, input) + _channels(norm.bias, input)
        return output, cls(normalised, norm.weight * inverse_std, count.to(input.dtype))

    def __call__(self, q: Tensor) -> Tensor:
        dims = _all_but_channels(q)
        mean, mean_along = total(torch.stack([q.sum(dims), (q * self.input).sum(dims)])) / self.count
        return _channels(self.scale, q) * (q - _channels(mean, q) - self.input * _channels(mean_along, q))

    forward_product = __call__


def spread_statistics(x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (channels,) of all processes' x (batch, channels, …), and the count () behind them, in float64."""
    own = x.numel() // x.shape[1]
    variance, mean = (statistic.double() for statistic in torch.var_mean(x, _all_but_channels(x), correction=0))
    sums = total(own * torch.cat([mean, torch.ones_like(mean[:1])]))
    count, whole_mean = sums[-1], sums[:-1] / sums[-1]
    return whole_mean, total(own * (variance + (mean - whole_mean).square())) / count, count


def synchronise_batch_norms(network: nn.Module) -> None:
    """Have every batch norm of a FeedbackSNN take the statistics of all processes' samples."""
    for connection in (network.input, *network.hidden):
        connection.norm = SynchronisedBatchNorm.of(connection.norm)


def _all_but_channels(x: Tensor) -> list:
    return [0, *range(2, x.dim())]


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 2))
