"""What cannot be checkpointed is recognised by what /proc says."""

import pytest
from msgspec import structs

from hotstart.snapshot.obstacles import Privileges, ProcessFacts, lacking, obstacle

ORDINARY = ProcessFacts(
    1000,
    "server",
    frozenset({0}),
    frozenset({0}),
    open_files=("/dev/null", "pipe:[1]", "socket:[2]", "anon_inode:[eventpoll]", "anon_inode:inotify", "/srv/model"),
)
ROOT = Privileges(uid=0, gid=0, sys_resource=False)


def test_an_ordinary_process_has_no_obstacle():
    assert obstacle(ORDINARY) is None
    assert lacking(ORDINARY, ROOT) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"open_files": ("anon_inode:[io_uring]",)}, "has io_uring open"),
        ({"open_files": ("anon_inode:[userfaultfd]",)}, "has userfaultfd open"),
        ({"open_files": ("anon_inode:bpf-map",)}, "has bpf-map open"),
        ({"open_files": ("/secretmem (deleted)",)}, "secret memory"),
        ({"open_files": ("/dev/pts/3",)}, "terminal"),
        ({"namespaces": ("mnt", "user")}, "namespaces of its own (mnt, user)"),
        ({"tracer_pid": 7}, "traced by process 7"),
    ],
)
def test_each_obstacle_is_named_with_the_process(changes, reason):
    found = obstacle(structs.replace(ORDINARY, **changes))
    assert reason in found
    assert found.startswith("process 1000 (server)")


def test_another_users_process_needs_a_capability():
    other = structs.replace(ORDINARY, uids=frozenset({0, 101}))
    assert "runs as user 101" in lacking(other, ROOT)
    assert "CAP_SYS_RESOURCE" in lacking(other, ROOT)
    assert lacking(other, Privileges(0, 0, sys_resource=True)) is None


def test_another_group_counts_too():
    assert "runs as group 104" in lacking(structs.replace(ORDINARY, gids=frozenset({104})), ROOT)
