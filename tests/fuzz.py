"""Bad input at random: python -m tests.fuzz [--inputs 100000] [--seed 0]

Valid files of every kind, and command lines, are altered and given to their readers. Each is to be read, with what was read
checked, or refused with UserError (ValueError where a reader promises that to `fetch`; status 2 and a sentence on the command line).
Another exception, more than LIMIT_S seconds or LIMIT_BYTES of memory more than before is a failure, and its input is saved. The last
line counts them all; the exit status is 1 if anything failed.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, Optional, Sequence

import torch

from tests.fuzz_alterations import Refused
from tests.fuzz_readers import READERS

LIMIT_S = 5.0
LIMIT_BYTES = 64 * 2**20
HARD_LIMIT_BYTES = 2**30  # of address space; a failure can take so much before it is refused more
OUTCOMES = ("read", "refused", "failed")


class TooLong(BaseException):
    """Not an Exception, so that no reader takes it for damage."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: %(default)s)")
    parser.add_argument("--save", type=Path, default=Path("fuzz-failures"),
                        help="folder for inputs that fail (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    totals: Counter = Counter()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for number, (name, (share, make)) in enumerate(READERS.items()):
            began = time.perf_counter()
            count = max(1, round(args.inputs * share / sum(share for share, _ in READERS.values())))
            folder = Path(scratch) / str(number)
            folder.mkdir()
            with quiet():
                outcomes = fuzz(name, make(folder), range(count), args.seed, folder, args.save)
            print(f"{name:30s} {_told(outcomes)}, {time.perf_counter() - began:.1f} s", flush=True)
            totals.update(outcomes)
    print(_told(totals))
    return 1 if totals["failed"] else 0


def fuzz(name: str, attempt: Callable[[random.Random], None], numbers: Sequence[int], seed: int, folder: Path,
         save: Path) -> Counter:
    """Counts of OUTCOMES. Input k of a reader depends on seed, reader and k alone, so that it can be made again alone."""
    outcomes: Counter = Counter()
    handler = signal.signal(signal.SIGALRM, _stop)
    _fault(attempt, random.Random(seed))  # What is imported or made at the first call is no reader's fault.
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + HARD_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        for number in numbers:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most memory in use, starts anew.
            before = _memory("VmRSS")
            fault = _fault(attempt, random.Random(f"{seed} {name} {number}"))
            taken = _memory("VmHWM") - before
            if fault in ("", "refused") and taken > LIMIT_BYTES:
                fault = f"it took {taken // 2**20} MiB"
            outcomes[{"": "read", "refused": "refused"}.get(fault, "failed")] += 1
            if fault not in ("", "refused"):
                kept = save / f"{name}-{seed}-{number}".replace(" ", "-")
                shutil.copytree(folder, kept, dirs_exist_ok=True, ignore_dangling_symlinks=True)
                (kept / "fault.txt").write_text(fault + "\n", errors="backslashreplace")
                print(f"FAILED {name}, input {number}: {fault[:300]!r}; saved in {kept}", flush=True)
    finally:
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return outcomes


def _fault(attempt: Callable[[random.Random], None], draw: random.Random) -> str:
    """Empty for an input that was read, "refused", or what went wrong."""
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            attempt(draw)
        return ""
    except Refused:
        return "refused"
    except TooLong:
        return f"it took more than {LIMIT_S} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _stop(number: int, frame: object) -> None:
    raise TooLong


def _memory(kind: str) -> int:
    """Bytes of this process as Linux counts them: VmSize, VmRSS, or VmHWM."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(kind))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries in C write to the standard error, such as libpng on every damaged picture."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _told(outcomes: Counter) -> str:
    return f"{sum(outcomes[name] for name in OUTCOMES)} inputs: " + ", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES)


if __name__ == "__main__":
    sys.exit(main())
