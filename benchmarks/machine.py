"""What the machine can do: its matrix-product rate, and its name."""

import platform
import statistics
import time
from pathlib import Path

import torch


def matmul_rate(sizes=(512, 1024, 2048), repeats: int = 9, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Best median rate of matrix products over some sizes, in multiply-adds per second, on PyTorch's threads or the GPU."""
    if device == "cuda":
        sizes = (4096, 8192)
    rates = []
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        times = [_seconds(lambda: a @ b, device) for _ in range(3 + repeats)][3:]
        rates.append(n ** 3 / statistics.median(times))
    return max(rates)


def _seconds(work, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def describe_machine(device: str = "cpu") -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []
    cpu = names[0] if names else platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu} ({capability}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
