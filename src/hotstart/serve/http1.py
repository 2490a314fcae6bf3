"""HTTP/1.1 as bytes (RFC 9110, RFC 9112): heads, framing, bodies. No I/O.

Stricter than it must be: what two readers could understand differently is refused, not guessed. What goes on is never the bytes that
came in, but a head and a framing of our own, so that whoever reads it next sees the same messages as we do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Protocol

from msgspec import Struct

END_OF_HEAD = b"\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-\"$-~]+) HTTP/(\d)\.(\d)")  # a target has no fragment
_STATUS_LINE = re.compile(r"HTTP/1\.(\d) (\d{3})(?: ([\t -~\x80-\xff]*))?")
# No folding, no space before the colon, no control characters. What does not match is left out by findall: who calls it counts.
# Anchored, so that a long line that is no field is looked at once and not from each of its characters.
_FIELDS = re.compile(rf"^({_TOKEN}):([\t -~\x80-\xff]*)\r\n", re.MULTILINE)
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::\d{0,5})?")
_ABSOLUTE = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
_LENGTH = re.compile(r"\d{1,15}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~\x80-\xff]*)?")

_MOST_SIZE_LINE = 4096
_MOST_TRAILERS = 16 << 10

Fields = list[tuple[str, str]]


class BadMessage(Exception):
    """What came is no HTTP/1.1 message; `status` is for whoever sent a request."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.status = status


class RequestHead(Struct, frozen=True):
    """What a client asks for. Names of fields are in lower case; `index` has the values of equal names joined by commas."""

    method: str
    target: str  # a path with its query, or *
    minor: int  # of HTTP/1.MINOR
    fields: Fields
    index: dict[str, str]
    host: str

    def get(self, name: str) -> str:
        """Return a field's value, empty if it is not there."""
        return self.index.get(name, "")

    def tokens(self, name: str) -> frozenset[str]:
        """Return the members of a field that is a list of tokens, in lower case."""
        return tokens(self.index.get(name, ""))


class AnswerHead(Struct, frozen=True):
    """What a worker answers."""

    status: int
    reason: str
    minor: int
    fields: Fields
    index: dict[str, str]

    def get(self, name: str) -> str:
        """Return a field's value, empty if it is not there."""
        return self.index.get(name, "")

    def tokens(self, name: str) -> frozenset[str]:
        """Return the members of a field that is a list of tokens, in lower case."""
        return tokens(self.index.get(name, ""))


def tokens(value: str) -> frozenset[str]:
    """Split a list of tokens.

    >>> sorted(tokens("Keep-Alive, Upgrade"))
    ['keep-alive', 'upgrade']
    """
    return frozenset(part.strip(" \t").lower() for part in value.split(",")) if value else frozenset()


# ---- heads


def parse_request(head: bytes, most_fields: int) -> RequestHead:
    """Read a head, without the empty line that ends it. Raises BadMessage."""
    first, _, rest = head.decode("latin-1").partition("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if not line:
        raise BadMessage("the request line is not METHOD TARGET HTTP/1.1")
    method, target, major, minor_digit = line.groups()
    if major != "1":
        raise BadMessage(f"HTTP/{major} is not spoken here", 505)
    minor = min(int(minor_digit), 1)
    fields, index = _parse_fields(rest, most_fields)
    host = _one_host(fields, minor)
    if target[0] != "/" and target != "*":
        absolute = _ABSOLUTE.fullmatch(target)
        if not absolute:
            raise BadMessage("the target is no path")
        host = absolute[1]  # RFC 9112, section 3.2.2: it counts, the field does not
        target = absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]
        if not _HOST.fullmatch(host):
            raise BadMessage("the target names no host")
    return RequestHead(method, target, minor, fields, index, host)


def parse_answer(head: bytes, most_fields: int) -> AnswerHead:
    """Read a head, without the empty line that ends it. Raises BadMessage."""
    first, _, rest = head.decode("latin-1").partition("\r\n")
    line = _STATUS_LINE.fullmatch(first)
    if not line or line[2] < "100":
        raise BadMessage("the answer is not HTTP/1")
    fields, index = _parse_fields(rest, most_fields)
    return AnswerHead(int(line[2]), line[3] or "", int(line[1]), fields, index)


def _parse_fields(text: str, most: int) -> tuple[Fields, dict[str, str]]:
    if not text:
        return [], {}
    text += "\r\n"
    found: Fields = _FIELDS.findall(text)
    if len(found) != text.count("\n"):  # each match is one line from its beginning to its end
        raise BadMessage("a header field is ill-formed")
    if len(found) > most:
        raise BadMessage(f"more than {most} header fields", 431)
    fields = [(name.lower(), value.strip(" \t")) for name, value in found]
    index = dict(fields)
    if len(index) < len(fields):
        index = {}
        for name, value in fields:
            index[name] = f"{index[name]}, {value}" if name in index else value
    return fields, index


def _one_host(fields: Fields, minor: int) -> str:
    hosts = [value for name, value in fields if name == "host"]
    if len(hosts) > 1 or (minor and not hosts):
        raise BadMessage("a request names one host")
    if not hosts or not hosts[0]:
        return ""
    if not _HOST.fullmatch(hosts[0]):
        raise BadMessage("the host is ill-formed")
    return hosts[0]


def write_head(first: str, fields: Iterable[tuple[str, str]]) -> bytes:
    """Return a head with the empty line that ends it.

    >>> write_head("HTTP/1.1 204 No Content", [("date", "today")])
    b'HTTP/1.1 204 No Content\\r\\ndate: today\\r\\n\\r\\n'
    """
    lines = [first]
    lines += [f"{name}: {value}" for name, value in fields]
    lines.append("\r\n")
    return "\r\n".join(lines).encode("latin-1")


# ---- framing


def request_decoder(head: RequestHead) -> Decoder | None:
    """Return what takes the body off the connection, None if there is none (RFC 9112, section 6.3). Raises BadMessage."""
    coding, length = head.index.get("transfer-encoding"), head.index.get("content-length")
    if coding is not None:
        if length is not None or not head.minor:
            raise BadMessage("a request has one length, and HTTP/1.0 no transfer coding")
        if coding.lower() != "chunked":
            raise BadMessage("no transfer coding but chunked is understood", 501)
        return Chunked()
    if length is None:
        return None
    size = _size(length)
    return Sized(size) if size else None


def answer_decoder(head: AnswerHead, method: str) -> Decoder | None:
    """Return what takes the body off the connection, None if there is none (RFC 9112, section 6.3). Raises BadMessage."""
    if not has_body(method, head.status):
        return None
    coding = head.index.get("transfer-encoding")
    if coding is not None:
        if coding.lower() != "chunked":
            raise BadMessage("the answer's transfer coding is not chunked")
        return Chunked()
    length = head.index.get("content-length")
    if length is None:
        return UntilClose()
    size = _size(length)
    return Sized(size) if size else None


def has_body(method: str, status: int) -> bool:
    """Say whether an answer has a body, if only an empty one."""
    return method != "HEAD" and status >= 200 and status not in (204, 304)


def _size(value: str) -> int:
    if not _LENGTH.fullmatch(value):
        raise BadMessage("the content-length is no number")
    return int(value)


class Decoder(Protocol):
    """Takes one body off what comes in."""

    trailers: Fields

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Return the body's part of it, and what follows the body if it has ended (else None). Raises BadMessage."""

    def may_end(self) -> bool:
        """Say whether the body is whole if the connection ends now."""


class Sized:
    """A body of a known length, at least one byte."""

    def __init__(self, size: int) -> None:
        self.trailers: Fields = []
        self.size = size
        self._left = size

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Count down."""
        if len(data) < self._left:
            self._left -= len(data)
            return data, None
        left, self._left = self._left, 0
        return (data, b"") if len(data) == left else (data[:left], data[left:])

    def may_end(self) -> bool:
        """Say no: the end would have been told."""
        return False


class UntilClose:
    """A body that ends where the connection does."""

    def __init__(self) -> None:
        self.trailers: Fields = []

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Take all of it."""
        return data, None

    def may_end(self) -> bool:
        """Say yes: it cannot be told from one that was cut off."""
        return True


class Chunked:
    """A chunked body (RFC 9112, section 7.1); extensions are dropped, trailers kept."""

    def __init__(self) -> None:
        self.trailers: Fields = []
        self._held = b""  # the beginning of a line
        self._left = 0  # of the chunk
        self._step: Callable[[bytes, int], int | None] | None = self._size_line

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Take as many chunks off as are there."""
        if self._held:
            data, self._held = self._held + data, b""
        pieces: list[bytes] = []
        at: int | None = 0
        rest = 0
        while at is not None:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                self._left -= len(piece)
                at += len(piece)
                if self._left:
                    return b"".join(pieces), None
            rest = at
            if self._step is None:
                return b"".join(pieces), data[at:]
            at = self._step(data, at)
        self._held = data[rest:]
        return b"".join(pieces), None

    def may_end(self) -> bool:
        """Say no: the last chunk would have come."""
        return False

    # Each step takes one line from `at`: the position behind it, None if it is not all there.

    def _size_line(self, data: bytes, at: int) -> int | None:
        end = _line_end(data, at, _MOST_SIZE_LINE)
        if end is None:
            return None
        size = _CHUNK_SIZE.fullmatch(data, at, end)
        if not size:
            raise BadMessage("a chunk's size is no number")
        self._left = int(size[1], 16)
        self._step = self._after_chunk if self._left else self._trailers
        return end + 2

    def _after_chunk(self, data: bytes, at: int) -> int | None:
        if len(data) - at < 2:
            return None
        if data[at : at + 2] != b"\r\n":
            raise BadMessage("a chunk is longer than it says")
        self._step = self._size_line
        return at + 2

    def _trailers(self, data: bytes, at: int) -> int | None:
        if data.startswith(b"\r\n", at):
            self._step = None
            return at + 2
        end = data.find(END_OF_HEAD, at)
        if end < 0:
            if len(data) - at > _MOST_TRAILERS:
                raise BadMessage("the trailers are too long", 431)
            return None
        if end - at > _MOST_TRAILERS:
            raise BadMessage("the trailers are too long", 431)
        self.trailers, _ = _parse_fields(data[at:end].decode("latin-1"), _MOST_TRAILERS)
        self._step = None
        return end + len(END_OF_HEAD)


def _line_end(data: bytes, at: int, most: int) -> int | None:
    end = data.find(b"\r\n", at, at + most + 2)
    if end >= 0:
        return end
    if len(data) - at > most:
        raise BadMessage("a line is too long")
    return None


def chunk(data: bytes) -> bytes:
    """Return data, of which there is some, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(trailers: Fields) -> bytes:
    """Return what ends a chunked body."""
    return b"0\r\n" + write_head("", trailers)[2:] if trailers else LAST_CHUNK
