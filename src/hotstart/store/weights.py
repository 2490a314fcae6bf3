"""Weight files: a model's own files, of which parts lie in a worker's memory word for word.

Tensors lie in memory where the allocator put them, and in the file where the ones before them end: memory is searched for the pieces
of the file at any alignment, and its chunks end where the pieces do. So the same weights are the same chunks in every snapshot, and a
machine that has the file reads them there. What was converted on the way (BF16 to FP32, transposed, packed) is not found.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from threading import Lock
from typing import TYPE_CHECKING

from msgspec import MsgspecError, Struct, json

from hotstart.errors import Damaged, HotstartError, Refused
from hotstart.snapshot.manifest import Manifest, WeightFile
from hotstart.store.content import PAGE_BYTES, Extent, digest_of
from hotstart.store.digesting import mapped
from hotstart.store.packs import RAW, Place

if TYPE_CHECKING:
    import mmap

    import numpy as np
    from numpy.typing import NDArray

PIECE_BYTES = 256 << 10
LEAST_PIECE_BYTES = 64 << 10  # a chunk costs some 150 bytes and a request: smaller ones are not worth it
_MOST_HEADER_BYTES = 100 << 20  # what the safetensors library takes
_WORD_BYTES = 8
_TELLING_BYTES = 6  # different bytes in an anchor: fewer are zeros, ones, or something else that is everywhere
_ANCHOR_STEP, _ANCHOR_TRIES = 64, 64
_WINDOW_WORDS = 256 << 10
_MIX = 0x9E3779B97F4A7C15


class Match(Struct, frozen=True):
    """A piece of a weight file in memory: where it is there, how long, number of the file, where it is in that."""

    offset: int
    length: int
    file: int
    file_offset: int


# ---- pieces of a file


def tensors_of(data: memoryview) -> list[tuple[int, int]]:
    """(offset, length) of each tensor of a safetensors file; of any other file all of it.

    https://github.com/huggingface/safetensors#format
    """
    try:
        (header_bytes,) = struct.unpack_from("<Q", data)
        if header_bytes > min(_MOST_HEADER_BYTES, len(data) - 8):
            raise ValueError
        header = json.decode(data[8 : 8 + header_bytes], type=dict[str, dict[str, object]])
        begin = 8 + header_bytes
        found = []
        for name, tensor in header.items():
            if name != "__metadata__":
                start, end = json.decode(json.encode(tensor["data_offsets"]), type=tuple[int, int])
                if not 0 <= start <= end <= len(data) - begin:
                    raise ValueError
                found.append((begin + start, end - start))
    except (struct.error, MsgspecError, UnicodeDecodeError, KeyError, ValueError, RecursionError):
        return [(0, len(data))]
    return _without_overlap(sorted(found))


def _without_overlap(tensors: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Leave out what begins inside another: several names may mean one tensor."""
    found: list[tuple[int, int]] = []
    for start, length in tensors:
        if not found or start >= sum(found[-1]):
            found.append((start, length))
    return found


def pieces_of(tensors: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cut tensors into pieces, counted from the beginning of each.

    >>> list(pieces_of([(100, 600 << 10), (5, 1000)]))
    [(100, 262144), (262244, 262144), (524388, 90112)]
    """
    for start, length in tensors:
        for at in range(0, length, PIECE_BYTES):
            size = min(PIECE_BYTES, length - at)
            if size >= LEAST_PIECE_BYTES:
                yield start + at, size


# ---- finding them in memory


class WeightSearch:
    """Finds pieces of weight files in memory. Use it as a context; files that are not there, or have another size, are passed over."""

    def __init__(self, files: Sequence[WeightFile]) -> None:
        self._files, self._stack = files, ExitStack()
        self._views: dict[int, memoryview] = {}
        self._owners: list[
            tuple[int, int, int, int]
        ] = []  # file, offset, length of a piece; where its anchor is in that
        self._words: NDArray[np.uint64]
        self._next_words: NDArray[np.uint64]
        self._owner_of: NDArray[np.int64]

    def __enter__(self) -> WeightSearch:
        with self._stack:
            for number, weights in enumerate(self._files):
                with suppress(OSError):
                    fd = open_weights(weights.path, weights.size_bytes)
                    self._stack.callback(os.close, fd)
                    self._views[number] = memoryview(self._stack.enter_context(mapped(fd, weights.size_bytes)))
                    self._stack.callback(self._views[number].release)
            self._choose_anchors()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _choose_anchors(self) -> None:
        """Choose for each piece a place of 16 bytes that no other has: all eight words in it, since memory is looked at by words.

        Each with the word that follows, as one alone may be in memory by chance, and often.
        """
        import numpy as np

        words: dict[int, tuple[int, int]] = {}
        for number, view in self._views.items():
            for offset, length in pieces_of(tensors_of(view)):
                for at in range(0, _ANCHOR_STEP * _ANCHOR_TRIES, _ANCHOR_STEP):
                    anchor = view[offset + at : offset + at + 3 * _WORD_BYTES].tobytes()
                    if len(set(anchor[: 2 * _WORD_BYTES])) < _TELLING_BYTES:
                        continue
                    own = [struct.unpack_from("<QQ", anchor, phase) for phase in range(_WORD_BYTES)]
                    if not any(word in words for word, _ in own):
                        for phase, (word, following) in enumerate(own):
                            words[word] = len(self._owners), following
                            self._owners.append((number, offset, length, at + phase))
                        break
        self._words = np.array(sorted(words), dtype=np.uint64)
        self._owner_of = np.array([words[w][0] for w in self._words.tolist()], dtype=np.int64)
        self._next_words = np.array([words[w][1] for w in self._words.tolist()], dtype=np.uint64)

    def find(self, data: mmap.mmap, spans: Sequence[tuple[int, int]]) -> list[Match]:
        """Return what lies in page-aligned spans of mapped memory, in the order of offsets, without overlap."""
        from concurrent.futures import ThreadPoolExecutor

        import numpy as np

        if not len(self._words):
            return []
        bits = min(24, max(16, int(64 * len(self._words)).bit_length()))
        seen = np.zeros(1 << bits, dtype=np.bool_)
        seen[(self._words * np.uint64(_MIX)) >> np.uint64(64 - bits)] = True
        memory = np.frombuffer(data, dtype=np.uint8)
        words = memory[: len(memory) // _WORD_BYTES * _WORD_BYTES].view("<u8")

        def candidates(window: tuple[int, int]) -> list[tuple[int, int]]:
            found = words[window[0] : window[1]]
            hits = np.flatnonzero(seen[(found * np.uint64(_MIX)) >> np.uint64(64 - bits)])
            values = found[hits]
            places = np.minimum(np.searchsorted(self._words, values), len(self._words) - 1)
            following = words[np.minimum(hits + (window[0] + 1), len(words) - 1)]
            right = (self._words[places] == values) & (self._next_words[places] == following)
            at = (hits[right] + window[0]) * _WORD_BYTES
            return list(zip(at.tolist(), self._owner_of[places[right]].tolist(), strict=True))

        matches: list[Match] = []
        with memoryview(data) as view, ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            for start, length in spans:
                first, last = start // _WORD_BYTES, (start + length) // _WORD_BYTES
                windows = [(at, min(at + _WINDOW_WORDS, last)) for at in range(first, last, _WINDOW_WORDS)]
                for found in threads.map(candidates, windows):
                    for at, owner in found:
                        number, offset, size, inside = self._owners[owner]
                        begin = at - inside
                        end = matches[-1].offset + matches[-1].length if matches else 0
                        if begin < max(start, end) or begin + size > start + length:
                            continue
                        if self._is_there(view[begin : begin + size], self._views[number][offset : offset + size]):
                            matches.append(Match(begin, size, number, offset))
        return matches

    def _is_there(self, memory: memoryview, piece: memoryview) -> bool:
        """Compare bytes, those of a page first: they tell most that are not the same."""
        return memory[:PAGE_BYTES].tobytes() == piece[:PAGE_BYTES].tobytes() and memory.tobytes() == piece.tobytes()


# ---- reading them instead of a store


def open_weights(path: str, size_bytes: int) -> int:
    """Open a file of that size. Raises OSError, also for what is no file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    st = os.fstat(fd)
    if not stat.S_ISREG(st.st_mode) or st.st_size != size_bytes or not size_bytes:
        os.close(fd)
        raise FileNotFoundError(path)
    return fd


class Nearby:
    """Chunks of weight files that this machine has. Use it as a context; several threads may read at once."""

    def __init__(self, weights: Iterable[tuple[WeightFile, Sequence[Extent]]], folders: Sequence[str] = ()) -> None:
        """`folders` are looked through for files of the same name and size that are not where they were."""
        self._folders, self._lock = folders, Lock()
        self._files: list[WeightFile] = []
        self._extents: dict[str, tuple[int, Extent]] = {}
        self._fds: dict[int, int | None] = {}
        self.read_bytes = 0
        for weight_file, extents in weights:
            for extent in extents:
                self._extents.setdefault(extent.digest, (len(self._files), extent))
            self._files.append(weight_file)

    def __enter__(self) -> Nearby:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            if fd is not None:
                os.close(fd)
        self._fds.clear()

    def require(self, snapshot: str) -> None:
        """Raise Refused unless every file is here that has what no store has."""
        for number, weights in enumerate(self._files):
            if not weights.stored and self._fd(number) is None:
                raise Refused(
                    f"the weights of snapshot {snapshot} were left out of the store, and {weights.path} of {weights.size_bytes} "
                    "bytes is not here: put it there, or name a folder that has it in HOTSTART_WEIGHTS"
                )

    def read(self, digest: str) -> bytes | None:
        """Return a chunk, verified; None if no file that is here has it."""
        if digest not in self._extents:
            return None
        number, extent = self._extents[digest]
        fd = self._fd(number)
        if fd is None:
            return None
        try:
            data = os.pread(fd, extent.length, extent.offset)
        except OSError:
            return None
        if len(data) != extent.length or digest_of(data) != digest:
            return None
        with self._lock:
            self.read_bytes += len(data)
        return data

    def places(self, places: Mapping[str, Place]) -> dict[str, Place]:
        """Return places with those added of chunks that only the files have: in a pack without a name, which no store has."""
        added = {
            digest: Place("", extent.offset, extent.length, extent.length, RAW)
            for digest, (number, extent) in self._extents.items()
            if digest not in places and not self._files[number].stored
        }
        return {**places, **added} if added else dict(places)

    def _fd(self, number: int) -> int | None:
        with self._lock:
            if number not in self._fds:
                self._fds[number] = self._open(self._files[number])
            return self._fds[number]

    def _open(self, weights: WeightFile) -> int | None:
        for path in (weights.path, *_same_name(weights.path, self._folders)):
            with suppress(OSError):
                return open_weights(path, weights.size_bytes)
        return None


def _same_name(path: str, folders: Sequence[str]) -> Iterator[str]:
    name = os.path.basename(path)
    for folder in folders:
        for parent, _, files in os.walk(folder):
            if name in files:
                yield os.path.join(parent, name)


def left_out(manifest: Manifest, weights: Iterable[tuple[WeightFile, Sequence[Extent]]]) -> set[str]:
    """Digests of the chunks that are in no store, because a weight file has them."""
    needed = {c.digest for file in manifest.files for c in file.chunks}
    return {e.digest for file, extents in weights if not file.stored for e in extents} - needed


def not_as_it_was(digest: str) -> HotstartError:
    """Say that a chunk is in no store, and the weight file has something else in its place."""
    return Damaged(
        f"chunk {digest[:12]} was left out of the store, and the weight file has other bytes there by now: "
        "get the model's very file, and name its folder in HOTSTART_WEIGHTS"
    )
