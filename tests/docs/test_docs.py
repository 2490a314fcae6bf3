"""The documents stay true: what they name (links, commands, options, fields, modules, messages) is what the code has."""

import contextlib
import doctest
import importlib
import io
import re
import runpy
import shlex
import signal
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from bench import figures, storefigures
from hotstart import errors
from hotstart.adapters.linux import filepack
from hotstart.cli.main import main
from hotstart.restore.receipt import STAGES
from hotstart.snapshot.manifest import FORMAT, FORMAT_MAJOR, FORMAT_MINOR
from hotstart.store import content, packs, repository

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "hotstart"
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCS]
SHELL = {"sh", "text", ""}
GROUPS = ("snapshot", "keys", "k8s")  # commands of two words

# Where the documents list the fields of a value: document, heading, the value's class.
FIELDS = [
    ("docs/format.md", "Manifest: the document", "snapshot.manifest.Manifest"),
    ("docs/format.md", "WorkerSpec", "snapshot.worker.WorkerSpec"),
    ("docs/format.md", "DeviceState", "snapshot.device.DeviceState"),
    ("docs/format.md", "Gpu", "snapshot.device.Gpu"),
    ("docs/format.md", "DeviceProcess", "snapshot.device.DeviceProcess"),
    ("docs/format.md", "HostFingerprint", "snapshot.manifest.HostFingerprint"),
    ("docs/format.md", "Process", "snapshot.manifest.Process"),
    ("docs/format.md", "File", "snapshot.manifest.File"),
    ("docs/format.md", "MemoryFile", "snapshot.manifest.MemoryFile"),
    ("docs/format.md", "NeededFile", "snapshot.manifest.NeededFile"),
    ("docs/format.md", "Oracle", "snapshot.warmup.Oracle"),
    ("docs/format.md", "RecordedRestore", "snapshot.manifest.RecordedRestore"),
    ("docs/format.md", "Signature", "store.signing.Signature"),
    ("docs/cli.md", "hotstart snapshot create", "api.capturing.SnapshotTaken"),
    ("docs/cli.md", "hotstart plan", "restore.plan.Plan"),
    ("docs/cli.md", "hotstart receipt", "restore.receipt.Receipt"),
    ("docs/serve.md", "The document", "serve.config.ServeConfig"),
    ("docs/serve.md", "timeouts", "serve.config.TimeoutsConfig"),
    ("docs/serve.md", "limits", "serve.config.LimitsConfig"),
    ("docs/serve.md", "machine", "serve.config.MachineConfig"),
]
# The same where they stand in a sentence: `{"pid", "name", ...}`.
INLINE_FIELDS = [
    ("docs/cli.md", "hotstart plan", "restore.plan.ProcessPlan"),
    ("docs/cli.md", "hotstart doctor", "api.doctoring.Check"),
]
PLACEHOLDER = re.compile(
    r"\b(?:NAME|PATH|VERSION|WHAT|WHY|HOW|EVENT|METHOD|STATUS|FILE|LINE|KEY|DIGEST|MAJOR|MINOR|ARCHITECTURE|HOST|PORT|PROGRAM|N)\b|\.\.\.|\(.*"
)


# ---- reading Markdown


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, contents) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)


def prose(name: str) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)


def spans(markdown: str) -> list[str]:
    """Everything that is set as code within the text."""
    return [re.sub(r"\s+", " ", span).replace("\\|", "|") for span in re.findall(r"`([^`]+)`", markdown)]


def section(name: str, heading: str) -> str:
    """What stands under a heading, until the next one that is not deeper."""
    found = re.search(rf"^(#+) {re.escape(heading)}$", text_of(name), re.MULTILINE)
    assert found, f"{name} has no heading {heading!r}"
    rest = text_of(name)[found.end() :]
    end = re.search(
        rf"^#{{1,{len(found[1])}}} ", re.sub(r"^```.*?^```$", lambda m: " " * len(m[0]), rest, flags=re.M | re.S), re.M
    )
    return rest[: end.start()] if end else rest


def rows(markdown: str) -> list[list[str]]:
    """The cells of all tables, headers left out."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = {i for i, row in enumerate(cells) if set("".join(row)) <= set("-:")}
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def anchors(name: str) -> set[str]:
    """The anchors that headings get (as GitHub makes them)."""
    headings = re.findall(r"^#+ (.*)$", prose(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- asking the command


@cache
def help_of(command: str) -> str:
    """What `hotstart COMMAND --help` prints."""
    out, before = io.StringIO(), signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out):
            code = main([*command.split(), "--help"])
    except SystemExit as end:  # argparse's way
        code = end.code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 0, command
    return out.getvalue()


def options_of(command: str) -> set[str]:
    """The options that its --help lists, without --help."""
    listed = re.findall(r"^ {2,4}(-.*?)(?: {2}|$)", help_of(command), re.MULTILINE)
    return set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", " ".join(listed))) - {"-h", "--help"}


@cache
def commands() -> tuple[str, ...]:
    """Every command, those of a group with their two words."""

    def listed(command: str) -> list[str]:
        return re.findall(r"^  ([a-z][a-z0-9]*)  +\S", help_of(command), re.MULTILINE)

    return (*(c for c in listed("") if c not in GROUPS), *(f"{group} {c}" for group in GROUPS for c in listed(group)))


def command_lines(name: str) -> list[str]:
    """The arguments of every `hotstart ...` in a document, up to a `--` or the end of the command."""
    texts = spans(prose(name))
    for language, code in blocks(name):
        if language in SHELL:
            texts += code.replace("\\\n", " ").splitlines()
    found = [m[1] for text in texts for m in re.finditer(r"(?:^|[\s$(])hotstart +([^|;&#)]*)", text)]
    return [re.split(r"(?:^| )-- ", line + " ")[0].strip() for line in found]


# ---- the tests


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.exists(), f"{name}: {target} is not there"
        if anchor:
            assert anchor in anchors(str(file.relative_to(ROOT))), f"{name}: {target} is no heading"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_option_that_is_named_exists(name):
    for line in command_lines(name):
        words = [word.strip("[]") for word in shlex.split(line.replace("'", ""))]
        while words and words[0] in ("--debug", "--help", "--version"):
            words.pop(0)
        if not words or not re.fullmatch(r"[a-z][a-z0-9]*", words[0]):
            continue
        command = " ".join(words[:2]) if words[0] in GROUPS else words[0]
        if command in GROUPS:
            continue
        assert command in commands(), f"{name}: hotstart {line}"
        for word in words:
            if re.match(r"--?[a-z]", word):
                option = word.partition("=")[0]
                assert option in options_of(command) | {"--help"}, f"{name}: hotstart {line}: no option {option}"


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_that_is_named_exists(name):
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    texts = spans(prose(name)) + [
        line for language, code in blocks(name) if language in SHELL for line in code.splitlines()
    ]
    for text in texts:
        for target in re.findall(r"(?:^|&& )make ([a-z-]+)", text):
            assert target in targets, f"{name}: make {target}"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_the_repository_that_is_named_exists(name):
    for span in spans(prose(name)):
        if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)*/[\w.-]+\.(?:py|c|h|md|jsonl)|(?:scripts|examples)/[\w./-]+", span):
            assert any((root / span).exists() for root in (ROOT, SOURCE)), f"{name}: {span}"


def test_every_command_has_a_section_and_every_section_a_command():
    headings = re.findall(r"^## hotstart (.*)$", text_of("docs/cli.md"), re.MULTILINE)
    assert sorted(headings) == sorted(commands())


@pytest.mark.parametrize("command", commands())
def test_every_option_is_documented_and_no_other(command):
    here = section("docs/cli.md", f"hotstart {command}")
    documented = set()
    for heading, link in (("Worker options", "#worker-options"), ("Warm-up options", "#warm-up-options")):
        if f"]({link})" in here:
            here += section("docs/cli.md", heading)
    for first, *_ in rows(here):
        for span in spans(first):
            documented |= set(re.findall(r"^--?[a-z][a-z-]*", span))
    assert documented == options_of(command)


@pytest.mark.parametrize(("name", "heading", "kind"), FIELDS, ids=[kind for *_, kind in FIELDS])
def test_every_field_is_documented_and_no_other(name, heading, kind):
    documented = {
        span for first, *_ in rows(section(name, heading)) for span in spans(first) if not span.startswith("-")
    }
    assert documented == set(struct_of(kind).__struct_fields__)


@pytest.mark.parametrize(("name", "heading", "kind"), INLINE_FIELDS, ids=[kind for *_, kind in INLINE_FIELDS])
def test_every_field_in_a_sentence_is_documented_and_no_other(name, heading, kind):
    innermost = [set(re.findall(r'"(\w+)"', braces)) for braces in re.findall(r"\{([^{}]*)\}", section(name, heading))]
    assert set(struct_of(kind).__struct_fields__) in innermost


def test_every_figure_of_a_benchmark_is_documented_and_no_other():
    comparing = importlib.import_module("hotstart.api.comparing")
    expected = {*comparing.Comparison.__struct_fields__, *comparing.RestoreFigures.__struct_fields__}
    assert {span for first, *_ in rows(section("docs/benchmarks.md", "Fields")) for span in spans(first)} == expected
    assert set(comparing.ReplicaFigures.__struct_fields__) <= set(spans(section("docs/benchmarks.md", "Fields")))


def test_every_figure_of_the_stores_benchmark_is_documented_and_no_other():
    table = rows(section("docs/benchmarks.md", "The store"))
    fields = set(storefigures.StoreFigures.__struct_fields__)
    assert {span for first, *_ in table for span in spans(first)} == fields
    documented = {span for _, meaning in table for span in spans(meaning)}
    for kind in (storefigures.Cutting, storefigures.Compression, storefigures.Transfer):
        assert set(kind.__struct_fields__) <= documented, kind


def test_every_figure_of_the_restore_suite_is_documented_and_no_other():
    table = rows(section("docs/benchmarks.md", "How restores are measured"))
    kinds = (figures.RestoreFigures, figures.Size, figures.Cell, figures.Round)
    fields = {field for kind in kinds for field in kind.__struct_fields__ if not field.startswith("all_")}
    assert {span for first, *_ in table for span in spans(first)} == fields - {"warm_requests_s"}
    documented = {span for row in table for cell in row for span in spans(cell)}
    assert fields | set(figures.Target.__struct_fields__) <= documented


def struct_of(kind: str) -> type:
    module, _, name = kind.rpartition(".")
    return getattr(importlib.import_module(f"hotstart.{module}"), name)


def test_the_stages_are_those_of_a_receipt_in_order():
    stages = [*STAGES, "unaccounted"]
    assert [spans(first)[0] for first, *_ in rows(section("docs/architecture.md", "Clocks and stages"))] == stages


def test_the_tree_of_modules_is_that_of_the_source():
    tree = re.search(r"```text\nsrc/hotstart/\n(.*?)```", section("docs/architecture.md", "Modules"), re.DOTALL)
    listed, folders = set(), []
    for line in tree[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth - 1 :] = [name.rstrip("/")] if name.endswith("/") else []
        if not name.endswith("/"):
            listed.add("/".join([*folders[: depth - 1], name]))
    assert listed == {str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*") if p.suffix in (".py", ".c", ".h")}


def test_the_ports_and_what_implements_them_are_there():
    code = "\n".join(p.read_text(encoding="utf-8") for p in SOURCE.rglob("*.py"))
    for row in rows(section("docs/architecture.md", "Ports")):
        for name in (span for cell in row for span in spans(cell) if re.fullmatch(r"[A-Z]\w+", span)):
            assert re.search(rf"^class {name}\b", code, re.MULTILINE), name


def test_the_records_are_as_long_as_the_code_makes_them():
    for heading, record in (
        ("Index", content._EXTENT),
        ("Pack header", packs._HEADER),
        ("Pack records", packs._RECORD),
        ("Pack footer", packs._FOOTER),
        ("Places: packs", packs._PACK),
        ("Places: chunks", packs._PLACE),
    ):
        table = [(int(at), int(length)) for at, length, _ in rows(section("docs/format.md", heading))]
        assert all(at + length == following for (at, length), (following, _) in pairwise(table))
        assert sum(table[-1]) == record.size
        assert f"{record.size} bytes" in section("docs/format.md", heading)
    table = rows(section("docs/format.md", "File pack"))
    assert int(table[-1][0]) == filepack._RECORD.size
    assert all(int(a[0]) + int(a[1]) == int(b[0]) for a, b in pairwise(table))


def test_magic_numbers_and_version_are_those_of_the_code():
    document = text_of("docs/format.md")
    for magic in (
        content._INDEX_MAGIC,
        packs._PLACES_MAGIC,
        packs._MAGIC,
        packs._END_MAGIC,
        repository._SEALED_MAGIC,
        filepack.MAGIC,
    ):
        assert f"`{magic.rstrip(bytes(1)).decode()}`" in document
    assert f"`{FORMAT}`" in document
    assert f"Version {FORMAT_MAJOR}.{FORMAT_MINOR}." in document


def test_every_key_of_a_model_is_documented_and_no_other():
    keys = {spans(first)[0] for first, *_ in rows(section("docs/serve.md", "model"))}
    assert keys == set(struct_of("serve.config.ModelConfig").__struct_fields__)


def test_every_metric_action_and_step_of_a_replicas_life_is_documented_and_no_other():
    from hotstart.serve import lifecycle, metrics, pages

    listed = {spans(first)[0] for first, *_ in rows(section("docs/serve.md", "Seeing it"))}
    assert listed == set(metrics.HELP)
    assert {spans(first)[0] for first, *_ in rows(section("docs/serve.md", "Administration"))} == set(pages.ACTIONS)
    drawn = re.findall(r"^    (\w+) --> (\w+)", section("docs/serve.md", "Life of a model"), re.MULTILINE)
    table = {(a.value, b.value) for a, following in lifecycle.NEXT.items() for b in following if b.value != "gone"}
    assert set(drawn) == table


def test_exit_codes_are_those_of_the_errors():
    documented = {int(first) for first, *_ in rows(section("docs/cli.md", "Exit codes"))}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.HotstartError)
    ]
    assert {kind.exit_code for kind in kinds} == documented - {0, 130}


def test_every_message_that_is_explained_is_one_that_the_code_gives():
    code = "\n".join(p.read_text(encoding="utf-8") for p in SOURCE.rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", code)
    explained = [span for first, *_ in rows(text_of("docs/troubleshooting.md")) for span in spans(first)]
    parts = {(span, part.strip(" :,;`")) for span in explained for part in PLACEHOLDER.split(span)}
    unsaid = [f"{span!r}: nothing says {part!r}" for span, part in sorted(parts) if part not in said]
    assert not unsaid, "\n".join(unsaid)


def test_the_examples_of_the_documents_run(tmp_path, monkeypatch):
    for hooks in ("_quiesce_hooks", "_resume_hooks"):
        monkeypatch.setattr(f"hotstart.worker.{hooks}", [])
    failed, tried = doctest.testfile(str(ROOT / "docs" / "format.md"), module_relative=False)
    assert tried > 0
    assert not failed
    for name in NAMES:
        for number, code in enumerate(
            code for language, code in blocks(name) if language == "python" and ">>>" not in code
        ):
            script = tmp_path / f"example{number}.py"
            script.write_text(code, encoding="utf-8")
            if "__main__" in code:
                runpy.run_path(str(script), run_name="example")
            else:
                compile(code, name, "exec")


def test_the_worker_sdk_is_documented_whole():
    sdk = importlib.import_module("hotstart.worker")
    public = {
        name
        for name, value in vars(sdk).items()
        if callable(value) and getattr(value, "__module__", "") == sdk.__name__ and not name.startswith("_")
    }
    documented = {
        re.match(r"\w+", spans(first)[0])[0] for first, *_ in rows(text_of("docs/worker-sdk.md")) if spans(first)
    }
    assert public <= documented
