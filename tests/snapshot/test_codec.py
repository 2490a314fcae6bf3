"""Values as canonical JSON and back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.snapshot.codec import IllFormedError, decode, encode, to_plain
from hotstart.snapshot.manifest import (
    Chunk,
    File,
    HostFingerprint,
    Manifest,
    MemoryFile,
    NeededFile,
    Process,
    RecordedRestore,
)
from hotstart.snapshot.warmup import Answer, Oracle, Request
from hotstart.snapshot.worker import WorkerSpec
from tests.samples import CHARACTERS, a_manifest, a_worker

_text = st.text(CHARACTERS, max_size=8)
_texts = st.lists(_text, max_size=3).map(tuple)
_maps = st.dictionaries(_text, _text, max_size=3)
_count = st.integers(0, (1 << 63) - 1)
_seconds = st.floats(0, 1e6)
_chunks = st.lists(st.builds(Chunk, st.sampled_from(["00" * 32, "ff" * 32]), _count), max_size=3).map(tuple)

workers = st.builds(
    WorkerSpec,
    command=_texts,
    cwd=_text,
    environment=_maps,
    port=st.none() | st.integers(1, 65535),
    ready_url=st.none() | _text,
    ready_timeout_s=_seconds,
    memory_bytes=st.none() | _count,
    cpus=st.none() | _seconds,
    writable=_texts,
    visible=_texts,
)
oracles = st.builds(
    Oracle,
    st.builds(Request, _text, _text, _maps, st.binary(max_size=20)),
    st.builds(Answer, st.integers(100, 599), st.binary(max_size=20)),
    _texts,
)
# Each part is drawn on its own and put into a manifest that is otherwise complete: whole ones take seconds to draw.
manifests = st.one_of(
    st.builds(lambda w: a_manifest(worker=w), workers),
    st.builds(lambda o: a_manifest(oracle=o), st.none() | oracles),
    st.builds(
        lambda f, m: a_manifest(files=f, memory=m),
        st.lists(st.builds(File, _text, _count, _chunks), max_size=3).map(tuple),
        st.lists(st.builds(MemoryFile, _text, _count, _count, _count, _text), max_size=3).map(tuple),
    ),
    st.builds(
        lambda p, n: a_manifest(processes=p, needs=n),
        st.lists(st.builds(Process, _count, _text, _count, st.none() | _text, _text), max_size=3).map(tuple),
        st.lists(st.builds(NeededFile, _text, _count, _count), max_size=3).map(tuple),
    ),
    st.builds(
        lambda h, r: a_manifest(host=h, recorded=r),
        st.builds(HostFingerprint, _text, _text, _texts, _text, _text),
        st.none() | st.builds(RecordedRestore, _seconds, st.none() | _seconds),
    ),
)


@given(manifests)
def test_a_value_survives_being_written_and_read_and_is_written_again_in_the_same_bytes(manifest):
    read = decode(Manifest, encode(manifest))
    assert read == manifest
    assert encode(read) == encode(manifest)


@given(_maps, st.randoms(use_true_random=False))
def test_equal_values_give_equal_bytes_however_they_were_put_together(environment, chance):
    shuffled = list(environment.items())
    chance.shuffle(shuffled)
    assert encode(WorkerSpec((), "/", dict(shuffled))) == encode(WorkerSpec((), "/", environment))


@given(manifests, manifests)
def test_different_values_never_give_the_same_bytes(one, other):
    assert (encode(one) == encode(other)) == (one == other)


def _sorted_all_the_way(value):
    if isinstance(value, dict):
        return list(value) == sorted(value) and all(map(_sorted_all_the_way, value.values()))
    return all(map(_sorted_all_the_way, value)) if isinstance(value, list) else True


def test_keys_are_sorted_and_nothing_is_written_between_them():
    data = encode(a_manifest())
    assert _sorted_all_the_way(json.loads(data))
    assert data == json.dumps(json.loads(data), separators=(",", ":"), ensure_ascii=False).encode()


def test_another_json_reader_reads_what_is_written():
    plain = json.loads(encode(a_worker()))
    assert plain["cwd"] == "/srv/größe"
    assert plain["environment"] == {"HOME": "/root", "PATH": "/usr/bin"}
    assert plain["memory_bytes"] == 4 << 30
    assert json.loads(encode(Answer(200, b"\x00\xff"))) == {"status": 200, "body": "AP8="}


@given(manifests)
def test_the_plain_value_is_what_the_document_says(manifest):
    assert json.loads(json.dumps(to_plain(manifest))) == json.loads(encode(manifest))


def test_fields_of_a_later_version_are_ignored_at_any_depth():
    plain = json.loads(encode(a_manifest()))
    plain["later"] = {"x": [1]}
    plain["worker"]["later"] = None
    plain["files"][0]["later"] = 3
    plain["oracle"]["answer"]["later"] = "y"
    assert decode(Manifest, json.dumps(plain).encode()) == a_manifest()


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (lambda m: m.pop("name"), "name"),
        (lambda m: m["worker"].pop("cwd"), "$.worker"),
        (lambda m: m["files"][1].pop("chunks"), "$.files[1]"),
        (lambda m: m["oracle"]["request"].pop("path"), "$.oracle.request"),
        (lambda m: m.update(root_pid="1000"), "$.root_pid"),
        (lambda m: m.update(root_pid=1000.5), "$.root_pid"),
        (lambda m: m.update(root_pid=None), "$.root_pid"),
        (lambda m: m["memory"][0].update(size_bytes=True), "$.memory[0].size_bytes"),
        (lambda m: m["files"][0]["chunks"].append(3), "$.files[0].chunks[1]"),
        (lambda m: m["oracle"]["answer"].update(body="%%%"), "$.oracle.answer.body"),
        (lambda m: m["worker"]["environment"].update(PATH=3), "$.worker.environment[...]"),
        (lambda m: m.update(format_version=[1]), "$.format_version"),
        (lambda m: m.update(needs={}), "$.needs"),
    ],
)
def test_what_is_missing_or_of_the_wrong_kind_is_refused_with_its_place(spoil, place):
    plain = json.loads(encode(a_manifest()))
    spoil(plain)
    with pytest.raises(IllFormedError) as refused:
        decode(Manifest, json.dumps(plain).encode())
    assert place in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": "\xff"}', b"{} {}", b"\x00" * 64])
def test_what_is_no_document_is_refused(data):
    with pytest.raises(IllFormedError):
        decode(WorkerSpec, data)


@given(st.data())
def test_a_document_that_ends_early_is_refused(data):
    whole = encode(a_worker())
    with pytest.raises(IllFormedError):
        decode(WorkerSpec, whole[: data.draw(st.integers(0, len(whole) - 1))])
