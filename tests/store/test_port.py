"""The in-memory store passes what every store must, and keys cannot lead out of a store."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.store.memory import MemoryStore
from hotstart.store.port import check_key
from tests.samples import CHARACTERS
from tests.store.conformance import StoreConformance


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self):
        return MemoryStore()


@given(st.text("ab./-_", max_size=12) | st.text(CHARACTERS, max_size=12))
def test_an_accepted_key_stays_below_the_root_and_means_one_file(key):
    try:
        check_key(key)
    except ValueError:
        return
    path = os.path.join("/the/root", key)
    assert os.path.normpath(path) == path
    assert path.startswith("/the/root/") and key
    assert not any(part.startswith(".") for part in key.split("/"))


@pytest.mark.parametrize("key", ["names/llm-1", "packs/" + "0f" * 32, "names/a.b_c-D", "a/b/c/d"])
def test_the_keys_that_we_make_are_accepted(key):
    assert check_key(key) == key
