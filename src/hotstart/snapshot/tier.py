"""Decides whether a capture's memory files are written to RAM first. Pure."""

from __future__ import annotations


def why_not_ram(needed_bytes: int, available_bytes: int, held_bytes: int) -> str | None:
    """Say why memory files go straight to the disk, or None: then RAM takes them first.

    Memory in RAM cannot be reclaimed while a worker or replica has it mapped. So all of it (`held_bytes` is there already) may
    be half of what would be available without it.

    >>> why_not_ram(4 << 20, 8 << 20, 0)
    >>> why_not_ram(4 << 20, 5 << 20, 3 << 20)
    'RAM has room for 1 MiB of memory files, the worker has 4 MiB'
    """
    room = max(0, (available_bytes + held_bytes) // 2 - held_bytes)
    if needed_bytes <= room:
        return None
    return f"RAM has room for {room >> 20} MiB of memory files, the worker has {needed_bytes >> 20} MiB"
