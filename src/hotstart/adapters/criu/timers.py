"""Mends what CRIU 4.2.1 writes into its images and does not restore as it was.

A periodic timerfd that has expired and was not read yet shows no time left until it next expires (proc(5), fdinfo): the kernel
winds it up again when it is read. CRIU takes that for a timer that is not armed, and the replica's never ticks again. So it is
given a nanosecond.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from hotstart.adapters.protobuf import fields

_HEAD_BYTES = 8  # two magic numbers
_FILE_TIMERFD = 12  # images/fdinfo.proto
_VSEC, _VNSEC, _ISEC, _INSEC = 7, 8, 9, 10  # images/timerfd.proto


def rearm_timers(path: str) -> int:
    """Arm the periodic timers in a files.img that have expired; return how many. What cannot be understood is left alone."""
    with open(path, "r+b") as f:
        data = bytearray(f.read())
        spots = list(_expired(data))
        for spot in spots:
            data[spot] = 1
        if spots:
            f.seek(0)
            f.write(data)
    return len(spots)


def _expired(data: bytearray) -> Iterator[int]:
    """Where the nanoseconds of an expired periodic timer stand: a zero, one byte long, as protobuf writes it."""
    at = _HEAD_BYTES
    while at + 4 <= len(data):
        begin = at + 4
        at = begin + int.from_bytes(data[at:begin], "little")
        with suppress(ValueError):
            yield from _expired_in(data, begin, at)


def _expired_in(data: bytearray, begin: int, end: int) -> Iterator[int]:
    for field in fields(data, begin, end):
        if field.number != _FILE_TIMERFD:
            continue
        timer = {f.number: (f.value, f.end) for f in fields(data, field.value, field.end)}
        if not all(n in timer for n in (_VSEC, _VNSEC, _ISEC, _INSEC)):
            continue
        zero = {n: not any(data[slice(*timer[n])]) for n in (_VSEC, _VNSEC, _ISEC, _INSEC)}
        if zero[_VSEC] and zero[_VNSEC] and not (zero[_ISEC] and zero[_INSEC]):
            yield timer[_VNSEC][0]
