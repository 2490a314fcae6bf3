"""What a worker may import: where to checkpoint it, and what to do before and after. No dependencies, nothing of the rest.

>>> from hotstart.worker import checkpoint, on_resume
>>> on_resume(lambda identity: None)
>>> checkpoint() is None   # outside a sandbox there is nothing to do
True
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping

Identity = Mapping[str, object]

_FOLDER = "/run/hotstart"
_POLL_S = 0.001
_quiesce_hooks: list[Callable[[], None]] = []
_resume_hooks: list[Callable[[Identity], None]] = []


def on_quiesce(hook: Callable[[], None]) -> None:
    """Call `hook` before a checkpoint: drop what need not be kept (caches, free pools), finish what is under way."""
    _quiesce_hooks.append(hook)


def on_resume(hook: Callable[[Identity], None]) -> None:
    """Call `hook` with the new identity once the worker goes on, here or as a replica.

    It is {"name", "kind", "address", "port", "seed", "environment"}. In a replica the global random generators are new already.
    """
    _resume_hooks.append(hook)


def checkpoint() -> Identity | None:
    """Say that the worker is ready, and stand still until it goes on: as a replica of its snapshot, or at once if none is made.

    Returns who the worker is now, or None outside a sandbox. Quiesce hooks run before, in order; resume hooks after, in
    reverse order.
    """
    if "HOTSTART_SANDBOX" not in os.environ:
        return None
    for quiesce in _quiesce_hooks:
        quiesce()
    identity_path = f"{_FOLDER}/identity"
    with open(f"{_FOLDER}/ready", "w", encoding="utf-8"):
        pass
    while not os.path.exists(identity_path):
        time.sleep(_POLL_S)
    os.unlink(f"{_FOLDER}/ready")
    with open(identity_path, "rb") as f:
        document = f.read()
    identity: Identity = json.loads(document)
    given = identity.get("environment")
    if isinstance(given, dict):  # what was left out of the snapshot, given at the restore
        os.environ.update(given)
    if identity["kind"] == "replica":
        _renew(document)
    for resume in reversed(_resume_hooks):
        resume(identity)
    return identity


def _renew(identity: bytes) -> None:
    """Renew this process, unless Hotstart's signal was faster: what a hook seeds must stay."""
    if "hotstart_renewal" in sys.modules:
        sys.modules["hotstart_renewal"].renew(identity)
    else:
        from hotstart.worker.renewal import renew

        renew(identity)
