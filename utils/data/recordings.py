"""N-MNIST recordings: the raw and the text format of events, and the binary frames made of them.

A raw recording is 5 bytes per event: x, y, then 24 bits big-endian, of which bit 23 is the polarity (1 = ON) and 23 bits are the
time in µs. A text recording is the layout of the published scripts: per line a channel and the bins of its events.
Frames are packed to bits, T · 289 bytes in the order (step, polarity, x, y), the lowest bit of a byte first. Several recordings
are decoded at once: arrays of one recording's few thousand events are too short for NumPy to be fast.
"""

from functools import lru_cache
from typing import NamedTuple, Sequence, Tuple

import numpy as np

SIDE = 34                   # pixels
CHANNELS = 2 * SIDE * SIDE  # polarity, x, y
FRAME_BYTES = CHANNELS // 8  # without a remainder: every step starts on a byte
BIN = 3000                  # µs per step of the published frames
SACCADE = 105_000           # µs per movement of the camera
TABLE_BITS = 19             # of times in a sound recording, at most 2^19 µs: only for these is a table worth its memory
BINNINGS = ("paper", "time", "count")
OUT_OF_VIEW = "none of its events stays in view"


class DamagedRecording(Exception):
    """Why a recording can't be used; whoever knows its name adds it."""


class Events(NamedTuple):
    """Events of recordings 0, 1, … one after the other, in the order of each file; all int32 (events,).

    x, y in 0..33, polarity 1 for ON and 0 for OFF, time in µs, and the number of the recording, ascending.
    """

    x: np.ndarray
    y: np.ndarray
    polarity: np.ndarray
    time: np.ndarray
    recording: np.ndarray


def decode_events(recordings: Sequence[bytes], first: int = 0, last: int = 2**23) -> Events:
    """The events of raw recordings whose time lies in first..last (µs). Raises DamagedRecording unless all are sound."""
    for data in recordings:
        if len(data) == 0:
            raise DamagedRecording("it is empty")
        if len(data) % 5:
            raise DamagedRecording(f"it is truncated: its {len(data):,d} bytes are not a whole number of 5-byte events")
    data, counts = b"".join(recordings), np.array([len(data) // 5 for data in recordings])
    x = np.frombuffer(data, np.uint8)[::5]
    rest = np.ndarray(len(x), ">u4", data, offset=1, strides=(5,)).astype(np.uint32)  # y, polarity and time, highest bits first
    if x.max() >= SIDE or rest.max() >> 24 >= SIDE:
        raise DamagedRecording(f"it has events beyond its {SIDE} × {SIDE} pixels")
    if first > 0 or last < 2**23:
        time = rest & 0x7FFFFF
        chosen = ((time >= first) & (time <= last)).nonzero()[0]
        x, rest, counts = x[chosen], rest[chosen], np.diff(np.searchsorted(chosen, np.cumsum(counts)), prepend=0)
    recording = np.repeat(np.arange(len(recordings), dtype=np.int32), counts)
    rest = rest.view(np.int32)
    return Events(x.astype(np.int32), rest >> 24, rest >> 23 & 1, rest & 0x7FFFFF, recording)


def stabilised_channels(events: Events) -> Tuple[np.ndarray, np.ndarray]:
    """Each event's channel 0..2311, polarity · 1156 + x · 34 + y with the saccades undone, and whether it stays in view."""
    if len(events.time) == 0:
        return events.time, events.time > 0
    bits = int(events.time.max()).bit_length()
    time = events.time.astype(np.intp)  # or NumPy would convert it for each of the two look-ups
    shift_x, shift_y = _shifts(time) if bits > TABLE_BITS else (table[time] for table in _shift_tables(bits))
    x, y = events.x + shift_x, events.y + shift_y
    inside = (x.view(np.uint32) < SIDE) & (y.view(np.uint32) < SIDE)  # a negative number is a large one without its sign
    return (events.polarity * SIDE + x) * SIDE + y, inside


@lru_cache(maxsize=None)
def _shift_tables(bits: int) -> Tuple[np.ndarray, np.ndarray]:
    """`_shifts` at each time 0..2^bits − 1 µs."""
    return _shifts(np.arange(1 << bits))


def _shifts(t: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """The pixels by which events at times t (µs) are moved in x and y, int16.

    The camera moves by 3.5 pixels in x and 7 in y per saccade, and by 7 in x in the third, so positions are multiples of 1/30000
    of a pixel and integers hold them exactly. They are rounded half away from zero, which is half up for the 1..34 that are kept.
    """
    half = 15_000
    x = np.where(t <= 2 * SACCADE, -t, 2 * t - 6 * SACCADE)
    y = np.where(t <= SACCADE, -2 * t, np.where(t <= 2 * SACCADE, 2 * t - 4 * SACCADE, 0))
    return ((x + half) // (2 * half)).astype(np.int16), ((y + half) // (2 * half)).astype(np.int16)


def raw_frames(recordings: Sequence[bytes], time_steps: int, binning: str = "paper") -> np.ndarray:
    """The packed frames of n raw recordings, uint8 (n, T · 289). Raises DamagedRecording unless all are sound.

    paper: steps of 3 ms, step k is bin k + 1, and bin T is left out as in the published frames: the last frame is empty.
    time: T equal slices of the time from the first event to the last. count: T slices of equally many events in order of time.
    """
    if binning == "paper":
        events = decode_events(recordings, first=1, last=BIN * (time_steps - 1))
        step = (events.time - 1) // BIN
    else:
        events = decode_events(recordings)
        step = (_slices_of_time if binning == "time" else _slices_of_count)(events, time_steps)
    channel, inside = stabilised_channels(events)
    places = (events.recording.astype(np.int64) * time_steps + step) * CHANNELS + channel
    frames = _packed(places[inside], len(recordings), time_steps)
    for dark in np.flatnonzero(~frames.any(axis=1)):
        if not stabilised_channels(decode_events([recordings[dark]]))[1].any():
            raise DamagedRecording(OUT_OF_VIEW)
    return frames


def _slices_of_time(events: Events, slices: int) -> np.ndarray:
    """An event occupies its µs, so the slices part the last − first + 1 µs of its recording."""
    starts = np.searchsorted(events.recording, np.arange(events.recording[-1] + 1))
    first, last = (ufunc.reduceat(events.time, starts)[events.recording].astype(np.int64) for ufunc in (np.minimum, np.maximum))
    return (events.time - first) * slices // (last - first + 1)


def _slices_of_count(events: Events, slices: int) -> np.ndarray:
    """A recording's events are numbered in order of time, those at the same time as in the file."""
    counts = np.bincount(events.recording)
    number = np.arange(len(events.time)) - (np.cumsum(counts) - counts)[events.recording]
    step = np.empty_like(number)
    in_order = np.argsort((events.recording.astype(np.int64) << 23) + events.time, kind="stable")
    step[in_order] = number * slices // counts[events.recording]
    return step


def _packed(places: np.ndarray, count: int, time_steps: int) -> np.ndarray:
    """The bits at `places` = (recording · T + step) · 2312 + channel set, int64 (events,), as uint8 (count, T · 289)."""
    frames = np.zeros(count * time_steps * CHANNELS, np.uint8)
    frames[places] = 1
    return np.packbits(frames, bitorder="little").reshape(count, -1)


def raw_to_text(data: bytes) -> bytes:
    """A raw recording in the text format. Raises DamagedRecording.

    A line per channel 1..2312 that has events, ascending: the channel, a tab, then for each event in the order of the recording
    its bin ceil(t / 3000) and a tab.
    """
    events = decode_events([data])
    channel, inside = stabilised_channels(events)
    if not inside.any():
        raise DamagedRecording(OUT_OF_VIEW)
    channel, bins = channel[inside] + 1, (events.time[inside] + BIN - 1) // BIN
    order = np.argsort(channel, kind="stable")
    channels, starts = np.unique(channel[order], return_index=True)
    bins_of_channels = np.split(bins[order], starts[1:])
    return b"".join(b"%d\t%s\t\n" % (channel, "\t".join(map(str, bins.tolist())).encode())
                    for channel, bins in zip(channels.tolist(), bins_of_channels))


def text_frames(recordings: Sequence[bytes], time_steps: int) -> np.ndarray:
    """The packed frames of n text recordings, uint8 (n, T · 289); bins other than 1..T − 1 are left out.

    Raises DamagedRecording unless all are sound.
    """
    frames = np.empty((len(recordings), time_steps * FRAME_BYTES), np.uint8)
    for row, data in zip(frames, recordings):
        channel, bins = _parse_text(data)
        seen = (bins >= 1) & (bins <= time_steps - 1)
        row[:] = _packed((bins[seen] - 1) * CHANNELS + channel[seen] - 1, 1, time_steps)
    return frames


def _parse_text(data: bytes) -> Tuple[np.ndarray, np.ndarray]:
    """The channel 1..2312 and the bin of every event, int64 (n,)."""
    if not data.strip():
        raise DamagedRecording("it is empty")
    if data.translate(None, b"0123456789\t\r\n "):
        raise DamagedRecording("it holds something other than numbers, tabs and line ends")
    if not data.endswith((b"\t", b"\n")):
        raise DamagedRecording("it is truncated: its last line does not end")
    lines = [line.split() for line in data.split(b"\n")]
    counts = np.array([len(line) for line in lines if line])
    try:
        numbers = np.array([int(number) for line in lines for number in line], np.int64)
    except (ValueError, OverflowError) as error:  # more digits than Python reads, or than 64 bits hold
        raise DamagedRecording("it holds a number that is no bin") from error
    first = np.cumsum(counts) - counts
    channels = numbers[first]
    if counts.min() < 2 or channels.min() < 1 or channels.max() > CHANNELS:
        raise DamagedRecording(f"a line is not a channel 1 to {CHANNELS} with its bins")
    return np.repeat(channels, counts - 1), np.delete(numbers, first)
