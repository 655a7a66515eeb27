"""The readers to fuzz, with their shares of the inputs; the command line is one of them."""

import contextlib
import io

import numpy as np

import cifar_alexnetf
import cifar_cifarnetf
import fmnist_mlp
import get_rate_cifar_alexnetf
import mnist_conv
import nmnist_conv
from tests.fuzz_alterations import Refused
from tests.fuzz_data_files import cache, cifar, idx, raw, sheets, text, zips
from tests.fuzz_run_files import checkpoint, log, record
from utils.arguments import parse_arguments

SCRIPTS = (fmnist_mlp, mnist_conv, nmnist_conv, cifar_alexnetf, cifar_cifarnetf, get_rate_cifar_alexnetf)
FLAGS = ["--dataset", "-d", "--path", "-j", "--train-limit", "--test-limit", "--train-batch", "--test-batch", "-t", "--vth", "--leaky",
         "--drop", "--solver", "--tol", "--max-iterations", "--jacobian-bn", "--epochs", "--start-epoch", "--optimizer", "--lr",
         "--schedule", "--gamma", "--warmup", "--momentum", "--wd", "-c", "--resume", "-e", "--firing-rate", "--manualSeed", "--device",
         "--precision", "--gpu-id", "--nmnist-binning", "--t", "--", "-", "---x", "@file"]
TEXTS = ["", " ", "0", "1", "-1", "5", "0.5", "1e-3", "1e400", "-0", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "0x10", "1_0", "١", "½",
         "é", "\ud800", "\udcff", "a\0b", "\n", "cifar10", "CIFAR-100", "mnist", "sgd", "SGD", "cpu", "auto", ".", "/", "/dev/null",
         "a" * 5000, "%s", "%(prog)s", "{}", "none", "../x", "time"]


def arguments(folder):
    def attempt(draw):
        argv = []
        for _ in range(draw.randrange(1, 5)):
            argv += [draw.choice(FLAGS)] if draw.random() < 0.95 else []
            argv += [draw.choice(TEXTS) if draw.random() < 0.9 else "".join(chr(draw.randrange(0xD7FF)) for _ in range(draw.randrange(20)))
                     for _ in range(draw.choice((0, 1, 1, 1, 1, 2)))]
            if len(argv) > 1 and argv[-2].startswith("--") and draw.random() < 0.2:
                argv[-2:] = [f"{argv[-2]}={draw.choice((argv[-1], '--'))}"]
        (folder / "argv.txt").write_text(repr(argv), errors="backslashreplace")
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                args = parse_arguments(draw.choice(SCRIPTS).RECIPE, argv)
        except SystemExit as end:
            if end.code == 0:  # an abbreviation of --help
                return
            assert end.code == 2 and ": error: " in err.getvalue()
            raise Refused from end
        for name in ("epochs", "time_step", "train_batch", "test_batch", "max_iterations"):
            assert type(getattr(args, name)) is int and 1 <= getattr(args, name) <= 10**9
        for name in ("lr", "vth", "leaky", "dropout", "tol", "gamma", "momentum", "weight_decay"):
            assert np.isfinite(getattr(args, name))
        assert args.lr > 0 and args.vth > 0 and 0 <= args.dropout < 1 and 0 <= args.momentum < 1
        assert all(type(epoch) is int and 0 <= epoch <= 10**9 for epoch in args.schedule)
    return attempt


READERS = {  # shares of the inputs, and the readers
    "IDX": (20, idx), "CIFAR": (16, cifar), "CIFAR sheets": (5, sheets), "recording": (15, raw), "recordings as text": (14, text),
    "zips of recordings": (4, zips), "cache of recordings": (6, cache), "log.txt": (8, log), "run.json": (6, record),
    "checkpoint": (9, checkpoint), "command line": (6, arguments)}
