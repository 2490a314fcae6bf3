"""Port Cluster: the API server as the operator needs it. Errors are those of adapters/kubernetes/objects.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from hotstart.adapters.kubernetes.objects import Kind, Object


class Cluster(Protocol):
    """An API server. Objects are dicts, `selector` is a label that must be there."""

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object:
        """Return an object. Raises NotThere."""
        ...

    def list(self, kind: Kind, selector: str | None = None, namespace: str | None = None) -> tuple[list[Object], str]:
        """Return all objects of a kind, of one namespace or of all, and the version at which that is so."""
        ...

    def watch(
        self, kind: Kind, version: str, selector: str | None = None, namespace: str | None = None
    ) -> Iterator[tuple[str, Object]]:
        """Yield ADDED, MODIFIED, DELETED and the object, from a version on, until the server ends it. Raises VersionGone."""
        ...

    def create(self, kind: Kind, obj: Object) -> Object:
        """Create an object. Raises AlreadyThere."""
        ...

    def patch(self, kind: Kind, namespace: str | None, name: str, change: Object, subresource: str = "") -> Object:
        """Merge a change (RFC 7386). With metadata.resourceVersion in it, Changed is raised if that is another. Raises NotThere."""
        ...

    def delete(self, kind: Kind, namespace: str | None, name: str) -> None:
        """Ask for an object's end. Raises NotThere."""
        ...
