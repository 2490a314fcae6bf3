"""A fault injector: an HTTP server that answers as it is told to, wrongly or not at all. It is no S3 server and checks nothing."""

import contextlib
import http.server
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

Answer = Callable[["FaultInjector"], None]


class FaultInjector(http.server.BaseHTTPRequestHandler):
    """Takes the next answer of the script for each request; the last one again and again."""

    protocol_version = "HTTP/1.1"
    script: list[Answer]
    asked: list[str]

    def do(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(self.command)
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        answer(self)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def faulty_server(*script: Answer) -> Iterator[tuple[int, list[str]]]:
    """(port, the methods that were asked for) of a server that follows a script."""
    asked: list[str] = []
    handler = type("Scripted", (FaultInjector,), {"script": list(script), "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ---- answers


def says(status: int, body: bytes = b"", **headers: str) -> Answer:
    """A whole answer; `Retry_After="3"` is the header Retry-After."""

    def answer(request: FaultInjector) -> None:
        request.send_response(status)
        sent = {"Content-Length": str(len(body)), "ETag": '"e"', "Last-Modified": "Mon, 23 Nov 2026 10:00:00 GMT"}
        for name, value in (sent | {n.replace("_", "-"): v for n, v in headers.items()}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    return answer


def holds(data: bytes) -> Answer:
    """What a right server says to a GET of an object, with or without a range."""

    def answer(request: FaultInjector) -> None:
        asked = request.headers.get("Range", "")
        if not asked:
            return says(200, data)(request)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        return says(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}")(request)

    return answer


def decides() -> Answer:
    """A stand-in for a server that lets one of several writers through, as Amazon documents it for `If-None-Match: *`."""
    objects: dict[str, bytes] = {}
    being_written: set[str] = set()
    lock = threading.Lock()

    def answer(request: FaultInjector) -> None:
        key = request.path
        if request.command != "PUT":
            return holds(objects[key])(request)
        assert request.headers["If-None-Match"] == "*"
        with lock:
            status = 412 if key in objects else 409 if key in being_written else 200
            if status == 200:
                being_written.add(key)
        if status == 200:
            time.sleep(0.005)
            with lock:
                objects[key] = request.body
                being_written.remove(key)
        return says(status)(request)

    return answer


def truncates(answer: Answer, size: int) -> Answer:
    """The same answer, but its connection ends in an orderly way after `size` bytes of body."""
    return _cut(answer, size, reset=False)


def resets(answer: Answer, size: int) -> Answer:
    """The same answer, but its connection is reset after `size` bytes of body."""
    return _cut(answer, size, reset=True)


def _cut(answer: Answer, size: int, reset: bool) -> Answer:
    def cut(request: FaultInjector) -> None:
        whole = request.wfile

        class Body:
            def write(self, body: bytes) -> None:
                whole.write(body[:size])

        headers_end = request.end_headers

        def end_headers() -> None:
            headers_end()
            request.wfile = Body()  # type: ignore[assignment]

        request.end_headers = end_headers  # type: ignore[method-assign]
        answer(request)
        request.wfile = whole
        hang_up(request, reset)

    return cut


def hang_up(request: FaultInjector, reset: bool = True) -> None:
    """End the connection without another word."""
    request.close_connection = True
    request.wfile.flush()
    if reset:
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(request.connection.detach())


def stalls(seconds: float) -> Answer:
    """Say nothing for a while, then hang up."""

    def answer(request: FaultInjector) -> None:
        threading.Event().wait(seconds)
        hang_up(request)

    return answer
