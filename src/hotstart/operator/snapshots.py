"""What a Snapshot needs next: a source that is ready, a capture by the agent of its node, its end. Pure.

The operator writes phase Pending, Capturing and Deleting, the agent answers with Ready or Failed and owns all that it measured.

    Pending --source is ready--> Capturing --agent--> Ready --deleted, or past its retention--> Deleting --no node holds bytes--> gone
       |                             |
       +--no source in time----------+--gone, or too late--> Failed --spec changed--> Pending
"""

from __future__ import annotations

import copy
from typing import Any

from msgspec import Struct

from hotstart.adapters.kubernetes.names import (
    CAPTURING,
    CONTAINER,
    DELETING,
    FAILED,
    FINALIZER,
    PENDING,
    READY,
    RESTORE_FROM,
    SNAPSHOT,
    SOURCE_OF,
    store_name,
)
from hotstart.adapters.kubernetes.objects import (
    PODS,
    SNAPSHOTS,
    Object,
    is_true,
    owned_by,
    owner_reference,
    path,
)
from hotstart.errors import Refused
from hotstart.operator.conditions import conditions, difference
from hotstart.operator.decisions import Action, Change, Create, Decision, End, Tell, timestamp, unix_time
from hotstart.operator.placeholders import Unchanged, placeholder

LOOK_AGAIN_S = 2.0
SOURCE_GONE_S = 60.0  # the agent may have ended the pod itself, and tell so in a moment
AGENT_SILENT_S = 300.0
USE_NOTED_S = 600.0
_READY_TIMEOUT_S, _CAPTURE_TIMEOUT_S = 600, 900


class Seen(Struct, frozen=True):
    """What a decision is made on. `users` is how many pods name the snapshot, `gone` which nodes are not in the cluster any more.

    `source` is the pod of that name, whoever made it; `defaults` the spec of the Snapshot's class.
    """

    snapshot: Object
    now: float
    source: Object | None = None
    defaults: Object | None = None
    users: int = 0
    gone: frozenset[str] = frozenset()


def next_steps(seen: Seen) -> Decision:
    """Decide what to do about a Snapshot."""
    snapshot = seen.snapshot
    finalizers = path(snapshot, "metadata", "finalizers") or []
    if path(snapshot, "metadata", "deletionTimestamp"):
        return _delete(seen, finalizers) if FINALIZER in finalizers else Decision()
    if FINALIZER not in finalizers:
        return Decision((Change(SNAPSHOTS, snapshot, {"metadata": {"finalizers": [*finalizers, FINALIZER]}}),), 0)
    match path(snapshot, "status", "phase"):
        case "Capturing":
            return _capture(seen)
        case "Ready":
            return _ready(seen)
        case "Failed":
            return _failed(seen)
    return _pend(seen)


def source_name(snapshot: Object) -> str:
    """Return the name of the pod that a Snapshot is taken of."""
    named = path(snapshot, "spec", "source", "pod", "name")
    return named or f"{snapshot['metadata']['name'][:240]}-source"


def source_pod(snapshot: Object) -> Object:
    """Return the pod to start for a Snapshot with a template: a placeholder of its own, so that the agent starts it and can capture it."""
    template = copy.deepcopy(path(snapshot, "spec", "source", "template") or {})
    metadata = template.get("metadata") or {}
    name, container = snapshot["metadata"]["name"], path(snapshot, "spec", "source", "container")
    annotations = {**(metadata.get("annotations") or {}), RESTORE_FROM: name} | (
        {CONTAINER: container} if container else {}
    )
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": source_name(snapshot),
            "namespace": snapshot["metadata"]["namespace"],
            "labels": {**(metadata.get("labels") or {}), SNAPSHOT: name, SOURCE_OF: name},
            "annotations": annotations,
            "ownerReferences": [owner_reference(snapshot)],
        },
        "spec": template.get("spec") or {},
    }
    made = placeholder(pod, None)
    return pod if isinstance(made, Unchanged) else made


def _pend(seen: Seen) -> Decision:
    snapshot = seen.snapshot
    if problem := _problem(snapshot):
        return _fail(seen, problem)
    status = path(snapshot, "status") or {}
    if status.get("since") is None:  # the first look, or the first after a failure
        return _status(seen, {"phase": PENDING, "since": timestamp(seen.now), "message": "waits for its source"})
    waited = seen.now - (unix_time(status["since"]) or seen.now)
    patience = path(snapshot, "spec", "readyTimeoutSeconds") or _READY_TIMEOUT_S
    name, source, ours = source_name(snapshot), seen.source, bool(path(snapshot, "spec", "source", "template"))
    if source is None and ours:
        return _status(seen, {"message": f"pod {name} is started"}, Create(PODS, source_pod(snapshot)))
    if source is not None and ours and not owned_by(source, snapshot):
        if path(source, "metadata", "deletionTimestamp"):
            return Decision((), LOOK_AGAIN_S)
        return _fail(
            seen, f"there is a pod {name} already that is not this Snapshot's: remove it, or choose another name"
        )
    if source is not None and path(source, "status", "phase") in ("Failed", "Succeeded"):
        return _fail(seen, f"pod {name} ended before it was captured: see `kubectl logs {name}`")
    if source is not None and is_true(source, "Ready") and not path(source, "metadata", "deletionTimestamp"):
        return _begin_capture(seen, source)
    if waited > patience:
        return _fail(seen, f"pod {name} was not ready within {patience} s: see `kubectl describe pod {name}`")
    return _status(seen, {"message": f"waits for pod {name} to be {'there' if source is None else 'ready'}"})


def _begin_capture(seen: Seen, source: Object) -> Decision:
    container = (
        path(seen.snapshot, "spec", "source", "pod", "container")
        or path(seen.snapshot, "spec", "source", "container")
        or path(source, "metadata", "annotations", CONTAINER)
        or source["spec"]["containers"][0]["name"]
    )
    if container not in [c["name"] for c in source["spec"]["containers"]]:
        return _fail(seen, f"pod {source['metadata']['name']} has no container {container}")
    node = source["spec"]["nodeName"]
    return _status(
        seen,
        {
            "phase": CAPTURING,
            "since": timestamp(seen.now),
            "node": node,
            "pod": source["metadata"]["name"],
            "podUID": source["metadata"]["uid"],
            "container": container,
            "message": f"the agent of node {node} captures container {container}",
        },
        Tell(seen.snapshot, "Capturing", f"pod {source['metadata']['name']} on node {node} is ready"),
    )


def _capture(seen: Seen) -> Decision:
    status = seen.snapshot["status"]
    node, since = status.get("node"), unix_time(status.get("since")) or seen.now
    patience = path(seen.snapshot, "spec", "captureTimeoutSeconds") or _CAPTURE_TIMEOUT_S
    same = seen.source is not None and path(seen.source, "metadata", "uid") == status.get("podUID")
    if node in seen.gone:
        return _fail(seen, f"node {node} went away before pod {status.get('pod')} was captured")
    if not same and seen.now - since > SOURCE_GONE_S:
        return _fail(seen, f"pod {status.get('pod')} went away before it was captured")
    if seen.now - since > patience:
        return _fail(seen, f"the agent of node {node} did not capture it within {patience} s: see that agent's log")
    return _status(seen, {})


def _ready(seen: Seen) -> Decision:
    """Keep a Snapshot that can be restored, as long as its retention says."""
    snapshot, status = seen.snapshot, seen.snapshot["status"]
    captured = unix_time(status.get("capturedAt")) or seen.now
    noted_use = unix_time(status.get("lastUsed"))
    used = seen.now if seen.users else max(captured, (noted_use or 0) + USE_NOTED_S)
    retention = {**(path(seen.defaults, "retention") or {}), **(path(snapshot, "spec", "retention") or {})}
    ends = [
        start + retention[key]
        for key, start in (("expireAfterSeconds", captured), ("unusedAfterSeconds", used))
        if retention.get(key)
    ]
    if ends and min(ends) <= seen.now:
        telling = Tell(snapshot, "Expired", "its retention is over: it is deleted")
        return Decision((telling, End(SNAPSHOTS, snapshot)))
    noted = {} if status.get("capturedAt") else {"capturedAt": timestamp(seen.now)}
    if seen.users and seen.now - (noted_use or 0) >= USE_NOTED_S:
        noted["lastUsed"] = timestamp(seen.now)
    decision = _status(seen, noted, *_end_source(seen))
    again = min([e - seen.now for e in ends] + ([USE_NOTED_S] if seen.users else []), default=None)
    return Decision(decision.actions, again)


def _failed(seen: Seen) -> Decision:
    observed = path(seen.snapshot, "status", "observedGeneration")
    if observed is not None and observed != path(seen.snapshot, "metadata", "generation"):
        return _status(seen, {"phase": PENDING, "since": None, "message": "begins anew: its spec has changed"})
    return Decision(_status(seen, {}, *_end_source(seen)).actions)


def _delete(seen: Seen, finalizers: list[str]) -> Decision:
    """Wait until every node that holds bytes has removed them; those that cannot are not waited for."""
    snapshot, status = seen.snapshot, path(seen.snapshot, "status") or {}
    holders = list(status.get("nodes") or [])
    if status.get("phase") != DELETING:
        # An agent may be in the middle of a capture: it, too, has something to remove.
        if status.get("phase") == CAPTURING and status.get("node") not in (None, *holders):
            holders.append(status["node"])
        return _status(seen, {"phase": DELETING, "nodes": holders, "message": None}, *_end_source(seen))
    silent = seen.now - (unix_time(snapshot["metadata"]["deletionTimestamp"]) or seen.now) > AGENT_SILENT_S
    lost = [n for n in holders if silent or n in seen.gone]
    if lost:
        left = [n for n in holders if n not in lost]
        message = f"did not wait for {', '.join(lost)}: what is left there is removed when the agent starts there again"
        return _status(seen, {"nodes": left}, Tell(snapshot, "NotWaitedFor", message, warning=True))
    if holders:
        return _status(
            seen, {"message": f"waits for {', '.join(holders)} to remove what they hold"}, *_end_source(seen)
        )
    remaining = [f for f in finalizers if f != FINALIZER]
    return Decision((*_end_source(seen), Change(SNAPSHOTS, snapshot, {"metadata": {"finalizers": remaining}})))


def _problem(snapshot: Object) -> str | None:
    try:
        store_name(snapshot["metadata"]["namespace"], snapshot["metadata"]["name"])
    except Refused as e:
        return str(e)
    source = path(snapshot, "spec", "source") or {}
    if bool(source.get("pod")) == bool(source.get("template")):
        return "spec.source must have either pod or template"
    if source.get("template") and not path(source, "template", "spec", "containers"):
        return "spec.source.template.spec has no containers"
    return None


def _end_source(seen: Seen) -> tuple[Action, ...]:
    """End the pod that was started for the Snapshot; one that somebody else runs goes on."""
    if seen.source is None or path(seen.source, "metadata", "deletionTimestamp"):
        return ()
    return (End(PODS, seen.source),) if owned_by(seen.source, seen.snapshot) else ()


def _fail(seen: Seen, message: str) -> Decision:
    return _status(seen, {"phase": FAILED, "message": message}, Tell(seen.snapshot, "Failed", message, warning=True))


def _status(seen: Seen, changes: dict[str, Any], *more: Action) -> Decision:
    """Change the status where it differs, conditions included, then do the rest."""
    snapshot, before = seen.snapshot, path(seen.snapshot, "status") or {}
    after = {**before, **changes, "observedGeneration": path(snapshot, "metadata", "generation")}
    phase, message = after.get("phase", PENDING), after.get("message") or ""
    after["conditions"] = conditions(
        snapshot, (("Ready", phase == READY, phase, message), ("Failed", phase == FAILED, phase, message)), seen.now
    )
    change = difference(before, after)
    actions = (Change(SNAPSHOTS, snapshot, {"status": change}, "status"), *more) if change else more
    return Decision(actions, LOOK_AGAIN_S)
