"""The API server, as far as an agent needs it: objects are asked for, watched, made and changed, as JSON.

In a pod by the pod's own service account; elsewhere by the kubeconfig that KUBECONFIG names.
"""

from __future__ import annotations

import base64
import http.client
import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode, urlsplit

from msgspec import DecodeError, Struct, json

from hotstart.errors import BadUsage, HotstartError, MachineLacks, NotFound

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_TIMEOUT_S = 15.0
_WATCH_S = 240
_CONFLICT, _GONE = 409, 410
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"

Object = dict[str, Any]


class ConflictError(HotstartError):
    """The object has changed meanwhile, or is there already: look again."""


class Access(Struct, frozen=True):
    """Where the API server is, and who we are. `token_file` is read each time: tokens are renewed."""

    host: str
    port: int
    ca: str | None
    token: str | None = None
    token_file: str | None = None
    certificate: str | None = None
    key: str | None = None

    def context(self) -> ssl.SSLContext:
        """Return how connections are made safe."""
        context = ssl.create_default_context(cadata=self.ca)
        if self.certificate and self.key:
            import tempfile

            with tempfile.NamedTemporaryFile("w") as certificate, tempfile.NamedTemporaryFile("w") as key:
                for file, text in ((certificate, self.certificate), (key, self.key)):
                    file.write(text)
                    file.flush()
                context.load_cert_chain(certificate.name, key.name)
        return context

    def headers(self) -> dict[str, str]:
        """Return what says who we are."""
        token = self.token
        if self.token_file:
            with open(self.token_file, encoding="utf-8") as f:
                token = f.read().strip()
        return {"authorization": f"Bearer {token}"} if token else {}


def find_access() -> Access:
    """Return how the API server is reached from here. Raises BadUsage if nothing says so."""
    if kubeconfig := os.environ.get("KUBECONFIG"):
        return read_kubeconfig(kubeconfig)
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if not host or not os.path.exists(f"{_ACCOUNT}/token"):
        raise BadUsage("which cluster? This is no pod with a service account: set KUBECONFIG")
    with open(f"{_ACCOUNT}/ca.crt", encoding="utf-8") as f:
        ca = f.read()
    return Access(host, int(os.environ.get("KUBERNETES_SERVICE_PORT", "443")), ca, token_file=f"{_ACCOUNT}/token")


def read_kubeconfig(path: str) -> Access:
    """Read the current context of a kubeconfig. Raises BadUsage, MachineLacks without PyYAML."""
    try:
        import yaml
    except ImportError as e:
        raise MachineLacks("reading a kubeconfig needs the package PyYAML: pip install 'hotstart[k8s]'") from e
    try:
        with open(path, encoding="utf-8") as f:
            config = yaml.safe_load(f)

        def named(kind: str, name: str) -> Object:
            found: Object = next(e for e in config[f"{kind}s"] if e["name"] == name)[kind]
            return found

        context = named("context", config["current-context"])
        cluster, user = named("cluster", context["cluster"]), named("user", context["user"])
        server = urlsplit(cluster["server"])
        return Access(
            host=server.hostname or "",
            port=server.port or 443,
            ca=_data(cluster, "certificate-authority"),
            token=user.get("token"),
            certificate=_data(user, "client-certificate"),
            key=_data(user, "client-key"),
        )
    except (OSError, KeyError, TypeError, StopIteration, ValueError, yaml.YAMLError) as e:
        raise BadUsage(f"kubeconfig {path} cannot be used: {e!r}") from e


def _data(entry: Object, name: str) -> str | None:
    if text := entry.get(f"{name}-data"):
        return base64.b64decode(text).decode()
    if path := entry.get(name):
        with open(path, encoding="utf-8") as f:
            return f.read()
    return None


class Cluster:
    """An API server. May be used by several threads: each has a connection of its own."""

    def __init__(self, access: Access) -> None:
        self._access, self._context = access, access.context()
        self._mine = threading.local()

    def get(self, path: str, **query: str) -> Object:
        """Return an object or a list. Raises NotFound, HotstartError."""
        return self._ask("GET", f"{path}?{urlencode(query)}" if query else path)

    def create(self, path: str, value: Object) -> Object:
        """Make an object. Raises ConflictError if it is there already."""
        return self._ask("POST", path, value)

    def patch(self, path: str, value: Object, kind: str = MERGE) -> Object:
        """Change an object. Raises NotFound, ConflictError, HotstartError."""
        return self._ask("PATCH", path, value, kind)

    def watch(self, path: str, **query: str) -> Iterator[tuple[str, Object]]:
        """Give what is there, as ("ADDED", object), then ("SYNCED", {}), then every change, for some minutes.

        Begin again when it ends. Raises HotstartError.
        """
        listed = self.get(path, **query)
        for item in listed.get("items") or ():
            yield "ADDED", item
        yield "SYNCED", {}
        version = listed["metadata"]["resourceVersion"]
        asked = urlencode({**query, "watch": "1", "resourceVersion": version, "timeoutSeconds": str(_WATCH_S)})
        connection = self._connect(_WATCH_S + _TIMEOUT_S)
        try:
            connection.request("GET", f"{path}?{asked}", headers=self._access.headers())
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise HotstartError(f"the API server refuses to watch {path}: {answer.status} {answer.reason}")
            while line := answer.readline():
                event: Object = json.decode(line)
                if event["type"] == "ERROR":
                    return  # what happened since that version is forgotten: list again
                if event["type"] != "BOOKMARK":
                    yield event["type"], event["object"]
        except (OSError, http.client.HTTPException, DecodeError) as e:
            raise HotstartError(f"the API server tells no more of {path}: {e}") from e
        finally:
            connection.close()

    def _connect(self, timeout_s: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            self._access.host, self._access.port, timeout=timeout_s, context=self._context
        )

    def _ask(self, method: str, path: str, value: Object | None = None, kind: str = "application/json") -> Object:
        body = None if value is None else json.encode(value)
        headers = {**self._access.headers(), "content-type": kind, "accept": "application/json"}
        for again in (True, False):
            connection = getattr(self._mine, "connection", None)
            fresh = connection is None
            if connection is None:
                connection = self._mine.connection = self._connect(_TIMEOUT_S)
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                data = answer.read()
                break
            except (OSError, http.client.HTTPException) as e:
                with suppress(OSError):
                    connection.close()
                self._mine.connection = None
                if fresh or not again:  # one that was kept may have been closed meanwhile
                    raise HotstartError(f"the API server does not answer: {e}") from e
        return _answer_of(f"{method} {path}", answer.status, data)


def _answer_of(what: str, status: int, data: bytes) -> Object:
    try:
        found: Object = json.decode(data) if data else {}
    except DecodeError:
        found = {}
    if status < 300:
        return found
    why = f"{what}: {status} {str(found.get('message', data[:200]))[:300]}"
    if status in (http.client.NOT_FOUND, _GONE):
        raise NotFound(why)
    if status == _CONFLICT:
        raise ConflictError(why)
    raise HotstartError(f"the API server refuses {why}")


def event(
    kind: str, about: Mapping[str, Any], reason: str, message: str, component: str, *, warning: bool = False
) -> Object:
    """Return an Event about an object."""
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    meta = about["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{meta['name'][:200]}.{os.urandom(8).hex()}", "namespace": meta["namespace"]},
        "involvedObject": {
            "apiVersion": about.get("apiVersion", "v1"),
            "kind": kind,
            "namespace": meta["namespace"],
            "name": meta["name"],
            "uid": meta["uid"],
        },
        "reason": reason,
        "message": message[:1000],
        "type": "Warning" if warning else "Normal",
        "source": {"component": component},
        "firstTimestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lastTimestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "count": 1,
    }
