"""What can go wrong, sorted by what the caller should do about it; each class carries its exit code (design: command line)."""

from __future__ import annotations


class HotstartError(Exception):
    """It failed; the message says what happened and what to do, in one line."""

    exit_code = 1


class BadUsage(HotstartError):
    """The request itself is wrong: correct it and ask again."""

    exit_code = 2


class NotFound(HotstartError):
    """What was named does not exist."""

    exit_code = 3


class Refused(HotstartError):
    """A snapshot that must not run here: damaged, unsigned or incompatible; a worker that no snapshot can be taken of."""

    exit_code = 4


class Damaged(Refused):
    """Bytes are not what their digest says."""


class MachineLacks(HotstartError):
    """This machine lacks a program, a privilege or a kernel feature; `hotstart doctor` says what to do."""

    exit_code = 5


class FoldRefused(HotstartError):
    """A process tree cannot be folded; it is as it was and can still be dumped plainly."""
