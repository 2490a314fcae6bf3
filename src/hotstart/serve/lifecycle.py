"""What becomes of a replica in a pool, as a table. docs/serve.md draws it."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where a replica is in its life."""

    STARTING = "starting"  # cold, or being restored
    FREEZING = "freezing"  # started cold and warm; stands still while its snapshot is taken
    READY = "ready"  # takes requests
    SUSPECT = "suspect"  # was found dead, silent or garbled; takes none while it is looked at
    DRAINING = "draining"  # takes no new ones
    ENDING = "ending"
    GONE = "gone"


NEXT: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.FREEZING, State.READY, State.ENDING}),
    State.FREEZING: frozenset({State.READY, State.ENDING}),
    State.READY: frozenset({State.SUSPECT, State.DRAINING, State.ENDING}),
    State.SUSPECT: frozenset({State.READY, State.ENDING}),
    State.DRAINING: frozenset({State.ENDING}),
    State.ENDING: frozenset({State.GONE}),
    State.GONE: frozenset(),
}


def may_become(now: State, then: State) -> bool:
    """Say whether one state may follow another.

    >>> may_become(State.READY, State.DRAINING), may_become(State.DRAINING, State.READY)
    (True, False)
    """
    return then in NEXT[now]
