"""The port to wherever published bytes live."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from hotstart.errors import HotstartError

Bytes = bytes | bytearray | memoryview
_KEY = re.compile(r"(?!.*(?:^|/)\.)[A-Za-z0-9._/-]+")


class Missing(HotstartError):
    """There is no object of that key."""

    exit_code = 3

    def __init__(self, key: str) -> None:
        super().__init__(f"the store has no {key}")
        self.key = key


class Busy(HotstartError):
    """The store cannot do it just now: ask again, not before `retry_after_s` if the store said so.

    What was asked for may have been done all the same: a lost answer to a write says nothing about the write.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Store(Protocol):
    """Immutable objects under keys like 'packs/DIGEST'; several threads may use one store at once.

    Every implementation and every wrapper passes tests/store/conformance.py.
    """

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes, or `length` of them from `offset`. Raises Missing; short only at its end."""

    def write(self, key: str, *parts: Bytes) -> bool:
        """Create an object of `parts` in a row, all of it or nothing, durably. False: there is one already, and it stays."""

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the keys that begin with `prefix` and their sizes, sorted."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""


def check_key(key: str) -> str:
    """Return the key if it can be a path below a store's root. Raises ValueError: keys are made by us, never by users."""
    if not _KEY.fullmatch(key) or key.startswith("/") or key.endswith("/") or "//" in key:
        raise ValueError(f"not a store key: {key!r}")
    return key
