"""The kernels for a tensor's device: those in C on a CPU, those in Triton on a CUDA device."""

from types import ModuleType
from typing import Optional

from torch import Tensor

from modules import gpu, native


def kernels_for(tensor: Tensor) -> Optional[ModuleType]:
    """The module modules.native or modules.triton_kernels if it can work on tensors like this one, else None; PyTorch serves then."""
    return native if native.serves(tensor) else gpu.kernels_for(tensor)
