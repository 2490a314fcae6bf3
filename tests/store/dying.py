"""Ways to die on the way: a store whose user is killed at an operation, and processes that are killed at a system call."""

import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count

import pytest

CALLS = ("link", "unlink", "rename", "replace", "fsync", "fchmod", "mkdir", "rmdir", "ftruncate", "pwrite", "pwritev")
KILLED, FAILED = 137, 99


class Killed(BaseException):
    """Not an Exception: nothing may catch it and go on."""


class DyingStore:
    """Kills its user before or after its n-th operation; whoever is dead does nothing more, in any thread.

    With `how` something else happens, such as the end of the process.
    """

    def __init__(self, store, n: int, when: str, how: Callable[[], object] | None = None) -> None:
        self._store, self._left, self._when, self._how = store, n, when, how
        self._lock, self.dead = threading.Lock(), False

    def _operation(self, act):
        with self._lock:
            if self.dead:
                raise Killed
            self._left -= 1
            last = self._left == 0
            if last and self._when == "before":
                self._die()
            try:
                return act()
            finally:
                if last:
                    self._die()

    def _die(self):
        self.dead = True
        if self._how:
            self._how()
        raise Killed

    def read(self, key, offset=0, length=None):
        return self._operation(lambda: self._store.read(key, offset, length))

    def write(self, key, *parts):
        return self._operation(lambda: self._store.write(key, *parts))

    def list(self, prefix):
        return iter(self._operation(lambda: list(self._store.list(prefix))))

    def delete(self, key):
        return self._operation(lambda: self._store.delete(key))


def steps(both: bool) -> Iterator[tuple[int, str]]:
    """Every operation, and whether to die before or after it: both, or one and the other in turn."""
    for n in count(1):
        for when in ("before", "after") if both else (("before", "after")[n % 2],):
            yield n, when


def finishes(action: Callable[[], object]) -> bool:
    """Do something in a process of its own; returns whether it came to its end or was killed, and fails if it failed."""
    pid = os.fork()
    if pid == 0:
        code = FAILED
        try:
            action()
            code = 0
        except Killed:
            code = KILLED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, KILLED):
        pytest.fail(f"the process ended with status {code}")
    return code == 0


def finishes_unless_killed_at_call(n: int, when: str, action: Callable[[], object]) -> bool:
    """Do something in a process of its own that is killed before or after its n-th call that changes files, or in mid-write."""

    def armed():
        lock, done = threading.Lock(), 0

        def dying(name, call):
            def wrapper(*args, **named):
                nonlocal done
                with lock:
                    done += 1
                    if done == n:
                        with suppress(OSError):
                            if when == "after" and name == "pwrite":
                                fd, data, offset = args
                                call(fd, data[: len(data) // 2], offset)
                            elif when == "after" and name == "pwritev":
                                fd, (first, *_), offset = args
                                call(fd, [first[: len(first) // 2]], offset)
                            elif when == "after":
                                call(*args, **named)
                        os._exit(KILLED)
                return call(*args, **named)

            return wrapper

        for name in CALLS:
            setattr(os, name, dying(name, getattr(os, name)))
        action()

    return finishes(armed)
