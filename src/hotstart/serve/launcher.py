"""The port behind the pool: starts and ends replicas of models, makes and finds their snapshots.

`api/launching.py` implements it for this machine. All methods block; the pool calls them in threads of its own, several at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from msgspec import Struct

from hotstart.errors import HotstartError
from hotstart.serve.autoscaler import Resources
from hotstart.serve.config import ModelConfig


class Recipe(Struct, frozen=True):
    """A model as it is to be started now.

    `key` changes with whatever makes an older snapshot wrong: command, environment, files, engine, kernel, driver, warm-up. It can
    be part of a name. `parts` are what it was made of, so that a change can be told.
    """

    model: ModelConfig
    key: str
    parts: Mapping[str, str]


class Frozen(Struct, frozen=True):
    """A snapshot of a recipe: what a restore of it should take, and what each replica has for itself (None: not known)."""

    name: str
    predicted_s: float | None = None
    own_bytes: int | None = None
    logical_bytes: int = 0


class Waterfall(Struct, frozen=True):
    """What one start took: seconds until the first answer, and its stages in order. `kind` is `restore` or `cold`."""

    replica: str
    kind: str
    total_s: float
    stages: Mapping[str, float]
    at_unix_s: float = 0.0
    strategy: str = ""


class Launched(Struct, frozen=True):
    """A replica that has answered, and where it does."""

    name: str
    host: str
    port: int
    waterfall: Waterfall


class Found(Struct, frozen=True):
    """A replica that was there before this server; `cold`: it was started, not restored."""

    name: str
    host: str
    port: int
    cold: bool


class Usage(Struct, frozen=True):
    """Memory of one replica in bytes: resident, its share, what only it has."""

    rss: int
    pss: int
    own: int


class Savings(Struct, frozen=True):
    """Bytes of all snapshots: of their data, and what the store takes for them."""

    data_bytes: int
    stored_bytes: int


class NoRoomError(HotstartError):
    """The machine has too little of something now; later it may have."""


class Launcher(Protocol):
    """Replicas on some machine. A name is at most 64 characters, chosen by the caller before it starts anything."""

    def machine(self) -> Resources:
        """What all replicas together may take."""

    def recipe(self, model: ModelConfig) -> Recipe:
        """Look at what a model is made of now. Raises HotstartError."""

    def frozen(self, recipe: Recipe) -> Frozen | None:
        """Return the snapshot to start replicas from, None if there is none. Raises Refused, with the reason why it cannot be used."""

    def start_cold(self, recipe: Recipe, name: str) -> Launched:
        """Run the model's command, wait until it is ready, warm it up. Raises HotstartError; nothing is left then."""

    def restore(self, recipe: Recipe, frozen: Frozen, name: str) -> Launched:
        """Restore a replica, wait until it answers. Raises Refused, NoRoomError, HotstartError; nothing is left then."""

    def freeze(self, recipe: Recipe, name: str, thawed: Callable[[], None]) -> Frozen:
        """Take a snapshot of a replica that was started cold; it goes on.

        `thawed` is called, from any thread, as soon as the replica runs again; trying the snapshot goes on behind that. A snapshot
        of which a replica answers otherwise is not kept. Raises HotstartError, with the replica as it was.
        """

    def discard(self, recipe: Recipe) -> None:
        """Remove the snapshot of a recipe, and those of the model's former recipes that no replica runs of."""

    def end(self, name: str, grace_s: float) -> None:
        """Ask a replica to end, end it, forget it. One that is gone is fine."""

    def alive(self, name: str) -> bool:
        """Say whether a replica's processes run. Cheap: asked often."""

    def healthy(self, model: ModelConfig, name: str, timeout_s: float) -> str:
        """Ask a replica whether it is ready; returns why not, or an empty text."""

    def last_words(self, name: str) -> str:
        """What it wrote last, in one line."""

    def usage(self, name: str) -> Usage | None:
        """Memory of a replica; None if it is gone."""

    def found(self) -> list[Found]:
        """List the replicas of an earlier server that still run, whatever they are of; their names begin with `STEM.KEY.`."""

    def cold_start(self, recipe: Recipe) -> Waterfall | None:
        """What the cold start took that a restore of this recipe replaces; None: not known here."""

    def savings(self) -> Savings | None:
        """What the store holds of all snapshots; None: not known."""
