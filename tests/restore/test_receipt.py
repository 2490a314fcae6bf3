"""Stages are what was measured around each step; what lies between them is told as unaccounted."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.restore.receipt import STAGES, measure_stages, stages_of_init

_seconds = st.floats(0, 1e4)
_spans = st.dictionaries(st.sampled_from(STAGES), st.tuples(_seconds, _seconds).map(lambda span: tuple(sorted(span))))


def union(spans, asked, ended):
    """Seconds between `asked` and `ended` that at least one span covers: naively, from border to border."""
    borders = sorted({asked, ended, *(min(max(t, asked), ended) for span in spans for t in span)})
    return sum(b - a for a, b in pairwise(borders) if any(began <= a and b <= ended for began, ended in spans))


@given(_spans, _seconds, _seconds)
def test_stages_and_what_is_unaccounted_add_up_to_the_time_that_passed(spans, asked, took):
    ended = asked + took
    stages = measure_stages(spans, asked, ended)
    assert sum(stages.values()) == pytest.approx(ended - asked, abs=1e-6)
    assert all(seconds >= 0 for seconds in stages.values())
    assert stages["unaccounted"] == pytest.approx(took - union(spans.values(), asked, ended), abs=1e-6)


@given(_spans, st.randoms())
def test_stages_are_told_in_their_order_whatever_order_they_were_measured_in(spans, random):
    shuffled = list(spans.items())
    random.shuffle(shuffled)
    stages = measure_stages(dict(shuffled), 0.0, 1e4)
    assert list(stages) == [*(name for name in STAGES if name in spans), "unaccounted"]
    assert stages == measure_stages(spans, 0.0, 1e4)


def test_a_whole_restore_is_told_stage_by_stage():
    events = {
        "init": (11.3, 11.3),
        "namespaces": (11.25, 11.5),
        "mounts": (11.5, 12.0),
        "files": (12.0, 12.5),
        "started": (12.5, 13.0),
        "restored": (13.0, 14.5),
    }
    spans = {
        "cli_start": (10.0, 10.5),
        "check": (10.5, 11.0),
        "spawn": (11.0, 11.25),
        **stages_of_init(events),
        "notice": (14.5, 15.0),
        "first_answer": (15.0, 17.0),
    }
    assert measure_stages(spans, 10.0, 17.0) == {
        "cli_start": 0.5,
        "check": 0.5,
        "spawn": 0.25,
        "namespaces": 0.25,
        "mounts": 0.5,
        "files": 0.5,
        "init": 0.5,
        "criu": 1.5,
        "notice": 0.5,
        "first_answer": 2.0,
        "unaccounted": 0.0,
    }


def test_a_clock_that_jumps_between_two_stages_leaves_the_jump_unaccounted():
    now = [10.0]

    def measured(name, seconds, spans):
        began = now[0]
        now[0] += seconds
        spans[name] = began, now[0]

    spans = {}
    measured("check", 0.5, spans)
    now[0] += 3.0
    measured("spawn", 0.25, spans)
    now[0] += 4.0
    stages = measure_stages(spans, 10.0, now[0])
    assert stages == {"check": 0.5, "spawn": 0.25, "unaccounted": 7.0}


def test_time_that_two_stages_share_counts_once_for_the_one_that_began_first():
    # init may report before the process that started it looks at its clock
    assert measure_stages({"spawn": (0.0, 2.0), "namespaces": (1.0, 1.5), "mounts": (1.5, 3.0)}, 0.0, 3.0) == {
        "spawn": 2.0,
        "namespaces": 0.0,
        "mounts": 1.0,
        "unaccounted": 0.0,
    }


@pytest.mark.parametrize(("first", "second"), [("check", "spawn"), ("spawn", "check")])
def test_stages_with_the_same_times_count_for_the_one_that_comes_first_in_a_restore(first, second):
    assert measure_stages({first: (1.0, 2.0), second: (1.0, 2.0)}, 0.0, 2.0) == {
        "check": 1.0,
        "spawn": 0.0,
        "unaccounted": 1.0,
    }


def test_what_lies_outside_the_restore_counts_for_nothing():
    assert measure_stages({"check": (0.0, 1.0), "first_answer": (2.0, 9.0)}, 0.5, 3.0) == {
        "check": 0.5,
        "first_answer": 1.0,
        "unaccounted": 1.0,
    }


def test_a_restore_of_which_nothing_was_measured_is_unaccounted_as_a_whole():
    assert measure_stages({}, 3.0, 4.0) == {"unaccounted": 1.0}
