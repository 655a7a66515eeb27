"""N-MNIST's formats and binnings one event at a time, in fractions, straight from their description."""

from fractions import Fraction
from math import floor

import numpy as np
import torch

from utils.data.nmnist import unpack_frames


def raw_bytes(events):
    """events: (x, y, on, t in µs)."""
    return b"".join(bytes([x, y]) + (on << 23 | t).to_bytes(3, "big") for x, y, on, t in events)


def half_away_from_zero(value):
    return floor(value + Fraction(1, 2)) if value >= 0 else -floor(-value + Fraction(1, 2))


def channel_of(x, y, on, t):
    """1..2312, or None for an event that leaves the field."""
    T, x, y = 105_000, Fraction(x + 1), Fraction(y + 1)
    if t <= T:
        x, y = x - Fraction(7, 2) * t / T, y - Fraction(7) * t / T
    elif t <= 2 * T:
        x, y = x - (Fraction(7, 2) + Fraction(7, 2) * (t - T) / T), y - (7 - Fraction(7) * (t - T) / T)
    else:
        x -= 7 - Fraction(7) * (t - 2 * T) / T
    x, y = half_away_from_zero(x), half_away_from_zero(y)
    return (x - 1) * 34 + y + 1156 * on if 1 <= x <= 34 and 1 <= y <= 34 else None


def oracle_text(events):
    lines = {}
    for x, y, on, t in events:
        channel = channel_of(x, y, on, t)
        if channel is not None:
            lines.setdefault(channel, []).append(-(-t // 3000))
    return "".join(f"{channel}\t" + "".join(f"{bin}\t" for bin in lines[channel]) + "\n" for channel in sorted(lines)).encode()


def parse_as_published(text, time_steps):
    """The frames (2, 34, 34, T) of a text recording, line by line and event by event."""
    frames = np.zeros((2, 34, 34, time_steps), np.float32)
    for line in text.split("\n"):
        values = line.split()
        if not values:
            continue
        position = int(values[0]) - 1
        polarity = 1 if position >= 1156 else 0
        position -= 1156 * polarity
        x, y = position // 34, position % 34
        for value in values[1:]:
            bin = int(value)
            if 1 <= bin <= time_steps - 1:
                frames[polarity, x, y, bin - 1] = 1
    return frames


def oracle_slices(events, time_steps, binning):
    """The frames (2, 34, 34, T) of binning `time` or `count`."""
    frames = np.zeros((2, 34, 34, time_steps), np.float32)
    times = [t for *_, t in events]
    first, duration = min(times), max(times) - min(times) + 1
    for rank, place in enumerate(sorted(range(len(events)), key=times.__getitem__)):
        x, y, on, t = events[place]
        channel = channel_of(x, y, on, t)
        if channel is None:
            continue
        part = Fraction(t - first, duration) if binning == "time" else Fraction(rank, len(events))
        position = channel - 1 - 1156 * on
        frames[on, position // 34, position % 34, floor(part * time_steps)] = 1
    return frames


def unpacked(packed):
    """Packed frames of n recordings as an array (n, 2, 34, 34, T)."""
    return unpack_frames(torch.from_numpy(packed)).permute(1, 2, 3, 4, 0).numpy()
