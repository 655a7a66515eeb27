"""Two contestants that take turns: on a CPU in processes of their own, so that each has its own memory, on a GPU in this one."""

import gc
import multiprocessing
import resource
import sys
import traceback
from pathlib import Path
from typing import Any, Callable

import torch


class Worker:
    """An object made by `factory(*args)` in a fresh process; `call` runs its methods there and returns what they return."""

    def __init__(self, factory: Callable[..., Any], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, factory, args), daemon=False)
        self._process.start()
        other.close()
        self._answer()

    def call(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._answer()

    def close(self) -> float:
        """End the process and return its peak resident memory in MB, less what its imports took; processes of its own are not counted."""
        peak = self.call("")
        self._pipe.close()
        self._process.join()
        return peak

    def _answer(self) -> Any:
        try:
            failed, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a benchmark's process died; its message is above") from None
        if failed:
            raise RuntimeError(answer)
        return answer


class OnGpu:
    """As Worker, in this process; `close` returns the GPU memory in MB that the target's making and its first call had PyTorch reserve.

    That includes cuBLAS's workspaces, which those before it have to give back. Captured graphs don't survive that: a contestant that has
    some is the last one to be made.
    """

    def __init__(self, factory: Callable[..., Any], *args: Any):
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self._before, self._peak = torch.cuda.memory_reserved(), None
        torch.cuda.reset_peak_memory_stats()
        self._target = factory(*args)

    def call(self, method: str, *args: Any) -> Any:
        answer = getattr(self._target, method)(*args)
        self._peak = self._peak or torch.cuda.max_memory_reserved() - self._before
        return answer

    def close(self) -> float:
        self._target = None
        return (self._peak or 0) / 2**20


def _serve(pipe, factory, args) -> None:
    imports = _peak_mb()
    try:
        target = factory(*args)
        pipe.send((False, None))
        while True:
            method, args = pipe.recv()
            if not method:
                break
            pipe.send((False, getattr(target, method)(*args)))
    except EOFError:
        return
    except Exception:
        pipe.send((True, traceback.format_exc()))
        return
    pipe.send((False, _peak_mb() - imports))


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where what getrusage tells starts from the parent process's peak
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
