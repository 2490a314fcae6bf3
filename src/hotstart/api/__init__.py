"""The one place that wires adapters to stages; command line, gateway and agents use nothing else.

>>> from hotstart.api import Hotstart
>>> Hotstart(home="/tmp/nowhere", run="/tmp/nowhere/run").snapshots.names()
[]
"""

from hotstart.api.core import Hotstart
from hotstart.api.ports import Publish

__all__ = ["Hotstart", "Publish"]
