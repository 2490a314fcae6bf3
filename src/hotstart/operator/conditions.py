"""Conditions of our objects' status: what `kubectl wait --for=condition=Ready` waits for. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from hotstart.adapters.kubernetes.objects import Object, path
from hotstart.operator.decisions import timestamp


def conditions(obj: Object, wanted: Iterable[tuple[str, bool, str, str]], now: float) -> list[Object]:
    """Return the conditions (type, is it so, reason, message); a time of transition stays where nothing changed over."""
    before = {c["type"]: c for c in path(obj, "status", "conditions") or []}
    generation = path(obj, "metadata", "generation")
    made = []
    for kind, so, reason, message in wanted:
        status = "True" if so else "False"
        old = before.get(kind, {})
        made.append(
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": message or reason,  # Debian's build of Kubernetes 1.20 takes an empty string for null
                "lastTransitionTime": old["lastTransitionTime"] if old.get("status") == status else timestamp(now),
                **({} if generation is None else {"observedGeneration": generation}),
            }
        )
    return made


def difference(before: Object, after: Object) -> Object:
    """Return the merge patch (RFC 7386) that makes `after` of `before`; keys that `after` does not name stay.

    >>> difference({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4}, "e": None})
    {'b': {'c': 4}}
    """
    change: Object = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if deeper := difference(old, value):
                change[key] = deeper
        elif value != old:
            change[key] = value
    return change
