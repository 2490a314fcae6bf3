"""What imports what: contracts of pyproject.toml, and what the two cheapest imports must not pull in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail

ROOT = Path(__file__).parents[1]
# What an interpreter has loaded by itself differs; what an import adds is what counts.
_ADDED = """
import sys
before = set(sys.modules)
import {module}
print("\\n".join(sorted(set(sys.modules) - before)))
"""


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def added_by(module):
    """The modules that importing one adds to a fresh interpreter."""
    return set(python(_ADDED.format(module=module)).split())


def test_every_import_contract_holds():
    lint_imports = ROOT / ".tools" / "bin" / "lint-imports"
    if not lint_imports.exists():
        skip_or_fail("import-linter is not there: make lint installs it")
    run = subprocess.run(
        [lint_imports, "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 kept, 0 broken" in run.stdout


def test_importing_hotstart_costs_no_other_package():
    added = added_by("hotstart")
    assert "hotstart" in added
    assert not {name.partition(".")[0] for name in added} & {"msgspec", "blake3"}
    assert {name for name in added if name.startswith("hotstart")} == {"hotstart"}


def test_the_api_is_there_once_it_is_asked_for():
    assert python("import hotstart; print(hotstart.Hotstart.__name__)") == "Hotstart\n"
    assert python("from hotstart import Hotstart; print(Hotstart.__module__)").startswith("hotstart.api")


def test_what_is_not_there_is_not_pretended():
    assert "AttributeError" in python(
        "import hotstart\ntry: hotstart.nothing\nexcept AttributeError as e: print(repr(e))"
    )


def test_the_worker_sdk_imports_the_standard_library_only():
    added = added_by("hotstart.worker")
    foreign = {name for name in added if name.partition(".")[0] not in sys.stdlib_module_names | {"hotstart"}}
    assert foreign == set()
    assert {name for name in added if name.startswith("hotstart")} == {"hotstart", "hotstart.worker"}


@pytest.mark.parametrize("module", ["hotstart.errors", "hotstart.cli.main", "hotstart.store.directory"])
def test_what_a_restore_loads_first_costs_no_other_package(module):
    assert not {name.partition(".")[0] for name in added_by(module)} & {"msgspec", "blake3", "argparse", "subprocess"}


def test_no_start_pays_for_typing_extensions():
    added = added_by("hotstart.api")
    assert "msgspec" in added
    assert "typing_extensions" not in added, "make setup removes it from the virtual environment"


def test_no_module_does_anything_when_it_is_imported():
    modules = [
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for path in sorted((ROOT / "src" / "hotstart").rglob("*.py"))
        if path.name != "__init__.py" and path.stem not in ("plots", "bench")
    ]
    # Neither a home nor a run folder may be touched, nothing printed; both would show here.
    environment = {**os.environ, "HOTSTART_HOME": "/nonexistent/home", "HOTSTART_RUN": "/nonexistent/run"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(f"import {m}" for m in modules)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert len(modules) > 40
