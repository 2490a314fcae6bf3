"""Plain data as YAML that people can read. Writes only what it can be sure of: every string that is not a plain word is quoted as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from msgspec import json

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")  # begins with a letter or a slash: no number, no sign of YAML
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def to_yaml(value: Any, other: Callable[[Any], str] | None = None) -> str:
    """Return a document; `other` writes what is no plain data.

    >>> print(to_yaml({"a": [1, {"b": "no"}], "c": {}}), end="")
    a:
      - 1
      - b: "no"
    c: {}
    """
    return "".join(_lines(value, 0, other or _refuse))


def _lines(value: Any, depth: int, other: Callable[[Any], str]) -> list[str]:
    indent = "  " * depth
    if isinstance(value, dict) and value:
        lines = []
        for key, item in value.items():
            lines += _entry(f"{indent}{_scalar(key, other)}:", item, depth, other)
        return lines
    if isinstance(value, list) and value:
        lines = []
        for item in value:
            if isinstance(item, dict | list) and item:
                first, *rest = _lines(item, depth + 1, other)
                lines += [f"{indent}- {first.lstrip()}", *rest]
            else:
                lines.append(f"{indent}- {_scalar(item, other)}\n")
        return lines
    return [f"{indent}{_scalar(value, other)}\n"]


def _entry(head: str, item: Any, depth: int, other: Callable[[Any], str]) -> list[str]:
    if isinstance(item, dict | list) and item:
        return [f"{head}\n", *_lines(item, depth + 1, other)]
    return [f"{head} {_scalar(item, other)}\n"]


def _scalar(value: Any, other: Callable[[Any], str]) -> str:
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else _quoted(value)
    if value is None or isinstance(value, bool | int | float | dict | list):
        return json.encode(value).decode()
    return other(value)


def _quoted(text: str) -> str:
    """JSON's string is YAML's, but for characters that YAML wants escaped and JSON does not."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.encode(text).decode())


def _refuse(value: Any) -> str:
    raise TypeError(f"{value!r} is no plain data")
