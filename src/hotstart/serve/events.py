"""What happens to models and replicas, as facts that log, metrics, traces and dashboard are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from msgspec import Struct, field

Value = str | int | float | bool | None
_KEPT = 200


class Event(Struct, frozen=True):
    """One thing that happened. `kind` is one word or two, `text` a sentence for people.

    `seconds` is how long it took, if it took time, and `stages` what of.
    """

    at_unix_s: float
    kind: str
    text: str
    model: str | None = None
    replica: str | None = None
    seconds: float | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    bad: bool = False


class Events:
    """Tells everybody who listens; keeps the last ones."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._listeners: list[Callable[[Event], None]] = []
        self.last: deque[Event] = deque(maxlen=_KEPT)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call back with every event."""
        self._listeners.append(listener)

    def tell(
        self,
        kind: str,
        text: str,
        model: str | None = None,
        replica: str | None = None,
        *,
        seconds: float | None = None,
        stages: Mapping[str, float] | None = None,
        bad: bool = False,
    ) -> None:
        """Say what happened."""
        event = Event(self._wall_clock(), kind, text, model, replica, seconds, stages or {}, bad)
        self.last.append(event)
        for listener in self._listeners:
            listener(event)
