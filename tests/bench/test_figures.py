"""Percentiles, cells and promises."""

import pytest
from msgspec import structs

from bench.figures import (
    COLD,
    OURS,
    PLAIN,
    S3,
    WARM,
    Cell,
    Round,
    Size,
    cell_of,
    nearest_rank,
    targets_of,
)


def a_cell(method=OURS, cache=WARM, replicas=1, answers=(0.1,), warm=(0.1,), said=0.1, arrived=None) -> Cell:
    rounds = [Round([a / 2], [a] * replicas, list(warm), said / 2, said, arrived) for a in answers]
    return cell_of(method, cache, replicas, rounds)


def a_size(*cells: Cell, gib=1.0, working_set=None, own=0) -> Size:
    numbers = {name: 0 for name in Size.__struct_fields__ if name not in ("cells",)}
    lists = {name: [] for name in Size.__struct_fields__ if name.startswith("all_")}
    size = Size(**{**numbers, **lists, "cells": list(cells)})
    return structs.replace(
        size,
        gib=gib,
        worker_bytes=1000,
        working_set_bytes=working_set,
        warm_request_s=0.06,
        floor_resumed_s=0.02,
        direct_bytes_per_s=1000.0,
        unasked_own_bytes=own,
        unasked_replicas=16,
    )


def met(size: Size, about: str) -> bool | None:
    (found,) = (t for t in targets_of([size]) if t.what.startswith(about))
    return found.met


def test_a_percentile_is_one_of_the_values():
    assert nearest_rank([1.0], 99) == 1.0
    assert nearest_rank([float(i) for i in range(1, 101)], 99) == 99.0
    assert nearest_rank([float(i) for i in range(1, 17)], 99) == 16.0


def test_a_cell_sums_up_all_replicas_of_all_rounds():
    cell = a_cell(replicas=2, answers=(0.1, 0.3, 0.2), warm=(0.05, 0.07))
    assert (cell.first_answer_s, cell.first_answer_p99_s) == (0.2, 0.3)
    assert (cell.warm_request_s, cell.warm_request_p99_s) == (pytest.approx(0.06), 0.07)
    assert len(cell.rounds) == 3


def test_a_warm_answer_may_take_1_3_times_the_floor():
    assert met(a_size(a_cell(answers=(0.104,))), "warm cache") is True
    assert met(a_size(a_cell(answers=(0.105,))), "warm cache") is False


def test_a_cold_answer_is_held_against_the_working_set_and_unknown_without_it():
    cells = (a_cell(), a_cell(cache=COLD, answers=(0.6,)))
    assert met(a_size(*cells), "cold cache") is None
    assert met(a_size(*cells, working_set=400), "cold cache") is True
    assert met(a_size(*cells, working_set=399), "cold cache") is False


def test_a_cold_answer_is_told_for_one_gib_and_the_largest_worker():
    sizes = [a_size(a_cell(), a_cell(cache=COLD), gib=gib) for gib in (0.25, 1.0, 2.0, 8.0)]
    assert [t.where for t in targets_of(sizes) if t.what.startswith("cold cache")] == ["1 GiB", "8 GiB"]


def test_from_s3_not_everything_may_have_arrived():
    assert met(a_size(a_cell(cache=S3, arrived=1.0)), "S3") is False
    assert met(a_size(a_cell(cache=S3, arrived=0.6)), "S3") is True
    assert met(a_size(a_cell(cache=S3)), "S3") is None


def test_many_at_once_are_held_against_as_many_warm_requests():
    assert met(a_size(a_cell(replicas=16, answers=(0.25,), warm=(0.1,))), "16 at once") is True
    assert met(a_size(a_cell(replicas=16, answers=(0.26,), warm=(0.1,))), "16 at once") is False


def test_own_memory_may_be_3_percent():
    assert met(a_size(own=30), "own memory") is True
    assert met(a_size(own=31), "own memory") is False


def test_the_plan_is_held_to_30_percent_in_nine_cells_of_ten():
    good, bad = a_cell(said=0.13), a_cell(PLAIN, said=0.14)
    assert met(a_size(*[good] * 9, bad), "cells in which") is True
    assert met(a_size(*[good] * 8, bad), "cells in which") is False
    assert met(a_size(), "cells in which") is None
