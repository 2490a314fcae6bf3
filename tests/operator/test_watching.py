"""What is seen of the cluster is never older than what was seen before."""

import time

from hotstart.adapters.kubernetes.objects import SNAPSHOTS, Unreachable
from hotstart.operator.agenda import Agenda
from hotstart.operator.memory import MemoryCluster
from hotstart.operator.watching import Watched
from tests.operator.conformance import snapshot


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def names(watched):
    return sorted(o["metadata"]["name"] for o in watched.all())


def test_a_watch_goes_on_over_errors_and_forgotten_versions(monkeypatch):
    cluster, told = MemoryCluster(lambda: 0.0), []
    watched = Watched(cluster, SNAPSHOTS, lambda o: told.append(o["metadata"]["name"]))
    real, failures = cluster.watch, [Unreachable("gone"), Unreachable("gone")]

    def watch(*arguments):
        if failures:
            raise failures.pop()
        yield from real(*arguments)

    monkeypatch.setattr(cluster, "watch", watch)
    monkeypatch.setattr("hotstart.operator.watching._SHORTEST_PAUSE_S", 0.01)
    watched.start()
    try:
        cluster.create(SNAPSHOTS, snapshot("ns", "a"))
        until(lambda: names(watched) == ["a"])
        for i in range(3):
            cluster.create(SNAPSHOTS, snapshot("ns", f"b{i}"))
        del cluster._changes[:-1]
        until(lambda: names(watched) == ["a", "b0", "b1", "b2"])
        cluster.delete(SNAPSHOTS, "ns", "a")
        until(lambda: names(watched) == ["b0", "b1", "b2"])
        assert {"a", "b0", "b1", "b2"} <= set(told)
    finally:
        watched.end()


def test_a_list_that_was_slower_than_the_watch_changes_nothing(monkeypatch):
    cluster = MemoryCluster(lambda: 0.0)
    watched = Watched(cluster, SNAPSHOTS, lambda _: None)
    made = cluster.create(SNAPSHOTS, snapshot("ns", "a"))
    old = cluster.list(SNAPSHOTS)
    cluster.patch(SNAPSHOTS, "ns", "a", {"status": {"phase": "Ready"}}, "status")
    watched.take("MODIFIED", cluster.get(SNAPSHOTS, "ns", "a"))
    monkeypatch.setattr(cluster, "list", lambda *_: old)
    watched.list()
    assert watched.get("ns", "a") != made
    assert watched.get("ns", "a")["status"] == {"phase": "Ready"}


def test_the_agenda_has_each_key_once_at_its_earliest_time():
    now = [0.0]
    agenda = Agenda(lambda: now[0])
    agenda.add(("a", "", ""), 5)
    agenda.add(("a", "", ""), 1)
    agenda.add(("a", "", ""), 9)
    agenda.add(("b", "", ""), 3)
    assert agenda.take(0) is None
    now[0] = 4
    assert [agenda.take(0), agenda.take(0), agenda.take(0)] == [("a", "", ""), ("b", "", ""), None]
    now[0] = 20
    assert agenda.take(0) is None
