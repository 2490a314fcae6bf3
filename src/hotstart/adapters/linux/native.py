"""Where the compiled programs are."""

from __future__ import annotations

import os

from hotstart.errors import MachineLacks

_BIN = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), "native", "bin")


def native_program(name: str) -> str:
    """Path of a compiled program of ours. Raises MachineLacks if the package was installed without it."""
    path = os.path.join(_BIN, name)
    if not os.path.exists(path):
        raise MachineLacks(f"{name} was not built with this package: install gcc, then reinstall hotstart")
    return path
