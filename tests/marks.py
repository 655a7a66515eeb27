"""What some tests need: a C compiler, a processor with a matrix unit, a CUDA device, or Triton, in whose interpreter they then run."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Where the Makefile puts Triton beside a CPU build of PyTorch.
TRITON_APART = Path(sys.prefix) / "triton"


def has_matrix_unit() -> bool:
    """Whether processor, system and compiler have AMX, by their own word, not the kernels', whose failure must not skip their tests."""
    cpu = Path("/proc/cpuinfo")
    if shutil.which("cc") is None or not cpu.exists() or "amx_bf16" not in cpu.read_text().split():
        return False
    macros = subprocess.run(["cc", "-march=native", "-dM", "-E", "-x", "c", "/dev/null"], capture_output=True, text=True).stdout
    return "__AMX_BF16__" in macros or "__AMXBF16__" in macros


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, so no kernels")
needs_tiles = pytest.mark.skipif(not has_matrix_unit(), reason="the processor has no matrix unit, or compiler or system don't know it")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
needs_interpreter = pytest.mark.skipif(not (TRITON_APART / "triton").exists() and importlib.util.find_spec("triton") is None,
                                       reason="Triton is not installed: make test does that on Linux")


def run_in_interpreter(code: str) -> None:
    """Run Python code in a process where Triton's kernels are interpreted on the CPU and the C kernels are off.

    It starts from the random state that conftest.py gives every test here.
    """
    subprocess.run([sys.executable, "-c", f"import torch; torch.manual_seed(0); {code}"], check=True, cwd=Path(__file__).parents[1],
                   env={"TRITON_INTERPRET": "1", "FEEDBACK_SNN_NATIVE": "0", "PYTHONPATH": str(TRITON_APART), "PATH": ""})
