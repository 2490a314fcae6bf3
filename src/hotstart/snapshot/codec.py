"""Values as canonical JSON and back. Unknown fields are ignored; missing and ill-typed ones are refused."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


class IllFormedError(ValueError):
    """A document does not have the shape that it must have."""


def encode(value: object) -> bytes:
    """Return canonical JSON, keys sorted, bytes in base64: equal values give equal bytes."""
    return msgspec.json.encode(value, order="sorted")


def to_plain(value: object) -> Any:
    """Return the value as what json.dumps takes."""
    return msgspec.to_builtins(value)


def decode(kind: type[T], data: bytes) -> T:
    """Parse JSON into a value of `kind`. Raises IllFormedError that names the place."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise IllFormedError(str(e)) from e
