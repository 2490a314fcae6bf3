"""The store in a folder: nothing torn is ever visible, however a writer ends; a full disk is one clear error."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from hotstart.errors import HotstartError
from hotstart.store.buffers import Buffers
from hotstart.store.collecting import collect
from hotstart.store.directory import DirectoryStore
from hotstart.store.port import Missing
from tests.conftest import skip_or_fail
from tests.store.conformance import BAD_KEYS, StoreConformance
from tests.store.samples import repository


class TestDirectoryStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path):
        return DirectoryStore(str(tmp_path / "store"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


def leftovers(root):
    aside = root / ".aside"
    return sorted(os.listdir(aside)) if aside.exists() else []


def python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, **options
    )


def content(key, size):
    """The only right content of a key."""
    return (key.encode() * (size // len(key) + 1))[:size]


# ---- killed writers

_WRITE_AND_DIE = """
import os, signal, sys
from hotstart.store import directory

root, step = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

pwritev = os.pwritev

def torn(fd, pieces, at):
    pwritev(fd, [pieces[0][: len(pieces[0]) // 2]], at)
    die()

if step == "write":
    os.pwritev = torn
else:
    setattr(os, step, die)
directory.DirectoryStore(root).write("packs/a", b"0123456789" * 1000)
"""


@pytest.mark.parametrize(
    ("step", "visible"), [("write", False), ("fchmod", False), ("fsync", False), ("link", False), ("unlink", True)]
)
def test_a_writer_killed_at_any_step_leaves_all_or_nothing(root, step, visible):
    with python(_WRITE_AND_DIE, root, step) as writer:
        assert writer.wait() == -signal.SIGKILL
    store = DirectoryStore(str(root))
    assert list(store.list("")) == ([("packs/a", 10_000)] if visible else [])
    assert len(leftovers(root)) == 1  # the proof that it was killed on the way
    store.clear_leftovers()
    assert leftovers(root) == []
    assert store.write("packs/a", b"0123456789" * 1000) is not visible
    assert store.read("packs/a") == b"0123456789" * 1000


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, (4 << 20) - 1, 4 << 20, (8 << 20) + 4097])
def test_what_goes_past_the_page_cache_is_written_to_the_last_byte(root, monkeypatch, size, direct):
    opened = os.open

    def without_direct(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "this file system cannot")
        return opened(path, flags, *rest)

    if not direct:
        monkeypatch.setattr(os, "open", without_direct)
    data = random.Random(size).randbytes(size)
    cuts = (0, 1, 4097, 70_000, size)
    assert DirectoryStore(str(root)).write("packs/a", *(data[a:b] for a, b in pairwise(cuts)))
    assert (root / "packs" / "a").read_bytes() == data
    assert leftovers(root) == []


def test_parts_that_begin_at_a_page_and_others_are_written_in_their_order(root):
    chance = random.Random(5)
    buffers = Buffers(1 << 20)
    for number in range(20):
        parts = []
        for _ in range(chance.randrange(1, 30)):
            data = chance.randbytes(chance.choice([1, 4095, 4096, 65_536, 70_000, 1 << 18, 1 << 20]))
            if chance.random() < 0.6:
                memory = buffers.take()[: len(data)]
                memory[:] = data
                parts.append(memory)
            else:
                parts.append(data)
            if chance.random() < 0.7:
                parts.append(bytes(-sum(map(len, parts)) % 4096))
        assert DirectoryStore(str(root)).write(f"packs/{number}", *parts)
        assert (root / "packs" / str(number)).read_bytes() == b"".join(parts)


_WRITE_FOR_EVER = """
import itertools, random, sys
from hotstart.store.directory import DirectoryStore

store, seed = DirectoryStore(sys.argv[1]), int(sys.argv[2])
chance = random.Random(seed)
for n in itertools.count():
    size = chance.choice([1, 5000, 1 << 20, 3 << 20])
    key = f"packs/{seed}-{n}-{size}"
    store.write(key, (key.encode() * (size // len(key) + 1))[:size])
    print(key, flush=True)
"""


def test_a_torn_write_is_never_visible_and_an_acknowledged_one_is_never_lost(root):
    chance = random.Random(1)
    store = DirectoryStore(str(root))
    acknowledged = set()
    for seed in range(8):
        with python(_WRITE_FOR_EVER, root, seed) as writer:
            acknowledged.add(writer.stdout.readline().strip())
            time.sleep(chance.uniform(0, 0.03))
            writer.kill()
            acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
        visible = dict(store.list(""))
        assert acknowledged <= visible.keys()
        for key, listed in visible.items():
            size = int(key.rpartition("-")[2])
            assert listed == size
            assert store.read(key) == content(key, size)
    store.clear_leftovers()
    assert leftovers(root) == []
    assert dict(store.list("")) == visible


def test_what_a_living_writer_has_aside_is_left_alone(root):
    store = DirectoryStore(str(root))
    store.write("packs/a", b"x")
    mine, dead = root / ".aside" / f"{os.getpid()}-abc", root / ".aside" / "999999999-abc"
    mine.write_bytes(b"half")
    dead.write_bytes(b"half")
    store.clear_leftovers()
    assert leftovers(root) == [mine.name]


def test_there_is_nothing_to_clear_in_a_store_that_was_never_written(root):
    DirectoryStore(str(root)).clear_leftovers()
    assert not root.exists()


def test_what_lies_aside_is_never_listed(root):
    store = DirectoryStore(str(root))
    store.write("packs/a", b"x")
    (root / ".aside" / "1-abc").write_bytes(b"half")
    assert list(store.list("")) == [("packs/a", 1)]
    assert list(store.list("packs/")) == [("packs/a", 1)]


def test_a_write_leaves_nothing_aside_whether_it_won_or_lost(root):
    store = DirectoryStore(str(root))
    store.write("packs/a", b"x")
    store.write("packs/a", b"y")
    assert leftovers(root) == []


# ---- files


def test_objects_are_files_that_nobody_is_meant_to_write_to(root):
    DirectoryStore(str(root)).write("packs/a", b"x")
    st = os.stat(root / "packs" / "a")
    assert (st.st_mode & 0o777, st.st_nlink) == (0o444, 1)


def test_two_stores_on_the_same_folder_are_one_store(root):
    one, other = DirectoryStore(str(root)), DirectoryStore(str(root))
    assert one.write("names/a", b"x")
    assert not other.write("names/a", b"y")
    assert other.read("names/a") == b"x"


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_bad_key_touches_no_file(tmp_path, key):
    precious = tmp_path / "x"
    precious.write_bytes(b"precious")
    store = DirectoryStore(str(tmp_path / "store"))
    for call in (lambda: store.write(key, b"evil"), lambda: store.delete(key), lambda: store.read(key)):
        with pytest.raises(ValueError, match="not a store key"):
            call()
    assert precious.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["x"]


def test_a_store_that_cannot_be_written_says_so_in_one_line(root):
    with pytest.raises(HotstartError) as error:
        DirectoryStore(str(root)).write("packs/" + "a" * 300, b"x")
    assert str(error.value) == f"the store at {root} cannot be written: File name too long"
    assert leftovers(root) == []


def test_a_store_that_cannot_be_read_says_so_in_one_line(root):
    """As a shared folder does whose server is gone: a read fails over to another store only for an error of ours."""
    DirectoryStore(str(root)).write("a", b"x")
    os.unlink(root / "a")
    os.symlink("a", root / "a")  # a loop: any error that is not "missing"
    with pytest.raises(HotstartError) as error:
        DirectoryStore(str(root)).read("a")
    assert str(error.value) == f"the store at {root} cannot be read: Too many levels of symbolic links"
    assert not isinstance(error.value, Missing)


def test_a_folder_of_objects_is_no_object(root):
    store = DirectoryStore(str(root))
    store.write("packs/a", b"x")
    with pytest.raises(Missing):
        store.read("packs")


_FILL = """
import json, os, sys
from hotstart.errors import HotstartError
from hotstart.store.buffers import Buffers
from hotstart.store.directory import DirectoryStore

store = DirectoryStore(sys.argv[1])
small = store.write("packs/small", b"x" * 4096)
try:
    store.write("packs/big", b"y" * (2 << 20))
    error = None
except Exception as e:
    error = [isinstance(e, HotstartError), str(e)]
after = store.write("packs/after", b"z" * 4096)
print(json.dumps([small, error, after, list(store.list("")), os.listdir(sys.argv[1] + "/.aside"), store.read("packs/small")[:2].decode()]))
"""


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(tmp_path):
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 90; exec "$0" -c "$2" "$1"'
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, str(tmp_path), _FILL],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 90 or "unshare" in run.stderr:
        skip_or_fail(f"a small file system cannot be mounted here: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    small, error, after, listed, aside, kept = json.loads(run.stdout)
    assert error == [True, f"no room in the store at {tmp_path}: free some space, or remove snapshots"]
    assert (small, after, kept) == (True, True, "xx")
    assert listed == [["packs/after", 4096], ["packs/small", 4096]]
    assert aside == []


# ---- what is not an object


def test_a_folder_is_not_an_object_and_deleting_one_or_below_an_object_is_fine(root):
    store = DirectoryStore(str(root))
    store.write("packs/a", b"x")
    with pytest.raises(Missing):
        store.read("packs")
    store.delete("packs")
    store.delete("packs/a/x")
    assert list(store.list("")) == [("packs/a", 1)]


@pytest.mark.parametrize("prefix", ["../", "..", ".aside/", ".aside", "packs/../", "packs/../../"])
def test_a_list_never_leaves_the_store_nor_shows_what_lies_aside(tmp_path, root, prefix):
    store = DirectoryStore(str(root))
    store.write("packs/a", b"x")
    (tmp_path / "outside").write_bytes(b"")
    (root / ".aside" / "1-a").write_bytes(b"half")
    assert list(store.list(prefix)) == []


def test_a_root_below_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HotstartError, match="cannot be written: Not a directory"):
        DirectoryStore(str(tmp_path / "file" / "s")).write("a", b"")


def test_a_name_too_long_is_one_clear_error(root):
    DirectoryStore(str(root)).write("packs/a", b"x")
    with pytest.raises(HotstartError, match="cannot be read: File name too long"):
        DirectoryStore(str(root)).read("packs/" + "a" * 300)


@pytest.mark.parametrize("offset", [1 << 62, 1 << 63, 1 << 70])
def test_a_range_behind_everything_is_empty_and_a_long_one_takes_no_memory(root, offset):
    store = DirectoryStore(str(root))
    store.write("a", b"abc")
    assert store.read("a", offset, 5) == b""
    assert store.read("a", 1, 1 << 60) == b"bc"


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(root, monkeypatch):
    store = DirectoryStore(str(root))
    store.write("names/a", b"0" * 64)
    store.write("packs/x", b"precious")
    scandir = os.scandir

    def failing(path):
        if str(path).rstrip("/").endswith("names"):
            raise OSError(errno.EIO, "Input/output error", path)
        return scandir(path)

    with monkeypatch.context() as broken:
        broken.setattr(os, "scandir", failing)
        for look in (lambda: list(store.list("names/")), lambda: collect(repository(store))):
            with pytest.raises(HotstartError, match="cannot be read: Input/output error"):
                look()
    assert store.read("packs/x") == b"precious"
