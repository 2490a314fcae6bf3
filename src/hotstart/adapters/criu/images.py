"""CRIU's images, as far as a restore has to change them: which memory asks for huge pages.

An image of a process's areas (mm-PID.img) is a magic number of 8 bytes, a length of 4 and one protobuf message (criu/images/mm.proto,
vma.proto): field 14 of it is an area, field 9 of that a mask of what madvise(2) it was given.
"""

from __future__ import annotations

import os

from hotstart.adapters.protobuf import VARINT, fields, record, varint

_HEAD_BYTES = 12
_AREAS, _ADVICE = 14, 9
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
            record(_AREAS, _without_advice(image[f.value : f.end])) if f.number == _AREAS else image[f.begin : f.end]
            for f in fields(image, _HEAD_BYTES)
        )
    except ValueError:
        return image  # CRIU says what is wrong with it
    return image[: _HEAD_BYTES - 4] + len(message).to_bytes(4, "little") + message


def _without_advice(area: bytes) -> bytes:
    found = bytearray()
    for f in fields(area):
        advice = varint(area, f.value)[0] if (f.number, f.kind) == (_ADVICE, VARINT) else 0
        turned = record(_ADVICE, advice ^ (_HUGEPAGE | _NOHUGEPAGE))
        found += turned if advice & _HUGEPAGE else area[f.begin : f.end]
    return bytes(found)
