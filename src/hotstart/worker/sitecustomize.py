"""What Python imports when it starts in a sandbox: arms the renewal, then gets out of the way of the program's own sitecustomize."""

import os
import sys


def _arm() -> None:
    writes_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = False  # into the sandbox's private /run: compiling takes longer than all the rest
    try:
        import hotstart_renewal  # type: ignore[import-not-found]  # renewal.py, beside this file

        hotstart_renewal.arm()
    except Exception:  # noqa: BLE001  # an odd Python: it runs as ever, and what it draws is not renewed
        pass
    finally:
        sys.dont_write_bytecode = writes_bytecode


def _load_hidden() -> None:
    folder = os.path.dirname(__file__)
    if folder in sys.path:
        sys.path.remove(folder)
    ours = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as e:
        if e.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", ours)


if __name__ == "sitecustomize":
    _arm()
    _load_hidden()
