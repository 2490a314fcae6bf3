"""Fields of protobuf messages, as CRIU's images are made of: where each stands, so that one byte or one field can be changed."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

VARINT, BYTES = 0, 2
_FIXED = {1: 8, 5: 4}  # wire type -> bytes


class Field(Struct, frozen=True):
    """One field: its number and wire type, where it begins, where its value does, where both end."""

    number: int
    kind: int
    begin: int
    value: int
    end: int


def fields(message: bytes | bytearray, at: int = 0, end: int | None = None) -> Iterator[Field]:
    """Give the fields between two offsets. Raises ValueError at what is none.

    >>> [f.number for f in fields(b"\\x08\\x01\\x12\\x00")]
    [1, 2]
    """
    end = len(message) if end is None else end
    while at < end:
        begin = at
        key, value = varint(message, at)
        kind = key & 7
        if kind == VARINT:
            _, at = varint(message, value)
        elif kind == BYTES:
            length, value = varint(message, value)
            at = value + length
        elif kind in _FIXED:
            at = value + _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if at > min(end, len(message)):
            raise ValueError("a field that is cut off")
        yield Field(key >> 3, kind, begin, value, at)


def varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """Read a number; return it and where it ends. Raises ValueError if it does not."""
    number = 0
    for shift, byte in enumerate(data[at : at + 10]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return number, at + shift + 1
    raise ValueError("a number without an end")


def encoded(number: int) -> bytes:
    """Write a number.

    >>> varint(encoded(300), 0)
    (300, 2)
    """
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def record(number: int, value: int | bytes) -> bytes:
    """Write a field: a number, or bytes."""
    if isinstance(value, int):
        return encoded(number << 3 | VARINT) + encoded(value)
    return encoded(number << 3 | BYTES) + encoded(len(value)) + value
