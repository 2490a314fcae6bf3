"""hotstart keys, as it is called."""

import json
import os
import signal

import pytest

from hotstart.cli.main import main
from hotstart.store.directory import DirectoryStore
from hotstart.store.encryption import DataKeys, store_key_id
from hotstart.store.signing import Keyring, key_id

OLD, NEW = bytes(range(32)), bytes(range(1, 33))


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setenv("HOTSTART_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOTSTART_RUN", str(tmp_path / "run"))
    for variable in ("HOTSTART_STORE_KEY", "HOTSTART_STORE_KEY_FILE", "HOTSTART_STORE_KEY_COMMAND"):
        monkeypatch.delenv(variable, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def keys(capsys):
    def call(*arguments):
        """(exit code, stdout, stderr)"""
        code = main(["keys", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def alice(tmp_path):
    return Keyring(str(tmp_path / "alice")).signer().key


def test_a_key_is_made_once_and_printed_each_time(keys, tmp_path):
    code, key, complaint = keys("new")
    assert (code, complaint) == (0, "")
    assert Keyring(str(tmp_path / "home" / "keys")).own().key == key.strip()
    code, again, complaint = keys("new")
    assert (code, again) == (0, key)
    assert "there is a signing key already" in complaint
    assert json.loads(keys("new", "--json")[1]) == {"id": key_id(key.strip()), "key": key.strip(), "made": False}
    assert os.listdir(tmp_path / "home") == ["keys"]


def test_listing_an_empty_keyring_makes_none(keys, tmp_path):
    assert json.loads(keys("ls", "--json")[1]) == {"policy": "required", "keys": []}
    assert not (tmp_path / "home").exists()


def test_keys_are_listed_with_whose_they_are(keys, alice):
    own = keys("new")[1].strip()
    assert keys("trust", alice, "Alice, build farm") == (0, "", "")
    listed = json.loads(keys("ls", "--json")[1])
    assert listed["keys"] == [
        {"id": key_id(own), "key": own, "comment": "", "own": True},
        {"id": key_id(alice), "key": alice, "comment": "Alice, build farm", "own": False},
    ]
    lines = keys("ls")[1].splitlines()
    assert lines[0] == "signatures are required"
    assert lines[1].split() == ["ID", "WHOSE", "KEY", "COMMENT"]
    assert lines[2].split() == [key_id(own), "own", own]
    assert lines[3].split(maxsplit=3) == [key_id(alice), "trusted", alice, "Alice, build farm"]


def test_what_is_distrusted_is_gone(keys, alice):
    for which in (alice, key_id(alice)):
        keys("trust", alice)
        assert keys("distrust", which) == (0, "", "")
        assert json.loads(keys("ls", "--json")[1])["keys"] == []
    code, _, complaint = keys("distrust", alice)
    assert code == 3
    assert complaint == f"hotstart: no trusted key {alice}: `hotstart keys ls` lists them\n"


def test_the_policy_is_set_and_shown(keys):
    assert keys("policy") == (0, "required\n", "")
    assert keys("policy", "optional") == (0, "", "")
    assert keys("policy") == (0, "optional\n", "")
    assert json.loads(keys("policy", "required", "--json")[1]) == {"policy": "required"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("trust", "hsk1_x"),
        ("trust",),
        ("distrust", "x"),
        ("policy", "never"),
        ("rotate", "/tmp"),
        ("ls", "x"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(keys, arguments):
    code, out, complaint = keys(*arguments)
    assert (code, out) == (2, "")
    assert complaint.startswith("hotstart: ") and complaint.count("\n") == 1


def test_without_a_command_it_says_what_there_is(keys):
    code, out, err = keys()
    assert (code, out) == (2, "")
    assert "no command: it is one of new, ls, trust, distrust, policy, rotate; " in err
    code, out, _ = keys("--help")
    assert code == 0
    assert all(f"\n  {command} " in out for command in ("new", "ls", "trust", "distrust", "policy", "rotate"))


# ---- rotate


@pytest.fixture
def encrypted(tmp_path):
    """(where the store is, a data key's set)"""
    where = str(tmp_path / "store")
    return where, DataKeys(DirectoryStore(where), OLD).current().set_id


@pytest.fixture
def new_key(tmp_path):
    (tmp_path / "new.key").write_text(NEW.hex() + "\n")
    return str(tmp_path / "new.key")


def test_the_key_of_a_store_is_changed(keys, encrypted, new_key, monkeypatch):
    where, set_id = encrypted
    monkeypatch.setenv("HOTSTART_STORE_KEY", OLD.hex())
    code, out, complaint = keys("rotate", where, "--to-file", new_key)
    assert (code, complaint) == (0, "")
    assert out == f"1 data key now opened by the key with id {store_key_id(NEW)}\n"
    assert list(DirectoryStore(where).list("keys/")) == [(f"keys/{set_id}/{store_key_id(NEW)}", 60)]
    assert keys("rotate", where, "--to-file", new_key)[0] == 3  # there is nothing left for the old one


def test_the_change_can_be_read_by_a_program(keys, encrypted, new_key, monkeypatch):
    monkeypatch.setenv("HOTSTART_STORE_KEY_COMMAND", f"echo {OLD.hex()}")
    out = keys("rotate", encrypted[0], "--to-file", new_key, "--json")[1]
    assert json.loads(out) == {"data_keys": 1, "old_id": store_key_id(OLD), "new_id": store_key_id(NEW)}


def test_without_the_old_key_nothing_is_changed(keys, encrypted, new_key, monkeypatch):
    where, _ = encrypted
    before = list(DirectoryStore(where).list(""))
    code, _, complaint = keys("rotate", where, "--to-file", new_key)
    assert code == 2
    assert "which is the old key? Set HOTSTART_STORE_KEY, " in complaint
    monkeypatch.setenv("HOTSTART_STORE_KEY", bytes(32).hex())
    code, _, complaint = keys("rotate", where, "--to-file", new_key)
    assert code == 3
    assert f"is opened by the old key, the one with id {store_key_id(bytes(32))}" in complaint
    assert list(DirectoryStore(where).list("")) == before


def test_the_keys_of_a_store_never_enter_a_workers_environment(monkeypatch):
    from hotstart.adapters.criu import program
    from hotstart.cli.common import add_worker_options, parser, worker_spec

    monkeypatch.setattr(program, "find_criu", lambda: program.Criu("/usr/sbin/criu"))
    monkeypatch.setenv("HOTSTART_STORE_KEY", OLD.hex())
    monkeypatch.setenv("HOTSTART_STORE_KEY_COMMAND", "kms")
    monkeypatch.setenv("HARMLESS", "1")
    p = parser("run", "")
    add_worker_options(p)
    environment = worker_spec(p.parse_args([]), ["true"]).environment
    assert environment["HARMLESS"] == "1"
    assert not [name for name in environment if name.startswith("HOTSTART_STORE_KEY")]
