"""The figures of docs/benchmarks.md are those of docs/figures, and nothing else of the document is touched."""

import re

import pytest
from msgspec import json

from bench import report
from bench.figures import RestoreFigures, targets_of


def test_the_figures_of_the_document_are_made_from_the_json():
    document = report.DOCUMENT.read_text(encoding="utf-8")
    assert report.written(document, report.FIGURES) == document, "run `python -m bench.report`"


def test_every_kind_of_figures_has_its_place_in_the_document():
    document = report.DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- figures: (\w+) -->", document)) == set(report.SOURCES)
    assert {p.stem for p in report.FIGURES.glob("*.json")} == set(report.SOURCES)


def test_only_what_stands_between_the_markers_is_written(tmp_path):
    document = "before\n<!-- figures: demo -->\nold\n<!-- end of figures -->\nafter\n"
    assert report.written(document, tmp_path) == (
        "before\n<!-- figures: demo -->\n\nNot measured yet.\n\n<!-- end of figures -->\nafter\n"
    )
    (tmp_path / "demo.json").write_bytes((report.FIGURES / "demo.json").read_bytes())
    made = report.written(document, tmp_path)
    assert made.startswith("before\n<!-- figures: demo -->\n") and made.endswith("<!-- end of figures -->\nafter\n")
    assert "cold start" in made and "old" not in made.split()


def test_the_promises_are_those_that_the_values_give():
    figures = json.decode((report.FIGURES / "restore.json").read_bytes(), type=RestoreFigures)
    assert targets_of(figures.sizes) == figures.targets


@pytest.mark.parametrize("name", sorted(report.SOURCES))
def test_every_table_has_as_many_cells_in_a_row_as_in_its_head(name):
    blocks = report._blocks_of(name, (report.FIGURES / f"{name}.json").read_bytes())
    assert blocks
    for table in blocks:
        assert {len(row) for row in table.rows} <= {len(table.header)}, table.title
