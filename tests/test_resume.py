"""A resumed run goes on exactly where it stopped, in the folder that -c names."""

import pytest
import torch

from tests.small_data import command, write_small_data
from utils.checkpoint import load_checkpoint
from utils.log import COLUMNS, read_log
from utils.schedule import learning_rate

FLAGS = ["--train-batch", 20, "--manualSeed", 5, "--schedule", 2, 3, "--warmup", 4, "--device", "cpu"]


@pytest.fixture
def data(tmp_path):
    return write_small_data(tmp_path / "data")


def train(data, folder, epochs, *more):
    status, out, err = command("--path", data, "-c", folder, "--epochs", epochs, *FLAGS, *more)
    assert status == 0, err
    return out


def assert_same_run(one, other):
    left, right = (load_checkpoint(folder / "checkpoint.pth.tar") for folder in (one, other))
    assert (left.epoch, left.acc, left.best_acc) == (right.epoch, right.acc, right.best_acc)
    for name, tensor in left.state_dict.items():
        assert torch.equal(tensor, right.state_dict[name]), name
    assert (one / "log.txt").read_text() == (other / "log.txt").read_text()


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(data, tmp_path):
    train(data, tmp_path / "whole", 4)
    train(data, tmp_path / "parts", 1)
    for epochs in (3, 4):
        train(data, tmp_path / "parts", epochs, "--resume", tmp_path / "parts" / "checkpoint.pth.tar", "--manualSeed", 99)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rates = [row[0] for row in read_log(tmp_path / "whole" / "log.txt")]
    assert rates == pytest.approx([0.05 * 3 / 4, 0.05, 0.005, 0.0005]), "warm-up by iteration, then a milestone at 2 and at 3"


def test_epochs_after_the_checkpoint_are_repeated_not_kept_twice(data, tmp_path):
    train(data, tmp_path / "whole", 3)
    train(data, tmp_path / "run", 2)
    early = (tmp_path / "run" / "checkpoint.pth.tar").read_bytes()
    train(data, tmp_path / "run", 3, "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    (tmp_path / "run" / "checkpoint.pth.tar").write_bytes(early)
    train(data, tmp_path / "run", 3, "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_checkpoint_folder_given_with_resume_is_honoured(data, tmp_path):
    train(data, tmp_path / "old", 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    train(data, tmp_path / "new", 2, "--resume", tmp_path / "old" / "checkpoint.pth.tar")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert load_checkpoint(tmp_path / "new" / "checkpoint.pth.tar").epoch == 2
    assert len(read_log(tmp_path / "new" / "log.txt")) == 2, "the log goes on too"


def test_an_earlier_run_in_the_folder_is_moved_aside(data, tmp_path):
    for _ in range(3):
        train(data, tmp_path / "run", 1)
    kept = sorted(path.name for path in (tmp_path / "run").glob("earlier-*"))
    assert kept == ["earlier-1", "earlier-2"]
    for name in (*kept, ""):
        assert {"log.txt", "log.png", "log.pdf", "checkpoint.pth.tar", "model_best.pth.tar"} <= \
            {path.name for path in (tmp_path / "run" / name).iterdir()}


def test_log_format_and_best_model(data, tmp_path):
    out = train(data, tmp_path / "run", 3)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert lines[0].rstrip("\t").split("\t") == list(COLUMNS) and len(lines) == 4
    accuracies = [row[4] for row in read_log(tmp_path / "run" / "log.txt")]
    best = load_checkpoint(tmp_path / "run" / "model_best.pth.tar")
    assert best.acc == best.best_acc == pytest.approx(max(accuracies), abs=1e-4)
    assert best.epoch == 1 + accuracies.index(max(accuracies))
    assert "of 3 not converged" in out and "Traceback" not in out
    assert (tmp_path / "run" / "log.png").read_bytes()[1:4] == b"PNG" and (tmp_path / "run" / "log.pdf").read_bytes()[:4] == b"%PDF"


def test_non_convergence_is_reported(data, tmp_path):
    out = train(data, tmp_path / "run", 1, "--tol", "1e-7", "--max-iterations", 1)
    assert "3 of 3 not converged" in out


def test_training_learns_and_evaluation_agrees_with_the_log(data, tmp_path):
    out = train(data, tmp_path / "run", 4, "--firing-rate")
    rows = read_log(tmp_path / "run" / "log.txt")
    assert rows[-1][1] < rows[0][1]
    _, evaluated, _ = command("--path", data, "--resume", tmp_path / "run" / "checkpoint.pth.tar", "--evaluate", "--device", "cpu")
    assert f"test loss {rows[-1][2]:.4f} | top-1 {rows[-1][4]:.2f} %" in evaluated and "in total" in out


@pytest.mark.parametrize("epoch,iteration,expected", [(0, 0, 0.001), (0, 49, 0.05), (29, 999, 0.05), (30, 999, 0.005), (90, 999, 5e-5)])
def test_learning_rate(epoch, iteration, expected):
    assert learning_rate(0.05, epoch, iteration, [30, 60, 90], 0.1, warmup=50) == pytest.approx(expected)


def test_what_is_run_again_does_not_count_as_the_best(data, tmp_path):
    """Nor is the checkpoint that such a run starts from, in whose folder the best network stays."""
    train(data, tmp_path / "run", 4)
    rows = read_log(tmp_path / "run" / "log.txt")
    checkpoint, best = tmp_path / "run" / "checkpoint.pth.tar", (tmp_path / "run" / "model_best.pth.tar").read_bytes()
    for start in (0, 1):
        out = train(data, tmp_path / f"from {start}", start + 1, "--resume", checkpoint, "--start-epoch", start, "--vth", 1e6)
        again = load_checkpoint(tmp_path / f"from {start}" / "checkpoint.pth.tar")
        accuracies = [row[COLUMNS.index("Valid Acc.")] for row in rows[:start]] + [again.acc]
        assert again.best_acc == pytest.approx(max(accuracies), abs=1e-3), out
    train(data, tmp_path / "run", 2, "--resume", checkpoint, "--start-epoch", 1, "--vth", 1e6)
    assert (tmp_path / "run" / "model_best.pth.tar").read_bytes() == best


def test_an_evaluation_says_what_is_other_than_in_training(data, tmp_path):
    train(data, tmp_path / "run", 1, "-t", 4)
    flags = ["--path", data, "--device", "cpu", "--evaluate", "--resume", tmp_path / "run" / "checkpoint.pth.tar"]
    status, out, _ = command(*flags, "--leaky", 1, "--lr", 3, "--drop", 0.5)
    assert status == 0 and "warning: not as in the checkpoint: --time-step was 4, is now 5; --leaky was 0.95, is now 1.0\n" in out
    assert "not as in the checkpoint" not in command(*flags, "-t", 4, "--lr", 3)[1]
