"""Leases: objects in a store that say who is pushing, pulling or collecting there, and until when.

A lease is `leases/PURPOSE.ID.SUBJECT.UNTIL`; all that others need to know is in its key. Whoever pushes may rely on packs that no
name leads to yet, so nothing is collected meanwhile. Each side first says what it is about to do and then looks what the others
said: of two that begin at once, at least one sees the other (listing is consistent in every store that we know).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from msgspec import MsgspecError, Struct, json

from hotstart.errors import HotstartError
from hotstart.store.port import Missing, Store

PUSH, PULL, COLLECT = "push", "pull", "collect"
LASTS_S = 900
SKEW_S = 300  # by which two machines' clocks may differ
NOTHING = "none"


class Holder(Struct, frozen=True):
    """Which process of which boot of which machine holds a lease; a process that is gone holds none."""

    boot: str
    pid: int
    start_ticks: int


class Held(Struct, frozen=True):
    """A lease that somebody holds: why, about which snapshot digest, until when (seconds since 1970)."""

    key: str
    purpose: str
    subject: str
    until_unix_s: int


def parse_lease(key: str) -> Held | None:
    """Read a lease's key; None if it is none."""
    parts = key.removeprefix("leases/").split(".")
    if len(parts) != 4 or not parts[3].isdecimal():
        return None
    return Held(key, parts[0], parts[2], int(parts[3]))


class Leases:
    """The leases of one store. `clock` gives seconds since 1970; `gone` says that a holder on this machine has ended."""

    def __init__(
        self, store: Store, holder: Holder, gone: Callable[[Holder], bool], clock: Callable[[], float]
    ) -> None:
        self._store, self._holder, self._gone, self._clock = store, holder, gone, clock

    def take(self, purpose: str, subject: str = NOTHING) -> Lease:
        """Say what is about to be done; the caller then looks at `others`."""
        lease = Lease(self._store, purpose, subject, self._clock, json.encode(self._holder))
        lease.renew()
        return lease

    def others(self, mine: Lease | None) -> list[Held]:
        """Leases of others that are in force. What is left of holders that are gone is removed."""
        found = []
        for key, _ in list(self._store.list("leases/")):
            held = parse_lease(key)
            if held is None or (mine and key == mine.key):
                continue
            if held.until_unix_s + SKEW_S < self._clock() or self._has_ended(key):
                self._store.delete(key)
                continue
            found.append(held)
        return found

    def _has_ended(self, key: str) -> bool:
        try:
            holder = json.decode(self._store.read(key), type=Holder)
        except Missing:
            return True
        except (MsgspecError, UnicodeDecodeError):
            return False  # whoever it is: until its time has come
        return holder.boot == self._holder.boot and self._gone(holder)


class Lease:
    """A lease that we hold. Use it as a context: it ends with it."""

    def __init__(self, store: Store, purpose: str, subject: str, clock: Callable[[], float], document: bytes) -> None:
        self._store, self._clock, self._document = store, clock, document
        self._prefix = f"leases/{purpose}.{os.urandom(8).hex()}.{subject}."
        self._until = 0
        self.key = ""

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        if self.key:
            self._store.delete(self.key)

    def renew(self) -> None:
        """Prolong it if a third of its time has gone; cheap to call often. Raises HotstartError if it has run out."""
        now = self._clock()
        if self._until and now > self._until:
            raise HotstartError("this took too long between two steps, others may have broken its lease: try again")
        if now < self._until - LASTS_S * 2 / 3:
            return
        former, self._until = self.key, int(now) + LASTS_S
        self.key = f"{self._prefix}{self._until}"
        self._store.write(self.key, self._document)
        if former and former != self.key:
            self._store.delete(former)

    def require(self) -> None:
        """Raise HotstartError if it was broken because we were too slow: what we rely on may be gone."""
        if not any(key == self.key for key, _ in self._store.list(self._prefix)):
            raise HotstartError("the store did not hear of this upload for too long and broke its lease: try again")
