"""What restores of a snapshot took on this machine: the next plan looks at it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from msgspec import MsgspecError, json

from hotstart.restore.plan import PastRestore, Plan, median
from hotstart.restore.receipt import Receipt

_HISTORY = ".restores"
_REMEMBERED = 32


def past_restores(folder: str) -> tuple[PastRestore, ...]:
    """Return what is remembered in a snapshot's folder, the latest last."""
    with suppress(OSError, MsgspecError), open(os.path.join(folder, _HISTORY), "rb") as f:
        return json.decode(f.read(), type=tuple[PastRestore, ...])
    return ()


def note_restore(folder: str, plan: Plan, planned_s: float, receipts: Sequence[Receipt]) -> None:
    """Remember what replicas that were asked for at once took."""
    answered = [r.first_answer_s for r in receipts if r.first_answer_s is not None]
    past = PastRestore(
        replicas=len(receipts),
        missing_bytes=(plan.working_set_missing or 0) + plan.images_missing,
        prefetched=plan.prefetch,
        planned_s=planned_s,
        resumed_s=median([r.resumed_s for r in receipts]) or 0.0,
        first_answer_s=median(answered),
    )
    path = os.path.join(folder, _HISTORY)
    with suppress(OSError):
        with open(f"{path}.aside", "wb") as f:
            f.write(json.encode((*past_restores(folder), past)[-_REMEMBERED:]))
        os.replace(f"{path}.aside", path)


def forget_restores(folder: str) -> None:
    """Begin to compare anew."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, _HISTORY))
