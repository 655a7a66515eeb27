"""Files that are whole at any time, by processes that end in the middle of replacing one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Writes "new" over "old", which is kept as the previous file, and ends without a word before the call that the last argument counts.
REPLACE = """
import os, sys
from pathlib import Path
from utils.files import written_aside

folder, calls = Path(sys.argv[1]), int(sys.argv[2])

def ending(call):
    def counted(*given):
        global calls
        calls -= 1
        if calls < 0:
            os._exit(9)
        call(*given)
    return counted

os.link, os.replace = ending(os.link), ending(os.replace)
with written_aside(folder / "latest", folder / "previous") as file:
    file.write(b"new")
"""


@pytest.mark.parametrize("calls,latest,previous", [(0, b"old", b"older"), (1, b"old", b"older"), (2, b"new", b"older"),
                                                   (3, b"new", b"old")])
def test_whenever_a_process_ends_two_files_are_whole_and_no_damage_to_one_reaches_the_other(tmp_path, calls, latest, previous):
    (tmp_path / "latest").write_bytes(b"old")
    (tmp_path / "previous").write_bytes(b"older")
    ended = subprocess.run([sys.executable, "-c", REPLACE, str(tmp_path), str(calls)], cwd=ROOT).returncode
    assert ended == (0 if calls == 3 else 9)
    assert ((tmp_path / "latest").read_bytes(), (tmp_path / "previous").read_bytes()) == (latest, previous)
    assert not (tmp_path / "latest").samefile(tmp_path / "previous")
    assert subprocess.run([sys.executable, "-c", REPLACE, str(tmp_path), "3"], cwd=ROOT).returncode == 0
    assert (tmp_path / "latest").read_bytes() == b"new" and not list(tmp_path.glob("*.part"))
