"""Absurd flags, paths and command lines: status 2 and a sentence."""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import fmnist_mlp
import nmnist_conv
from tests.fuzz_readers import SCRIPTS
from tests.small_data import command, write_small_data
from utils import convert_nmnist, preview_nmnist
from utils.arguments import parse_arguments

HUGE, LONG = "9" * 30, "a" * 5000
WHOLE = ["-j", "--train-limit", "--test-limit", "--train-batch", "--test-batch", "-t", "--max-iterations", "--epochs", "--start-epoch",
         "--schedule", "--warmup", "--manualSeed"]
REAL = ["--vth", "--leaky", "--drop", "--tol", "--lr", "--gamma", "--momentum", "--wd"]
CHOICE = ["-d", "--solver", "--jacobian-bn", "--optimizer", "--device", "--precision"]


@pytest.mark.parametrize("flag", [*WHOLE, *REAL, *CHOICE, "--path", "-c", "--resume"])
def test_absurd_values_of_every_flag(flag, capsys):
    values = ["", LONG, "a\0b", "\ud800"]
    if flag in WHOLE:
        values += [HUGE, "9" * 5000, "½", "é", "1e3", "nan", "-7", "inf", "0x10"]
    elif flag in REAL:
        values += ["nan", "inf", "-inf", "1e999", "½", "é", "1,5"]
    elif flag in CHOICE:
        values += ["é", HUGE, "-"]
    for script in (fmnist_mlp, nmnist_conv):
        for value in values:
            with pytest.raises(SystemExit) as end:
                parse_arguments(script.RECIPE, [f"{flag}={value}"] if flag.startswith("--") else [flag, value])
            message = capsys.readouterr().err.strip().splitlines()[-1]
            assert end.value.code == 2 and "error: argument " in message and flag.strip("-") in message, value
            assert len(message) < 400 or flag in CHOICE


def test_two_dashes_for_a_value(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(fmnist_mlp.RECIPE, ["--lr=--"])
    assert end.value.code == 2 and "--lr" in capsys.readouterr().err


@pytest.mark.parametrize("main,more", [(convert_nmnist.main, []), (preview_nmnist.main, [])])
@pytest.mark.parametrize("path", ["", "a\0b", LONG])
def test_paths_of_the_other_commands(main, more, path, capsys):
    for flags in (["--path", path, "--out", "x"], ["--path", "x", "--out", path]):
        with pytest.raises(SystemExit) as end:
            main([*flags, *more])
        assert end.value.code == 2 and "error: argument --" in capsys.readouterr().err


def test_folders_and_files_in_each_others_place(tmp_path):
    data, file = write_small_data(tmp_path / "data"), tmp_path / "file"
    file.write_text("x")
    images = data / "FashionMNIST/raw/train-images-idx3-ubyte"
    images.unlink()
    images.mkdir()
    for flags, named in [(["--path", data], str(images)), (["--path", data, "-c", file], "-c"), (["--path", file], "--path"),
                         (["--path", data, "--resume", tmp_path], "--resume")]:
        status, _, err = command(*flags, "--device", "cpu")
        assert status == 2 and named in err.splitlines()[-1] and "Traceback" not in err, (flags, err)


def test_files_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        data = write_small_data(Path(folder) / "data")
        for path in (data / "FashionMNIST/raw/train-images-idx3-ubyte", Path(folder) / "checkpoint"):
            path.touch()
            flags = ["--path", data, "--epochs", 1, *(["--resume", path] if path.name == "checkpoint" else [])]
            command(*flags, "-c", f"{folder}/run")  # imports what another user may not be able to
            path.chmod(0)
            with as_nobody():
                status, _, err = command(*flags, "-c", f"{folder}/other")
            assert status == 2 and str(path) in err and "Traceback" not in err
            path.chmod(0o600)


@contextlib.contextmanager
def as_nobody():
    """Root may read any file, so it is another user in here."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


ARGUMENTS = st.lists(st.sampled_from(["--lr", "-t", "--path", "--resume", "-c", "--schedule", "--seed", "--drop", "-e"]) | st.text(),
                     max_size=5)


@settings(max_examples=100, deadline=None)
@given(argv=ARGUMENTS, script=st.sampled_from(SCRIPTS))
def test_any_command_line_is_parsed_or_refused_with_status_2(argv, script):
    try:
        args = parse_arguments(script.RECIPE, argv)
        assert args.time_step >= 1 and args.lr > 0 and args.path
    except SystemExit as end:
        assert end.code == 2 or end.code == 0 and any("h" in text for text in argv)
