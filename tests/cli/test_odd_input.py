"""Odd input is told in one clear line with the right exit code: no traceback, nothing begun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotstart.cli.main import main

RUN = ("run", "w")
SLEEP = ("--", "sleep", "60")
NUMBERS = ("", "x", "1e999", "inf", "nan", "-inf", "٣", "²", "1_0", " 1", "1 ", "+1", "0x10", "1e3", "9" * 5000)
NAMES = ("", "../x", "a/b", ".", "..", "a b", "a\nb", "\x1b[31m", "-", "x" * 65, "ü", "٣")

BAD_USAGE = [
    *((*RUN, f"--ready-timeout={n}", *SLEEP) for n in (*NUMBERS, "0", "-1")),
    *((*RUN, f"--cpus={n}", *SLEEP) for n in (*NUMBERS, "0", "-1", "0.001", "99999999999")),
    *((*RUN, f"--memory={n}", *SLEEP) for n in (*NUMBERS, "0", "-1", "M", "0.1", "1e3M", "٣G", "9999999999T", "1GG")),
    *((*RUN, f"--port={n}", *SLEEP) for n in (*NUMBERS, "0", "-1", "65536", "1.5")),
    *((*RUN, f"--publish={n}", *SLEEP) for n in (*NUMBERS, "-1", "65536", "h:", ":", "h:²", "h:٣", "[::1]", "h:99999")),
    *((*RUN, f"--env={e}", *SLEEP) for e in ("", "=", "=x", "NAME", "a\nb")),
    *((*RUN, f"--writable={d}", *SLEEP) for d in ("", "/no/such/folder", "/etc/passwd", "a\nb")),
    *((*RUN, f"--network={n}", *SLEEP) for n in ("", "both", "egres")),
    *(
        (*RUN, f"--ready-url={u}", *SLEEP)
        for u in ("", "x", "https://h/", "http://", "http://h:99999/", "http://h/a b")
    ),
    *((*RUN, f"--warmup={f}", *SLEEP) for f in ("", "/no/such/file", "/", "/dev/null", "a\nb")),
    *(("run", name, *SLEEP) for name in NAMES),
    *(("restore", name) for name in NAMES),
    *(("restore", "s", f"--name={name}") for name in NAMES),
    *(("restore", "s", f"--replicas={n}") for n in (*NUMBERS, "0", "-1", "1001", "1000000000000")),
    *(("restore", "s", f"--publish={n}") for n in (*NUMBERS, "-1", "65536")),
    ("restore", "s", "--publish=65535", "--replicas=2"),
    ("restore", "s", f"--name={'x' * 63}", "--replicas=2"),
    *(("snapshot", "create", name, *SLEEP) for name in NAMES),
    *(("snapshot", command, name) for command in ("store", "verify", "rm", "inspect") for name in NAMES),
    *((command, name) for command in ("plan", "receipt", "logs", "stop", "rm") for name in NAMES),
    *(("exec", name, "--", "true") for name in NAMES),
    *(("stop", "w", f"--grace={n}") for n in (*NUMBERS, "-1")),
    *(("bench", f"--rounds={n}", "--port=1", "--warmup=/no/such/file", *SLEEP) for n in NUMBERS),
    *(
        (*command, "\udcff")
        for command in (("restore",), ("snapshot", "store"), ("run",), ("logs",), (), ("snapshot",))
    ),
    (*RUN, "--", "sleep", "\udcff"),
    (*RUN, "--env=X=\udcff", *SLEEP),
    (),
    ("",),
    ("defrost",),
    ("a\nb",),
    ("snapshot",),
    ("snapshot", ""),
    ("snapshot", "thaw"),
    ("restore",),
    ("run",),
    RUN,
    (*RUN, "--"),
    ("exec", "w"),
    ("ps", "--jso"),
    ("ps", "extra"),
    ("ps", "x" * 100_000),
]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOTSTART_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOTSTART_RUN", str(tmp_path / "run"))
    yield
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def complaint(capsys, code_wanted, *arguments):
    """Run a command that must fail; returns what it says."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code == code_wanted, err
    assert out == ""
    assert err.startswith("hotstart: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    assert err[:-1].isprintable()
    return err


@pytest.mark.parametrize(
    "arguments", BAD_USAGE, ids=lambda a: " ".join(a).encode("ascii", "backslashreplace").decode()[:60]
)
def test_odd_input_is_bad_usage_in_one_line(capsys, arguments):
    assert len(complaint(capsys, 2, *arguments)) < 1100


@pytest.mark.parametrize("variable", ["HOTSTART_HOME", "HOTSTART_RUN"])
def test_a_folder_whose_name_is_not_utf8_is_bad_usage(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "/var/tmp/\udcff")
    assert variable in complaint(capsys, 2, "ps")


def test_a_folder_that_cannot_be_one_is_named(capsys, monkeypatch):
    monkeypatch.setenv("HOTSTART_HOME", "/dev/null/home")
    assert "/dev/null/home/cache/snapshots: Not a directory" in complaint(capsys, 1, "snapshot", "ls")


@pytest.mark.parametrize("command", ["restore", "plan", "receipt", "logs", "stop", "rm"])
def test_what_does_not_exist_is_not_found(capsys, command):
    assert "nobody" in complaint(capsys, 3, command, "nobody")


def test_a_working_directory_that_is_gone_is_bad_usage(capsys, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "working directory" in complaint(capsys, 2, *RUN, *SLEEP)


def test_a_working_directory_that_is_not_utf8_is_bad_usage(capsys, tmp_path, monkeypatch):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "not UTF-8" in complaint(capsys, 2, *RUN, *SLEEP)


def test_a_warm_up_file_is_named_with_its_line(capsys, tmp_path):
    file = tmp_path / "w.jsonl"
    for line in (b'{"path": "/a\\r\\nb"}', b"\xff", b'{"path":' + b"[" * 100_000, b"{}", b"\x00"):
        file.write_bytes(b'{"path": "/"}\n' + line + b"\n")
        assert "w.jsonl" in complaint(capsys, 2, *RUN, "--port=1", f"--warmup={file}", *SLEEP)
    file.unlink()


def test_help_lists_every_exit_code(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(
        f"{code} {word}" in said for code, word in ((0, "done"), (2, "bad usage"), (5, "this"), (130, "interrupted"))
    )


def hotstart(*arguments, **how):
    return subprocess.run([sys.executable, "-m", "hotstart.cli.main", *arguments], check=False, **how)


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = hotstart("--help", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_finds_no_room_is_an_error_in_one_line():
    with open("/dev/full", "wb") as full:
        done = hotstart("ps", "--json", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


def test_a_command_works_with_its_standard_files_closed():
    command = f'exec "{sys.executable}" -m hotstart.cli.main "$@" <&- >&- 2>&-'
    for arguments, code in (
        (["ps"], 0),
        (["ps", "--json"], 0),
        (["restore", "nobody"], 3),
        (["defrost"], 2),
        (["--help"], 0),
    ):
        assert subprocess.run(["sh", "-c", command, "sh", *arguments], check=False).returncode == code
