"""Memory that is used again, but never while anybody looks at it."""

import doctest
import mmap

from hotstart.store import buffers
from hotstart.store.buffers import Buffers, begins_at_page


def test_the_example_is_right():
    assert doctest.testmod(buffers).failed == 0


def test_memory_is_given_again_once_nobody_has_a_view_of_it():
    pool = Buffers(1 << 16)
    memory = pool.take()
    memory[:4] = b"mine"
    part = memory[:4]
    del memory
    other = pool.take()
    other[:4] = b"else"
    assert bytes(part) == b"mine"
    del part
    assert bytes(pool.take()[:4]) == b"mine"


def test_memory_of_the_pool_begins_at_a_page_and_bytes_are_not_asked():
    memory = Buffers(1 << 16).take()
    assert begins_at_page(memory)
    assert begins_at_page(memory[mmap.PAGESIZE :])
    assert not begins_at_page(memory[1:])
    assert not begins_at_page(bytes(mmap.PAGESIZE))
