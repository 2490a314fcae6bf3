"""The restore suite from its command to its files, with the tiny worker."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import json

from bench import device, report
from bench.figures import COLD, COLD_START, COMMAND, LAZY, OURS, PLAIN, S3, WARM, RestoreFigures
from tests.conftest import skip_or_fail
from tests.store import swift

ROOT = Path(__file__).parents[2]


def measured(tmp_path: Path, *options: str) -> RestoreFigures:
    """Run the suite; fail if it leaves anything behind."""
    environment = {**os.environ, "HOTSTART_HOME": str(tmp_path / "home"), "HOTSTART_RUN": str(tmp_path / "run")}
    command = [sys.executable, "-m", "bench.restore", "--worker", "tiny", "--sizes", "0.03", *options]
    out = tmp_path / "out"
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []
    assert [p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")] == []
    assert list((tmp_path / "home" / "cache" / "memory").iterdir()) == []
    for table in report.restore_blocks(
        figures := json.decode((out / "restore.json").read_bytes(), type=RestoreFigures)
    ):
        assert table.title.encode() in done.stdout
    return figures


@pytest.mark.criu
def test_the_suite_measures_every_way_and_writes_what_it_found(tmp_path):
    (size,) = measured(tmp_path, "--rounds", "1", "--replicas", "1,2", "--s3-up-to", "0").sizes
    assert {(c.method, c.cache, c.replicas) for c in size.cells} == {
        (COLD_START, WARM, 1),
        *((method, WARM, n) for method in (PLAIN, LAZY, OURS) for n in (1, 2)),
        (COMMAND, WARM, 1),
        *((method, COLD, 1) for method in (PLAIN, LAZY)),
        *((OURS, COLD, n) for n in (1, 2)),
    }
    ours, plain = size.cell(OURS, WARM), size.cell(PLAIN, WARM)
    assert 0 < ours.resumed_s < ours.first_answer_s
    assert ours.own_bytes < plain.own_bytes / 4
    assert ours.predicted_first_answer_s
    assert sum(ours.stages.values()) == pytest.approx(ours.rounds[0].first_answer_s[0], abs=0.001)
    assert 0 < size.floor_criu_s < size.floor_resumed_s
    assert size.areas > 50
    assert min(size.direct_bytes_per_s, size.populate_bytes_per_s) > 1 << 20
    assert size.warm_request_s > 0


@pytest.mark.criu
@pytest.mark.long
def test_the_suite_restores_from_a_real_s3_server(tmp_path):
    if not (swift.SWIFT / "swift-proxy-server").exists():
        skip_or_fail("there is no S3 server: scripts/install-swift installs OpenStack Swift")
    figures = measured(tmp_path, "--rounds", "2", "--replicas", "1")
    cell = figures.sizes[0].cell(OURS, S3)
    assert len(cell.rounds) == 2
    assert 0 < cell.arrived_part <= 1
    assert figures.took_s < 60


def test_files_that_were_put_out_of_the_page_cache_are_out_and_can_be_brought_back(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(8 << 20))
    with open(file, "rb") as f:
        assert device._resident(f.fileno()) == (8 << 20, 8 << 20)
        device.put_out([file])
        assert device._resident(f.fileno())[0] < 1 << 20
        device.bring_in([file])
        assert device._resident(f.fileno()) == (8 << 20, 8 << 20)


def test_files_that_a_process_has_mapped_are_not_called_cold(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(8 << 20))
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 8 << 20, prot=mmap.PROT_READ) as area:
        assert sum(area[i] for i in range(0, 8 << 20, 4096)) > 0
        with pytest.raises(RuntimeError, match="stay in the page cache"):
            device.put_out([file])
