"""Decides which processes can be mapped from a memory file, and why others cannot. Pure.

What a process throws away by madvise(2), or gains by mremap(2), must be zeros afterwards; in a private file mapping it is
the file's bytes. The preload shim mends that for whoever calls the C library (native/shim.c). It cannot for who asks the
kernel without it: such a process keeps anonymous memory, and its pages are brought to it.
"""

from __future__ import annotations

import re

from msgspec import Struct

# x86_64: syscall; before it, one of the ways to load 25 (mremap) or 28 (madvise) into eax. In 2 GB of libraries (torch, vllm, Node,
# the JVM, Debian's) it is found in glibc, in Go programs and in sanitizers, and nowhere else.
_SYSCALL = b"\x0f\x05"
_LOADS_NUMBER = re.compile(rb"(?:\xb8|\xc7\xc0)[\x19\x1c]\x00\x00\x00|\x6a[\x19\x1c]\x58")
_RETURN_OR_SYSCALL = re.compile(rb"\xc3|\x0f\x05")
WINDOW_BYTES = 40  # how far before the call the number is looked for

# glibc calls itself past the shim, and does not rely on zeros where it does (malloc's arenas, thread stacks; 2.36).
TRUSTED_LIBRARIES = ("libc.so.6", "ld-linux-x86-64.so.2")


class Traits(Struct, frozen=True):
    """What decides it: has it loaded the shim, its root folder, its code (paths) that asks the kernel past the C library."""

    shim: bool
    root: str
    raw_callers: tuple[str, ...] = ()


def why_unsafe(traits: Traits) -> str | None:
    """Say why a process cannot be mapped, or None if it can.

    >>> why_unsafe(Traits(shim=True, root="/"))
    >>> why_unsafe(Traits(shim=True, root="/", raw_callers=("/usr/bin/ollama",)))
    '/usr/bin/ollama calls madvise or mremap without the C library'
    """
    if not traits.shim:
        return "the preload shim is not in it (a static or set-uid program, or LD_PRELOAD was cleared)"
    if traits.root != "/":
        return f"it has changed its root folder to {traits.root}, where the preload shim may not see its mappings"
    if traits.raw_callers:
        return f"{traits.raw_callers[0]} calls madvise or mremap without the C library"
    return None


def makes_raw_calls(code: bytes) -> bool:
    """Say whether machine code asks the kernel for madvise or mremap itself.

    >>> makes_raw_calls(bytes.fromhex("b81c0000000f05c3"))  # mov $28,%eax; syscall; ret
    True
    >>> makes_raw_calls(bytes.fromhex("b80b0000000f05c3"))  # munmap
    False
    """
    at = code.find(_SYSCALL)
    while at >= 0:
        before = code[max(0, at - WINDOW_BYTES) : at]
        for found in _LOADS_NUMBER.finditer(before):
            if not _RETURN_OR_SYSCALL.search(before, found.end()):
                return True
        at = code.find(_SYSCALL, at + 1)
    return False
