"""Names that may be used for workers, snapshots and replicas."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.errors import BadUsage
from hotstart.snapshot.worker import check_name
from tests.samples import CHARACTERS


@pytest.mark.parametrize("name", ["a", "7", "llm-1", "a.b_c-d", "A" * 64, "x..y", "9" * 64])
def test_a_good_name_is_returned_as_it_is(name):
    assert check_name(name, "snapshot") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        ".hidden",
        "-rf",
        "_x",
        "x-",
        "x.",
        "a b",
        "a\n",
        "\na",
        "a\0b",
        "A" * 65,
        "é",
        "١",
        "$(x)",
        "*",
        "~",
        "a\\b",
        "C:x",
    ],
)
def test_a_bad_name_is_refused(name):
    with pytest.raises(BadUsage, match="cannot name a replica"):
        check_name(name, "replica")


def test_a_refusal_of_an_endless_name_is_one_short_line():
    with pytest.raises(BadUsage) as refused:
        check_name("x" * 100_000 + "\n", "snapshot")
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)


@given(st.text(CHARACTERS, max_size=70) | st.text("aZ9._-", max_size=70))
def test_an_accepted_name_is_a_safe_file_name_anywhere(name):
    try:
        check_name(name, "snapshot")
    except BadUsage:
        return
    assert os.path.normpath(os.path.join("/home/of/it", name)) == f"/home/of/it/{name}"
    assert os.path.basename(name) == name
    assert name.isascii() and name.isprintable() and " " not in name
    assert not name.startswith((".", "-"))  # neither hidden (".NAME.lock", ".NAME.partial" are ours) nor an option
    assert 1 <= len(name) <= 64
