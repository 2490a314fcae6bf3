"""The manifest: its bytes are pinned by a golden file; newer and damaged ones are told apart."""

import json
import random
from pathlib import Path

import pytest
from msgspec import structs

from hotstart.errors import Damaged, Refused
from hotstart.snapshot.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    Chunk,
    File,
    Manifest,
    MemoryFile,
    RecordedRestore,
    parse_manifest,
)
from hotstart.snapshot.warmup import Answer, Request
from tests.samples import a_manifest

GOLDEN = Path(__file__).parent / "golden"


def test_the_golden_manifest_is_written_byte_for_byte():
    # If this fails the format has changed: snapshots that exist keep their bytes, so raise FORMAT_MINOR or FORMAT_MAJOR.
    assert a_manifest().to_bytes() == (GOLDEN / "manifest-1.2.json").read_bytes()


def test_a_manifest_of_a_former_version_is_read_and_lacks_only_what_came_later():
    manifest = parse_manifest((GOLDEN / "manifest-1.1.json").read_bytes())
    assert manifest == a_manifest(format_version=(1, 1), weights=())
    manifest = parse_manifest((GOLDEN / "manifest-1.0.json").read_bytes())
    assert manifest == a_manifest(
        format_version=(1, 0),
        working_set=None,
        weights=(),
        recorded=RecordedRestore(0.031, 0.125, cpu_s=None),
        processes=tuple(structs.replace(p, reason=None) for p in a_manifest().processes),
    )


def test_the_golden_manifest_is_read():
    manifest = parse_manifest((GOLDEN / "manifest-1.2.json").read_bytes())
    assert manifest == a_manifest()
    assert manifest.format_version == (1, 2)
    assert manifest.oracle is not None
    assert manifest.oracle.request == Request(
        "POST", "/v1/completions", {"content-type": "application/json"}, b'{"prompt":"hi"}'
    )
    assert manifest.oracle.answer == Answer(200, b'{"id":1,"text":"\xc3\xa9"}')
    assert [c for file in manifest.files for c in file.chunks] == [
        Chunk("11" * 32, 8),
        Chunk("22" * 32, 1 << 20),
        Chunk("33" * 32, 1),
    ]


def test_a_manifest_without_its_optional_parts_is_read():
    manifest = a_manifest(oracle=None, recorded=None)
    plain = json.loads(manifest.to_bytes())
    del plain["oracle"], plain["recorded"]
    assert parse_manifest(json.dumps(plain).encode()) == manifest


def test_a_corrupted_manifest_is_damaged():
    with pytest.raises(Damaged, match="the manifest is damaged"):
        parse_manifest((GOLDEN / "manifest-1.0-corrupted.json").read_bytes())


def test_a_manifest_of_a_newer_major_version_is_refused_by_name_and_not_called_damaged():
    with pytest.raises(Refused, match=r"format 2\.3, this hotstart reads up to 1\.x: update hotstart") as refused:
        parse_manifest((GOLDEN / "manifest-2.3.json").read_bytes())
    assert type(refused.value) is Refused


def test_a_newer_major_version_is_named_however_different_the_rest_is():
    data = json.dumps({"format": "hotstart.snapshot", "format_version": [FORMAT_MAJOR + 1, 0], "name": [1]}).encode()
    with pytest.raises(Refused, match="update hotstart"):
        parse_manifest(data)


def test_a_manifest_of_a_newer_minor_version_is_read_without_what_is_new():
    plain = json.loads((GOLDEN / "manifest-1.2.json").read_bytes())
    plain["format_version"] = [FORMAT_MAJOR, FORMAT_MINOR + 1]
    plain["signature"] = "x"
    plain["memory"][0]["colour"] = [1, 2]
    manifest = parse_manifest(json.dumps(plain).encode())
    assert manifest == a_manifest(format_version=(FORMAT_MAJOR, FORMAT_MINOR + 1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b"\xff\xfe\xfd",
        b'{"format": "hotstart.snapshot"}',
        b'{"format": "hotstart.snapshot", "format_version": "1.0"}',
        b'{"format": "hotstart.snapshot", "format_version": [1, 0]}',
        b'{"x":' + b"[" * 100_000,
    ],
)
def test_what_is_no_manifest_is_damaged(data):
    with pytest.raises(Damaged):
        parse_manifest(data)


def test_a_document_of_another_kind_is_damaged_and_says_what_it_is():
    data = json.dumps({"format": "hotstart.receipt", "format_version": [1, 0]}).encode()
    with pytest.raises(Damaged, match=r"hotstart\.receipt"):
        parse_manifest(data)


def test_bytes_changed_at_random_give_a_manifest_or_a_refusal_and_nothing_else():
    good, chance = (GOLDEN / "manifest-1.0.json").read_bytes(), random.Random(20)
    refused = 0
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(chance.choice([1, 1, 1, 5])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        try:
            assert isinstance(parse_manifest(bytes(data)), Manifest)
        except Refused:
            refused += 1
    assert refused > 1000


A_CHUNK = Chunk("11" * 32, 8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": (File("a", 9, (A_CHUNK,)),)}, "the chunks of 'a' are not the file"),
        ({"files": (File("a", -8, (A_CHUNK,)),)}, "are not the file"),
        ({"files": (File("a", 0, (Chunk("11" * 32, 0),)),)}, "are not the file"),
        ({"files": (File("a", 0, (A_CHUNK, Chunk("11" * 32, -8))),)}, "are not the file"),
        ({"files": (File("a", (1 << 20) + 1, (Chunk("11" * 32, (1 << 20) + 1),)),)}, "are not the file"),
        ({"files": (File("a", 8, (A_CHUNK,)),) * 2}, "names a file twice"),
        ({"memory": (MemoryFile("aa/0.mem", 1, 1, 0, "i"),) * 2}, "names a file twice"),
        ({"memory": (MemoryFile("aa/0.mem", 1, 2, 0, "i"),)}, "ends before its data"),
        ({"memory": (MemoryFile("aa/0.mem", 1, -1, 0, "i"),)}, "ends before its data"),
        ({"memory": (MemoryFile("aa/0.mem", 1 << 43, 1, 0, "i"),)}, "ends before its data"),
        ({"memory": (MemoryFile("aa/0.mem", 1 << 80, 1, 0, "i"),)}, "the manifest is damaged"),
    ],
)
def test_sizes_that_do_not_agree_are_damage(changes, reason):
    with pytest.raises(Damaged, match=reason):
        parse_manifest(a_manifest(**changes).to_bytes())
