"""Hotstart freezes a warm AI inference worker once and starts replicas of it in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotstart.api import Hotstart

__version__ = "0.1.0"
__all__ = ["Hotstart", "__version__"]


def __getattr__(name: str) -> object:
    """Load the API when it is first used: `import hotstart` stays cheap."""
    if name == "Hotstart":
        from hotstart.api import Hotstart

        return Hotstart
    raise AttributeError(name)
