"""--tensorboard: the log's numbers as scalars, whole after a resumed run; a sentence where the package is missing."""

import sys

import pytest

from tests.small_data import command, write_small_data
from utils.log import read_log


def test_scalars_are_the_logs_numbers_over_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    data, run = write_small_data(tmp_path / "data"), tmp_path / "run"
    flags = ["--path", data, "-c", run, "--device", "cpu", "--seed", 1, "--schedule", 1]
    for more in (["--epochs", 2, "--tensorboard"], ["--epochs", 3, "--tensorboard", "--resume", run / "checkpoint.pth.tar"]):
        status, _, err = command(*flags, *more)
        assert status == 0, err
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    names = ["learning rate", "loss/training", "loss/test", "accuracy/training", "accuracy/test"]
    assert set(events.Tags()["scalars"]) == {*names, "solver/iterations", "solver/not converged", "equilibrium residual"}
    for name, column in zip(names, zip(*read_log(run / "log.txt"))):
        assert [scalar.step for scalar in events.Scalars(name)] == [1, 2, 3]
        assert [scalar.value for scalar in events.Scalars(name)] == pytest.approx(column, abs=1e-5)
    assert all(scalar.value >= 1 for scalar in events.Scalars("solver/iterations"))
    status, out, err = command(*flags, "--epochs", 4, "--resume", run / "checkpoint.pth.tar")
    assert status == 0 and "--tensorboard" not in out, "what is shown of a run is not one of its hyperparameters"


def test_without_the_package_it_says_so_before_anything_is_written(tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    status, _, err = command("--path", tmp_path / "none", "-c", tmp_path / "run", "--device", "cpu", "--tensorboard")
    assert status == 2 and "pip install -r requirements-optional.txt" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "none").exists()
