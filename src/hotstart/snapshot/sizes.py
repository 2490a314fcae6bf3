"""Sizes as people write them. Pure."""

from __future__ import annotations

import re

from hotstart.errors import BadUsage

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MOST_BYTES = 1 << 60


def parse_size(text: str) -> int:
    """Read bytes with an optional unit. Raises BadUsage.

    >>> parse_size("1.5G")
    1610612736
    """
    found = re.fullmatch(r"(\d{1,18}(?:\.\d*)?|\.\d+)([KMGT]?)(?:iB|B)?", text, re.ASCII | re.IGNORECASE)
    value = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not 0 < value <= _MOST_BYTES:
        raise BadUsage(f"{text[:40]!r} is not a size: write it like 512M or 4G")
    return value
