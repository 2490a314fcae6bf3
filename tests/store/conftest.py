"""Nobody pulls the plug in these tests, and waiting for the disk would be most of their time: fsync is not waited for."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # children that are killed still do
