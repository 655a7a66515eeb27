"""What the machine can do: its matrix-product rate, and the peak memory of a function run in a process of its own."""

import multiprocessing
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Tuple

import torch


def matmul_rate(sizes=(512, 1024, 2048), repeats: int = 9) -> float:
    """Best median rate of float32 matrix products over some sizes, in multiply-adds per second, on PyTorch's threads."""
    rates = []
    for n in sizes:
        a, b = torch.randn(n, n), torch.randn(n, n)
        for _ in range(3):
            a @ b
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        rates.append(n ** 3 / statistics.median(times))
    return max(rates)


def run_isolated(function: Callable[..., Any], *args: Any) -> Tuple[Any, float]:
    """function(*args) in a fresh process: its result and that process's peak resident memory in MB, worker processes not counted."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} died; its message is above") from None
    finally:
        process.join()
    return result


def _report(sender, function, args) -> None:
    result = function(*args)
    unit = 1 if sys.platform == "darwin" else 1024
    sender.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20))


def describe_machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []
    cpu = names[0] if names else platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu} ({capability}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
