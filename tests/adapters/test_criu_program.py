"""What CRIU's log says when it fails: real logs of CRIU 4.2.1, shortened."""

import pytest

from hotstart.adapters.criu.program import why_it_failed

RLIMIT = "(00.000123) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
TUN = "(00.001234) Error (criu/tun.c:85): tun: Unable to create tun: No such file or directory\n"
BAD_MODE = """\
(00.004321)   1000: Error (criu/files-reg.c:2294): File srv/data has bad mode 0100600 (expect 0100644)
(00.004330)   1000: Error (criu/files.c:1221): Unable to open fd=5 id=0x8
(00.004512) Error (criu/cr-restore.c:2331): Restoring FAILED.
"""
USERFAULTFD = """\
(00.000100) Warn  (criu/kerndat.c:1642): CRIU was built without libnftables support
(00.002000) Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (anon anon_inode:[userfaultfd])
(00.002001) Error (criu/cr-dump.c:1545): Dump files (pid: 1000) failed with -1
(00.002100) Error (criu/cr-dump.c:1975): Dumping FAILED.
"""
UNSEIZABLE = """\
(00.000300) Warn  (compel/src/lib/infect.c:132): Unable to interrupt task: 1001 (Operation not permitted)
(00.000301) Error (compel/src/lib/infect.c:262): Unseizable non-zombie 1001 found, state t, err -1/10
(00.001000) Error (criu/cr-dump.c:1975): Dumping FAILED.
"""


@pytest.mark.parametrize("before", ["", RLIMIT, TUN], ids=["", "rlimit", "tun"])
@pytest.mark.parametrize(
    ("log", "said"),
    [
        (BAD_MODE, "File srv/data has bad mode 0100600 (expect 0100644)"),
        (USERFAULTFD, "Can't dump file 3 of that type [600] (anon anon_inode:[userfaultfd])"),
        (UNSEIZABLE, "Unseizable non-zombie 1001 found, state t, err -1/10"),
        ("(00.1) Error (criu/cr-restore.c:2331): Restoring FAILED.\n", "Restoring FAILED."),
        ("(00.1) Warn  (criu/x.c:1): nothing much\n", ""),
        ("", ""),
    ],
)
def test_the_first_error_that_criu_did_not_go_on_after_is_told(tmp_path, log, said, before):
    (tmp_path / "log").write_text(before + log)
    assert why_it_failed(str(tmp_path / "log")) == said


def test_a_log_that_is_not_there_tells_nothing(tmp_path):
    assert why_it_failed(str(tmp_path / "log")) == ""


def test_a_long_error_is_cut(tmp_path):
    (tmp_path / "log").write_text(f"(00.1) Error (criu/x.c:1): {'x' * 5000}\n")
    assert why_it_failed(str(tmp_path / "log")) == "x" * 300
