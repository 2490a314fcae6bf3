"""One server: gateway, pool, pages and this machine's launcher, put together; reloaded and stopped without losing a request."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from hotstart.api.launching import LocalLauncher
from hotstart.errors import HotstartError
from hotstart.serve.config import load_config
from hotstart.serve.events import Events
from hotstart.serve.gateway import Gateway
from hotstart.serve.logging import Log
from hotstart.serve.pages import ServePages
from hotstart.serve.pool import ReplicaPool
from hotstart.serve.port import Served
from hotstart.serve.tracing import Tracing

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart

_SAVINGS_S = 30.0


class Server:
    """Serves the models of a configuration file."""

    def __init__(self, hotstart: Hotstart, path: str, stored: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._config = load_config(path)
        self._launcher = LocalLauncher(hotstart, stored)
        self._stop = asyncio.Event()
        self._log = Log(self._config.log, requests=self._config.log_requests)
        self._tracing = Tracing()
        self.events = Events(time.time)
        self.events.listen(self._log.happened)
        self.events.listen(self._tracing.happened)
        self.pool = ReplicaPool(self._launcher, self._config, self.events)
        self.pages = ServePages(self.pool, lambda: self._config, time.monotonic)
        self.events.listen(self.pages.metrics.happened)
        self.gateway = Gateway(self._config.gateway, self.pool, self.pages.pages, self._served)
        self.address = ("", 0)

    async def run(self, started: Callable[[tuple[str, int]], None]) -> None:
        """Serve until stopped; `started` is told where, once requests are taken. Raises HotstartError."""
        self._launcher.claim()
        await self.pool.start()
        try:
            self.address = await self.gateway.start()
        except OSError as e:
            await self.pool.close()
            raise HotstartError(
                f"{self._config.listen} cannot be listened on ({e.strerror}): choose another address"
            ) from e
        self._on_signals()
        pool = asyncio.create_task(self.pool.run(self.gateway.traffic))
        savings = asyncio.create_task(self._look_at_store())
        stopped = asyncio.create_task(self._stop.wait())
        host, port = self.address
        self.events.tell("serving", f"{len(self.pool.models)} models at http://{host}:{port}, dashboard at /ui")
        started(self.address)
        await asyncio.wait((pool, stopped), return_when=asyncio.FIRST_COMPLETED)
        self.pages.stopping = True
        self.events.tell("stopping", "requests that are here are answered first")
        try:
            await self.gateway.stop(max(m.drain_s for m in self._config.model))
        finally:
            savings.cancel()
            stopped.cancel()
            await self.pool.close()
            with suppress(asyncio.CancelledError):
                await pool
            self._tracing.close()
        self.events.tell("stopped", "all replicas have ended")

    def stop(self) -> None:
        """Answer what is here, end all replicas, return from `run`. The second time: end at once, as a kill would."""
        if self._stop.is_set():
            self.events.tell("killed", "replicas that run are left to the next server", bad=True)
            os._exit(130)
        self._stop.set()

    def reload(self) -> None:
        """Read the file again. One that is wrong changes nothing."""
        try:
            config = load_config(self._path)
        except HotstartError as e:
            self.events.tell("reload failed", f"nothing has changed: {e}", bad=True)
            return
        if config.listen != self._config.listen:
            self.events.tell("reload", "listen takes effect at the next start", bad=True)
        self._config = config
        self.gateway.configure(config.gateway)
        self.pool.apply(config)
        self.events.tell("reload", f"{len(config.model)} models")

    def _served(self, served: Served) -> None:
        self.pool.served(served)
        self.pages.metrics.served(served)
        self._log.served(served)
        self._tracing.served(served)

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    async def _look_at_store(self) -> None:
        while True:
            with suppress(HotstartError, OSError):
                self.pages.savings = await asyncio.to_thread(self._launcher.savings)
            await asyncio.sleep(_SAVINGS_S)
