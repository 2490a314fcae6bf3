"""A launcher without processes, and requests without a gateway: what a pool is told to do is done at once, or fails as scripted."""

import threading
import time

from hotstart.errors import HotstartError
from hotstart.serve.autoscaler import Resources
from hotstart.serve.launcher import Found, Frozen, Launched, Recipe, Savings, Usage, Waterfall
from hotstart.serve.port import Load


class MemoryLauncher:
    """Implements `serve.launcher.Launcher`. `scripts` are errors that the next calls of a method raise."""

    def __init__(self):
        self.calls = []
        self.running = {}  # name -> "cold" or "restore"
        self.sick = {}  # name -> why
        self.snapshots = set()
        self.keys = {}
        self.scripts = {}
        self.left_over = []
        self.slow = {}
        self.resources = Resources(8.0, 1 << 34, 0)
        self._lock = threading.Lock()

    def _call(self, method, *what):
        time.sleep(self.slow.get(method, 0))
        with self._lock:
            self.calls.append((method, *what))
            if self.scripts.get(method):
                error = self.scripts[method].pop(0)
                if error:
                    raise error

    def count(self, method):
        return sum(call[0] == method for call in self.calls)

    def machine(self):
        return self.resources

    def recipe(self, model):
        self._call("recipe", model.name)
        key = self.keys.get(model.name, "0" * 12)
        return Recipe(model, key, {"files": key})

    def frozen(self, recipe):
        if (recipe.model.name, recipe.key) not in self.snapshots:
            return None
        self._call("frozen", recipe.key)
        return Frozen(f"{recipe.model.name}.{recipe.key}", 0.05, 1 << 20, 1 << 30)

    def _launch(self, name, kind, total_s):
        self.running[name] = kind
        return Launched(name, "127.0.0.1", 1000 + len(self.calls), Waterfall(name, kind, total_s, {"all": total_s}))

    def start_cold(self, recipe, name):
        self._call("start_cold", name)
        return self._launch(name, "cold", 0.2)

    def restore(self, recipe, frozen, name):
        self._call("restore", name)
        return self._launch(name, "restore", 0.01)

    def freeze(self, recipe, name, thawed):
        self._call("freeze", name)
        thawed()
        time.sleep(self.slow.get("trial", 0))
        self._call("trial", name)
        self.snapshots.add((recipe.model.name, recipe.key))
        return Frozen(f"{recipe.model.name}.{recipe.key}", 0.05, 1 << 20, 1 << 30)

    def discard(self, recipe):
        self._call("discard", recipe.key)
        self.snapshots.discard((recipe.model.name, recipe.key))

    def end(self, name, grace_s):
        self._call("end", name)
        self.running.pop(name, None)

    def alive(self, name):
        return name in self.running

    def healthy(self, model, name, timeout_s):
        if name not in self.running:
            return "it is gone"
        return self.sick.get(name, "")

    def last_words(self, name):
        return "it wrote nothing"

    def usage(self, name):
        return Usage(100, 60, 10) if name in self.running else None

    def found(self):
        for name in self.left_over:
            self.running[name] = "restore"
        return [Found(name, "127.0.0.1", 99, cold=False) for name in self.left_over]

    def cold_start(self, recipe):
        return None

    def savings(self):
        return Savings(1 << 30, 1 << 20)


class ScriptedTraffic:
    """Implements `port.Traffic`: the load that a test says."""

    def __init__(self):
        self.loads = {}
        self.busy = set()

    def load(self, model):
        return self.loads.get(model, Load())

    async def drained(self, replica):
        import asyncio

        while replica in self.busy:
            await asyncio.sleep(0.005)

    def waits(self, model, count, in_flight=None):
        self.loads[model] = Load(
            waiting=count, oldest_wait_s=0.1 if count else 0.0, in_flight=in_flight or {}, last_active=time.monotonic()
        )


def failing(*texts):
    return [HotstartError(text) for text in texts]
