"""Binning and formats of N-MNIST's recordings against loops over single events."""

import numpy as np
import pytest
from hypothesis import given, HealthCheck, settings, strategies as st

from tests.nmnist_oracle import channel_of, oracle_slices, oracle_text, parse_as_published, raw_bytes, unpacked
from utils.data.recordings import DamagedRecording, raw_frames, raw_to_text, text_frames

EDGES = [edge + more for edge in (0, 3000, 7500, 15_000, 87_000, 90_000, 105_000, 112_500, 210_000, 292_500, 315_000)
         for more in (0, 1, 2)]
TIMES = st.one_of(st.sampled_from(EDGES), st.integers(0, 120_000), st.integers(0, 2**23 - 1))
EVENTS = st.lists(st.tuples(st.integers(0, 33), st.integers(0, 33), st.integers(0, 1), TIMES), min_size=1, max_size=40)
IN_VIEW = EVENTS.filter(lambda events: any(channel_of(*event) for event in events))
ANY_BYTES = st.one_of(st.binary(max_size=60), st.text("0123456789\t\n\r -.x", max_size=60).map(str.encode))
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@FEW
@given(st.lists(IN_VIEW, min_size=1, max_size=3), st.integers(1, 40))
def test_paper_binning_from_raw_and_from_text_equals_the_oracle(recordings, time_steps):
    raw = [raw_bytes(events) for events in recordings]
    text = [raw_to_text(data) for data in raw]
    assert text == [oracle_text(events) for events in recordings]
    packed = raw_frames(raw, time_steps)
    assert packed.dtype == np.uint8 and packed.shape == (len(raw), -(-time_steps * 2 * 34 * 34 // 8))
    assert np.array_equal(packed, text_frames(text, time_steps))
    assert np.array_equal(unpacked(packed), [parse_as_published(data.decode(), time_steps) for data in text])
    assert not unpacked(packed)[..., -1].any(), "the published reading leaves the last frame empty"


@FEW
@given(st.lists(IN_VIEW, min_size=1, max_size=3), st.integers(1, 40), st.sampled_from(["time", "count"]))
def test_time_and_count_binning_equal_the_oracle(recordings, time_steps, binning):
    frames = unpacked(raw_frames([raw_bytes(events) for events in recordings], time_steps, binning))
    assert np.array_equal(frames, [oracle_slices(events, time_steps, binning) for events in recordings])


WORKED = [(10, 20, 0, 0),         # (11, 21): bin 0
          (10, 20, 0, 7500),      # (10.75, 20.5): half away from zero, so (11, 21); bin 2.5, so 3
          (10, 20, 0, 7501),      # (10.75, 20.4999): (11, 20); bin 3
          (10, 20, 1, 3000),      # (10.9, 20.8): (11, 21), ON; bin 1 exactly
          (10, 20, 1, 3000),      # again: kept
          (10, 20, 0, 105_000),   # (7.5, 14): (8, 14); bin 35
          (10, 20, 0, 210_000),   # (4, 21); bin 70
          (10, 20, 0, 315_000),   # back at (11, 21); bin 105
          (0, 0, 0, 15_000)]      # (0.5, 0): out of view


def test_the_text_format_to_the_byte():
    assert raw_to_text(raw_bytes(WORKED)) == b"123\t70\t\n252\t35\t\n360\t3\t\n361\t0\t3\t105\t\n1517\t1\t1\t\n"


def test_frames_by_hand():
    frames = unpacked(raw_frames([raw_bytes(WORKED)], 4))[0]
    assert [tuple(place) for place in np.argwhere(frames)] == [(0, 10, 19, 2), (0, 10, 20, 2), (1, 10, 20, 0)]
    assert not unpacked(raw_frames([raw_bytes(WORKED)], 3))[0][0].any(), "bin 3 is bin T: left out"
    counted = unpacked(raw_frames([raw_bytes(WORKED)], 3, "count"))[0]
    assert counted.sum(axis=(0, 1, 2)).tolist() == [2, 2, 3], "two events on one pixel; one out of view; three"


def test_frames_without_events_in_the_first_steps_are_valid_and_dark():
    assert not raw_frames([raw_bytes([(15, 15, 1, 200_000)])], 30).any()


def test_a_recording_of_which_nothing_stays_in_view_is_damaged():
    data = raw_bytes([(0, 0, 0, 80_000), (1, 1, 1, 200_000)])
    both = [raw_bytes(WORKED), data]
    for decode in (lambda: raw_to_text(data), lambda: raw_frames(both, 30), lambda: raw_frames([data], 3, "time")):
        with pytest.raises(DamagedRecording, match="in view"):
            decode()


@FEW
@given(ANY_BYTES, st.sampled_from(["paper", "time", "count"]))
def test_any_bytes_are_a_recording_or_a_damaged_one(data, binning):
    for decode in (lambda: raw_frames([data], 4, binning), lambda: text_frames([data], 4), lambda: raw_to_text(data)):
        try:
            decode()
        except DamagedRecording:
            pass
