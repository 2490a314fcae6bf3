"""Requests by which a worker drops what need not be kept: what is read, and which answers will do."""

import json

import pytest

from hotstart.errors import BadUsage
from hotstart.snapshot.quiesce import QuiesceStep, parse_quiesce
from hotstart.snapshot.warmup import Answer, Request


def line(**entry):
    return json.dumps({"method": "POST", "path": "/reset", **entry})


def test_a_file_is_read_as_a_warm_up_file_is_with_what_is_expected():
    steps = parse_quiesce(f"{line(expect={'success': True})}\n\n{line(body={'method': 'drop'})}\n", "q.jsonl")
    assert [s.expect for s in steps] == [{"success": True}, {}]
    assert [s.request.body for s in steps] == [b"", b'{"method":"drop"}']


@pytest.mark.parametrize("text", ['{"path": 1}', "nonsense", line(expect=[1]), line(expect="yes")])
def test_what_is_no_such_line_is_bad_usage_with_its_number(text):
    with pytest.raises(BadUsage, match=r"q\.jsonl:2: "):
        parse_quiesce(f"\n{text}", "q.jsonl")


@pytest.mark.parametrize(
    ("status", "body", "enough"),
    [
        (200, b'{"success": true}', True),
        (200, b'{"success": true, "blocks": 4}', True),
        (200, b'{"success": false}', False),
        (200, b'{"success": 1}', False),
        (200, b'[{"success": true}]', False),
        (200, b"{}", False),
        (200, b"\xff", False),
        (404, b'{"success": true}', False),
    ],
)
def test_an_answer_will_do_if_it_has_what_is_expected(status, body, enough):
    step = QuiesceStep(Request("POST", "/reset", {}, b""), {"success": True})
    assert step.accepts(Answer(status, body)) is enough


def test_without_an_expectation_only_an_error_will_not_do():
    step = QuiesceStep(Request("POST", "/reset", {}, b""), {})
    assert step.accepts(Answer(204, b""))
    assert not step.accepts(Answer(500, b"{}"))
