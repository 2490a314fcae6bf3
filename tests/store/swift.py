"""A real S3 server: OpenStack Swift with its s3api, one replica, on free ports of the loopback, in a temporary folder.

`scripts/install-swift` installs it. Four processes, ended by pid; the kernel ends them if the tests are killed.
"""

import contextlib
import http.client
import signal
import socket
import subprocess
import time
import urllib.parse
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

ROOT = Path(__file__).parents[2]
SWIFT = ROOT / ".engines" / "swift" / "bin"
KEY_ID, SECRET = "test:tester", "the-secret-of-the-tests"
BUCKET = "hotstart"
PAGE = 50  # keys in one page of a list; Amazon's have 1000
_RINGS = ("account", "container", "object")
_START_TIMEOUT_S = 60.0

_CONFIG = """
[swift-hash]
swift_hash_path_prefix = hotstart
swift_hash_path_suffix = tests
[storage-policy:0]
name = gold
default = yes
"""

_SERVER = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
workers = 0
swift_dir = {folder}
log_level = WARNING
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

# Nothing listens on the memcache's port: Swift does without.
_PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
workers = 0
swift_dir = {folder}
log_level = WARNING
[pipeline:main]
pipeline = catch_errors healthcheck cache listing_formats bulk s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
auth_pipeline_check = false
max_bucket_listing = {page}
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""

_BUILD_RINGS = """
import sys
from swift.common.ring import RingBuilder

folder, *ports = sys.argv[1:]
for name, port in zip(("account", "container", "object"), map(int, ports)):
    ring = RingBuilder(4, 1, 1)
    ring.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1",
                  "replication_port": port, "device": "sdb1", "weight": 1.0, "meta": ""})
    ring.rebalance()
    ring.get_ring().save(f"{folder}/{name}.ring.gz")
"""


class Swift:
    """The server while the `with` lasts; `environment` is what a client needs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        *self._ports, self.port = free_ports(len(_RINGS) + 1)
        self.environment = environment_for(self.port)

    def __enter__(self) -> "Swift":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if process.poll() is None:
                process.kill()
                process.wait()

    def _start(self) -> None:
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (self._folder / "devices" / "sdb1").mkdir(parents=True)
        (self._folder / "swift.conf").write_text(_CONFIG)
        values = {"user": user, "folder": self._folder, "secret": SECRET, "page": PAGE}
        for name, port in zip(_RINGS, self._ports, strict=True):
            (self._folder / f"{name}-server.conf").write_text(_SERVER.format(name=name, port=port, **values))
        (self._folder / "proxy-server.conf").write_text(_PROXY.format(port=self.port, **values))
        rings = [SWIFT / "python", "-c", _BUILD_RINGS, self._folder, *map(str, self._ports)]
        subprocess.run(rings, check=True, capture_output=True)
        for name in (*_RINGS, "proxy"):
            command = [SWIFT / f"swift-{name}-server", self._folder / f"{name}-server.conf"]
            with open(self._folder / f"{name}.log", "wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        ["setpriv", "--pdeathsig", "KILL", "--", *command],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )
        self._wait_until_it_serves()

    def _wait_until_it_serves(self) -> None:
        over_at = time.monotonic() + _START_TIMEOUT_S
        while True:
            ended = [p for p in self._processes if p.poll() is not None]
            if ended or time.monotonic() > over_at:
                logs = "\n".join(log.read_text()[-2000:] for log in self._folder.glob("*.log"))
                raise RuntimeError(f"Swift did not start:\n{logs}")
            try:
                if make_bucket(self.port, BUCKET):
                    return
            except OSError:
                pass
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def environment_for(port: int) -> dict[str, str]:
    """What tells a client about an S3 server on the loopback."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


def make_bucket(port: int, bucket: str) -> bool:
    """Create a bucket by a signed URL: obstore itself makes none."""
    client = S3Store(
        bucket,
        endpoint=f"http://127.0.0.1:{port}",
        access_key_id=KEY_ID,
        secret_access_key=SECRET,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    url = urllib.parse.urlsplit(obstore.sign(client, "PUT", "", expires_in=timedelta(minutes=5)))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("PUT", f"{url.path}?{url.query}")
        return connection.getresponse().status == 200
    finally:
        connection.close()
