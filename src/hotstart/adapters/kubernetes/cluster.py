"""The operator's port Cluster on a real API server, by lightkube: its configuration, tokens that change, TLS. Objects go through as dicts.

lightkube's own models of kinds are not used: they drop what they do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

from hotstart.adapters.kubernetes.objects import (
    AlreadyThere,
    ApiRefused,
    Changed,
    Kind,
    NotThere,
    Object,
    Unreachable,
    VersionGone,
)
from hotstart.errors import HotstartError, MachineLacks

_WATCH_S = 240
_VERBS = ["delete", "get", "global_list", "global_watch", "list", "patch", "post", "put", "watch"]
T = TypeVar("T")


class LightkubeCluster:
    """The cluster that this process runs in, else that of $KUBECONFIG."""

    def __init__(self) -> None:
        self._client = _connect()

    def close(self) -> None:
        """Close all connections but those of watches."""
        self._client.close()

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object:
        """Return an object."""
        return self._asked(kind, lambda: self._client.get(_resource(kind), name, **_in(kind, namespace)))

    def list(self, kind: Kind, selector: str | None = None, namespace: str | None = None) -> tuple[list[Object], str]:
        """Return all objects of a kind, page by page."""

        def pages() -> tuple[list[Object], str]:
            found = self._client.list(_resource(kind), chunk_size=500, **_selected(kind, selector, namespace))
            objects = [_plain(kind, o) for o in found]
            return objects, found.resourceVersion

        return _translated(pages)

    def watch(
        self, kind: Kind, version: str, selector: str | None = None, namespace: str | None = None
    ) -> Iterator[tuple[str, Object]]:
        """Yield changes; lightkube asks again when the server ends a watch in time."""
        client = _connect()  # of its own: lightkube does not give the connection of a watch back to the others
        try:
            changes = _translated(
                lambda: client.watch(
                    _resource(kind),
                    resource_version=version,
                    server_timeout=_WATCH_S,
                    **_selected(kind, selector, namespace),
                )
            )
            while (change := _translated(lambda: next(changes, None))) is not None:
                what, obj = change
                yield what, _plain(kind, obj)
        finally:
            client.close()

    def create(self, kind: Kind, obj: Object) -> Object:
        """Create an object."""
        namespace = obj["metadata"].get("namespace")
        made = _resource(kind).from_dict({**obj, "apiVersion": kind.api_version, "kind": kind.name})
        return self._asked(kind, lambda: self._client.create(made, **_in(kind, namespace)))

    def patch(self, kind: Kind, namespace: str | None, name: str, change: Object, subresource: str = "") -> Object:
        """Merge a change."""
        from lightkube.types import PatchType

        resource = _resource(kind, subresource)
        return self._asked(
            kind,
            lambda: self._client.patch(resource, name, change, patch_type=PatchType.MERGE, **_in(kind, namespace)),
        )

    def delete(self, kind: Kind, namespace: str | None, name: str) -> None:
        """Delete an object."""
        _translated(lambda: self._client.delete(_resource(kind), name, **_in(kind, namespace)))

    def _asked(self, kind: Kind, ask: Callable[[], Any]) -> Object:
        return _plain(kind, _translated(ask))


def _connect() -> Any:
    try:
        from lightkube import Client
        from lightkube.core.exceptions import ConfigError
    except ImportError as e:
        raise MachineLacks("the operator needs lightkube: install hotstart[k8s]") from e
    try:
        return Client(field_manager="hotstart-operator")
    except ConfigError as e:
        raise MachineLacks(f"no cluster is configured ({e}): set KUBECONFIG") from e


@cache
def _resource(kind: Kind, subresource: str = "") -> Any:
    """Return the class by which lightkube knows a kind, without models."""
    from lightkube import generic_resource
    from lightkube.core.resource import ApiInfo, ResourceDef

    here = ResourceDef(kind.group, kind.version, kind.name)
    if subresource:
        info = ApiInfo(here, kind.plural, ["get", "patch", "put"], parent=here, action=subresource)
        base: Any = (
            generic_resource.GenericNamespacedStatus if kind.namespaced else generic_resource.GenericGlobalStatus
        )
    else:
        info = ApiInfo(here, kind.plural, _VERBS)
        base = generic_resource.GenericNamespacedResource if kind.namespaced else generic_resource.GenericGlobalResource
    return type(kind.name, (base,), {"_api_info": info})


def _in(kind: Kind, namespace: str | None) -> dict[str, str]:
    return {"namespace": namespace or "default"} if kind.namespaced else {}


def _selected(kind: Kind, selector: str | None, namespace: str | None) -> dict[str, Any]:
    from lightkube.operators import exists

    where: dict[str, Any] = {"namespace": namespace or "*"} if kind.namespaced else {}
    return where | ({"labels": {selector: exists()}} if selector else {})


def _plain(kind: Kind, obj: Any) -> Object:
    """Return a plain dict; items of lists do not say what they are."""
    return {"apiVersion": kind.api_version, "kind": kind.name, **dict(obj)}


def _translated(ask: Callable[[], T]) -> T:
    """Ask, and turn what lightkube and its HTTP client raise into ours."""
    import httpx2
    from lightkube.core.exceptions import ApiError

    try:
        return ask()
    except ApiError as e:
        raise _error(e.status.code, e.status.reason or "", str(e)) from e
    except httpx2.HTTPStatusError as e:
        raise _error(e.response.status_code, "", str(e)) from e
    except httpx2.HTTPError as e:
        raise Unreachable(f"the API server does not answer ({e or type(e).__name__})") from e


def _error(code: int | None, reason: str, message: str) -> HotstartError:
    if code == 404:
        return NotThere(message)
    if code == 409:
        return AlreadyThere(message) if reason == "AlreadyExists" else Changed(message)
    if code == 410:
        return VersionGone(message)
    if code is None or code == 429 or code >= 500:
        return Unreachable(f"the API server is busy or failing: {message}")
    return ApiRefused(f"the API server refuses: {message}")
