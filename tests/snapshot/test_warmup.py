"""Warm-up files, and when two answers are the same."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.errors import BadUsage
from hotstart.snapshot.warmup import Answer, Oracle, Request, parse_warmup, ready_request, same
from tests.samples import CHARACTERS


def test_a_warm_up_file_is_one_request_a_line_with_blank_lines_between():
    text = (
        '{"method": "GET", "path": "/health"}\n'
        "\n"
        '  {"path": "/x?y=1"}  \n'
        '{"method": "post", "path": "/v1/completions", "headers": {"X-Key": "k"}, "body": {"prompt": "größe", "n": 1}}\n'
        '{"method": "PUT", "path": "/t", "body": "plain ü"}'
    )
    assert parse_warmup(text, "w.jsonl") == [
        Request("GET", "/health", {}, b""),
        Request("GET", "/x?y=1", {}, b""),
        Request(
            "POST",
            "/v1/completions",
            {"X-Key": "k", "content-type": "application/json"},
            '{"prompt":"größe","n":1}'.encode(),
        ),
        Request("PUT", "/t", {}, "plain ü".encode()),
    ]


def test_an_empty_file_holds_no_requests():
    assert parse_warmup("", "w") == parse_warmup("\n \n\t\n", "w") == []


@pytest.mark.parametrize(
    ("body", "sent"), [("0", b"0"), ("false", b"false"), ("[]", b"[]"), ("{}", b"{}"), ('""', b""), ("null", b"")]
)
def test_a_body_is_sent_as_json_even_if_it_is_nothing_much(body, sent):
    (request,) = parse_warmup(f'{{"path": "/", "body": {body}}}', "w")
    assert request.body == sent
    assert ("content-type" in request.headers) == (body not in ('""', "null"))


@pytest.mark.parametrize("name", ["content-type", "Content-Type", "CONTENT-TYPE"])
def test_a_content_type_that_was_given_is_left_alone(name):
    (request,) = parse_warmup(f'{{"path": "/", "headers": {{"{name}": "application/x-my"}}, "body": {{}}}}', "w")
    assert dict(request.headers) == {name: "application/x-my"}


def test_headers_that_are_numbers_are_sent_as_text():
    (request,) = parse_warmup('{"path": "/", "headers": {"X-N": 3}}', "w")
    assert request.headers == {"X-N": "3"}


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"path": "/"',
        "[]",
        "3",
        "null",
        '"text"',
        '{"method": "GET"}',
        '{"path": "health"}',
        '{"path": ""}',
        '{"path": null}',
        '{"path": "/", "headers": ["a"]}',
        '{"path": "/", "headers": "a: b"}',
        '{"path": "/a b"}',
        '{"path": "/größe"}',
        '{"path": "/x HTTP/1.0\\r\\nX-Evil: 1"}',
        '{"path": "/x\\u0000"}',
        '{"path": "/x\\u007f"}',
        '{"path": "/x#part"}',
        '{"path": "//x\\ty"}',
        '{"path": "http://elsewhere/"}',
        '{"path": "*"}',
        '{"path": "/", "method": "GET /evil HTTP/1.0\\r\\n"}',
        '{"path": "/", "method": ""}',
        '{"path": "/", "method": "GÊT"}',
        '{"path": "/", "method": "A B"}',
        '{"path": "/", "headers": {"X": "a\\r\\nY: b"}}',
        '{"path": "/", "headers": {"X": "a\\nb"}}',
        '{"path": "/", "headers": {"X": "\\u0000"}}',
        '{"path": "/", "headers": {"X": "日"}}',
        '{"path": "/", "headers": {"X": null}}',
        '{"path": "/", "headers": {"X": ["a"]}}',
        '{"path": "/", "headers": {"X: y\\r\\nZ": "a"}}',
        '{"path": "/", "headers": {"": "a"}}',
        '{"path": "/", "headers": {"X Y": "a"}}',
        '{"path": "/", "headers": {"Content-Length": 3}}',
        '{"path": "/", "headers": {"transfer-encoding": "chunked"}}',
        '{"path": "/", "body": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=lambda line: line[:40],
)
def test_a_bad_line_is_named_by_file_and_number(line):
    with pytest.raises(BadUsage) as refused:
        parse_warmup(f'{{"path": "/"}}\n\n{line}\n{{"path": "/"}}\n', "dir/warm.jsonl")
    assert str(refused.value).startswith("dir/warm.jsonl:3: ")
    assert "\n" not in str(refused.value)


def test_lines_end_where_json_lines_end_and_nowhere_else():
    text = '{"path": "/", "body": "a\u2028b\x85c\u2029d"}\r\n{"path": "/2"}'
    assert parse_warmup(text, "w") == [Request("GET", "/", {}, "a\u2028b\x85c\u2029d".encode()), Request("GET", "/2")]


@pytest.mark.parametrize(
    ("url", "port", "target", "host"),
    [
        ("http://127.0.0.1:8000/health", 8000, "/health", "127.0.0.1:8000"),
        ("http://localhost", 80, "/", "localhost"),
        ("http://[::1]:9/x?y=1#part", 9, "/x?y=1", "[::1]:9"),
    ],
)
def test_a_readiness_url_becomes_a_request(url, port, target, host):
    assert ready_request(url) == (port, Request("GET", target, {"host": host}))


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "nonsense",
            "https://localhost/",
            "http://",
            "http:///x",
            "http://h:99999/",
            "http://h:0/",
            "http://h:x/",
        ),
        *("http://h:٣/", "http://h/a b", "http://h/ü", "http://h/\r\nX: y", "http://[::1/", "http://ü/"),
    ],
)
def test_a_readiness_url_that_cannot_be_asked_is_bad_usage(url):
    with pytest.raises(BadUsage, match="--ready-url"):
        ready_request(url)


@given(st.text(CHARACTERS, max_size=60))
def test_any_text_is_either_requests_or_bad_usage(text):
    with suppress(BadUsage):
        assert all(isinstance(r, Request) for r in parse_warmup(text, "w"))


@given(
    st.lists(
        st.fixed_dictionaries(
            {"path": st.text(alphabet="abc/?=&", max_size=9).map(lambda p: f"/{p}")},
            optional={
                "method": st.sampled_from(["GET", "post", "Delete"]),
                "headers": st.dictionaries(st.text(alphabet="abX-", min_size=1), st.text("a1:;=\t \x85é~", max_size=5)),
                "body": st.one_of(st.none(), st.text(CHARACTERS, max_size=9), st.lists(st.integers(-9, 9))),
            },
        ),
        max_size=5,
    )
)
def test_every_request_that_was_written_is_read(entries):
    requests = parse_warmup("\n".join(map(json.dumps, entries)), "w")
    assert [(r.path, r.method) for r in requests] == [(e["path"], e.get("method", "GET").upper()) for e in entries]
    for request, entry in zip(requests, entries, strict=True):
        body = entry.get("body")
        if isinstance(body, str | None):
            assert request.body == (body or "").encode()
        else:
            assert json.loads(request.body) == body
        assert entry.get("headers", {}).items() <= request.headers.items()


# ---- the oracle


def oracle(body, ignore=(), status=200):
    return Oracle(Request("GET", "/"), Answer(status, body), tuple(ignore))


def test_the_same_bytes_are_accepted():
    assert oracle(b"hello").accepts(Answer(200, b"hello"))
    assert oracle(b"").accepts(Answer(200, b""))


@pytest.mark.parametrize("other", [b"hello ", b"Hello", b"", b'"hello"'])
def test_other_bytes_are_not_accepted(other):
    assert not oracle(b"hello").accepts(Answer(200, other))


def test_another_status_is_not_accepted_whatever_the_body_says():
    assert not oracle(b"{}").accepts(Answer(500, b"{}"))
    assert oracle(b"{}", status=404).accepts(Answer(404, b"{}"))


def test_json_is_compared_by_what_it_says_not_how_it_is_written():
    assert oracle(b'{"a": 1, "b": [true, null]}').accepts(Answer(200, b'\n{"b":[true,null],"a":1}'))
    assert not oracle(b'{"a": [1, 2]}').accepts(Answer(200, b'{"a": [2, 1]}'))
    assert not oracle(b'{"a": 1}').accepts(Answer(200, b'{"a": 1, "b": 2}'))
    assert not oracle(b'{"a": 1}').accepts(Answer(200, b'{"a": "1"}'))
    assert not oracle(b'{"a": null}').accepts(Answer(200, b"{}"))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (b"true", b"1", False),
        (b"false", b"0", False),
        (b"[true]", b"[1]", False),
        (b'{"a": {"b": [1.0]}}', b'{"a": {"b": [true]}}', False),
        (b"1", b"1.0", True),
        (b"[100]", b"[1e2]", True),
        (b"0", b"-0.0", True),
        (b"true", b" true", True),
        (b"null", b"0", False),
        (b'""', b"null", False),
        (b"[]", b"{}", False),
        (b"1", b'"1"', False),
    ],
)
def test_values_of_other_types_are_never_the_same_and_numbers_are_by_value(one, other, equal):
    assert same(one, other, ()) is equal
    assert same(other, one, ()) is equal


@pytest.mark.parametrize("depth", [200, 900, 5000, 200_000])
def test_json_that_is_nested_deeply_is_compared_too(depth):
    deep = b"[" * depth + b"1" + b"]" * depth
    assert oracle(deep).accepts(Answer(200, deep))
    assert not oracle(deep).accepts(Answer(200, deep.replace(b"1", b"2")))
    assert not oracle(deep).accepts(Answer(200, b"[]"))


def test_bytes_that_are_json_are_never_the_same_as_bytes_that_are_not():
    assert not oracle(b"{'a': 1}").accepts(Answer(200, b'{"a": 1}'))


def test_ignored_fields_may_differ_at_any_depth_and_no_others():
    warm = b'{"id": 1, "choices": [{"text": "hi", "meta": {"id": 2, "created": 3}}, [[{"created": 1}]]]}'
    same = b'{"id": "x", "choices": [{"text": "hi", "meta": {}}, [[{"created": null}]]], "created": 9}'
    other = same.replace(b'"hi"', b'"ho"')
    assert oracle(warm, ["id", "created"]).accepts(Answer(200, same))
    assert not oracle(warm, ["id"]).accepts(Answer(200, same))
    assert not oracle(warm, ["id", "created"]).accepts(Answer(200, other))


def test_a_field_is_ignored_by_its_name_not_by_its_value():
    assert not oracle(b'{"a": "id"}', ["id"]).accepts(Answer(200, b'{"a": "x"}'))
    assert not oracle(b'["id"]', ["id"]).accepts(Answer(200, b"[]"))


@pytest.mark.parametrize(
    "body", [b"\xff\xfe", b'"\xff"', b'{"a": NaN}', b"{} {}", b'{"a":', b'"\\ud800"', b"data: {}\n\ndata: [DONE]\n\n"]
)
def test_bodies_that_are_not_json_are_compared_byte_for_byte(body):
    assert oracle(body, ["a"]).accepts(Answer(200, body))
    assert not oracle(body, ["a"]).accepts(Answer(200, body + b" "))


_json = st.recursive(
    st.one_of(st.none(), st.integers(-9, 9), st.text(CHARACTERS, max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)),
    max_leaves=8,
)


def _with_noise(value):
    """The same JSON with a field 'noise' in every object."""
    if isinstance(value, dict):
        return {"noise": [1], **{k: _with_noise(v) for k, v in value.items()}}
    return [_with_noise(v) for v in value] if isinstance(value, list) else value


@given(_json)
def test_noise_in_ignored_fields_never_makes_an_answer_wrong(value):
    noisy = json.dumps(_with_noise(value)).encode()
    assert oracle(json.dumps(value).encode(), ["noise"]).accepts(Answer(200, noisy))


@given(_json, _json)
def test_two_answers_are_the_same_exactly_if_they_say_the_same(one, other):
    assert oracle(json.dumps(one).encode()).accepts(Answer(200, json.dumps(other).encode())) == (one == other)
