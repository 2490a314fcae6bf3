"""Requests that make a worker drop what need not be kept, sent before it is frozen: what must be answered to each. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import DecodeError, Struct, json

from hotstart.errors import BadUsage
from hotstart.snapshot.warmup import Answer, Request, parse_lines


class QuiesceStep(Struct, frozen=True):
    """A request, and fields that its answer, a JSON object, must have. Empty: any answer without an error will do."""

    request: Request
    expect: Mapping[str, Any]

    def accepts(self, answer: Answer) -> bool:
        """Say whether the worker did what it was asked for.

        >>> step = QuiesceStep(Request("POST", "/reset", {}, b""), {"success": True})
        >>> step.accepts(Answer(200, b'{"success": true, "n": 1}')), step.accepts(Answer(200, b'{"success": false}'))
        (True, False)
        """
        if answer.status >= 400:
            return False
        if not self.expect:
            return True
        try:
            said = json.decode(answer.body)
        except (DecodeError, UnicodeDecodeError, RecursionError):
            return False
        return isinstance(said, dict) and all(
            name in said and said[name] == value and isinstance(said[name], type(value))
            for name, value in self.expect.items()
        )


def parse_quiesce(text: str, source: str) -> list[QuiesceStep]:
    """Read a file of such requests: lines as of a warm-up file, with "expect", an object, if that matters. Raises BadUsage."""
    steps = []
    for number, request, entry in parse_lines(text, source):
        expect = entry.get("expect") or {}
        if not isinstance(expect, dict):
            raise BadUsage(f'{source}:{number}: "expect" is no object, like {{"success": true}}')
        steps.append(QuiesceStep(request, expect))
    return steps
