"""CRIU's plugins stay out: the one for CUDA would take device state back by itself."""

from pathlib import Path

import pytest

from hotstart.adapters.criu.program import Criu
from hotstart.api.capturing import SnapshotOptions
from tests.engine.conftest import hotstart, tiny_warmup, tiny_worker  # noqa: F401


def test_dump_and_restore_are_shown_a_folder_without_plugins():
    criu = Criu("/usr/sbin/criu")
    for command in (criu.dump_command(1000, 3, "/hook"), criu.restore_command(3, 4, {5: "pipe:[1]"})):
        folder = command[command.index("--libdir") + 1]
        assert [p.name for p in Path(folder).iterdir() if p.name.endswith(".so")] == []


@pytest.mark.criu
def test_a_plugin_that_lies_around_is_not_loaded(
    hotstart,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "broken.so").write_bytes(b"not a library: CRIU gives up if it loads this")
    monkeypatch.setenv("CRIU_LIBS_DIR", str(tmp_path))
    hotstart.snapshot("s", tiny_worker(), SnapshotOptions(warmup=tiny_warmup(), oracle_ignore=("id", "created")))
    (replica,) = hotstart.restore("s")
    assert replica.receipt.oracle_ok
