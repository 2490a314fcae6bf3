"""Stages add up, in whatever order things happened."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.restore.receipt import measure_stages

MARKS = ["cli_start", "checked", "spawned", "noticed", "answered"]
EVENTS = ["init", "namespaces", "mounts", "files", "started", "restored", "exit"]
_seconds = st.floats(0, 1e4)


def _after(asked):
    return st.floats(0, 1e3).map(lambda s: asked + s)


@given(st.data(), _seconds)
def test_the_stages_add_up_to_the_time_from_asked_to_the_last_thing_that_happened(data, asked):
    marks = data.draw(st.dictionaries(st.sampled_from(MARKS), _after(asked)))
    events = data.draw(st.dictionaries(st.sampled_from(EVENTS), _after(asked)))
    stages = measure_stages({**marks, "asked": asked}, events)
    counted = [at for name, at in events.items() if name not in ("init", "exit")]
    end = max([asked, *marks.values(), *counted])
    assert sum(stages.values()) == pytest.approx(end - asked, abs=1e-6)
    assert all(seconds >= 0 for seconds in stages.values())
    assert len(stages) == len(marks) + len(counted)


@given(st.permutations([("asked", 0.0), ("spawned", 1.0), ("noticed", 5.0), ("answered", 6.0)]))
def test_the_order_in_which_marks_were_written_down_does_not_matter(marks):
    assert measure_stages(dict(marks), {"restored": 4.0}) == {
        "spawn": 1.0,
        "criu": 3.0,
        "notice": 1.0,
        "first_answer": 1.0,
    }


def test_a_whole_restore_is_told_stage_by_stage_in_order():
    marks = {"asked": 10.0, "cli_start": 10.5, "checked": 11.0, "spawned": 11.25, "noticed": 15.0, "answered": 17.0}
    events = {"init": 11.3, "namespaces": 11.5, "mounts": 12.0, "files": 12.5, "started": 13.0, "restored": 14.5}
    stages = measure_stages(marks, events)
    assert list(stages.items()) == [
        ("cli_start", 0.5),
        ("check", 0.5),
        ("spawn", 0.25),
        ("namespaces", 0.25),
        ("mounts", 0.5),
        ("files", 0.5),
        ("init", 0.5),
        ("criu", 1.5),
        ("notice", 0.5),
        ("first_answer", 2.0),
    ]
    assert sum(stages.values()) == 7.0


def test_a_sandbox_that_was_quicker_than_its_starter_takes_nothing_twice():
    # init may report before the process that started it looks at its clock
    assert measure_stages({"asked": 0.0, "spawned": 2.0, "noticed": 3.0}, {"namespaces": 1.0}) == {
        "namespaces": 1.0,
        "spawn": 1.0,
        "notice": 1.0,
    }


def test_nothing_but_asked_has_no_stages():
    assert measure_stages({"asked": 3.0}, {}) == {}
