"""The shared library of the C kernels: that it can be built, when it is built anew, and what it leaves in a thread that ends."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from modules import native
from modules.neuron import make_neuron
from modules.zoo import f64c5_mnist
from tests.marks import needs_compiler

pytestmark = needs_compiler


def test_the_kernels_can_be_built():
    assert native.library() is not None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux tells it")
def test_a_thread_that_ends_leaves_no_memory_behind():
    network = f64c5_mnist(32, neuron=make_neuron(0.5, 0.9), time_steps=3).eval()
    x = torch.randn(4, 1, 28, 28)

    @torch.no_grad()
    def evaluate():
        torch.set_num_threads(1)  # in this thread alone
        network(x)

    def megabytes_after(threads):
        for _ in range(threads):
            thread = threading.Thread(target=evaluate)
            thread.start()
            thread.join()
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")).split()[1]) / 1024
    first = megabytes_after(10)
    assert megabytes_after(60) < first + 12


def test_another_header_is_another_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_compile", lambda tuned, scratch: (scratch / "native.so").touch())
    shutil.copytree(native._FOLDER, tmp_path / "modules", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(native, "_FOLDER", tmp_path / "modules")
    paths = []
    for name in ("native.h", "native_norm.c"):
        paths.append(native._build())
        with open(tmp_path / "modules" / name, "a") as file:
            file.write("/* changed */")
    assert len({*paths, native._build()}) == 3
