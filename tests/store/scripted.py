"""What the tests of the wrappers share: a clock that moves only when it is slept on, and a store that fails as it is told."""

from collections import Counter

from hotstart.store.memory import MemoryStore


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now_s = 1000.0
        self.slept = []

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        assert seconds >= 0
        self.slept.append(seconds)
        self.now_s += seconds


class ScriptedStore:
    """A store in memory. Each method first does the next step of its script: raise an error, or None to go on.

    `after` holds errors that are raised once the work has been done: an answer that was lost.
    """

    def __init__(self, **scripts):
        self.inner = MemoryStore()
        self.scripts = scripts
        self.after = {}
        self.calls = Counter()

    def _do(self, method, *args):
        self.calls[method] += 1
        script = self.scripts.get(method, [])
        if script and (error := script.pop(0)) is not None:
            raise error
        result = getattr(self.inner, method)(*args)
        late = self.after.get(method, [])
        if late and (error := late.pop(0)) is not None:
            raise error
        return result

    def read(self, key, offset=0, length=None):
        return self._do("read", key, offset, length)

    def write(self, key, *parts):
        return self._do("write", key, *parts)

    def list(self, prefix):
        return self._do("list", prefix)

    def delete(self, key):
        return self._do("delete", key)
