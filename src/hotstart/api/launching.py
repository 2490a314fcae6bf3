"""The launcher of `hotstart serve` on this machine: workers and replicas by the engine in this process.

What it knows of a model outlives it in names: a replica is called STEM.KEY.RANDOM and a snapshot STEM.KEY, where KEY tells what the
model was made of. So a server that was killed leaves nothing to be remembered: the next one finds all by looking.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from blake3 import blake3
from msgspec import MsgspecError, Struct, json, structs

from hotstart.adapters.linux.host import free_memory_bytes, host_folders_below_private, total_memory_bytes
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.api.ports import Publish
from hotstart.api.starting import last_words, require_program
from hotstart.errors import BadUsage, HotstartError, NotFound, Refused
from hotstart.restore.plan import make_plan, why_no_room
from hotstart.serve.autoscaler import Resources
from hotstart.serve.config import AUTO, NEVER, ModelConfig, read_requests
from hotstart.serve.launcher import Found, Frozen, Launched, NoRoomError, Recipe, Savings, Usage, Waterfall
from hotstart.serve.pool import stem_of
from hotstart.snapshot.codec import encode
from hotstart.snapshot.manifest import FORMAT_MAJOR
from hotstart.snapshot.warmup import ready_request
from hotstart.snapshot.worker import WorkerSpec

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart

_OURS = re.compile(r"[A-Za-z0-9-]{1,30}\.[0-9a-f]{12}\.[0-9a-f]{8}")
_KEY_DIGITS = 12
_LOCK = ".serve"
_INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
_HERE = "127.0.0.1"
_ANSWERS_WITHIN_S = 120.0
_ASK_TIMEOUT_S = 10.0
_POLL_S = 0.003
_THAWED_BY = "writing to the disk"  # the stage of taking a snapshot in which the worker runs again
_OWN_PART = 20  # a replica's own memory was below 3 % of the worker in every engine measured
_DRIVER = "/proc/driver/nvidia/version"


class _Remembered(Struct, frozen=True):
    """What is kept of a recipe beside its snapshot: HOTSTART_HOME/serve/KEY.json."""

    model: str
    snapshot: str
    cold: Waterfall | None = None


class LocalLauncher:
    """Implements `serve.launcher.Launcher`. `stored` is called after each snapshot: it may put it into the store."""

    def __init__(self, hotstart: Hotstart, stored: Callable[[], None] = lambda: None) -> None:
        self._hotstart, self._stored = hotstart, stored
        self._memory = os.path.join(hotstart.home, "serve")
        self._lock_fd = -1

    def claim(self) -> None:
        """Be the only server on these folders, until this process ends. Raises HotstartError."""
        self._hotstart.require_privileges()
        os.makedirs(self._memory, mode=0o700, exist_ok=True)
        fd = os.open(os.path.join(self._hotstart.run_root, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(fd)
            raise HotstartError(
                f"another `hotstart serve` uses {self._hotstart.run_root}: stop it, or set HOTSTART_RUN and HOTSTART_HOME"
            ) from e
        self._lock_fd = fd
        self._hotstart.sweep()

    def machine(self) -> Resources:
        """What all replicas together may take."""
        devices = len([d for d in glob.glob("/dev/nvidia[0-9]*") if d.removeprefix("/dev/nvidia").isdigit()])
        return Resources(float(len(os.sched_getaffinity(0))), total_memory_bytes(), devices)

    # ---- what a model is made of

    def recipe(self, model: ModelConfig) -> Recipe:
        """Look at what a model is made of now. Raises HotstartError."""
        worker = self._worker(model)
        require_program(worker)
        parts = {
            "command": [*model.command, model.cwd],
            "environment": sorted(worker.environment.items()),
            "worker": [model.port, model.ready_url, model.network, model.cpus, model.memory, list(worker.writable)],
            "warm-up": [encode(list(read_requests(model))), list(model.oracle_ignore)],
            "files": [_identity(path) for path in _files(model, worker)],
            "engine": _packages(worker),
            "kernel": os.uname().release,
            "driver": _driver(),
            "hotstart": [FORMAT_MAJOR, self._hotstart.criu_version()[0]],
        }
        told = {name: blake3(json.encode(value)).hexdigest()[:_KEY_DIGITS] for name, value in parts.items()}
        return Recipe(model, blake3(json.encode([model.name, told])).hexdigest()[:_KEY_DIGITS], told)

    def _worker(self, model: ModelConfig) -> WorkerSpec:
        if not os.path.isdir(model.cwd):
            raise BadUsage(f"model {model.name}: cwd {model.cwd} is no folder")
        if missing := next((path for path in model.writable if not os.path.isdir(path)), None):
            raise BadUsage(f"model {model.name}: writable {missing} is no folder")
        if unset := next((name for name in model.pass_env if name not in os.environ), None):
            raise BadUsage(f"model {model.name}: pass_env names {unset}, which is not set here")
        inherited = {n: os.environ[n] for n in (*_INHERITED, *model.pass_env) if n in os.environ}
        return WorkerSpec(
            command=model.command,
            cwd=model.cwd,
            environment={**inherited, **model.env},
            port=model.port,
            ready_url=model.ready_url,
            ready_timeout_s=model.ready_timeout_s,
            network=model.network,
            memory_bytes=model.memory_bytes,
            cpus=model.cpus,
            writable=model.writable,
            visible=host_folders_below_private(model.cwd, model.command, (self._hotstart.criu().path,)),
        )

    def frozen(self, recipe: Recipe) -> Frozen | None:
        """Return the snapshot to start replicas from, None if there is none. Raises Refused, with the reason why it cannot be used."""
        if recipe.model.snapshot == NEVER:
            return None
        hotstart, name = self._hotstart, _snapshot_name(recipe)
        try:
            manifest = hotstart.manifest(name)
        except NotFound:
            if recipe.model.snapshot == AUTO:
                return None
            raise
        local = name in hotstart.snapshots.names()
        if local and recipe.model.snapshot == AUTO and manifest.recorded is None:
            hotstart.remove_snapshot(name)  # whoever made it was killed before it was tried
            return None
        node = hotstart.node_facts(manifest, time.monotonic())
        plan = make_plan(manifest, node)
        if lasting := [reason for reason in plan.refusals if reason != why_no_room(manifest, node)]:
            raise Refused(f"snapshot {name} cannot be restored here: {'; '.join(lasting)}")
        own = manifest.image_bytes + manifest.logical_bytes // _OWN_PART if manifest.memory else manifest.logical_bytes
        return Frozen(name, plan.predicted_first_answer_s or plan.predicted_resumed_s, own, manifest.logical_bytes)

    # ---- starting

    def start_cold(self, recipe: Recipe, name: str) -> Launched:
        """Run the model's command, wait until it is ready, warm it up. Raises HotstartError; nothing is left then."""
        hotstart, model = self._hotstart, recipe.model
        began = time.monotonic()
        requests = read_requests(model)
        state = hotstart.run(name, self._worker(model), Publish(_HERE, 0))
        ready = time.monotonic()
        try:
            folder, _ = hotstart.find(name)
            oracle = hotstart.warm_up(state, folder.door, requests, model.oracle_ignore)
            folder.save(structs.replace(state, oracle=oracle))
        except BaseException:
            hotstart.remove(name, force=True)
            raise
        warm = time.monotonic()
        stages = {"start": ready - began, "warm-up": warm - ready}
        waterfall = Waterfall(name, "cold", warm - began, stages, time.time())
        self._remember(recipe, waterfall)
        return Launched(name, *_host_and_port(state.address), waterfall)

    def restore(self, recipe: Recipe, frozen: Frozen, name: str) -> Launched:
        """Restore a replica, wait until it answers. Raises Refused, NoRoomError, HotstartError; nothing is left then."""
        hotstart, model = self._hotstart, recipe.model
        began = time.monotonic()
        by_oracle = model.ask_oracle or model.ready_url is None
        try:
            (started,) = hotstart.restore(
                frozen.name, name=name, publish=Publish(_HERE, 0), wait=by_oracle, sweep=False
            )
        except Refused as e:
            if free_memory_bytes() < (frozen.own_bytes or 0):
                raise NoRoomError(str(e)) from e
            raise
        stages = dict(started.receipt.stages)
        stages.pop("unaccounted", None)
        if not by_oracle:
            asked = time.monotonic()
            try:
                self._wait_until_well(model, name)
            except BaseException:
                hotstart.remove(name, force=True)
                raise
            stages["ready"] = time.monotonic() - asked
        total = time.monotonic() - began
        stages["unaccounted"] = max(0.0, total - sum(stages.values()))
        waterfall = Waterfall(name, "restore", total, stages, time.time(), started.receipt.strategy)
        return Launched(name, *_host_and_port(started.address), waterfall)

    def _wait_until_well(self, model: ModelConfig, name: str) -> None:
        deadline = time.monotonic() + _ANSWERS_WITHIN_S
        while reason := self.healthy(model, name, _ASK_TIMEOUT_S):
            if not self.alive(name):
                raise HotstartError(f"the replica ended as soon as it was there; {self.last_words(name)}")
            if time.monotonic() > deadline:
                raise HotstartError(f"the replica is not ready after {_ANSWERS_WITHIN_S:g} s: {reason}")
            time.sleep(_POLL_S)

    # ---- snapshots

    def freeze(self, recipe: Recipe, name: str, thawed: Callable[[], None]) -> Frozen:
        """Take a snapshot of a replica that was started cold; it goes on. Raises HotstartError, with the replica as it was."""
        snapshot = _snapshot_name(recipe)
        with suppress(NotFound):
            self._hotstart.remove_snapshot(snapshot)
        take_snapshot(
            self._hotstart, snapshot, name, SnapshotOptions(keep=True), time.monotonic(), _TellsWhenThawed(thawed)
        )
        self._discard_former(recipe, kept=1)
        self._stored()
        frozen = self.frozen(recipe)
        if frozen is None:
            raise HotstartError(f"snapshot {snapshot} was removed as soon as it was there")
        return frozen

    def discard(self, recipe: Recipe) -> None:
        """Remove the snapshot of a recipe, and those of the model's former recipes that no replica runs of."""
        with suppress(NotFound):
            self._hotstart.remove_snapshot(_snapshot_name(recipe))
        self._discard_former(recipe, kept=0)

    def _discard_former(self, recipe: Recipe, kept: int) -> None:
        used = {state.snapshot for _, state in self._hotstart.folders.all() if state.alive()}
        former = []
        for path in glob.glob(os.path.join(glob.escape(self._memory), "*.json")):
            remembered = _read(path)
            if remembered and remembered.model == recipe.model.name and remembered.snapshot != _snapshot_name(recipe):
                former.append((os.stat(path).st_mtime, path, remembered.snapshot))
        for _, path, snapshot in sorted(former, reverse=True)[kept:]:
            if snapshot not in used:
                with suppress(HotstartError):
                    self._hotstart.remove_snapshot(snapshot)
                os.unlink(path)

    def _remember(self, recipe: Recipe, cold: Waterfall) -> None:
        path = os.path.join(self._memory, f"{recipe.key}.json")
        with suppress(OSError):  # a full disk costs a line on the dashboard, no replica
            os.makedirs(self._memory, mode=0o700, exist_ok=True)
            with open(f"{path}.aside", "wb") as f:
                f.write(json.encode(_Remembered(recipe.model.name, _snapshot_name(recipe), cold)))
            os.replace(f"{path}.aside", path)

    def cold_start(self, recipe: Recipe) -> Waterfall | None:
        """What the cold start took that a restore of this recipe replaces; None: not known here."""
        remembered = _read(os.path.join(self._memory, f"{recipe.key}.json"))
        return remembered.cold if remembered else None

    def savings(self) -> Savings | None:
        """What the store holds of all snapshots; None: not known."""
        data = stored = 0
        for name in self._hotstart.snapshots.names():
            with suppress(HotstartError):
                data += self._hotstart.snapshots.open(name).manifest.data_bytes
        for folder, _, files in os.walk(os.path.join(self._hotstart.home, "store")):
            for file in files:
                with suppress(OSError):
                    stored += os.stat(os.path.join(folder, file)).st_blocks * 512
        return Savings(data, stored) if data else None

    # ---- replicas that run

    def end(self, name: str, grace_s: float) -> None:
        """Ask a replica to end, end it, forget it. One that is gone is fine."""
        with suppress(NotFound):
            self._hotstart.stop(name, grace_s)
            self._hotstart.remove(name, force=True)

    def alive(self, name: str) -> bool:
        """Say whether a replica's processes run."""
        try:
            return self._hotstart.find(name)[1].alive()
        except NotFound:
            return False

    def healthy(self, model: ModelConfig, name: str, timeout_s: float) -> str:
        """Ask a replica whether it is ready; returns why not, or an empty text."""
        try:
            folder, _ = self._hotstart.find(name)
            if model.ready_url is None:
                self._hotstart.asker.wait_port(folder.door, model.port, 0)
                return ""
            port, request = ready_request(model.ready_url)
            answer = self._hotstart.asker.ask(folder.door, port, request, timeout_s)
        except HotstartError as e:
            return str(e)
        return "" if 200 <= answer.status < 300 else f"{model.ready_url} is answered {answer.status}"

    def last_words(self, name: str) -> str:
        """What it wrote last, in one line."""
        try:
            return last_words(self._hotstart.find(name)[1].log_path)
        except NotFound:
            return "nothing is left of it"

    def usage(self, name: str) -> Usage | None:
        """Memory of a replica; None if it is gone."""
        try:
            found = self._hotstart.memory_bytes(name)
        except (HotstartError, OSError):
            return None
        return Usage(found["rss"], found["pss"], found["own"])

    def found(self) -> list[Found]:
        """List the replicas of an earlier server that still run, whatever they are of."""
        here = []
        for _, state in self._hotstart.ps():
            if _OURS.fullmatch(state.name):
                if state.alive() and state.address:
                    here.append(Found(state.name, *_host_and_port(state.address), cold=state.kind == "worker"))
                else:
                    self._hotstart.remove(state.name, force=True)
        return here


class _TellsWhenThawed(Progressing):
    def __init__(self, thawed: Callable[[], None]) -> None:
        self._thawed = thawed

    def stage(self, name: str) -> None:
        """Say what begins."""
        if name == _THAWED_BY:
            self._thawed()


def _snapshot_name(recipe: Recipe) -> str:
    chosen = recipe.model.snapshot
    return f"{stem_of(recipe.model.name)}.{recipe.key}" if chosen in (AUTO, NEVER) else chosen


def _host_and_port(address: str | None) -> tuple[str, int]:
    host, _, port = (address or "").rpartition(":")
    return host, int(port)


def _read(path: str) -> _Remembered | None:
    with suppress(OSError, MsgspecError), open(path, "rb") as f:
        return json.decode(f.read(), type=_Remembered)
    return None


def _files(model: ModelConfig, worker: WorkerSpec) -> list[str]:
    """Files that a model is made of: those that its command names, and those that its owner names."""
    from shutil import which

    program = which(model.command[0], path=worker.environment.get("PATH", os.defpath)) or model.command[0]
    named = [os.path.join(model.cwd, part) for part in (program, *model.command[1:])]
    for pattern in model.files:
        named += glob.glob(os.path.join(model.cwd, pattern), recursive=True)
    return sorted({os.path.realpath(path) for path in named if os.path.isfile(path)})


def _identity(path: str) -> list[object]:
    st = os.stat(path)
    return [path, st.st_size, st.st_mtime_ns]


def _packages(worker: WorkerSpec) -> list[str]:
    """Python packages of the virtual environment that the command's program is in, by name and version."""
    from shutil import which

    program = which(worker.command[0], path=worker.environment.get("PATH", os.defpath)) or ""
    root = os.path.dirname(os.path.dirname(os.path.join(worker.cwd, program)))
    if not os.path.exists(os.path.join(root, "pyvenv.cfg")):
        return []
    found = glob.glob(os.path.join(glob.escape(root), "lib", "python3*", "site-packages", "*.dist-info"))
    return sorted(map(os.path.basename, found))


def _driver() -> str:
    with suppress(OSError), open(_DRIVER, encoding="utf-8", errors="replace") as f:
        return f.readline().strip()
    return ""
