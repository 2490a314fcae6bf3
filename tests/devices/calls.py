"""Run with one version of cuda-bindings and the emulated driver: what the adapter does to a process with device memory, as JSON.

usage: calls.py PID OLD=NEW
"""

import json
import sys

from cuda.bindings import driver as cuda

from hotstart.adapters.cuda.driver import CudaDriver
from hotstart.snapshot.device import DeviceFailed

pid, (old, new) = int(sys.argv[1]), sys.argv[2].split("=")
driver = CudaDriver(cuda)
done = {"api": driver.api, "can_move": driver.can_move, "direct": driver.knows_direct_storage, "states": []}


def look() -> None:
    """Note the state."""
    done["states"].append(driver.state(pid).value)


look()
driver.lock(pid, 5.0)
look()
try:
    driver.lock(pid, 5.0)
except DeviceFailed as e:
    done["twice"] = e.why
driver.checkpoint(pid)
look()
driver.restore(pid, {})
look()
driver.checkpoint(pid)
try:
    driver.restore(pid, {old: new})
    done["moved"] = True
except DeviceFailed as e:
    done["moved"] = e.why
    driver.restore(pid, {})
driver.unlock(pid)
look()
done["nobody"] = driver.state(1)
print(json.dumps(done))
