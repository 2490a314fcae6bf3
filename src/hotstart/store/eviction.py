"""Which local copies of stored snapshots to give up when the node cache is too large. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

_FIXED_PULL_S = 0.5  # what a pull costs whatever its size
_HALF_LIFE_S = 86400.0


class Cached(Struct, frozen=True):
    """A local copy: bytes on disk, restores so far, seconds since the last; `pinned`: in use, or stored nowhere else."""

    name: str
    size_bytes: int
    uses: int
    idle_s: float
    pinned: bool


def value_per_byte(copy: Cached, pull_bytes_per_s: float) -> float:
    """Seconds of pulling that one byte of this copy is expected to save: restores, halved for each idle day, times a pull's cost."""
    expected: float = (copy.uses + 1) * 0.5 ** (copy.idle_s / _HALF_LIFE_S)
    return expected * (_FIXED_PULL_S + copy.size_bytes / pull_bytes_per_s) / max(1, copy.size_bytes)


def choose_evictions(copies: Iterable[Cached], quota_bytes: int, pull_bytes_per_s: float = 500e6) -> list[str]:
    """Return what to give up, least valuable byte first, until the rest fits; what is pinned stays even if it does not.

    >>> choose_evictions([Cached("old", 10, 1, 1e6, False), Cached("new", 10, 1, 10.0, False)], 15)
    ['old']
    """
    kept = list(copies)
    total = sum(c.size_bytes for c in kept)
    doomed = []
    for copy in sorted((c for c in kept if not c.pinned), key=lambda c: value_per_byte(c, pull_bytes_per_s)):
        if total <= quota_bytes:
            break
        doomed.append(copy.name)
        total -= copy.size_bytes
    return doomed
