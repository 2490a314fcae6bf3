"""HTTP/1.1 as bytes: what is taken, what is refused; h11 reads what we read, and what we write."""

from contextlib import suppress

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.serve.http1 import (
    BadMessage,
    Chunked,
    Sized,
    UntilClose,
    answer_decoder,
    chunk,
    last_chunk,
    parse_answer,
    parse_request,
    request_decoder,
    write_head,
)


def parsed(text, most=100):
    head = parse_request(text.replace("\n", "\r\n").encode("latin-1"), most)
    return head, request_decoder(head)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("GET / HTTP/1.1\nHost: a\nContent-Length: 5\nTransfer-Encoding: chunked", 400),
        ("GET / HTTP/1.1\nHost: a\nContent-Length: 5\nContent-Length: 5", 400),
        ("GET / HTTP/1.1\nHost: a\nContent-Length: 5\nContent-Length: 6", 400),
        ("GET / HTTP/1.1\nHost: a\nContent-Length: +5", 400),
        ("GET / HTTP/1.1\nHost: a\nContent-Length: 0x5", 400),
        ("GET / HTTP/1.1\nHost: a\nContent-Length: 5 5", 400),
        ("GET / HTTP/1.1\nHost: a\nContent-Length:", 400),
        ("GET / HTTP/1.1\nHost: a\nContent-Length: 99999999999999999999", 400),
        ("GET / HTTP/1.1\nHost: a\nContent-Length : 5", 400),
        ("GET / HTTP/1.1\nHost: a\nTransfer-Encoding: xchunked", 501),
        ("GET / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked, identity", 501),
        ("GET / HTTP/1.1\nHost: a\nTransfer-Encoding: identity", 501),
        ("GET / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked", 501),
        ("GET / HTTP/1.1\nHost: a\nTransfer-Encoding:\x0bchunked", 400),
        ("GET / HTTP/1.1\nHost: a\n Transfer-Encoding: chunked", 400),
        ("GET / HTTP/1.1\nHost: a\nX: y\n folded", 400),
        ("GET / HTTP/1.0\nTransfer-Encoding: chunked", 400),
        ("GET / HTTP/1.1\nHost: a\nHost: b", 400),
        ("GET / HTTP/1.1", 400),
        ("GET / HTTP/1.1\nHost: a b", 400),
        ("GET / HTTP/1.1\nHost: a/b", 400),
        ("GET / HTTP/1.1\nHost: a\nX\x00: y", 400),
        ("GET / HTTP/1.1\nHost: a\nX: y\x00", 400),
        ("GET / HTTP/1.1\nHost: a\nX: y\x7f", 400),
        ("GET / HTTP/1.1\nHost: a\n: y", 400),
        ("GET / HTTP/1.1\nHost: a\nno colon", 400),
        ("GET  / HTTP/1.1\nHost: a", 400),
        ("GET / HTTP/1.1 \nHost: a", 400),
        ("GET /a b HTTP/1.1\nHost: a", 400),
        ("GET /\x80 HTTP/1.1\nHost: a", 400),
        ("GET /#x HTTP/1.1\nHost: a", 400),
        ("GET x HTTP/1.1\nHost: a", 400),
        ("G(T / HTTP/1.1\nHost: a", 400),
        ("GET /\nHost: a", 400),
        ("GET / HTTP/2.0\nHost: a", 505),
        ("GET / HTTP/1.1\nHost: a" + "\nx: y" * 100, 431),
    ],
)
def test_what_could_be_understood_in_two_ways_is_refused(text, status):
    with pytest.raises(BadMessage) as refused:
        parsed(text)
    assert refused.value.status == status


def test_a_line_feed_alone_ends_nothing():
    for raw in (b"GET / HTTP/1.1\nHost: a", b"GET / HTTP/1.1\r\nHost: a\nX: y", b"GET / HTTP/1.1\r\nHost: a\rX: y"):
        with pytest.raises(BadMessage):
            parse_request(raw, 100)


def test_a_head_is_read():
    head, decoder = parsed("POST http://b.test:80?q HTTP/1.1\nHost: a\nX-A:  1 \nx-a:\t2\nContent-length: 3")
    assert (head.method, head.target, head.host, head.minor) == ("POST", "/?q", "b.test:80", 1)
    assert (head.get("x-a"), head.get("nothing"), type(decoder)) == ("1, 2", "", Sized)
    assert parsed("GET / HTTP/1.1\nHost: a\nContent-Length: 0")[1] is None
    assert type(parsed("GET / HTTP/1.1\nHost: a\nTransfer-Encoding: Chunked")[1]) is Chunked
    assert parsed("OPTIONS * HTTP/1.0")[0].target == "*"
    assert parsed("GET / HTTP/1.9\nHost: [::1]:80")[0].minor == 1


def test_an_answer_is_framed_as_the_standard_says():
    def framing(text, method="GET"):
        return type(answer_decoder(parse_answer(text.replace("\n", "\r\n").encode(), 100), method))

    assert framing("HTTP/1.1 200 OK\ncontent-length: 3") is Sized
    assert framing("HTTP/1.1 200 OK\ncontent-length: 3\ntransfer-encoding: chunked") is Chunked
    assert framing("HTTP/1.0 200") is UntilClose
    none = type(None)
    assert framing("HTTP/1.1 200 OK\ncontent-length: 3", "HEAD") is none
    assert framing("HTTP/1.1 204 No\ntransfer-encoding: chunked") is none
    assert framing("HTTP/1.1 304 No\ncontent-length: 3") is none
    for bad in ("HTTP/1.1 20 OK", "HTTP/2 200 OK", "HTTP/1.1 200 OK\ncontent-length: x", "hello"):
        with pytest.raises(BadMessage):
            framing(bad)


@pytest.mark.parametrize(
    "bad",
    [
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b"1\r\nab",
        b"1\r\na\n0\r\n\r\n",
        b"1;\x00\r\na\r\n",
        b"\r\n",
        b"1\na\r\n",
        b"f" * 17 + b"\r\n",
        b"1;" + b"a" * 5000,
        b"0\r\nno trailer\r\n\r\n",
        b"0\r\n" + b"a: b\r\n" * 4000,
    ],
)
def test_chunks_that_are_none_are_refused(bad):
    decoder = Chunked()
    with pytest.raises(BadMessage):
        decoder.feed(bad + b" " * 20)


PIECES = st.lists(st.binary(min_size=1, max_size=300), max_size=6)
TRAILERS = st.lists(st.tuples(st.sampled_from(["x-a", "x-b"]), st.text("abc 1", max_size=5).map(str.strip)), max_size=2)


@given(PIECES, TRAILERS, st.lists(st.integers(1, 40), min_size=1), st.binary(max_size=30))
def test_a_chunked_body_is_the_same_however_it_arrives(pieces, trailers, steps, after):
    wire = b"".join(map(chunk, pieces)) + last_chunk(trailers) + after
    decoder, body, rest, at = Chunked(), b"", None, 0
    while rest is None:
        step = steps[at % len(steps)]
        got, rest = decoder.feed(wire[at : at + step])
        at += step
        body += got
    assert body == b"".join(pieces)
    assert rest + wire[at:] == after
    assert decoder.trailers == trailers


def by_h11(raw):
    """What h11 makes of a request: method, target, fields, body; None if it refuses."""
    connection = h11.Connection(h11.SERVER)
    try:
        connection.receive_data(raw)
        head = connection.next_event()
        if not isinstance(head, h11.Request):
            return None
        body = b""
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                return None
            body += bytes(event.data)
    except h11.RemoteProtocolError:
        return None
    return head.method, head.target, body


FIELDS = st.lists(
    st.sampled_from(
        [
            b"Content-Length: 4",
            b"Content-Length: 04",
            b"Content-Length: 4, 4",
            b"Transfer-Encoding: chunked",
            b"Transfer-Encoding:  chunked ",
            b"Transfer-Encoding: gzip, chunked",
            b"Transfer-encoding: chunked\t",
            b" Transfer-Encoding: chunked",
            b"Host: a",
            b"Host: b",
            b"X: y\r",
            b"X: y\n",
            b"X:",
            b"X\t: y",
            b"X: \xff",
        ]
    ),
    max_size=4,
)
LINES = st.sampled_from(
    [b"POST /x HTTP/1.1", b"POST /x HTTP/1.0", b"GET /x HTTP/1.1", b"POST  /x HTTP/1.1", b"POST /x"]
)
BODIES = st.sampled_from(
    [b"", b"abcd", b"4\r\nabcd\r\n0\r\n\r\n", b"4 \r\nabcd\r\n0\r\n\r\n", b"4\r\nabcd\r\n0\r\nx: y\r\n\r\n"]
)


@given(LINES, FIELDS, BODIES)
def test_what_we_take_h11_takes_too_and_sees_the_same(line, fields, sent):
    raw = b"\r\n".join([line, *fields, b"", b""]) + sent
    end = raw.find(b"\r\n\r\n")
    try:
        head = parse_request(raw[:end], 100)
        decoder = request_decoder(head)
        body, rest = decoder.feed(raw[end + 4 :]) if decoder else (b"", b"")
    except BadMessage:
        return
    if rest is None:
        return
    assert by_h11(raw) == (head.method.encode(), head.target.encode(), body)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail_otherwise(raw):
    for read in (lambda: parse_request(raw, 100), lambda: parse_answer(raw, 100), lambda: Chunked().feed(raw)):
        with suppress(BadMessage):
            read()


def test_a_head_that_is_written_is_what_is_read():
    raw = write_head("GET /x HTTP/1.1", [("host", "a"), ("x", "ü")])
    assert parse_request(raw[:-4], 10).fields == [("host", "a"), ("x", "ü")]
