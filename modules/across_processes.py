"""Sums over the processes of a job whose batch is spread over them; without a process group everything is in this one process."""

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def total(x: Tensor) -> Tensor:
    """The sum of every process's `x`, the same in all; its gradient is that of the sum of all processes' losses."""
    return _Total.apply(x) if process_count() > 1 else x


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _all_reduced(x)

    @staticmethod
    def backward(ctx, gradient):
        return _all_reduced(gradient)


def _all_reduced(x: Tensor) -> Tensor:
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


class InnerProducts:
    """Norms and inner products of flat vectors that lie in this process or, for `joint`, whose samples are spread over all."""

    def __init__(self, joint: bool = False):
        self.joint = joint

    def norm(self, x: Tensor) -> Tensor:
        own = torch.linalg.vector_norm(x)
        return total(own.double().square()).sqrt().to(own.dtype) if self.joint else own

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """a · b or, where `a` is a matrix of row vectors, each row's product with `b`."""
        return total(a @ b) if self.joint else a @ b
