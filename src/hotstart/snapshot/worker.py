"""What a worker is: its command and what it needs from its sandbox; names that may be used. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct, field

from hotstart.errors import BadUsage

NAME_RULE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
# Far from CRIU's own pids when it restores inside the same namespace, which start at 2.
ROOT_PID = 1000
PRIVATE_FOLDERS = ("/run", "/tmp", "/dev/shm")
SUPPORT_FOLDER = "/run/hotstart"
RENEWAL_FOLDER = f"{SUPPORT_FOLDER}/renewal"  # who wants to be told, in a replica, to renew itself
KEEP_RANDOM = "HOTSTART_KEEP_RANDOM"  # a variable that spares a worker from that


class WorkerSpec(Struct, frozen=True):
    """How a worker is started and reached.

    Sizes in bytes, times in seconds, `cpus` in cores; `port` is what it listens on inside. `ready_url` is asked inside.
    """

    command: tuple[str, ...]
    cwd: str
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None
    ready_url: str | None = None
    ready_timeout_s: float = 600.0
    network: str = "isolated"
    memory_bytes: int | None = None
    cpus: float | None = None
    writable: tuple[str, ...] = ()
    visible: tuple[str, ...] = ()  # folders below a private one that the worker sees all the same, read-only
    omitted: tuple[str, ...] = ()  # variables that were left out of its environment; a restore gives them


def check_name(name: str, what: str) -> str:
    """Return the name if it can be a file's name anywhere. Raises BadUsage.

    >>> check_name("llm-1", "snapshot")
    'llm-1'
    """
    if not NAME_RULE.fullmatch(name):
        raise BadUsage(
            f"{name[:80]!r} cannot name a {what}: use 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning and ending with a letter or digit"
        )
    return name
