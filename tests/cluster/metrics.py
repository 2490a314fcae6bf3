"""metrics.k8s.io, served by the test: what pods use of the processor, read from their control groups, for the autoscaler."""

import base64
import glob
import json
import ssl
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

from hotstart.operator.certificates import make_pair, service_names, utc
from tests.cluster import kube

_NODE_ADDRESS = "10.250.0.1"
_GROUP = "metrics.k8s.io/v1beta1"
_NAME = "v1beta1.metrics.k8s.io"
_SERVICE = "metrics"
_WINDOW_S = 1.0


@contextmanager
def served(namespace, folder):
    """An aggregated API of the cluster, with a certificate of its own; gone afterwards."""
    pair = make_pair(service_names(_SERVICE, namespace), utc(time.time()))
    file = folder / "metrics.pem"
    file.write_bytes(pair.certificate + pair.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    server = ThreadingHTTPServer((_NODE_ADDRESS, 0), _Handler)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        for value in _objects(namespace, server.server_port, pair.authority):
            kube.apply(value)
        kube.kubectl("wait", "--for=condition=Available", "apiservice", _NAME, "--timeout=60s")
        yield
    finally:
        kube.kubectl("delete", "apiservice", _NAME, check=False)
        server.shutdown()
        server.server_close()


def _objects(namespace, port, authority):
    meta = {"name": _SERVICE, "namespace": namespace}
    spec = {
        "group": "metrics.k8s.io",
        "version": "v1beta1",
        "groupPriorityMinimum": 100,
        "versionPriority": 100,
        "service": {**meta, "port": 443},
        "caBundle": base64.b64encode(authority).decode(),
    }
    ports = [{"port": 443, "targetPort": port, "protocol": "TCP"}]
    subsets = [{"addresses": [{"ip": _NODE_ADDRESS}], "ports": [{"port": port, "protocol": "TCP"}]}]
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": ports}},
        {"apiVersion": "v1", "kind": "Endpoints", "metadata": meta, "subsets": subsets},
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": _NAME},
            "spec": spec,
        },
    ]


def _used_s(pod):
    """Seconds of the processor that a pod has used."""
    (path,) = glob.glob(f"/sys/fs/cgroup/cpuacct/kubepods/**/pod{pod['metadata']['uid']}/cpuacct.usage", recursive=True)
    with open(path) as f:
        return int(f.read()) / 1e9


def _usage(pods):
    """Millicores that pods use, by name; pods that end meanwhile are left out."""
    seen = []
    for wait_s in (_WINDOW_S, 0):
        now = {}
        for pod in pods:
            try:
                now[pod["metadata"]["name"]] = _used_s(pod)
            except (OSError, ValueError):
                continue
        seen.append(now)
        time.sleep(wait_s)
    before, after = seen
    return {name: round(1000 * (after[name] - before[name]) / _WINDOW_S) for name in before if name in after}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        url = urlsplit(self.path)
        if url.path == f"/apis/{_GROUP}":
            resource = {"name": "pods", "namespaced": True, "kind": "PodMetrics", "verbs": ["get", "list"]}
            self._answer(
                {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": _GROUP, "resources": [resource]}
            )
        elif url.path.endswith("/pods"):
            namespace = url.path.split("/")[-2]
            pods = kube.listed("pods", namespace, parse_qs(url.query).get("labelSelector", [""])[0])
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            items = [
                {
                    "metadata": {"name": name, "namespace": namespace},
                    "timestamp": now,
                    "window": f"{_WINDOW_S:g}s",
                    "containers": [{"name": "worker", "usage": {"cpu": f"{milli}m", "memory": "1Mi"}}],
                }
                for name, milli in _usage(pods).items()
            ]
            self._answer({"kind": "PodMetricsList", "apiVersion": _GROUP, "metadata": {}, "items": items})
        else:
            self.send_error(404)

    def _answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
