"""The commands on snapshots and stores, as a user calls them: what they print, what they return, one line for what went wrong."""

import json
import os

import pytest

from hotstart.cli import snapshot_store
from hotstart.cli.main import main
from hotstart.store.local import LocalSnapshots
from tests.store.samples import MIB, contents_of, make_local, tree_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="snapshots are root's")


class Machine:
    """A HOTSTART_HOME, and the command in it."""

    def __init__(self, folder, monkeypatch, capfd):
        self.home, self._monkeypatch, self._capfd = folder / "home", monkeypatch, capfd
        self.run_root = folder / "run"

    def hotstart(self, *arguments, code=0):
        """Run a command; returns what it printed, or the one line of its error."""
        self._monkeypatch.setenv("HOTSTART_HOME", str(self.home))
        self._monkeypatch.setenv("HOTSTART_RUN", str(self.run_root))
        self._capfd.readouterr()
        try:
            returned = main(["snapshot", *map(str, arguments)])
        except SystemExit as e:
            returned = e.code
        out, err = self._capfd.readouterr()
        assert returned == code, out + err
        if code:
            lines = [line for line in err.splitlines() if line.startswith("hotstart: ")]
            assert len(lines) == 1 and "Traceback" not in err, err
            return lines[0]
        return out

    def json(self, *arguments):
        return json.loads(self.hotstart(*arguments, "--json"))

    @property
    def snapshots(self):
        return LocalSnapshots(str(self.home))


@pytest.fixture
def machine(tmp_path, monkeypatch, capfd):
    for variable in ("HOTSTART_REMOTE", "HOTSTART_CACHE_QUOTA", "HOTSTART_STORE_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(snapshot_store, "push_rest_in_background", lambda: None)
    return Machine(tmp_path / "one", monkeypatch, capfd)


@pytest.fixture
def another(tmp_path, monkeypatch, capfd):
    return Machine(tmp_path / "another", monkeypatch, capfd)


@pytest.fixture
def local(machine):
    return make_local(machine.home)


def test_a_snapshot_goes_to_a_shared_store_and_comes_to_another_machine(machine, another, local, tmp_path):
    shared = str(tmp_path / "shared")
    pushed = machine.json("push", "llm-1", shared)
    assert pushed["snapshot"] == "llm-1" and pushed["stored_bytes"] > 100_000
    assert machine.json("push", "llm-1", shared)["stored_bytes"] == 0
    refusal = another.hotstart("pull", "llm-1", shared, code=4)
    assert "signed by the unknown key" in refusal and "hotstart keys trust hsk1_" in refusal
    assert another.snapshots.names() == []
    (another.home / "keys").mkdir(parents=True, exist_ok=True)
    (another.home / "keys" / "policy").write_text("optional\n")
    pulled = another.json("pull", "llm-1", shared)
    assert pulled["digest"] == local.digest()
    assert contents_of(another.snapshots.open("llm-1")) == contents_of(local)
    assert [row["where"] for row in another.json("ls")] == ["local"]


def test_a_snapshot_travels_in_a_file(machine, another, local, tmp_path):
    file = tmp_path / "snapshot.hotstart"
    exported = machine.json("export", "llm-1", file)
    assert exported["bytes"] == file.stat().st_size
    assert "already" in machine.hotstart("export", "llm-1", file, code=2)
    another.hotstart("import", file, code=4)
    assert machine.json("import", file) == {"snapshot": "llm-1"}
    assert [row["where"] for row in machine.json("ls")] == ["both"]
    data = bytearray(file.read_bytes())
    file.write_bytes(data[: len(data) // 2])
    machine.hotstart("import", file, code=4)
    assert "there is no file" in machine.hotstart("import", tmp_path / "nothing", code=3)


def test_a_store_is_damaged_found_out_and_repaired(machine, local):
    machine.hotstart("push", "llm-1")
    assert machine.json("verify", "llm-1") == {"snapshot": "llm-1", "local": "good", "stored": "good"}
    (pack,) = (machine.home / "store" / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    assert "damaged" in machine.hotstart("verify", "llm-1", code=4)
    assert machine.json("verify", "llm-1", "--repair") == {"snapshot": "llm-1", "local": "good", "stored": "repaired"}
    assert machine.json("verify", "llm-1")["stored"] == "good"


@pytest.mark.parametrize("victim", ["names", "manifests", "places", "signatures", "packs"])
@pytest.mark.parametrize("how", ["gone", "emptied"])
def test_whatever_a_store_lost_is_repaired_from_the_local_copy(machine, local, victim, how):
    machine.hotstart("push", "llm-1")
    (path,) = tree_of(machine.home / "store" / victim)
    os.chmod(path, 0o644)
    os.unlink(path) if how == "gone" else os.truncate(path, 0)
    if (victim, how) == ("names", "gone"):  # then nothing says that it was ever there
        machine.hotstart("push", "llm-1")
    else:
        machine.hotstart("verify", "llm-1", code=4)
        machine.hotstart("verify", "llm-1", "--repair")
    assert machine.json("verify", "llm-1") == {"snapshot": "llm-1", "local": "good", "stored": "good"}


def test_a_local_copy_is_damaged_found_out_and_repaired_from_the_store(machine, local):
    right = contents_of(local)
    machine.hotstart("push", "llm-1")
    path = local.memory_path(local.manifest.memory[0].name)
    with open(path, "r+b") as f:
        f.seek(3 * MIB)
        f.write(b"!")
    assert "memory file" in machine.hotstart("verify", "llm-1", code=4)
    assert machine.json("verify", "llm-1", "--repair")["local"] == "repaired"
    assert contents_of(machine.snapshots.open("llm-1")) == right


def test_without_a_good_copy_a_repair_says_where_one_could_come_from_and_removes_nothing(machine, local):
    path = local.memory_path(local.manifest.memory[0].name)
    with open(path, "r+b") as f:
        f.seek(3 * MIB)
        f.write(b"!")
    machine.hotstart("verify", "llm-1", "--repair", code=4)
    assert machine.snapshots.names() == ["llm-1"]
    assert os.path.exists(path)


def test_what_is_removed_is_gone_from_both_and_leaves_nothing(machine, local):
    machine.hotstart("push", "llm-1")
    machine.hotstart("rm", "llm-1")
    assert machine.json("ls") == []
    assert tree_of(machine.home / "store") == set()
    assert tree_of(machine.home / "cache") == set()
    for command in ("rm", "push", "pull", "verify", "inspect"):
        assert "llm-1" in machine.hotstart(command, "llm-1", code=3)


def test_garbage_is_what_nothing_leads_to_and_a_dry_run_only_says_so(machine, local):
    machine.hotstart("push", "llm-1")
    (machine.home / "store" / "names" / "llm-1").unlink()
    would = machine.json("gc", "--dry-run")
    assert would["objects"] == 4 and would["freed_bytes"] > 0
    assert len(tree_of(machine.home / "store")) == 4
    assert machine.json("gc") == would
    assert tree_of(machine.home / "store") == set()


def test_the_last_ones_are_kept(machine):
    for i, name in enumerate(["a", "b", "c"]):
        make_local(machine.home, name, f"{i:04x}", created_unix_s=1000 + i)
        machine.hotstart("push", name)
    assert machine.json("gc", "--keep-last", 1, "--dry-run")["removed"] == ["a", "b"]
    assert len(machine.json("ls")) == 3
    assert machine.json("gc", "--keep-last", 1)["removed"] == ["a", "b"]
    assert [row["snapshot"] for row in machine.json("ls")] == ["c"]
    assert machine.json("verify", "c")["stored"] == "good"


def test_a_quota_gives_up_local_copies_of_what_is_stored_and_of_nothing_else(machine):
    for i, name in enumerate(["a", "b"]):
        make_local(machine.home, name, f"{i:04x}")
    machine.hotstart("push", "a")
    assert machine.json("gc", "--quota", "1")["evicted"] == ["a"]
    assert {row["snapshot"]: row["where"] for row in machine.json("ls")} == {"a": "stored", "b": "local"}
    machine.hotstart("pull", "a")
    assert machine.json("verify", "a") == {"snapshot": "a", "local": "good", "stored": "good"}


def test_two_snapshots_are_compared(machine):
    for i, name in enumerate(["a", "b"]):
        make_local(machine.home, name, f"{i:04x}", regions=b"{}")
    found = machine.json("diff", "a", "b")
    assert (found["first"], found["second"]) == ("a", "b")
    assert 0 < found["new_bytes"] < found["second_bytes"] / 4
    assert machine.json("diff", "a", "a")["new_bytes"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("push", "../x"),
        ("pull", "a/b"),
        ("verify", ".hidden"),
        ("rm", ""),
        ("gc", "--keep-last", "-1"),
        ("gc", "--keep-younger", "soon"),
        ("gc", "--keep-younger", ""),
        ("gc", "--keep-younger", "d"),
        ("gc", "--quota", "much"),
        ("gc", "--quota", ""),
        ("diff", "a", "../b"),
        ("nothing",),
    ],
)
def test_what_cannot_be_meant_is_bad_usage(machine, arguments):
    machine.hotstart(*arguments, code=2)


def test_a_snapshot_of_another_name_there_is_never_replaced(machine, another, local, tmp_path):
    shared = str(tmp_path / "shared")
    machine.hotstart("push", "llm-1", shared)
    make_local(another.home, root_pid=1001)
    assert "names are immutable" in another.hotstart("push", "llm-1", shared, code=2)
    assert machine.json("push", "llm-1", shared)["stored_bytes"] == 0


def test_a_quota_never_gives_up_the_only_copy_that_can_be_reached(machine, another, local, tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    machine.hotstart("push", "llm-1", shared)
    (another.home / "keys").mkdir(parents=True)
    (another.home / "keys" / "policy").write_text("optional\n")
    another.hotstart("pull", "llm-1", shared)
    assert another.json("gc", "--quota", "1K")["evicted"] == []  # nothing says where it came from
    monkeypatch.setenv("HOTSTART_REMOTE", str(tmp_path / "empty"))
    assert another.json("gc", "--quota", "1K")["evicted"] == []
    assert another.snapshots.names() == ["llm-1"]
    monkeypatch.setenv("HOTSTART_REMOTE", str(shared))
    assert another.json("gc", "--quota", "1K")["evicted"] == ["llm-1"]
    assert another.snapshots.names() == []
