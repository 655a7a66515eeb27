"""Two contestants that take turns, in processes of their own, so that each has its own memory."""

import atexit
import gc
import multiprocessing
import resource
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Sequence

import torch


class Worker:
    """An object made by `factory(*args)` in a fresh process; `call` runs its methods there and returns what they return."""

    def __init__(self, factory: Callable[..., Any], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, factory, args), daemon=False)
        self._process.start()
        other.close()
        atexit.register(self._pipe.close)  # The process ends then, for which this one waits at its own end.
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
    """As Worker, in a process that all contestants of this factory share, one after the other: each start there takes seconds.

    `close` returns the GPU memory in MB that the target's making and its first call had PyTorch reserve, cuBLAS's workspaces included.
    """

    _hosts: Dict[Callable[..., Any], Worker] = {}

    def __init__(self, factory: Callable[..., Any], *args: Any):
        if factory not in self._hosts:
            self._hosts[factory] = Worker(_Host)
        self._host = self._hosts[factory]
        self._host.call("take", factory, args)

    def call(self, method: str, *args: Any) -> Any:
        return self._host.call("call", method, args)

    def close(self) -> float:
        return self._host.call("let_go")


class _Host:
    """Holds one target at a time, and tells what it had reserved."""

    def take(self, factory: Callable[..., Any], args: Sequence[Any]) -> None:
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self._before, self._peak = torch.cuda.memory_reserved(), None
        torch.cuda.reset_peak_memory_stats()
        self._target = factory(*args)

    def call(self, method: str, args: Sequence[Any]) -> Any:
        answer = getattr(self._target, method)(*args)
        self._peak = self._peak or torch.cuda.max_memory_reserved() - self._before
        return answer

    def let_go(self) -> float:
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
