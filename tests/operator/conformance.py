"""What every implementation of the port Cluster does; `cluster` and an empty `namespace` come from the module that takes these tests in."""

import threading

import pytest

from hotstart.adapters.kubernetes.names import API_VERSION
from hotstart.adapters.kubernetes.objects import SNAPSHOT_CLASSES, SNAPSHOTS, AlreadyThere, Changed, NotThere, path

FINALIZER = "hotstart.dev/bytes"


def snapshot(namespace, name="chat", **metadata):
    source = {"template": {"spec": {"containers": [{"name": "w", "image": "i", "fieldOfTheFuture": {"a": [1, None]}}]}}}
    return {
        "apiVersion": API_VERSION,
        "kind": "Snapshot",
        "metadata": {"name": name, "namespace": namespace, **metadata},
        "spec": {"source": source},
    }


def test_what_was_created_is_read_back_with_fields_that_we_do_not_know(cluster, namespace):
    made = cluster.create(SNAPSHOTS, snapshot(namespace))
    read = cluster.get(SNAPSHOTS, namespace, "chat")
    assert read == made
    assert (read["apiVersion"], read["kind"]) == (API_VERSION, "Snapshot")
    assert read["metadata"]["uid"]
    assert path(read, "spec", "source", "template", "spec", "containers")[0]["fieldOfTheFuture"] == {"a": [1, None]}


def test_a_second_one_of_the_same_name_is_refused(cluster, namespace):
    cluster.create(SNAPSHOTS, snapshot(namespace))
    with pytest.raises(AlreadyThere):
        cluster.create(SNAPSHOTS, snapshot(namespace))


def test_what_is_not_there_is_said_to_be_so(cluster, namespace):
    with pytest.raises(NotThere):
        cluster.get(SNAPSHOTS, namespace, "absent")
    with pytest.raises(NotThere):
        cluster.patch(SNAPSHOTS, namespace, "absent", {"metadata": {"labels": {"a": "b"}}})
    with pytest.raises(NotThere):
        cluster.delete(SNAPSHOTS, namespace, "absent")
    with pytest.raises(NotThere):
        cluster.get(SNAPSHOT_CLASSES, None, "absent")


def test_a_change_is_merged_and_null_removes(cluster, namespace):
    cluster.create(SNAPSHOTS, snapshot(namespace, labels={"a": "1", "b": "2"}))
    cluster.patch(SNAPSHOTS, namespace, "chat", {"metadata": {"labels": {"a": None, "c": "3"}}})
    assert cluster.get(SNAPSHOTS, namespace, "chat")["metadata"]["labels"] == {"b": "2", "c": "3"}


def test_status_and_spec_are_changed_apart(cluster, namespace):
    made = cluster.create(SNAPSHOTS, {**snapshot(namespace), "status": {"phase": "Ready"}})
    assert path(made, "status", "phase") is None
    generation = made["metadata"]["generation"]
    cluster.patch(
        SNAPSHOTS, namespace, "chat", {"status": {"phase": "Pending"}, "spec": {"readyTimeoutSeconds": 5}}, "status"
    )
    read = cluster.get(SNAPSHOTS, namespace, "chat")
    assert read["status"] == {"phase": "Pending"}
    assert read["spec"].get("readyTimeoutSeconds") != 5
    assert read["metadata"]["generation"] == generation
    cluster.patch(SNAPSHOTS, namespace, "chat", {"status": {"phase": "Ready"}, "spec": {"readyTimeoutSeconds": 5}})
    read = cluster.get(SNAPSHOTS, namespace, "chat")
    assert read["status"] == {"phase": "Pending"}
    assert read["spec"]["readyTimeoutSeconds"] == 5
    assert read["metadata"]["generation"] == generation + 1


def test_a_change_that_names_an_old_version_is_refused(cluster, namespace):
    old = cluster.create(SNAPSHOTS, snapshot(namespace))["metadata"]["resourceVersion"]
    cluster.patch(SNAPSHOTS, namespace, "chat", {"metadata": {"resourceVersion": old, "labels": {"a": "1"}}})
    with pytest.raises(Changed):
        cluster.patch(SNAPSHOTS, namespace, "chat", {"metadata": {"resourceVersion": old, "labels": {"a": "2"}}})
    change = {"metadata": {"resourceVersion": old}, "status": {"phase": "Ready"}}
    with pytest.raises(Changed):
        cluster.patch(SNAPSHOTS, namespace, "chat", change, "status")


def test_a_finalizer_holds_what_is_deleted(cluster, namespace):
    cluster.create(SNAPSHOTS, snapshot(namespace, finalizers=[FINALIZER]))
    cluster.delete(SNAPSHOTS, namespace, "chat")
    assert cluster.get(SNAPSHOTS, namespace, "chat")["metadata"]["deletionTimestamp"]
    cluster.patch(SNAPSHOTS, namespace, "chat", {"metadata": {"finalizers": []}})
    with pytest.raises(NotThere):
        cluster.get(SNAPSHOTS, namespace, "chat")


def test_lists_are_those_of_a_label_and_a_namespace(cluster, namespace):
    cluster.create(SNAPSHOTS, snapshot(namespace, "a", labels={"hotstart.dev/snapshot": "x"}))
    cluster.create(SNAPSHOTS, snapshot(namespace, "b"))

    def names(*arguments):
        found, version = cluster.list(SNAPSHOTS, *arguments)
        assert version
        assert all(o["kind"] == "Snapshot" and o["apiVersion"] == API_VERSION for o in found)
        return {o["metadata"]["name"] for o in found if o["metadata"]["namespace"] == namespace}

    assert names(None, namespace) == {"a", "b"}
    assert names("hotstart.dev/snapshot", namespace) == {"a"}
    assert names("hotstart.dev/snapshot") == {"a"}
    assert names(None, "kube-public") == set()


def test_a_watch_tells_what_changed_since_a_version(cluster, namespace):
    cluster.create(SNAPSHOTS, snapshot(namespace, "before"))
    _, version = cluster.list(SNAPSHOTS, None, namespace)

    def work():
        cluster.create(SNAPSHOTS, snapshot(namespace, "a"))
        cluster.patch(SNAPSHOTS, namespace, "a", {"status": {"phase": "Pending"}}, "status")
        cluster.delete(SNAPSHOTS, namespace, "a")

    changing = threading.Timer(0.1, work)
    changing.start()
    seen = []
    for what, obj in cluster.watch(SNAPSHOTS, version, None, namespace):
        seen.append((what, obj["metadata"]["name"], path(obj, "status", "phase")))
        if what == "DELETED":
            break
    changing.join()
    assert seen == [("ADDED", "a", None), ("MODIFIED", "a", "Pending"), ("DELETED", "a", "Pending")]
