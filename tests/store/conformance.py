"""What every Store must do. A test module per implementation: `class TestX(StoreConformance)` with a fixture `store`."""

import random
import threading
from contextlib import suppress

import pytest

from hotstart.store.port import Missing

BAD_KEYS = [
    "",
    ".",
    "..",
    "../x",
    "a/../b",
    "a/..",
    "./a",
    "a/./b",
    "/etc/passwd",
    "a/",
    "a//b",
    ".hidden",
    "a/.hidden",
    ".aside/x",
    "a\0b",
    "a\nb",
    "a\n",
    "a b",
    "a\\..\\b",
    "größe",
]


class StoreConformance:
    """Inherited by the tests of each implementation."""

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 3 << 20])
    def test_an_object_is_read_as_it_was_written(self, store, size):
        data = random.Random(size).randbytes(size)
        assert store.write("packs/a", data) is True
        assert store.read("packs/a") == data

    def test_an_object_is_its_parts_in_a_row(self, store):
        parts = [b"head", b"", bytearray(b"bytes"), memoryview(b"a view of more")[2:6]]
        assert store.write("packs/a", *parts) is True
        assert store.read("packs/a") == b"headbytesview"
        assert store.write("packs/empty") is True
        assert store.read("packs/empty") == b""

    def test_an_object_is_written_once_and_never_changed(self, store):
        assert store.write("names/a", b"first") is True
        assert store.write("names/a", b"second, and longer") is False
        assert store.write("names/a", b"") is False
        assert store.read("names/a") == b"first"
        assert list(store.list("")) == [("names/a", 5)]

    def test_what_a_caller_does_with_its_buffer_afterwards_changes_nothing(self, store):
        buffer = bytearray(b"good")
        store.write("a", buffer)
        buffer[:] = b"evil"
        assert store.read("a") == b"good"

    @pytest.mark.parametrize(
        ("offset", "length", "expected"),
        [
            (0, 0, b""),
            (0, 3, b"012"),
            (3, 4, b"3456"),
            (9, 1, b"9"),
            (3, None, b"3456789"),
            (0, None, b"0123456789"),
            (8, 5, b"89"),
            (0, 1000, b"0123456789"),
            (10, 1, b""),
            (11, 5, b""),
            (10, None, b""),
            (1 << 40, 4, b""),
            (1 << 40, None, b""),
        ],
    )
    def test_a_range_is_what_was_asked_for_and_short_only_at_the_end(self, store, offset, length, expected):
        store.write("packs/a", b"0123456789")
        assert store.read("packs/a", offset, length) == expected

    def test_any_range_is_the_same_as_a_slice_of_the_whole(self, store):
        chance = random.Random(4)
        data = chance.randbytes(100_000)
        store.write("packs/a", data)
        for _ in range(200):
            offset, length = chance.randrange(110_000), chance.randrange(50_000)
            assert store.read("packs/a", offset, length) == data[offset : offset + length]

    @pytest.mark.parametrize("key", ["names/a", "a", "packs/a/b", "packs/b"])
    def test_what_is_not_there_is_missing_and_says_which(self, store, key):
        store.write("packs/a", b"x")
        with pytest.raises(Missing) as missing:
            store.read(key)
        assert missing.value.key == key
        assert key in str(missing.value)
        assert missing.value.exit_code == 3

    def test_keys_are_listed_with_their_sizes_in_order(self, store):
        keys = [
            "packs/b",
            "names/z",
            "packs/a-1",
            "packs/a",
            "places/x/y",
            "packs/a.b",
            "packs/B",
            "top",
            "packs-old/x",
        ]
        for i, key in enumerate(keys):
            store.write(key, bytes(i))
        assert list(store.list("")) == sorted((key, i) for i, key in enumerate(keys))

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            ("packs/", ["packs/a", "packs/ab", "packs/b"]),
            ("packs", ["packs-old/x", "packs/a", "packs/ab", "packs/b"]),
            ("packs/a", ["packs/a", "packs/ab"]),
            ("packs/ab", ["packs/ab"]),
            ("packs/abc", []),
            ("pa", ["packs-old/x", "packs/a", "packs/ab", "packs/b"]),
            ("names/", ["names/llm-1"]),
            ("nothing/", []),
            ("nothing/at/all", []),
        ],
    )
    def test_a_list_holds_exactly_the_keys_with_its_prefix(self, store, prefix, expected):
        for key in ("packs/a", "packs/ab", "packs/b", "packs-old/x", "names/llm-1"):
            store.write(key, b"x")
        assert [key for key, _ in store.list(prefix)] == expected

    def test_an_empty_store_lists_nothing(self, store):
        assert list(store.list("")) == list(store.list("packs/")) == []

    def test_what_is_listed_can_be_deleted_on_the_way(self, store):
        for i in range(5):
            store.write(f"packs/{i}", b"x")
        for key, _ in store.list("packs/"):
            store.delete(key)
        assert list(store.list("")) == []

    def test_what_is_deleted_is_gone_and_can_be_written_anew(self, store):
        store.write("names/a", b"first")
        store.write("names/b", b"other")
        store.delete("names/a")
        with pytest.raises(Missing):
            store.read("names/a")
        assert list(store.list("names/")) == [("names/b", 5)]
        assert store.write("names/a", b"second") is True
        assert store.read("names/a") == b"second"

    def test_deleting_what_is_not_there_is_fine(self, store):
        store.delete("names/a")
        store.write("names/a", b"x")
        store.delete("names/a")
        store.delete("names/a")
        store.delete("other/folder/a")
        assert list(store.list("")) == []

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_a_key_that_could_lead_elsewhere_is_refused_by_every_method(self, store, key):
        for call in (store.read, lambda k: store.write(k, b"x"), store.delete):
            with pytest.raises(ValueError, match="not a store key"):
                call(key)
        assert list(store.list("")) == []

    def test_of_concurrent_writers_one_wins_and_the_others_are_told(self, store):
        for i in range(25):
            values = [bytes([n]) * 50_000 for n in range(3)]
            told: dict[int, bool] = {}
            barrier = threading.Barrier(len(values))

            def write(n, key=f"names/{i}", values=values, told=told, barrier=barrier):
                barrier.wait()
                told[n] = store.write(key, values[n])

            threads = [threading.Thread(target=write, args=(n,)) for n in range(len(values))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            winners = [n for n, created in told.items() if created]
            assert len(told) == len(values)
            assert len(winners) == 1
            assert store.read(f"names/{i}") == values[winners[0]]

    def test_a_reader_never_sees_half_of_an_object_that_is_being_written(self, store):
        size, seen, done = 2 << 20, set(), threading.Event()

        def look():
            while not done.is_set():
                for i in range(12):
                    with suppress(Missing):
                        seen.add(len(store.read(f"packs/{i}")))

        reader = threading.Thread(target=look)
        reader.start()
        try:
            for i in range(12):
                store.write(f"packs/{i}", bytes([i]) * size)
        finally:
            done.set()
            reader.join()
        assert seen <= {size}
        assert list(store.list("")) == sorted((f"packs/{i}", size) for i in range(12))
