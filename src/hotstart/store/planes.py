"""Byte planes: the first bytes of all words of 4, then all second ones, and so on; a plane is compressed if that is worth it. Pure.

Mantissas are noise, and while they stand between signs and exponents zstd finds little in either. Apart, signs and exponents shrink
to a third: one byte in four of float32, one in two of bfloat16 and float16, of which a word has two. docs/format.md has the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from hotstart.errors import Damaged
from hotstart.store.port import Bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WORD_BYTES = 4
_HEAD = struct.Struct("<4I")
_WORTH_IT = 0.97  # of a plane: what saves less is not worth unpacking
_SAMPLE_BYTES = 1024  # at four places of a plane


def pack(data: Bytes, compress: Callable[[Bytes], bytes]) -> bytes:
    """Return the lengths of the planes, the planes, each as it is or compressed, and the bytes behind the last whole word."""
    import numpy as np

    count = len(data) // WORD_BYTES
    words = np.frombuffer(data, dtype=np.uint8, count=count * WORD_BYTES).reshape(count, WORD_BYTES)
    parts = [_packed(plane, compress) for plane in np.ascontiguousarray(words.T)]
    return b"".join((_HEAD.pack(*map(len, parts)), *parts, memoryview(data)[count * WORD_BYTES :]))


def _packed(plane: NDArray[np.uint8], compress: Callable[[Bytes], bytes]) -> Bytes:
    quarter = len(plane) // 4
    if quarter > 2 * _SAMPLE_BYTES:  # trying costs time, and of most weights two planes or three are noise
        sample = plane[: 4 * quarter].reshape(4, quarter)[:, :_SAMPLE_BYTES].tobytes()
        if len(compress(sample)) >= len(sample) * _WORTH_IT:
            return plane.data
    packed = compress(plane.data)
    return packed if len(packed) < len(plane) * _WORTH_IT else plane.data


def unpack(data: Bytes, length: int, decompress: Callable[[Bytes, int], bytes]) -> memoryview:
    """Return the `length` bytes that were packed; `decompress` is told how many bytes there may be. Raises Damaged."""
    import numpy as np

    count = length // WORD_BYTES
    view = memoryview(data)
    if len(view) < _HEAD.size:
        raise Damaged("the byte planes of a chunk are damaged")
    sizes = _HEAD.unpack_from(view)
    ends = list(accumulate(sizes, initial=_HEAD.size))
    if max(sizes) > count or ends[-1] + length % WORD_BYTES != len(view):
        raise Damaged("the byte planes of a chunk are damaged")
    found = np.empty(length, dtype=np.uint8)
    words = found[: count * WORD_BYTES].reshape(count, WORD_BYTES)
    for k, (begin, end) in enumerate(pairwise(ends)):
        plane: Bytes = view[begin:end]
        if len(plane) < count:
            plane = decompress(plane, count)
        if len(plane) != count:
            raise Damaged("a byte plane of a chunk is damaged")
        words[:, k] = np.frombuffer(plane, dtype=np.uint8)
    found[count * WORD_BYTES :] = np.frombuffer(view[ends[-1] :], dtype=np.uint8)
    return found.data
