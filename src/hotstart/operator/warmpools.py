"""Which placeholders a WarmPool makes and ends. Pure.

A pod of the pool is `spare` until somebody labels it claimed; from then on it is the claimant's, and the pool makes another. A claim and an
end cannot both happen if each is a change that names the version of the pod that it saw: so a spare one is first labelled as ending,
and only then deleted.
"""

from __future__ import annotations

import copy
from zlib import crc32

from msgspec import Struct, json

from hotstart.adapters.kubernetes.names import CLAIMED, ENDING, PLACEHOLDER, READY, RESTORE_FROM, SNAPSHOT, WARM_POOL
from hotstart.adapters.kubernetes.objects import PODS, WARM_POOLS, Object, owned_by, owner_reference, path
from hotstart.operator.conditions import conditions, difference
from hotstart.operator.decisions import Action, Change, Create, Decision, End
from hotstart.operator.placeholders import Unchanged, placeholder

TEMPLATE = "hotstart.dev/template"  # annotation: which template a pod was made of
_AGAIN_S = 30.0
_LONGEST_LABEL = 63


class Seen(Struct, frozen=True):
    """A WarmPool, the Snapshot that it names, and all pods that name that Snapshot."""

    pool: Object
    snapshot: Object | None
    pods: tuple[Object, ...]
    now: float


def next_steps(seen: Seen) -> Decision:
    """Decide which pods to make, which to end and what to say."""
    pool = seen.pool
    if path(pool, "metadata", "deletionTimestamp"):
        return Decision()  # its spare pods are collected with it
    ours = [p for p in seen.pods if owned_by(p, pool)]
    claimed = [p for p in ours if _labels(p).get(CLAIMED) is not None]
    free = [p for p in ours if _labels(p).get(CLAIMED) is None]
    leaving = [p for p in free if _labels(p).get(ENDING) is not None or _over(p)]
    spare = [p for p in free if p not in leaving and not path(p, "metadata", "deletionTimestamp")]
    mark = template_mark(pool)
    stale = [p for p in spare if path(p, "metadata", "annotations", TEMPLATE) != mark]
    good = sorted((p for p in spare if p not in stale), key=lambda p: (not _running(p), p["metadata"]["name"]))

    wanted, message = _wanted(seen)
    actions: list[Action] = [_let_go(p, pool) for p in claimed]
    actions += [End(PODS, p) for p in leaving if not path(p, "metadata", "deletionTimestamp")]
    for p in [*stale, *good[wanted:]]:
        actions += [Change(PODS, p, {"metadata": {"labels": {ENDING: "true"}}}), End(PODS, p)]
    taken = {p["metadata"]["name"] for p in seen.pods}
    for _ in range(wanted - len(good)):
        made = _new_pod(seen, mark, taken)
        if isinstance(made, Unchanged):
            message = made.why or message
            break
        taken.add(made["metadata"]["name"])
        actions.append(Create(PODS, made))

    ready = sum(map(_running, good[:wanted]))
    status = {
        "replicas": len(good[:wanted]),
        "readyReplicas": ready,
        "selector": f"{WARM_POOL}={pool['metadata']['name']},!{CLAIMED},!{ENDING}",
        "observedGeneration": path(pool, "metadata", "generation"),
        "conditions": conditions(
            pool,
            [("Ready", ready >= (path(pool, "spec", "replicas") or 0), "Spare" if not message else "Waiting", message)],
            seen.now,
        ),
    }
    if change := difference(path(pool, "status") or {}, status):
        actions.append(Change(WARM_POOLS, pool, {"status": change}, "status"))
    return Decision(tuple(actions), _AGAIN_S)


def template_mark(pool: Object) -> str:
    """Return what tells pods of the pool's present template and snapshot from older ones."""
    spec = path(pool, "spec") or {}
    return f"{crc32(json.encode([spec.get('template'), spec.get('snapshot')], order='deterministic')):08x}"


def _wanted(seen: Seen) -> tuple[int, str]:
    if len(seen.pool["metadata"]["name"]) > _LONGEST_LABEL:
        return 0, "its name is longer than a label may be, 63 characters: choose a shorter one"
    name, phase = path(seen.pool, "spec", "snapshot"), path(seen.snapshot, "status", "phase")
    if phase != READY:
        return 0, f"Snapshot {name} is {phase or 'not there'}: no placeholders are kept"
    return max(0, path(seen.pool, "spec", "replicas") or 0), ""


def _new_pod(seen: Seen, mark: str, taken: set[str]) -> Object | Unchanged:
    """Return a placeholder under the first free name: done twice, the second one is there already."""
    pool = seen.pool
    template = copy.deepcopy(path(pool, "spec", "template") or {})
    metadata = template.get("metadata") or {}
    name = next(n for i in range(len(taken) + 1) if (n := f"{pool['metadata']['name'][:57]}-{i}") not in taken)
    snapshot = pool["spec"]["snapshot"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": pool["metadata"]["namespace"],
            "labels": {**(metadata.get("labels") or {}), SNAPSHOT: snapshot, WARM_POOL: pool["metadata"]["name"]},
            "annotations": {**(metadata.get("annotations") or {}), RESTORE_FROM: snapshot, TEMPLATE: mark},
            "ownerReferences": [owner_reference(pool)],
        },
        "spec": template.get("spec") or {},
    }
    made = placeholder(pod, seen.snapshot)
    if not isinstance(made, Unchanged):
        for container in made["spec"]["containers"]:  # a placeholder waits for long: nothing in it answers a probe
            for probe in ("livenessProbe", "startupProbe"):
                container.pop(probe, None)
    return made


def _let_go(pod: Object, pool: Object) -> Change:
    """Take the pool's ownership off a claimed pod: it outlives the pool."""
    others = [r for r in pod["metadata"]["ownerReferences"] if r.get("uid") != pool["metadata"]["uid"]]
    return Change(PODS, pod, {"metadata": {"ownerReferences": others}})


def _labels(pod: Object) -> dict[str, str]:
    return path(pod, "metadata", "labels") or {}


def _over(pod: Object) -> bool:
    return path(pod, "status", "phase") in ("Failed", "Succeeded")


def _running(pod: Object) -> bool:
    return path(pod, "status", "phase") == "Running" and _labels(pod).get(PLACEHOLDER) == "true"
