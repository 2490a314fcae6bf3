"""Memory that begins at a page and is used again: the kernel takes longer to give fresh pages than a file's bytes to fill them."""

from __future__ import annotations

import ctypes
import mmap
import weakref

from hotstart.store.port import Bytes


class Buffers:
    """Buffers of one length. Threads may share it.

    >>> buffers = Buffers(8192)
    >>> memory = buffers.take()
    >>> memory[:2] = b"ab"
    >>> del memory
    >>> bytes(buffers.take()[:2])  # the same again
    b'ab'
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._free: list[mmap.mmap] = []

    def take(self) -> memoryview:
        """Return one, with whatever is in it. It is free again once nobody has a view of it."""
        try:
            area = self._free.pop()
        except IndexError:
            # Private: a fresh page of shared memory, which is what Python takes unless told, costs twice as much.
            area = mmap.mmap(-1, self._length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        exporter = (ctypes.c_char * self._length).from_buffer(area)
        weakref.finalize(exporter, self._free.append, area).atexit = False
        return memoryview(exporter).cast("B")


def begins_at_page(data: Bytes) -> bool:
    """Say whether bytes that can be written to begin at a page; others are not asked."""
    view = memoryview(data)
    return not view.readonly and ctypes.addressof(ctypes.c_char.from_buffer(view)) % mmap.PAGESIZE == 0
