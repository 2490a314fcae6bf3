"""Memory files that are filled while they are used: what is touched comes first, each byte once, and nothing unverified is there."""

import os
import threading
import time

import pytest

from hotstart.errors import Damaged, HotstartError
from hotstart.snapshot.workingset import Span
from hotstart.store.content import Extent, digest_of
from hotstart.store.memory import MemoryStore
from hotstart.store.packs import Codec, Encoded, Pack
from hotstart.store.port import Busy
from hotstart.store.streaming import StreamedFile, Streaming, chunk_elsewhere
from tests.store.samples import repository

CHUNK = 64 << 10
CHUNKS = 96


class Line(MemoryStore):
    """A store that remembers what was read, and on which nothing moves while it is held."""

    def __init__(self):
        super().__init__()
        self.reads, self.goes, self.fails = [], threading.Event(), False
        self.goes.set()

    def read(self, key, offset=0, length=None):
        self.reads.append((offset, length))
        self.goes.wait(10)
        if self.fails:
            raise Busy("the line is dead")
        return super().read(key, offset, length)


class Scene:
    """One memory file of chunks that differ, in one pack, and a stream that fills it."""

    def __init__(self, folder, order=(), elsewhere=None, spoil=()):
        self.data = [bytes([i]) * CHUNK for i in range(CHUNKS)]
        self.store, pack = Line(), Pack()
        for chunk in self.data:
            pack.add(Encoded(digest_of(chunk), CHUNK, 0, chunk))
        self.places, _ = pack.write(self.store)
        for i in spoil:
            key, place = f"packs/{pack_name(self.places)}", self.places[digest_of(self.data[i])]
            damaged = bytearray(self.store.read(key))
            damaged[place.position] ^= 1
            self.store.delete(key)
            self.store.write(key, bytes(damaged))
        self.store.reads.clear()
        self.fd = os.open(folder / "0.mem", os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, 2 * CHUNKS * CHUNK)
        # Every second place in the file is a hole.
        self.extents = [Extent(2 * i * CHUNK, CHUNK, digest_of(c)) for i, c in enumerate(self.data)]
        self.arrived = []
        self.streaming = Streaming(
            repository(self.store),
            self.places,
            [StreamedFile(self.fd, self.extents)],
            [Span(0, 2 * i * CHUNK, 1) for i in order],
            elsewhere or chunk_elsewhere([], ""),
            lambda _, offset, __: self.arrived.append(offset // CHUNK // 2),
        )

    def touch(self, number, chunks=1):
        """Want some chunks; returns what says whether they came."""
        came, told = [], threading.Event()
        self.streaming.want(0, 2 * number * CHUNK, 2 * chunks * CHUNK, lambda there: (came.append(there), told.set()))

        def result():
            assert told.wait(10)
            return came

        return result

    def chunk(self, number):
        return os.pread(self.fd, CHUNK, 2 * number * CHUNK)


def pack_name(places):
    return next(iter(places.values())).pack


@pytest.fixture
def scene(tmp_path):
    made = []

    def make(**how):
        made.append(Scene(tmp_path, **how))
        return made[-1]

    yield make
    for one in made:
        one.store.goes.set()
        one.streaming.end()
        os.close(one.fd)


def test_what_is_touched_comes_and_nothing_else_does_but_what_lies_beside_it(scene):
    s = scene()
    s.streaming.start()
    assert s.touch(40)() == [True]
    assert s.chunk(40) == s.data[40]
    assert s.chunk(39) == bytes(CHUNK)
    assert s.streaming.arrived().bytes <= 2 << 20
    assert not s.streaming.wait(0.05)


def test_the_working_set_comes_by_itself_in_its_order_and_the_rest_when_it_is_told_to_go_on(scene):
    order = [90, 91, 92, 3, 4, 50]
    s = scene(order=order)
    s.streaming.start()
    deadline = time.monotonic() + 10
    while s.streaming.arrived().set_bytes < len(order) * CHUNK:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert s.streaming.arrived().bytes == len(order) * CHUNK
    assert sorted(s.arrived) == sorted(order)
    assert s.store.reads[0][1] == 3 * CHUNK  # 90 to 92 in one piece
    s.streaming.go_on()
    assert s.streaming.wait(10)
    assert [s.chunk(i) for i in range(CHUNKS)] == s.data
    assert s.streaming.arrived().bytes == CHUNKS * CHUNK
    assert sorted(s.arrived) == sorted(order)


def test_each_byte_is_read_once_whoever_touches_it(scene):
    s = scene(order=range(0, CHUNKS, 3))
    s.streaming.start()
    results = [s.touch(i, 2) for i in (80, 7, 7, 31, 80, 6)]
    s.streaming.go_on()
    assert s.streaming.wait(10)
    assert [r() for r in results] == [[True]] * 6
    # Gaps between chunks that lie close are read with them, twice at worst.
    assert sum(length for _, length in s.store.reads) <= 2 * CHUNKS * CHUNK
    assert [s.chunk(i) for i in range(CHUNKS)] == s.data


def test_what_is_touched_is_read_before_what_nobody_waits_for(scene):
    s = scene(order=range(CHUNKS - 1))
    s.store.goes.clear()
    s.streaming.start()
    result = s.touch(CHUNKS - 1)
    s.store.goes.set()
    assert result() == [True]
    place = s.places[digest_of(s.data[-1])]
    before = [at for at, _ in s.store.reads].index(place.position)
    assert before <= 6  # at most what the threads had begun


def test_a_hole_needs_nothing(scene):
    s = scene()
    called = []
    s.streaming.want(0, CHUNK, CHUNK, called.append)
    s.streaming.want(0, 2 * CHUNKS * CHUNK + 5, 10, called.append)
    assert called == [True, True]
    assert s.store.reads == []


def test_a_damaged_chunk_is_taken_from_elsewhere(scene):
    s = scene(spoil=(5,), elsewhere=lambda digest, _: next(c for c in s.data if digest_of(c) == digest))
    s.streaming.start()
    assert s.touch(5)() == [True]
    assert s.chunk(5) == s.data[5]


def test_a_damaged_chunk_of_which_there_is_no_good_copy_is_never_there(scene):
    s = scene(spoil=(5,))
    s.streaming.start()
    assert s.touch(5)() == [False]
    assert "no store has a good copy" in s.streaming.problem
    assert s.chunk(5) == bytes(CHUNK)
    assert s.touch(6)() == [True]
    assert s.touch(4, 3)() == [False]
    s.streaming.go_on()
    assert not s.streaming.wait(0.2)


def test_a_store_that_fails_is_asked_again_for_what_nobody_waits_for(scene, monkeypatch):
    monkeypatch.setattr("hotstart.store.streaming.PAUSE_S", 0.05)
    s = scene(order=range(20))
    s.store.fails = True
    s.streaming.start()
    while not s.streaming.problem:
        time.sleep(0.001)
    assert s.touch(60)() == [False]
    s.store.fails = False
    assert s.touch(60)() == [True]
    s.streaming.go_on()
    assert s.streaming.wait(10)
    assert [s.chunk(i) for i in range(CHUNKS)] == s.data


def test_who_waits_when_it_ends_is_told(scene):
    s = scene()
    s.store.goes.clear()
    s.streaming.start()
    result = s.touch(1)
    threading.Timer(0.05, s.store.goes.set).start()
    s.streaming.end()
    assert result() == [False]


def test_what_an_interrupted_stream_has_got_is_verified_and_not_read_again(scene, tmp_path):
    first = scene()
    first.streaming.go_on()
    first.streaming.start()
    assert first.streaming.wait(10)
    os.pwrite(first.fd, b"\xff", 2 * 30 * CHUNK + 100)
    s = scene(order=range(10))
    s.streaming.start()
    assert s.touch(30)() == [True]
    assert s.chunk(30) == s.data[30]
    s.streaming.go_on()
    assert s.streaming.wait(10)
    assert [length for _, length in s.store.reads] == [CHUNK]


def test_a_chunk_without_a_place_is_refused_before_anything_is_read(tmp_path):
    s = Scene(tmp_path)
    digest = digest_of(s.data[0])
    with pytest.raises(Damaged, match="no place"):
        Streaming(
            repository(s.store),
            {d: p for d, p in s.places.items() if d != digest},
            [StreamedFile(s.fd, s.extents)],
            [],
            chunk_elsewhere([], ""),
        )
    os.close(s.fd)


def test_other_stores_are_asked_by_their_own_tables():
    chunk = b"a" * CHUNK
    pack, store = Pack(), MemoryStore()
    pack.add(Encoded(digest_of(chunk), CHUNK, *Codec().encode(chunk)))
    places, _ = pack.write(store)
    good, empty = repository(store), repository(MemoryStore())
    good.write_places("ab" * 32, places)
    assert bytes(chunk_elsewhere([empty, good], "ab" * 32)(digest_of(chunk), CHUNK)) == chunk
    with pytest.raises(HotstartError, match="no store has a good copy"):
        chunk_elsewhere([empty], "ab" * 32)(digest_of(chunk), CHUNK)
