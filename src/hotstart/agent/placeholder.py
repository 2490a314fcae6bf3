"""One container of a pod that is to be restored: from its start to its end. What cannot be restored starts cold, in the same pod."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from hotstart.adapters.kubernetes.client import Object
from hotstart.adapters.kubernetes.names import CLAIMED, CONTAINER, READY, RESTORE_FROM, RESTORED, WARM_POOL, store_name
from hotstart.adapters.linux import podinit
from hotstart.adapters.linux.podinit import PodInit
from hotstart.adapters.linux.podspace import PodAsker
from hotstart.adapters.linux.procfs import start_ticks
from hotstart.agent.reports import Reports
from hotstart.api.pods import Pods
from hotstart.errors import HotstartError, MachineLacks, Refused
from hotstart.restore.pods import Container
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import SUPPORT_FOLDER

_TAKEN_WITHIN_S = 3.0  # what has run for longer is not interrupted any more
_POLL_S = 0.05
_PROBE_TIMEOUT_S = 5.0
_STARTED_TIMEOUT_S = 60.0  # a pod without requests of CPU may not be scheduled for seconds on a busy node
_MOST_AGAIN, _AGAIN_WITHIN_S = 5, 60.0


def is_worker(pod: Object, container: str) -> bool:
    """Say whether a container is the one of its pod that is to be restored."""
    annotations = pod["metadata"].get("annotations") or {}
    if RESTORE_FROM not in annotations:
        return False
    return bool(container == (annotations.get(CONTAINER) or pod["spec"]["containers"][0]["name"]))


class Placeholder:
    """A container whose first process is, or shall be, our init. `live` has a thread of its own."""

    def __init__(
        self,
        pods: Pods,
        reports: Reports,
        container: Container,
        pid: int,
        pod: Object,
        snapshot_of: Callable[[str, str], Object | None],
        pod_of: Callable[[str, str], Object | None],
    ) -> None:
        self._pods, self._reports, self._container, self._pid, self._pod = pods, reports, container, pid, pod
        self._snapshot_of, self._pod_of = snapshot_of, pod_of
        self._again: list[float] = []
        self._wake_read, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def claim(self) -> None:
        """Let a pod of a warm pool go on; any other goes on by itself."""
        with suppress(OSError):
            os.write(self._wake, b"c")

    def live(self) -> bool:
        """Lead it to its end, or until it needs nobody; False if something went wrong and it is to be led anew."""
        try:
            ours = podinit.is_ours(self._pid)
            if not ours and _age_s(self._pid) > _TAKEN_WITHIN_S:
                self._watch_native("no agent was here when it started")
                return True
            try:
                init = self._pods.take(self._pid, self._container.command)
            except (Refused, MachineLacks) as e:
                self._reports.cold(self._pod, str(e))
                self._watch_native(str(e))
                return True
            try:
                self._lead(init)
            finally:
                init.close()
        except (HotstartError, OSError) as e:
            self._reports.log(f"{self._container.namespace}/{self._container.pod}: {e}")
            return False
        finally:
            os.close(self._wake_read)
            os.close(self._wake)

    # ---- our init leads

    def _lead(self, init: PodInit) -> NoReturn:
        if init.state == "waiting":
            self._wait_for_claim(init)
            self._start(init)
        elif init.state == "running":  # an agent before us started it
            self._until_ready(init, "Adopted", "it ran when this agent started")
        elif init.state == "ended":
            self._start_again(init, init.ended_with)
        while True:
            word, *rest = init.hear(None)
            if word == "ended":
                self._start_again(init, int(rest[0]))

    def _wait_for_claim(self, init: PodInit) -> None:
        init.say("hold")
        while self._is_unclaimed():
            ready, _, _ = select.select([init.fileno(), self._wake_read], [], [])
            if init.fileno() in ready:
                init.hear(0)  # it has nothing to say but that it has ended
            with suppress(BlockingIOError):
                if os.read(self._wake_read, 64):
                    return

    def _is_unclaimed(self) -> bool:
        pod = self._pod_of(self._container.namespace, self._container.pod) or self._pod
        labels = pod["metadata"].get("labels") or {}
        return WARM_POOL in labels and CLAIMED not in labels

    def _start(self, init: PodInit, *, again: bool = False) -> None:
        why = self._why_cold()
        if not why:
            try:
                stored = store_name(self._container.namespace, self._snapshot_name())
                receipt = self._pods.restore(init, stored, self._container.pod)
                self._reports.restored(self._pod, self._pid, receipt, again=again)
                return
            except HotstartError as e:
                why = str(e)
        self._pods.start_cold(init, self._container.pod)
        init.expect("started", _STARTED_TIMEOUT_S)
        self._reports.cold(self._pod, why)
        self._until_ready(init, "ColdStarted", why)

    def _start_again(self, init: PodInit, wait_status: int) -> None:
        """Restore a worker that has died, where the container would be started again; else end as it did."""
        now = time.monotonic()
        self._again = [t for t in self._again if now - t < _AGAIN_WITHIN_S]
        pod = self._pod_of(self._container.namespace, self._container.pod)
        policy = self._pod["spec"].get("restartPolicy", "Always")
        wanted = policy == "Always" or (policy == "OnFailure" and wait_status)
        if (
            not pod
            or pod["metadata"].get("deletionTimestamp")
            or not wanted
            or len(self._again) >= _MOST_AGAIN
            or self._why_cold()
        ):
            init.say("end")
            return
        self._again.append(now)
        self._start(init, again=True)

    def _snapshot_name(self) -> str:
        return str(self._pod["metadata"]["annotations"][RESTORE_FROM])

    def _why_cold(self) -> str:
        name = self._snapshot_name()
        snapshot = self._snapshot_of(self._container.namespace, name)
        if snapshot is None:
            return f"there is no Snapshot {name}"
        phase = snapshot.get("status", {}).get("phase") or "new"
        return "" if phase == READY else f"Snapshot {name} is {phase}"

    # ---- readiness

    def _until_ready(self, init: PodInit, reason: str, message: str) -> None:
        while not self._is_ready():
            if select.select([init.fileno()], [], [], _POLL_S)[0]:
                return  # it has ended, as whoever hears it next learns
        self._open_gate(reason, message)

    def _watch_native(self, why: str) -> None:
        ticks = start_ticks(self._pid)
        while start_ticks(self._pid) == ticks:
            if self._is_ready():
                self._open_gate("ColdStarted", why)
                return
            time.sleep(_POLL_S)

    def _open_gate(self, reason: str, message: str) -> None:
        pod = self._pod_of(self._container.namespace, self._container.pod) or self._pod
        conditions = pod.get("status", {}).get("conditions") or ()
        if not any(c["type"] == RESTORED and c["status"] == "True" for c in conditions):
            self._reports.ready(self._pod, self._pid, reason, message)

    def _is_ready(self) -> bool:
        spec = next(c for c in self._pod["spec"]["containers"] if c["name"] == self._container.name)
        asker = PodAsker(self._pid)
        if os.path.exists(f"/proc/{self._pid}/root{SUPPORT_FOLDER}/ready"):
            return True
        probe = (spec.get("readinessProbe") or {}).get("httpGet")
        if probe and isinstance(probe.get("port"), int):
            with suppress(HotstartError):
                return (
                    200
                    <= asker.ask(probe["port"], Request("GET", probe.get("path") or "/"), _PROBE_TIMEOUT_S).status
                    < 400
                )
            return False
        ports = spec.get("ports") or ()
        return asker.accepts(ports[0]["containerPort"]) if ports else True


def _age_s(pid: int) -> float:
    ticks = start_ticks(pid)
    if ticks is None:
        raise HotstartError("the container has ended")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
