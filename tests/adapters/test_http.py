"""One HTTP request over a real socket, against servers that behave and servers that do not."""

import socket
import threading
import time
from contextlib import suppress

import pytest

from hotstart.adapters import http
from hotstart.adapters.http import NoAnswerError, encode_request, read_answer
from hotstart.snapshot.warmup import Answer, Request

GET = Request("GET", "/health")
HEAD = Request("HEAD", "/health")


def ask(s, request, timeout_s):
    """Send a request and read the answer, as one who asks does."""
    with s:
        try:
            s.sendall(encode_request(request))
        except OSError as e:
            raise NoAnswerError("it left") from e
        return read_answer(s, request.method, time.monotonic() + timeout_s)


class Server:
    """Takes one connection, reads the request's head and body, then does what its script does with the socket."""

    def __init__(self, script, read_request=True):
        self.received = b""
        self._script, self._read_request = script, read_request
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def connect(self):
        return socket.create_connection(self._listener.getsockname(), timeout=10)

    def _serve(self):
        connection, _ = self._listener.accept()
        with connection, suppress(ConnectionError):
            if self._read_request:
                self._read(connection)
            self._script(connection)

    def _read(self, connection):
        length = None
        while length is None or len(self.received) < length:
            more = connection.recv(65536)
            if not more:
                return
            self.received += more
            head, end, _ = self.received.partition(b"\r\n\r\n")
            if end and length is None:
                (body,) = (line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"content-length"))
                length = len(head) + len(end) + int(body)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


def saying(*parts, pause_s=0.0):
    """A script that sends some bytes, one piece after the other, and closes."""

    def script(connection):
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_s)

    return script


def answer_of(*parts, request=GET, timeout_s=5.0, **options):
    with Server(saying(*parts, **options)) as server:
        return ask(server.connect(), request, timeout_s)


# ---- what is sent


def test_a_request_is_sent_whole_and_in_a_version_that_knows_no_chunks():
    with Server(saying(b"HTTP/1.0 200 OK\r\n\r\n")) as server:
        ask(server.connect(), Request("POST", "/v1/x?y=1", {"X-Key": "k"}, b'{"a": 1}\r\n\r\nmore'), 5)
    head, _, body = server.received.partition(b"\r\n\r\n")
    first, *headers = head.split(b"\r\n")
    assert first == b"POST /v1/x?y=1 HTTP/1.0"
    assert sorted(headers) == [b"content-length: 16", b"host: 127.0.0.1", b"x-key: k"]
    assert body == b'{"a": 1}\r\n\r\nmore'


def test_no_connection_is_asked_to_be_kept_and_nothing_is_announced_as_chunked():
    with Server(saying(b"HTTP/1.0 200 OK\r\n\r\n")) as server:
        ask(server.connect(), GET, 5)
    assert b"keep-alive" not in server.received.lower()
    assert b"transfer-encoding" not in server.received.lower()
    assert b"\r\ncontent-length: 0\r\n" in server.received


def test_headers_that_were_given_take_the_place_of_ours_whatever_their_case():
    with Server(saying(b"HTTP/1.0 200 OK\r\n\r\n")) as server:
        ask(server.connect(), Request("GET", "/", {"HOST": "model.local"}), 5)
    assert server.received.lower().count(b"host:") == 1
    assert b"host: model.local\r\n" in server.received


def test_a_large_body_arrives_whole():
    body = bytes(range(256)) * 8192
    with Server(saying(b"HTTP/1.0 200 OK\r\n\r\n")) as server:
        ask(server.connect(), Request("POST", "/", {}, body), 10)
    assert server.received.partition(b"\r\n\r\n")[2] == body


# ---- answers


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\nhello", Answer(200, b"hello")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", Answer(200, b"hello")),
        (b"HTTP/1.1 200 OK\r\ncontent-length:5\r\nX: y\r\n\r\nhello", Answer(200, b"hello")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Answer(204, b"")),
        (b"HTTP/1.1 503 \r\n\r\nbusy", Answer(503, b"busy")),
        (b"HTTP/1.1 200\r\n\r\n", Answer(200, b"")),
        (b"HTTP/1.0 200 OK\r\n\r\na\r\n\r\nb", Answer(200, b"a\r\n\r\nb")),
        (b"HTTP/1.0 200 OK\r\n\r\n\x00\xff", Answer(200, b"\x00\xff")),
        (b"HTTP/1.1 200 OK\r\ncontent-length : 3\r\n\r\nhello", Answer(200, b"hel")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", Answer(200, b"hi")),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", Answer(304, b"")),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", Answer(200, b"hi")),
    ],
)
def test_a_whole_answer_is_returned(said, answer):
    assert answer_of(said) == answer


def test_an_answer_may_come_in_any_pieces():
    said = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    assert answer_of(*(said[i : i + 1] for i in range(len(said)))) == Answer(200, b"hello")


def test_a_large_answer_is_returned_whole():
    body = bytes(range(256)) * 16384
    assert answer_of(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body) == Answer(200, body)


@pytest.mark.parametrize(
    ("request_", "said", "answer"),
    [
        (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", Answer(200, b"hello")),
        (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Answer(200, b"")),
        (GET, b"HTTP/1.1 204 No Content\r\n\r\n", Answer(204, b"")),
        (HEAD, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Answer(200, b"")),
        (HEAD, b"HTTP/1.1 200 OK\r\n\r\n", Answer(200, b"")),
    ],
)
def test_a_server_that_keeps_the_connection_open_is_not_waited_for(request_, said, answer):
    done = threading.Event()
    with Server(lambda connection: (connection.sendall(said), done.wait(10))) as server:
        assert ask(server.connect(), request_, 5) == answer
        done.set()


# ---- no answer


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", "closed before an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "not HTTP/1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", "cut off after 4 of 5 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "cut off after 0 of 5 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nhello", "how long it is"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nhello", "how long it is"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", "how long it is"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "longer than 64 MiB"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "closed before an answer"),
        (b"HTTP/1.1 20000 OK\r\n\r\n", "not HTTP/1"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP/1"),
        (b"HTTP/2 200\r\n\r\n", "not HTTP/1"),
        (b"HTTP/1.1 OK\r\n\r\n", "not HTTP/1"),
        (b"HTTP/1.1 -20 OK\r\n\r\n", "not HTTP/1"),
        (b"HTTP/1.1\r\n\r\n", "not HTTP/1"),
        (b"\r\n\r\n", "not HTTP/1"),
        (b"\x16\x03\x01\x00\xa5\x01\r\n\r\n", "not HTTP/1"),
    ],
)
def test_half_an_answer_is_never_taken_for_one(said, reason):
    with pytest.raises(NoAnswerError, match=reason):
        answer_of(said)


def test_an_answer_without_end_is_not_kept(monkeypatch):
    monkeypatch.setattr(http, "MOST_BYTES", 1 << 20)

    def flood(connection):
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            connection.sendall(bytes(65536))

    with Server(flood) as server, pytest.raises(NoAnswerError, match="longer than 1 MiB"):
        ask(server.connect(), GET, 30)


def test_headers_without_end_are_not_kept():
    def flood(connection):
        connection.sendall(b"HTTP/1.0 200 OK\r\n")
        while True:
            connection.sendall(b"x: y\r\n" * 1000)

    with Server(flood) as server, pytest.raises(NoAnswerError, match="not HTTP/1"):
        ask(server.connect(), GET, 30)


def test_a_server_that_says_nothing_is_not_waited_for_longer_than_asked():
    done = threading.Event()
    with Server(lambda _: done.wait(10)) as server:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            ask(server.connect(), GET, 0.2)
        took = time.monotonic() - began
        done.set()
    assert 0.15 < took < 5


def test_a_server_that_dribbles_is_not_waited_for_longer_than_asked():
    done = threading.Event()

    def dribble(connection):
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        while not done.wait(0.05):
            connection.sendall(b".")

    with Server(dribble) as server:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            ask(server.connect(), GET, 0.3)
        took = time.monotonic() - began
        done.set()
    assert 0.25 < took < 5


def test_a_connection_that_is_reset_is_no_answer():
    def reset(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    with Server(reset) as server, pytest.raises((NoAnswerError, ConnectionResetError)):
        ask(server.connect(), GET, 5)


def test_a_server_that_leaves_before_it_has_read_the_request_is_no_answer():
    with Server(lambda _: None, read_request=False) as server, pytest.raises(NoAnswerError):
        ask(server.connect(), Request("POST", "/", {}, bytes(32 << 20)), 5)
