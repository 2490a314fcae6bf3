"""Can this machine do it? Each check tries the thing itself; a version number is not a proof."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from hotstart.adapters.criu.program import find_criu
from hotstart.adapters.linux.cgroups import make_cgroups, remove_cgroups
from hotstart.adapters.linux.host import free_memory_bytes
from hotstart.adapters.linux.native import native_program
from hotstart.adapters.linux.node import measure_read_bandwidth
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.api.gpudoctor import describe_devices, has_gpu, try_device
from hotstart.errors import HotstartError
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import WorkerSpec

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart

_OLDEST_KERNEL = (6, 7)  # PAGEMAP_SCAN
_FEW_BYTES = 4 << 30
_CAP_SYS_ADMIN, _CAP_SYS_PTRACE, _CAP_SYS_RESOURCE, _CAP_NET_ADMIN = 21, 19, 24, 12
_SERVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"pong")
    def log_message(self, *_):
        pass
memory = bytearray(b"x" * (8 << 20))
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""

_MOUNTS = """
import os, sys, threading
from hotstart.adapters.linux.fuse import FuseMount, ServedFile, leave_mount_namespace
leave_mount_namespace()
fuse = FuseMount([ServedFile("a/b", 4)], sys.argv[1], lambda file, offset, length, reply: reply(b"good"[:length]))
threading.Thread(target=fuse.serve, daemon=True).start()
with open(f"{sys.argv[1]}/a/b", "rb") as f:
    good = f.read() == b"good"
fuse.unmount(sys.argv[1])
os._exit(not good)
"""


class Check(Struct, frozen=True):
    """One thing that was tried. A check that is not `required` may fail without the machine being unfit."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = True


def examine(hotstart: Hotstart, *, gpu: bool = False) -> list[Check]:
    """Run every check; later ones are tried even where earlier ones fail."""
    checks = [
        _kernel(),
        _privileges(),
        _tried("programs", _programs, "install util-linux, and reinstall hotstart where gcc is installed"),
        _tried("namespaces", _namespaces, "run as root where new pid, mount, net, ipc and uts namespaces may be made"),
        _tried("criu", lambda: _criu(hotstart), "run scripts/install-criu"),
        _other_users(),
        _tried(
            "limits",
            lambda: _limits(hotstart),
            "mount control groups, or do without --memory and --cpus",
            required=False,
        ),
        _tried("egress", _egress, "install iproute2 and iptables, or do without --network egress", required=False),
        _tried(
            "streaming",
            _streaming,
            "give it /dev/fuse (`modprobe fuse`), or do without: snapshots in a store are then all fetched before they start",
            required=False,
        ),
        _memory(),
        _tried("disk", lambda: _disk(hotstart), "free some space, or set HOTSTART_HOME to a folder with more"),
        _device(hotstart, required=gpu),
    ]
    if gpu and not has_gpu():
        checks.append(Check("device snapshot", False, "skipped: no GPU", "docs/gpu.md says what is needed"))
    works = all(
        c.ok for c in checks if c.required and c.name in ("kernel", "privileges", "programs", "namespaces", "criu")
    )
    if works:
        checks.append(
            _tried(
                "snapshot and restore", _try_it, "read the reason; `hotstart --debug doctor` shows where it happened"
            )
        )
        if gpu and has_gpu():
            checks.append(_tried("device snapshot", try_device, "read the reason; docs/gpu.md says what is needed"))
    else:
        checks.append(
            Check("snapshot and restore", False, "not tried: the checks above come first", "mend those, then ask again")
        )
    return checks


def _tried(name: str, attempt: Callable[[], str], remedy: str, *, required: bool = True) -> Check:
    try:
        return Check(name, True, attempt(), required=required)
    except (HotstartError, OSError) as e:
        return Check(name, False, str(e), remedy, required)


def _kernel() -> Check:
    release = os.uname().release
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    if os.uname().machine != "x86_64":
        return Check("kernel", False, f"{release} on {os.uname().machine}", "memory is mapped on x86_64 only so far")
    return Check(
        "kernel", version >= _OLDEST_KERNEL, f"Linux {release}", "Linux 6.7 or later is needed to find a worker's pages"
    )


def _capabilities() -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1], 16) for line in f if line.startswith("CapEff:"))


def _privileges() -> Check:
    effective = _capabilities()
    names = {_CAP_SYS_ADMIN: "SYS_ADMIN", _CAP_SYS_PTRACE: "SYS_PTRACE", _CAP_NET_ADMIN: "NET_ADMIN"}
    missing = [name for bit, name in names.items() if not effective >> bit & 1]
    if os.geteuid() != 0 or missing:
        return Check(
            "privileges",
            False,
            f"uid {os.geteuid()}, without {', '.join(missing) or 'nothing'}",
            "run as root with these capabilities",
        )
    return Check("privileges", True, "root")


def _other_users() -> Check:
    has = bool(_capabilities() >> _CAP_SYS_RESOURCE & 1)
    detail = (
        "workers of any user"
        if has
        else "workers of root only: CAP_SYS_RESOURCE is missing, CRIU needs it for other users"
    )
    return Check("users", has, detail, "grant CAP_SYS_RESOURCE, or run workers as root", required=False)


def _programs() -> str:
    names = ["hotstart-init", "hotstart-fold", "hotstart-prefetch", "libhotstart-shim.so"]
    for name in names:
        native_program(name)
    if not shutil.which("nsenter"):
        raise HotstartError("nsenter (util-linux) is not on PATH")
    return ", ".join([*names, "nsenter"])


def _namespaces() -> str:
    import subprocess

    command = ["unshare", "--pid", "--mount", "--net", "--ipc", "--uts", "--fork", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HotstartError(done.stderr.strip() or "they cannot be made")
    return "pid, mount, net, ipc and uts can be made"


def _criu(hotstart: Hotstart) -> str:
    return f"{'.'.join(map(str, hotstart.criu_version()))} at {find_criu().path}"


def _limits(hotstart: Hotstart) -> str:
    folders = make_cgroups(os.path.join(hotstart.run_root, f"doctor-{os.getpid()}"), 1 << 30, 1.0)
    remove_cgroups(folders)
    return "control groups limit memory and cpus"


def _egress() -> str:
    missing = [p for p in ("ip", "iptables") if not shutil.which(p)]
    if missing:
        raise HotstartError(f"{' and '.join(missing)} not on PATH")
    return "ip and iptables are there"


def _streaming() -> str:
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run([sys.executable, "-c", _MOUNTS, folder], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise HotstartError(tried.stderr.strip().splitlines()[-1].rpartition(": ")[2] if tried.stderr.strip() else "no")
    return "memory can be fetched while it is in use"


def _memory() -> Check:
    free = free_memory_bytes()
    return Check("memory", free >= _FEW_BYTES // 4, f"{free >> 20} MiB are available", "free some memory")


def _disk(hotstart: Hotstart) -> str:
    bandwidth = measure_read_bandwidth(hotstart.home)
    st = os.statvfs(hotstart.home)
    free = st.f_bavail * st.f_frsize
    if free < _FEW_BYTES:
        raise HotstartError(f"only {free >> 20} MiB are free in {hotstart.home}")
    return f"{free >> 30} GiB free in {hotstart.home}, read at {bandwidth / 1e9:.2f} GB/s"


def _device(hotstart: Hotstart, *, required: bool) -> Check:
    if not has_gpu():
        detail = "no GPU: workers on CPUs only"
        return Check("device", not required, detail, "install an NVIDIA GPU and its driver, 570 or later", required)
    remedy = "read the reason; docs/gpu.md says what is needed"
    return _tried("device", lambda: describe_devices(hotstart), remedy, required=required)


def _try_it() -> str:
    """Snapshot and restore a tiny server, in folders of its own."""
    from hotstart.adapters.linux.host import host_folders_below_private
    from hotstart.api.core import Hotstart

    with tempfile.TemporaryDirectory(prefix="hotstart-doctor-") as folder:
        hotstart = Hotstart(home=f"{folder}/home", run=f"{folder}/run")
        command = (sys.executable, "-I", "-S", "-c", _SERVER)
        worker = WorkerSpec(
            command=command,
            cwd="/",
            environment={"PATH": os.defpath},
            port=8000,
            ready_url="http://127.0.0.1:8000/",
            ready_timeout_s=30.0,
            visible=host_folders_below_private("/", command[:1], (find_criu().path,)),
        )
        taken = take_snapshot(
            hotstart, "doctor", worker, SnapshotOptions(warmup=(Request("GET", "/"),)), time.monotonic(), Progressing()
        )
        if taken.fold_refused:
            raise HotstartError(f"memory could not be mapped: {taken.fold_refused}")
        (replica,) = hotstart.restore("doctor")
        hotstart.remove(replica.name, force=True)
        return f"a tiny server answered {(replica.receipt.first_answer_s or 0) * 1000:.0f} ms after its restore was asked for"
