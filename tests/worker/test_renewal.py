"""A Python process is renewed once for each identity, and what cannot be renewed is named. Elsewhere: tests/engine/test_renewal.py."""

import random
import ssl
import sys

import numpy as np
import pytest

from hotstart.worker import renewal


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """A process that was never renewed."""
    monkeypatch.setattr(renewal, "_renewed_for", b"")
    monkeypatch.delenv("HOTSTART_KEEP_RANDOM", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)


def state():
    return random.getstate(), tuple(np.random.get_state()[1])


def seeded():
    random.seed(1)
    np.random.seed(1)
    return state()


def test_every_generator_is_seeded_once_for_each_identity():
    before = seeded()
    assert renewal.renew(b"first") == ""
    after = state()
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert renewal.renew(b"first") == ""
    assert state() == after
    renewal.renew(b"second")
    assert all(a != b for a, b in zip(after, state(), strict=True))


def test_a_process_that_keeps_its_random_state_keeps_it(monkeypatch):
    monkeypatch.setenv("HOTSTART_KEEP_RANDOM", "1")
    before = seeded()
    assert renewal.renew(b"first") == ""
    assert state() == before


def test_a_library_that_cannot_be_renewed_is_named_and_the_others_are_renewed_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    before = seeded()
    assert renewal.renew(b"first") == "torch"
    assert all(a != b for a, b in zip(before, state(), strict=True))


@pytest.mark.parametrize("preload", ["", "/run/hotstart/shim.so"])
def test_openssl_is_seeded_here_unless_the_shim_lets_it_notice_by_itself(monkeypatch, preload):
    added = []
    monkeypatch.setenv("LD_PRELOAD", preload)
    monkeypatch.setattr(sys.modules["_ssl"], "RAND_add", lambda *given: added.append(given))
    assert renewal.renew(b"first") == ""
    seen_by_shim = preload and renewal._has_shared_libcrypto(sys.modules["_ssl"])
    assert [(len(data), entropy) for data, entropy in added] == ([] if seen_by_shim else [(32, 32.0)])
    assert len(ssl.RAND_bytes(8)) == 8


@pytest.mark.parametrize("version", ["glibc 2.34", "musl 1.2.5", "", None])
def test_the_shim_is_relied_on_only_with_a_c_library_in_which_it_works(monkeypatch, version):
    monkeypatch.setenv("LD_PRELOAD", "/run/hotstart/shim.so")
    monkeypatch.setattr("os.confstr", lambda _: version)
    assert not renewal._has_shared_libcrypto(sys.modules["_ssl"])
