"""Build hook: compiles the C that the kernel leaves no choice about (src/hotstart/native) with the system's compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path(__file__).parent / "src" / "hotstart" / "native"
WARNINGS = ["-O2", "-g", "-Wall", "-Wextra", "-Werror"]
# Static: they run inside any container image, and start a millisecond sooner.
PROGRAMS = {
    "hotstart-init": ["init.c", "-static"],
    "hotstart-fold": ["fold.c", "-static", "-pthread"],
    "hotstart-prefetch": ["prefetch.c", "-static", "-pthread"],
    "hotstart-podinit": ["podinit.c", "-static"],
    "hotstart-enter": ["enter.c", "-static"],
    "libhotstart-shim.so": ["shim.c", "-fPIC", "-shared"],
}
X86_ONLY = {"hotstart-fold"}  # elsewhere snapshots are taken with a plain dump


class NativeBuildHook(BuildHookInterface):
    """Compiles every program into native/bin, for wheels and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("no C compiler: install gcc and libc6-dev (scripts/install-packages does)")
        binaries = NATIVE / "bin"
        binaries.mkdir(exist_ok=True)
        for name, (source, *flags) in PROGRAMS.items():
            if name in X86_ONLY and platform.machine() != "x86_64":
                continue
            subprocess.run(
                [compiler, *WARNINGS, "-o", str(binaries / f".{name}"), str(NATIVE / source), *flags], check=True
            )
            os.replace(binaries / f".{name}", binaries / name)  # never a half-written program, even if one is running
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
