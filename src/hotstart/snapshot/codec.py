"""Values as canonical JSON and back: keys sorted, no white space, bytes in base64. Unknown fields are ignored, missing and
ill-typed ones refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


class IllFormedError(ValueError):
    """A document does not have the shape that it must have."""


def encode(value: Any) -> bytes:
    """Return canonical JSON of a dataclass: equal values give equal bytes."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogateescape"
    )


def to_plain(value: Any) -> Any:
    """Return what json.dumps takes."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return value


def decode(kind: type[T], data: bytes) -> T:
    """Parse JSON into a dataclass. Raises IllFormedError."""
    try:
        plain = json.loads(data.decode("utf-8", "surrogateescape"))
    except ValueError as e:
        raise IllFormedError(f"not JSON: {e}") from e
    value: T = from_plain(kind, plain, kind.__name__)
    return value


@cache
def _hints(kind: type) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
        for f in dataclasses.fields(kind)
    }


def from_plain(kind: Any, plain: Any, where: str) -> Any:
    """Check and convert a plain value to `kind`. Raises IllFormedError that names the place."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(plain, dict):
            raise IllFormedError(f"{where}: not an object")
        fields = {}
        for name, (hint, required) in _hints(kind).items():
            if name in plain:
                fields[name] = from_plain(hint, plain[name], f"{where}.{name}")
            elif required:
                raise IllFormedError(f"{where}.{name}: missing")
        return kind(**fields)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if plain is None and type(None) in arguments:
            return None
        return from_plain(next(a for a in arguments if a is not type(None)), plain, where)
    if origin is tuple and isinstance(plain, list):
        if arguments[-1] is Ellipsis:
            return tuple(from_plain(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(plain))
        if len(arguments) == len(plain):
            return tuple(from_plain(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, plain, strict=True)))
    if origin is not None and issubclass(origin, Mapping) and isinstance(plain, dict):
        return {k: from_plain(arguments[1], v, f"{where}.{k}") for k, v in plain.items()}
    if kind is bytes and isinstance(plain, str):
        try:
            return base64.b64decode(plain, validate=True)
        except ValueError as e:
            raise IllFormedError(f"{where}: not base64") from e
    if kind is float and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    if origin is None and isinstance(kind, type) and isinstance(plain, kind) and (kind is bool or not isinstance(plain, bool)):
        return plain
    raise IllFormedError(f"{where}: not {getattr(kind, '__name__', kind)}")
