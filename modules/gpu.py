"""What a CUDA device offers: the kernels of triton_kernels.py for the tensors that they can work on, and graphs."""

import contextlib
import functools
import warnings
from types import ModuleType
from typing import Any, Iterator, Optional

import torch
from torch import Tensor

OLDEST = (8, 0)  # compute capability for which the kernels are made
SMALLEST_BLOCK = 10 * 2**20  # bytes, of those that PyTorch's allocator takes in the size that is asked for


def serves_graphs(tensor: Tensor) -> bool:
    """Whether work on tensors like this one can be captured in graphs."""
    return tensor.is_cuda


def kernels_for(tensor: Tensor) -> Optional[ModuleType]:
    """The module triton_kernels, if the layers whose state is like this tensor can be computed by it, else None."""
    if not tensor.is_cuda or tensor.dtype != torch.float32 or torch.cuda.get_device_capability(tensor.device) < OLDEST:
        return None
    return _kernels()


@functools.lru_cache(maxsize=None)
def _kernels() -> Optional[ModuleType]:
    """None where Triton is not installed (it comes with PyTorch's CUDA builds)."""
    try:
        from modules import triton_kernels
        return triton_kernels
    except ImportError:
        return None


@functools.lru_cache(maxsize=None)
def stream_aside(device: int) -> "torch.cuda.Stream":
    """The stream for all captures on this device and what leads up to them, as cuBLAS takes 32 MB for each that it works in."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Have the block's work done in that stream, after what was launched before it and before what will be."""
    own, current = stream_aside(torch.cuda.current_device()), torch.cuda.current_stream()
    own.wait_stream(current)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        current.wait_stream(own)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on the device. A CUDA device is not waited for: what is launched later comes after the copy."""
    if device.type == "cuda" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextlib.contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Have the block's work raise a RuntimeError where it would make the host wait for the device, as reading a value does.

    In a capture that is an error too, but one after which PyTorch before 2.12 can't capture anything else.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def memory_pool() -> Any:
    """For the graphs of which no two run at the same time: each may work where another has left nothing behind."""
    return torch.cuda.graph_pool_handle()


@contextlib.contextmanager
def capturing(pool: Any) -> Iterator["torch.cuda.CUDAGraph"]:
    """Kernels that are launched in the block become those of the graph that it gets, which takes its memory from `pool`."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads, such as those that watch over a job of several processes, may go on meanwhile.
        with torch.cuda.graph(graph, pool, stream_aside(torch.cuda.current_device()), capture_error_mode="thread_local"):
            yield graph
    finally:
        torch.cuda.set_stream(current)  # A capture that fails does not leave its own.


def take_at_once(size: int) -> None:
    """Have the allocator take `size` bytes in one block, for the current stream or capture, and cut what follows from that.

    Blocks of their own are never joined again, and what is needed later is often larger than what has been freed. Less than SMALLEST_BLOCK
    is never taken: the allocator would take twice as much.
    """
    torch.empty(max(size, SMALLEST_BLOCK), dtype=torch.uint8, device="cuda")


def not_captured(what: str, error: RuntimeError) -> None:
    """Warn that it goes without a graph."""
    warnings.warn(f"{what} could not be captured in a CUDA graph ({error}), so that every kernel is launched by itself, which is slower")


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Have float32 convolutions and matrix products in the block round their factors to tf32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
