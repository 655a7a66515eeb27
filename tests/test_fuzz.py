"""A share of the fuzz, and that the fuzz tells a fault."""

import numpy as np
import pytest

from tests import fuzz
from tests.fuzz_alterations import Refused
from tests.fuzz_readers import READERS


@pytest.mark.parametrize("name", READERS)
def test_a_share_of_the_fuzz(name, tmp_path):
    share, make = READERS[name]
    folder = tmp_path / "input"
    folder.mkdir()
    with fuzz.quiet():
        outcomes = fuzz.fuzz(name, make(folder), range(12 * share), 1, folder, tmp_path / "failed")
    assert outcomes["failed"] == 0, [path.read_text() for path in tmp_path.glob("failed/*/fault.txt")]
    assert outcomes["read"] > 0 and (outcomes["refused"] > 0 or name in ("log.txt", "run.json"))


def raises(draw):
    raise KeyError("x")


def hangs(draw):
    while True:
        pass


def grows(draw):
    np.ones(3 * 10**7)  # Well above the limit, as garbage of earlier tests may be freed meanwhile.


def refuses(draw):
    raise Refused


@pytest.mark.parametrize("attempt,outcome", [(raises, "failed"), (hangs, "failed"), (grows, "failed"), (refuses, "refused"),
                                             (lambda draw: None, "read")])
def test_the_fuzz_tells_a_fault(attempt, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT_S", 0.1)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "file").write_bytes(b"x")
    assert fuzz.fuzz("a reader", attempt, range(2), 0, tmp_path / "input", tmp_path / "failed") == {outcome: 2}
    assert (tmp_path / "failed" / "a-reader-0-1" / "file").exists() == (outcome == "failed")
