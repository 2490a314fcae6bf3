"""File packs: a reader that knows docs/format.md only finds every entry of a folder, and no byte that is zero."""

import io
import os
import random
import socket
import stat
import struct

import pytest

from hotstart.adapters.linux.filepack import write_file_pack

PAGE = 4096
HEAD = struct.Struct("<BBHHIIIIQq")


def pack(root, leave_out=()):
    out = io.BytesIO()
    write_file_pack(out, str(root), ["/tmp"], frozenset(leave_out))
    return out.getvalue()


def read(data):
    """Read a pack as docs/format.md says: {path: (type, mode, size, mtime, target, runs)}, and fail at anything left over."""
    assert data[:8] == b"HSFILES1"
    at, entries = 8, {}
    while at < len(data):
        kind, reserved, name_length, goal_length, mode, uid, gid, count, size, mtime = HEAD.unpack_from(data, at)
        assert (reserved, uid, gid) == (0, os.geteuid(), os.getegid())
        at += HEAD.size
        name, at = data[at : at + name_length], at + name_length
        goal, at = data[at : at + goal_length], at + goal_length
        spans = list(struct.iter_unpack("<QQ", data[at : at + 16 * count]))
        at += 16 * count
        runs = []
        for offset, length in spans:
            assert len(data) >= at + length
            runs.append((offset, data[at : at + length]))
            at += length
        assert os.fsdecode(name) not in entries
        entries[os.fsdecode(name)] = (chr(kind), mode, size, mtime, os.fsdecode(goal), runs)
    return entries


def content(entry):
    _, _, size, _, _, runs = entry
    data = bytearray(size)
    for offset, run in runs:
        data[offset : offset + len(run)] = run
    assert len(data) == size  # no run reaches beyond the end
    return bytes(data)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "tmp").mkdir()
    return tmp_path


def test_an_empty_folder_gives_an_empty_pack(root):
    assert pack(root) == b"HSFILES1"


def test_every_kind_of_entry_is_packed_with_its_mode_and_date_and_sockets_are_not(root):
    top = root / "tmp"
    (top / "folder").mkdir(mode=0o750)
    (top / "folder" / "file").write_bytes(b"hello")
    os.chmod(top / "folder" / "file", 0o4711)
    os.utime(top / "folder" / "file", ns=(0, -1_234_567_891))  # before 1970: the field is signed
    os.symlink("../nowhere", top / "link")
    os.mkfifo(top / "pipe", 0o600)
    os.link(top / "folder" / "file", top / "twin")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(top / "socket"))
        entries = read(pack(root))
    assert {path: entry[0] for path, entry in entries.items()} == {
        "/tmp/folder": "D",
        "/tmp/folder/file": "F",
        "/tmp/link": "L",
        "/tmp/pipe": "P",
        "/tmp/twin": "H",
    }
    assert entries["/tmp/folder/file"][1:4] == (0o4711, 5, -1_234_567_891)
    assert content(entries["/tmp/folder/file"]) == b"hello"
    assert entries["/tmp/folder"][1] == 0o750
    assert entries["/tmp/pipe"][1:3] == (0o600, 0)
    assert entries["/tmp/link"][4] == "../nowhere"
    assert entries["/tmp/twin"][4] == "/tmp/folder/file"


def test_folders_come_before_what_is_in_them_and_links_after_what_they_name(root):
    (root / "tmp" / "b" / "c").mkdir(parents=True)
    (root / "tmp" / "b" / "c" / "z").write_bytes(b"x")
    os.link(root / "tmp" / "b" / "c" / "z", root / "tmp" / "a")
    seen = set()
    for path, (kind, *_, goal, _) in read(pack(root)).items():
        assert os.path.dirname(path) in seen | {"/tmp"}
        assert kind != "H" or goal in seen
        seen.add(path)
    assert seen == {"/tmp/a", "/tmp/b", "/tmp/b/c", "/tmp/b/c/z"}


def test_what_is_left_out_is_left_out_with_everything_below_it(root):
    (root / "tmp" / "ours" / "deep").mkdir(parents=True)
    (root / "tmp" / "ours" / "deep" / "x").write_bytes(b"x")
    (root / "tmp" / "ours-too").write_bytes(b"x")
    assert set(read(pack(root, ["/tmp/ours"]))) == {"/tmp/ours-too"}


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, (1 << 20) - 1, (1 << 20) + PAGE + 7])
def test_a_file_of_any_length_comes_back(root, size):
    data = random.Random(size).randbytes(size)
    (root / "tmp" / "x").write_bytes(data)
    assert content(read(pack(root))["/tmp/x"]) == data


def test_pages_of_zeros_are_not_stored_whether_they_are_holes_or_were_written(root):
    with open(root / "tmp" / "x", "wb") as f:
        f.truncate(64 << 20)
        f.seek(3 << 20)
        f.write(bytes(2 << 20))
        f.seek((40 << 20) + 5 * PAGE + 17)
        f.write(b"here")
    ((_, _, size, _, _, runs),) = read(pack(root)).values()
    assert size == 64 << 20
    assert [(offset, len(run)) for offset, run in runs] == [((40 << 20) + 5 * PAGE, PAGE)]


def test_neighbouring_pages_are_one_run(root):
    (root / "tmp" / "x").write_bytes(b"x" * 3 * PAGE + bytes(PAGE) + b"y" * 10)
    ((*_, runs),) = read(pack(root)).values()
    assert [(offset, len(run)) for offset, run in runs] == [(0, 3 * PAGE), (4 * PAGE, 10)]


def test_whatever_pages_a_sparse_file_has_it_comes_back(root):
    chance = random.Random(3)
    for i in range(30):
        size = chance.randrange(1, 3 << 20)
        with open(root / "tmp" / f"{i:02}", "wb") as f:
            f.truncate(size)
            for _ in range(chance.randrange(6)):
                at = chance.randrange(size)
                f.seek(at)
                f.write(chance.choice([bytes, chance.randbytes])(min(chance.randrange(1, 9 * PAGE), size - at)))
    entries = read(pack(root))
    assert len(entries) == 30
    for path, entry in entries.items():
        with open(f"{root}{path}", "rb") as f:
            assert content(entry) == f.read()


def test_names_are_bytes_and_need_not_be_text(root):
    name = os.fsdecode(b"/tmp/gr\xf6\xdfe \xff\n")
    with open(f"{root}{name}", "wb"):
        pass
    assert set(read(pack(root))) == {name}


def test_packing_changes_nothing_in_the_folder(root):
    (root / "tmp" / "x").write_bytes(b"x" * PAGE)
    before = os.stat(root / "tmp" / "x")
    pack(root)
    after = os.stat(root / "tmp" / "x")
    assert (after.st_mtime_ns, after.st_ctime_ns, stat.S_IMODE(after.st_mode)) == (
        before.st_mtime_ns,
        before.st_ctime_ns,
        stat.S_IMODE(before.st_mode),
    )
