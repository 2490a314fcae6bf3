"""A cluster in memory behind HTTP, spoken to as an API server is: enough of the protocol for lightkube, and faults on demand."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from hotstart.adapters.kubernetes.objects import KINDS, AlreadyThere, Changed, NotThere, VersionGone
from hotstart.operator.memory import MemoryCluster

KIND_AT = {(kind.api_version, kind.plural): kind for kind in KINDS.values()}
PATH = re.compile(
    r"/(?:api|apis)/(?P<version>v1|[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>status))?"
)
CODES = {NotThere: (404, "NotFound"), AlreadyThere: (409, "AlreadyExists"), Changed: (409, "Conflict")}


class ApiServer(ThreadingHTTPServer):
    """Serves `cluster`; while `fault` is a code, every answer is that error."""

    daemon_threads = True

    def __init__(self):
        self.cluster = MemoryCluster(time.time)
        self.fault = None
        super().__init__(("127.0.0.1", 0), _Answers)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def kubeconfig(self, folder):
        file = folder / "kubeconfig"
        url = f"http://127.0.0.1:{self.server_address[1]}"
        entries = {
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        }
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "x", **entries}))
        return str(file)

    def handle_error(self, request, client_address):
        pass


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        found = PATH.fullmatch(url.path)
        kind = found and KIND_AT.get((found["version"], found["plural"]))
        if self.server.fault:
            return self.fail(self.server.fault, "Injected", "a fault")
        if not kind:
            return self.fail(404, "NotFound", f"no such path: {url.path}")
        try:
            if query.get("watch"):
                return self.watch(kind, found["namespace"], query)
            return self.answer(200, self.act(kind, found, query, body))
        except tuple(CODES) as e:
            return self.fail(*CODES[type(e)], str(e))

    do_GET = do_POST = do_PATCH = do_DELETE = do

    def act(self, kind, found, query, body):
        cluster, namespace, name = self.server.cluster, found["namespace"], found["name"]
        if self.command == "GET" and name is None:
            items, version = cluster.list(kind, query.get("labelSelector"), namespace)
            for item in items:  # as the real one does
                del item["apiVersion"], item["kind"]
            return {"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items}
        if self.command == "GET":
            return cluster.get(kind, namespace, name)
        if self.command == "POST":
            return cluster.create(kind, body)
        if self.command == "PATCH":
            assert self.headers["Content-Type"] == "application/merge-patch+json"
            return cluster.patch(kind, namespace, name, body, found["sub"] or "")
        cluster.delete(kind, namespace, name)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def watch(self, kind, namespace, query):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        changes = self.server.cluster.watch(kind, query["resourceVersion"], query.get("labelSelector"), namespace)
        try:
            for what, obj in changes:
                self.line({"type": what, "object": obj})
        except VersionGone as e:
            self.line({"type": "ERROR", "object": self.status(410, "Expired", str(e))})

    def line(self, value):
        self.wfile.write(json.dumps(value).encode() + b"\n")
        self.wfile.flush()

    def status(self, code, reason, message):
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
        }

    def fail(self, code, reason, message):
        self.answer(code, self.status(code, reason, message))

    def answer(self, code, value):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass
