"""Bytes altered at random, hostile pickles, and what counts as a refusal."""

import contextlib
import os
import pickle
import struct
from pathlib import Path


class Refused(Exception):
    """The reader refused the input as it should."""


@contextlib.contextmanager
def refusal(*kinds):
    try:
        yield
    except kinds as error:
        assert str(error), "a refusal must say why"
        raise Refused from error


# Altered bytes

def altered(draw, data):
    """`data` with one to four alterations; now and then as it is, or wholly random."""
    kind = draw.random()
    if kind < 0.05:
        return data
    if kind < 0.10:
        return draw.randbytes(draw.choice((0, 1, 5, 30, 300)))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(ALTERATIONS)(draw, data, draw.randrange(min(len(data), draw.choice((16, 200, 10**9))) + 1))
    return data


def _span(draw):
    return draw.choice((1, 2, 8, 64, 1000))


NUMBERS = [struct.pack(order + kind, value) for order in "<>" for kind, value in
           (("I", 2**32 - 1), ("I", 2**31), ("I", 2**27), ("q", -1), ("q", 2**62), ("q", 2**40), ("i", 0), ("H", 65535), ("B", 255))]
ALTERATIONS = (
    lambda draw, data, at: data[:at] + bytes(b ^ 1 << draw.randrange(8) for b in data[at:at + 1]) + data[at + 1:],
    lambda draw, data, at: data[:at],
    lambda draw, data, at: data[:at] + draw.randbytes(_span(draw)) + data[at:],
    lambda draw, data, at: data[:at] + data[at + _span(draw):],
    lambda draw, data, at: data[:at] + data[at:at + _span(draw)] * draw.choice((2, 3, 50)) + data[at:],
    lambda draw, data, at: data[:at] + (number := draw.choice(NUMBERS)) + data[at + len(number):],
    lambda draw, data, at: data[:at] + draw.choice(PICKLE_PARTS) + data[at:],
)
PICKLE_PARTS = [b"cos\nsystem\n(S'touch executed'\ntR", b"\x82\x01", b"\x83\x01\x02", b"(ios\nsystem\n", b"b", b"}b", b"(", b"t",
                b"]" * 500, b"\x85" * 3000, b"g0\n", b"h\x00", b"j\xff\xff\xff\xff", b"2", b"0", b"R", b"\x81", b"Q", b"u", b"e",
                b"N", b"P1\n"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def hostile_pickle(draw):
    return draw.choice((
        lambda: pickle.dumps(Evil(), protocol=draw.randrange(6)),
        lambda: pickle.dumps({"data": Evil(), "labels": [1], "state_dict": Evil()}, protocol=draw.randrange(6)),
        lambda: b"\x80\x02\x82" + draw.randbytes(1) + b".",
        lambda: b"(" * 3000 + b"t" * 3000 + b".",
        lambda: b"]" * 3000 + b"a" * 2999 + b".",
        lambda: b"N" + b"\x85" * 3000 + b"}R.",
        lambda: b"]q\x00" + b"h\x00a" * 1000 + b".",
        lambda: b"\x80\x02\x8b" + struct.pack("<i", draw.choice((-1, 2**31 - 1))) + b".",
        lambda: b"\x80\x04\x8e" + struct.pack("<Q", draw.choice((2**40, 2**62, 2**64 - 1))) + b"x.",
        lambda: b"\x80\x04j" + struct.pack("<I", 2**32 - 1) + b".",
        lambda: b"Nr" + struct.pack("<I", 2**32 - 1) + b".",
        lambda: b"L" + b"9" * draw.choice((4000, 20_000)) + b"L\n.",
        lambda: b"(dp0\ng0\ng0\nsg0\nb.",
    ))()


def not_executed():
    assert not Path("executed").exists(), "the input was executed"
