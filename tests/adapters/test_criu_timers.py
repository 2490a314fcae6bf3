"""Expired periodic timers are armed again in CRIU's images, and nothing else is touched."""

import pytest

from hotstart.adapters.criu.timers import rearm_timers

HEAD = bytes.fromhex("1943565438313056")


def field(number, value):
    if isinstance(value, bytes):
        return bytes([number << 3 | 2, len(value)]) + value
    encoded = b""
    while value >= 0x80:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return bytes([number << 3]) + encoded + bytes([value])


def entry(*fields):
    message = b"".join(field(*f) for f in fields)
    return len(message).to_bytes(4, "little") + message


def timer(value, interval):
    owner = b"".join(field(n, 0) for n in range(1, 6))
    fields = [(1, 7), (2, 0), (3, owner), (4, 1), (5, 1), (6, 0), *zip((7, 8, 9, 10), (*value, *interval), strict=True)]
    return entry((1, 17), (2, 7), (12, b"".join(field(*f) for f in fields)))


OTHER = entry((1, 1), (2, 300), (3, field(1, 1) + field(6, b"/tmp/0")))


def mend(tmp_path, *entries):
    path = tmp_path / "files.img"
    path.write_bytes(HEAD + b"".join(entries))
    count = rearm_timers(str(path))
    return count, path.read_bytes().removeprefix(HEAD)


def test_only_a_periodic_timer_that_has_expired_is_given_a_nanosecond(tmp_path):
    lone, armed, idle = timer((0, 0), (0, 0)), timer((0, 500), (0, 5_000_000)), timer((3, 0), (60, 0))
    count, found = mend(tmp_path, OTHER, timer((0, 0), (0, 5_000_000)), lone, armed, timer((0, 0), (60, 0)), idle)
    assert count == 2
    assert found == OTHER + timer((0, 1), (0, 5_000_000)) + lone + armed + timer((0, 1), (60, 0)) + idle


@pytest.mark.parametrize(
    "odd", [b"", b"\x05\x00\x00\x00\x62", b"\x02\x00\x00\x00\x0b\xff", b"\xff\xff\xff\x7f\x62\x01"]
)
def test_what_cannot_be_understood_is_left_alone(tmp_path, odd):
    assert mend(tmp_path, OTHER, odd) == (0, OTHER + odd)
