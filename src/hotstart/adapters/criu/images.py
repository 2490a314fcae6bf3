"""CRIU's images, as far as a restore has to change them: which memory asks for huge pages.

An image of a process's areas (mm-PID.img) is a magic number of 8 bytes, a length of 4 and one protobuf message (criu/images/mm.proto,
vma.proto): field 14 of it is an area, field 9 of that a mask of what madvise(2) it was given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

_HEAD_BYTES = 12
_AREAS, _ADVICE = 14, 9
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
_HUGEPAGE, _NOHUGEPAGE = 1 << 14, 1 << 15


def link_for_small_pages(source: str, target: str) -> None:
    """Make a folder of images beside another: the tree that they lead to is the same, but its memory is mapped by small pages.

    All but images of areas are links, which lead from one folder to the other wherever both are seen.
    """
    os.makedirs(target, exist_ok=True)
    for name in os.listdir(source):
        path = os.path.join(target, name)
        if name.startswith("mm-"):
            with open(os.path.join(source, name), "rb") as f, open(path, "wb") as out:
                out.write(without_huge_pages(f.read()))
        elif not os.path.lexists(path):
            os.symlink(os.path.join(os.path.relpath(source, target), name), path)


def without_huge_pages(image: bytes) -> bytes:
    """Return an image in which areas that asked for huge pages ask for none; an image that is none as it is."""
    try:
        message = b"".join(
            _record(field, _BYTES, _without_advice(value)) if field == _AREAS else raw
            for field, value, raw in _fields(image[_HEAD_BYTES:])
        )
    except (IndexError, KeyError):
        return image  # CRIU says what is wrong with it
    return image[: _HEAD_BYTES - 4] + len(message).to_bytes(4, "little") + message


def _without_advice(area: bytes | int) -> bytes:
    assert isinstance(area, bytes)  # an area is a message
    return b"".join(
        _record(field, _VARINT, value ^ (_HUGEPAGE | _NOHUGEPAGE))
        if field == _ADVICE and isinstance(value, int) and value & _HUGEPAGE
        else raw
        for field, value, raw in _fields(area)
    )


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int, bytes]]:
    """Give number, value and bytes of each field."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        kind = key & 7
        value: bytes | int = b""
        if kind == _VARINT:
            value, at = _varint(message, at)
        else:
            length = _FIXED.get(kind, 0)
            if kind == _BYTES:
                length, at = _varint(message, at)
            elif not length:
                raise KeyError(kind)
            value = message[at : at + length]
            at += length
        yield key >> 3, value, message[start:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _record(field: int, kind: int, value: bytes | int) -> bytes:
    key = _encoded(field << 3 | kind)
    return key + (_encoded(value) if isinstance(value, int) else _encoded(len(value)) + value)


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
