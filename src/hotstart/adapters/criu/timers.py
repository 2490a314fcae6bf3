"""Mends what CRIU 4.2.1 writes into its images and does not restore as it was.

A periodic timerfd that has expired and was not read yet shows no time left until it next expires (proc(5), fdinfo): the kernel
winds it up again when it is read. CRIU takes that for a timer that is not armed, and the replica's never ticks again. So it is
given a nanosecond.
"""

from __future__ import annotations

from collections.abc import Iterator

_HEAD_BYTES = 8  # two magic numbers
_FILE_TIMERFD = 12  # images/fdinfo.proto
_VSEC, _VNSEC, _ISEC, _INSEC = 7, 8, 9, 10  # images/timerfd.proto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


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
        for number, start, end in _fields(data, begin, at):
            if number != _FILE_TIMERFD:
                continue
            timer = {n: (s, e) for n, s, e in _fields(data, start, end)}
            if not all(n in timer for n in (_VSEC, _VNSEC, _ISEC, _INSEC)):
                continue
            zero = {n: not any(data[slice(*timer[n])]) for n in (_VSEC, _VNSEC, _ISEC, _INSEC)}
            if zero[_VSEC] and zero[_VNSEC] and not (zero[_ISEC] and zero[_INSEC]):
                yield timer[_VNSEC][0]


def _fields(data: bytearray, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of the values in a protobuf message."""
    end = min(end, len(data))
    while at < end:
        tag, at = _varint(data, at)
        kind, begin = tag & 7, at
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            length, begin = _varint(data, at)
            at = begin + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            return
        yield tag >> 3, begin, at


def _varint(data: bytearray, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return value, at
