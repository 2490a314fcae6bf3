"""Takes a snapshot of a running worker: fold, dump, pack what its private folders hold. The worker goes on afterwards.

What it refuses to know: where snapshots are kept, how bytes are stored, and every detail of CRIU, ptrace and namespaces,
which are behind the ports below.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from msgspec import Struct

from hotstart.errors import FoldRefused, HotstartError
from hotstart.snapshot.layout import MEMORY_FOLDER, Layout
from hotstart.snapshot.worker import PRIVATE_FOLDERS, SUPPORT_FOLDER

# In the private /run, but not the snapshot's: CRIU's cache, the memory files' folder, what a capture itself put there.
NOT_OF_THE_SNAPSHOT = frozenset(
    {"/run/criu.kdat", MEMORY_FOLDER, f"{SUPPORT_FOLDER}/capture", f"{SUPPORT_FOLDER}/identity"}
)
REGIONS = "regions.json"  # where each area went, and why


class FoldedProcess(Struct, frozen=True):
    """One process after a fold: pid inside, its memory file, where its areas went.

    `memory_file` is None if nothing was mapped or all of it lies in the files of processes that it shares it with; `unsafe` says
    why it must not be mapped, if so.
    """

    pid: int
    memory_file: str | None
    layout: Layout
    copied_bytes: int
    unsafe: str | None = None


class FrozenTree(Protocol):
    """A process tree that stands still; leaving the context without `release` undoes everything."""

    def map_memory(self, name_of: Callable[[int], str]) -> list[FoldedProcess]:
        """Copy to files the memory of every process that can be mapped, map them in its place. Raises FoldRefused."""

    def release(self) -> None:
        """Let the tree go on."""


class Freezer(Protocol):
    """Freezes process trees (ptrace)."""

    def freeze(self, root_pid: int, folder: str, inside: str) -> AbstractContextManager[FrozenTree]:
        """Freeze the tree below `root_pid` (host pid); memory files go to `folder`, which it sees as `inside`."""


class Dumper(Protocol):
    """Dumps process trees (CRIU)."""

    def dump(self, init_pid: int, images: str, while_frozen: Callable[[], None]) -> None:
        """Dump a sandbox's tree to a folder, calling back while it is frozen. Raises HotstartError; the tree goes on."""


class FilePacker(Protocol):
    """Packs the files of a sandbox's private folders."""

    def pack(self, init_pid: int, folders: tuple[str, ...], leave_out: frozenset[str], out: str) -> None:
        """Write everything below `folders` to a file pack at `out`."""


class Source(Struct, frozen=True):
    """A running worker: host pids of the sandbox's first process and of the root; its folder for memory files.

    `memory_id` names that folder for good; inside it is MEMORY_FOLDER/memory_id.
    """

    init_pid: int
    root_pid: int
    memory_folder: str
    memory_id: str
    generation: str


class Captured(Struct, frozen=True):
    """What a capture gave; `refused` says why memory was not folded, if it was not. Times are CLOCK_MONOTONIC seconds."""

    folded: tuple[FoldedProcess, ...]
    refused: str | None
    frozen_at: float
    thawed_at: float


def capture(
    source: Source,
    folder: str,
    *,
    fold: bool,
    freezer: Freezer,
    dumper: Dumper,
    packer: FilePacker,
    clock: Callable[[], float],
    private_folders: tuple[str, ...] = PRIVATE_FOLDERS,
) -> Captured:
    """Write CRIU's images to `folder`/images and the file pack, with what `private_folders` hold, to `folder`/files.pack.

    Where folding is refused the dump is a plain one and holds all memory. Raises HotstartError if the dump fails, with the
    worker running as before.
    """
    images = os.path.join(folder, "images")
    os.mkdir(images)
    folded: tuple[FoldedProcess, ...] = ()
    refused = None if fold else "a plain dump was asked for"
    frozen_at = clock()
    if fold:
        try:
            with freezer.freeze(source.root_pid, source.memory_folder, f"{MEMORY_FOLDER}/{source.memory_id}") as tree:
                folded = tuple(tree.map_memory(lambda i: f"{source.generation}-{i}.mem"))
                tree.release()
        except FoldRefused as e:
            if "No space left" in str(e):
                raise HotstartError(
                    f"the disk is full: the worker's memory does not fit into {source.memory_folder}"
                ) from e
            refused = str(e)
    # At once: every page that the worker dirties from here on is one that CRIU has to write.
    dumper.dump(
        source.init_pid,
        images,
        lambda: packer.pack(source.init_pid, private_folders, NOT_OF_THE_SNAPSHOT, os.path.join(folder, "files.pack")),
    )
    return Captured(folded, refused, frozen_at, clock())
