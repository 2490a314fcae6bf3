"""CRIU with all that it needs, in one folder: so it runs where only that folder's descriptor leads to it, in a container of any image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress

from hotstart.adapters.criu.program import Criu
from hotstart.errors import MachineLacks

_LIBRARY = re.compile(r"(\S+) => (/\S+) \(0x|^\s*(/\S*/ld-\S+) \(0x", re.MULTILINE)
_KDAT = "criu.kdat"


class Bundle:
    """A folder with the program, its shared libraries, and the loader that brings them together."""

    def __init__(self, criu: Criu, folder: str) -> None:
        """Fill the folder, if it does not hold this very program already. Raises MachineLacks."""
        self.folder = folder
        st = os.stat(criu.path)
        stamp = f"{criu.path} {st.st_ino} {st.st_size} {st.st_mtime_ns}"
        with suppress(OSError), open(os.path.join(folder, "stamp"), encoding="utf-8") as f:
            if f.read() == stamp:
                return
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(os.path.join(folder, "lib"))
        said = subprocess.run(["ldd", criu.path], capture_output=True, text=True, check=False).stdout
        for name, path, loader in _LIBRARY.findall(said):
            shutil.copy(path or loader, os.path.join(folder, "lib", name) if path else os.path.join(folder, "ld.so"))
        if not os.path.exists(os.path.join(folder, "ld.so")):
            raise MachineLacks(f"{criu.path} names no program loader (ldd): it cannot be brought into containers")
        shutil.copy(criu.path, os.path.join(folder, "criu"))
        with open(os.path.join(folder, "stamp"), "w", encoding="utf-8") as f:
            f.write(stamp)

    def criu(self, folder_fd: int) -> Criu:
        """Return the CRIU as it is run by a process that has the folder open as that descriptor, and /proc."""
        here = f"/proc/self/fd/{folder_fd}"
        return Criu(
            os.path.join(self.folder, "criu"), (f"{here}/ld.so", "--library-path", f"{here}/lib", f"{here}/criu")
        )

    def make_kdat(self, path: str) -> None:
        """Write CRIU's cache of kernel features, which saves each restore 25 ms; it keeps that in a tmpfs /run only (CRIU 4.2.1)."""
        criu = os.path.join(self.folder, "criu")
        script = (
            f'mount -t tmpfs none /run && "$0" --library-path "$1/lib" "$2" check >/dev/null 2>&1; cat /run/{_KDAT}'
        )
        command = ["unshare", "--mount", "sh", "-c", script, f"{self.folder}/ld.so", self.folder, criu]
        made = subprocess.run(command, capture_output=True, check=False).stdout
        if made:
            with open(f"{path}.aside", "wb") as f:
                f.write(made)
            os.replace(f"{path}.aside", path)
