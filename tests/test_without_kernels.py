"""Where no C kernel can be built, PyTorch's operations serve."""

import subprocess
import sys
from pathlib import Path


def test_without_kernels_pytorch_serves():
    code = ("import torch; from modules import native; from modules.zoo import f400; from modules.neuron import make_neuron;"
            "assert native.library() is None; net = f400(9, inputs=4, neuron=make_neuron(1, 1), time_steps=3);"
            "net(torch.randn(5, 4)).sum().backward(); assert net.solver.tally.solves == 1")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], env={"FEEDBACK_SNN_NATIVE": "0", "PATH": ""})
