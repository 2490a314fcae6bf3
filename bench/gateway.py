"""What the gateway costs: each request beside the same server called directly and beside other libraries, tokens, memory.

    python -m bench.gateway [--seconds 5] [--rounds 5] [--rates 200,400] [--million]

Needs wrk. Other libraries are put into an environment of their own (.engines/gateway-peers). Writes out/bench/gateway.json and prints
the tables; docs/benchmarks.md says how it is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar, cast

from msgspec import json, structs

from bench.gateway_peers import KINDS
from bench.gatewayfigures import DIRECT, OURS, GatewayFigures, Latency, Memory, Parsing, Streaming, targets_of_gateway
from hotstart.serve import loop
from hotstart.serve.gateway import Gateway
from hotstart.serve.http1 import chunk, parse_answer, parse_request, write_head
from hotstart.serve.port import Outlook, Replica
from hotstart.serve.settings import ClientLimits, GatewaySettings, ModelSettings

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench"
PEERS = ROOT / ".engines" / "gateway-peers"
LIBRARIES = ["aiohttp", "granian", "h11", "httptools", "httpx", "msgspec", "starlette", "uvicorn", "uvloop"]
CONNECTIONS = 10
BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 200 + b'"}]}'
ANSWER = b'{"id":"chatcmpl-1","object":"chat.completion","choices":[{"message":{"content":"' + b"y" * 200 + b'"}}]}'
TOKEN_GAP_S = 0.02
STREAMS = 20
TOKENS = 100
_Figures = TypeVar("_Figures", Latency, Streaming)

WRK = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-something-of-the-usual-length-0123456789"
wrk.headers["Accept"] = "application/json"
wrk.headers["Accept-Encoding"] = "gzip, deflate"
wrk.headers["User-Agent"] = "OpenAI/Python 1.50.0"
wrk.body = [[BODY]]
local pause = PAUSE_MS
if pause > 0 then
  function delay() return math.random(0, 2 * pause) end
end
function done(summary, latency, requests)
  local bad = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout
  io.write(string.format("RESULT %d %d %d %f %f %f\\n", summary.requests, bad, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"""


# ---- the server behind, and the gateway, each a process


class _Answering(asyncio.Protocol):
    """As little of a server as possible: knows the two requests that are made here."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.held = cast(asyncio.Transport, transport), b""
        self.tasks: set[asyncio.Task[None]] = set()

    def data_received(self, data: bytes) -> None:
        self.held += data
        while (end := self.held.find(b"\r\n\r\n")) >= 0:
            found = re.search(rb"content-length: (\d+)", self.held[:end], re.IGNORECASE)
            size = int(found[1]) if found else 0
            if len(self.held) < end + 4 + size:
                return
            head, self.held = self.held[:end], self.held[end + 4 + size :]
            if head.startswith(b"GET /tokens"):
                self.tasks.add(asyncio.ensure_future(self._tokens()))
            else:
                fields = [("content-type", "application/json"), ("content-length", str(len(ANSWER)))]
                self.transport.write(write_head("HTTP/1.1 200 OK", fields) + ANSWER)

    async def _tokens(self) -> None:
        fields = [("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]
        self.transport.write(write_head("HTTP/1.1 200 OK", fields))
        for _ in range(TOKENS):
            await asyncio.sleep(TOKEN_GAP_S)
            if self.transport.is_closing():
                return
            self.transport.write(chunk(b"data: %d\n\n" % time.monotonic_ns()))
        self.transport.write(b"0\r\n\r\n")


async def _serve_upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Answering, "127.0.0.1", port, backlog=512)
    await server.serve_forever()


class OnePool:
    """A pool with one replica that is always there."""

    def __init__(self, port: int) -> None:
        self._replicas = (Replica("m-1", "m", "127.0.0.1", port, 1000),)

    def replicas(self, _model: str) -> tuple[Replica, ...]:
        """Return it."""
        return self._replicas

    def outlook(self, _model: str) -> Outlook:
        """Nobody waits."""
        return Outlook()

    def wake(self, _model: str) -> None:
        """Nobody sleeps."""

    def failed(self, replica: Replica, why: str) -> None:
        """Nothing may fail here."""
        sys.exit(f"{replica.name}: {why}")

    def follow(self, _on_change: Callable[[str], None]) -> None:
        """Nothing changes."""


async def _serve_gateway(port: int, upstream: int) -> None:
    settings = GatewaySettings((ModelSettings("m", route="/m"),), port=port, limits=ClientLimits())
    gateway = Gateway(settings, OnePool(upstream), None, lambda _: None)
    await gateway.start()
    await asyncio.Event().wait()


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


@contextmanager
def process(*command: str, port: int) -> Iterator[int]:
    """Run a server; give its pid once it accepts."""
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"})
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if child.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"bench.gateway: {' '.join(command)} does not listen")
                time.sleep(0.05)
        yield child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# ---- measuring


def cpu_s(pid: int) -> float:
    """Return the processor time of a process and its children that live."""
    total = 0.0
    for task in [pid, *_children(pid)]:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *_children(child)]
    return found


def load(who: str, port: int, pid: int | None, rate: int, seconds: float, connections: int = CONNECTIONS) -> Latency:
    """Ask for some time at a rate (0: as fast as it goes) and say what was found."""
    script = WRK.replace("BODY", BODY.decode()).replace(
        "PAUSE_MS", str(round(1000 * connections / rate) if rate else 0)
    )
    with NamedTemporaryFile("w", suffix=".lua") as f:
        f.write(script)
        f.flush()
        before = cpu_s(pid) if pid else 0.0
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "-s",
            f.name,
            f"http://127.0.0.1:{port}/v1/chat/completions",
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spent = cpu_s(pid) - before if pid else None
    found = re.search(r"RESULT (\d+) (\d+) (\d+) ([\d.]+) ([\d.]+) ([\d.]+)", out)
    assert found, out
    requests, failed, us = map(int, found.groups()[:3])
    p50, p99, p999 = (float(x) / 1e3 for x in found.groups()[3:])
    return Latency(
        who, rate, requests / us * 1e6, failed, p50, p99, p999, None if spent is None else spent / requests * 1e6
    )


def stream(who: str, port: int) -> Streaming:
    """Read streams side by side and say how old tokens were."""
    ages: list[int] = []
    lock = threading.Lock()

    def read_one() -> None:
        mine = []
        with socket.create_connection(("127.0.0.1", port)) as s:
            s.sendall(
                b"GET /m/tokens HTTP/1.1\r\nhost: a\r\n\r\n"
                if who != DIRECT
                else b"GET /tokens HTTP/1.1\r\nhost: a\r\n\r\n"
            )
            while len(mine) < TOKENS:
                data = s.recv(1 << 16)
                now = time.monotonic_ns()
                mine += [now - int(ns) for ns in re.findall(rb"data: (\d+)\n", data)]
        with lock:
            ages.extend(mine)

    threads = [threading.Thread(target=read_one) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
        time.sleep(TOKEN_GAP_S / STREAMS)
    for thread in threads:
        thread.join()
    ages.sort()
    return Streaming(who, STREAMS, ages[len(ages) // 2] / 1e6, ages[len(ages) * 99 // 100] / 1e6, ages[-1] / 1e6)


def remember(port: int, pid: int, requests: int) -> Memory:
    """Ask so many times, and note how much memory there is on the way."""
    served, sizes = [0], [_rss(pid)]
    while served[-1] < requests:
        served.append(served[-1] + round(load(OURS, port, None, 0, 20, 32).rate * 20))
        sizes.append(_rss(pid))
        print(f"{served[-1]} requests: {sizes[-1] / 1e6:.1f} MB", flush=True)
    return Memory(served, sizes)


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


REQUEST = b"\r\n".join([
    b"POST /v1/chat/completions HTTP/1.1", b"Host: 127.0.0.1:8080", b"Accept: application/json", b"Accept-Encoding: gzip, deflate",
    b"Connection: keep-alive", b"Content-Type: application/json", b"Content-Length: 250",
    b"Authorization: Bearer sk-something-of-the-usual-length-0123456789", b"User-Agent: OpenAI/Python 1.50.0",
    b"X-Stainless-Lang: python", b"X-Stainless-Runtime: CPython", b"X-Stainless-Retry-Count: 0",
])  # fmt: skip
REPLY = b"HTTP/1.1 200 OK\r\ndate: Mon, 23 Nov 2026 20:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: 400\r\ncontent-type: application/json"


def parse_cost() -> list[Parsing]:
    """Time the reading of heads by several readers."""
    import h11  # here: only the peers' interpreter has httptools
    import httptools

    class Sink:
        def __init__(self) -> None:
            self.fields: list[tuple[str, str]] = []

        def on_header(self, name: bytes, value: bytes) -> None:
            self.fields.append((name.decode("latin-1").lower(), value.decode("latin-1")))

        def on_url(self, url: bytes) -> None:
            self.url = url

    def by_h11(role: Any, raw: bytes) -> None:
        connection = h11.Connection(role)
        if role is h11.CLIENT:
            connection.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
        connection.receive_data(raw)
        connection.next_event()

    def by_httptools(parser: Any, raw: bytes) -> None:
        sink = Sink()
        parser(sink).feed_data(raw)

    ways: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("hotstart", lambda: parse_request(REQUEST, 128), lambda: parse_answer(REPLY, 128)),
        (
            "httptools",
            lambda: by_httptools(httptools.HttpRequestParser, REQUEST + b"\r\n\r\n"),
            lambda: by_httptools(httptools.HttpResponseParser, REPLY + b"\r\n\r\n"),
        ),
        ("h11", lambda: by_h11(h11.SERVER, REQUEST + b"\r\n\r\n"), lambda: by_h11(h11.CLIENT, REPLY + b"\r\n\r\n")),
    ]
    return [Parsing(who, _us(one), _us(other)) for who, one, other in ways]


def _us(call: Callable[[], object]) -> float:
    rounds = []
    for _ in range(15):
        began = time.perf_counter()
        for _ in range(1000):
            call()
        rounds.append((time.perf_counter() - began) * 1e3)
    return median(rounds)


# ---- all of it


def peers_python() -> str:
    """Return an interpreter that has the other libraries, made if need be."""
    python = PEERS / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *LIBRARIES], check=True)
    return str(python)


def measure(seconds: float, rates: list[int], rounds: int, *, million: bool) -> GatewayFigures:
    """Run everything, in turn: a round has each load of each server once."""
    python = peers_python()
    machine = f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, load before: {os.getloadavg()[0]:.1f}"
    memory = None
    with ExitStack() as stack:
        upstream = free_port()
        stack.enter_context(process(sys.executable, "-m", "bench.gateway", "--upstream", str(upstream), port=upstream))
        commands: list[tuple[str, list[str]]] = [
            (OURS, [sys.executable, "-m", "bench.gateway", "--gateway"]),
            ("hotstart without uvloop", [sys.executable, "-m", "bench.gateway", "--asyncio", "--gateway"]),
            *((kind, [python, "-m", "bench.gateway_peers", kind]) for kind in KINDS),
        ]
        servers: list[tuple[str, int, int | None]] = [(DIRECT, upstream, None)]
        for who, command in commands:
            port = free_port()
            pid = stack.enter_context(process(*command, str(port), str(upstream), port=port))
            servers.append((who, port, pid))
        for who, port, pid in servers:
            load(who, port, pid, 0, 2)
        found: dict[tuple[str, int], list[Latency]] = {}
        streams: dict[str, list[Streaming]] = {}
        for number in range(1, rounds + 1):
            print(f"round {number} of {rounds} ...", file=sys.stderr, flush=True)
            for who, port, pid in servers:
                for rate in (*rates, 0):
                    one = load(who, port, pid, rate, seconds, CONNECTIONS if rate else 32)
                    found.setdefault((who, rate), []).append(one)
                if who in (DIRECT, OURS):
                    streams.setdefault(who, []).append(stream(who, port))
        if million:
            _, port, pid = servers[1]
            assert pid
            memory = remember(port, pid, 1_000_000)
    latencies, streaming = list(map(_median_of, found.values())), list(map(_median_of, streams.values()))
    parsing = subprocess.run(
        [python, "-m", "bench.gateway", "--parsing"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}, cwd=ROOT, check=True, capture_output=True,
    ).stdout  # fmt: skip
    targets = targets_of_gateway(latencies, streaming, memory)
    return GatewayFigures(machine, latencies, json.decode(parsing, type=list[Parsing]), streaming, memory, targets)


def _median_of(rounds: Sequence[_Figures]) -> _Figures:
    """Return the median of each number, on its own; requests that failed are added up."""
    values = [structs.asdict(one) for one in rounds]
    found = {n: median(v[n] for v in values) for n, value in values[0].items() if isinstance(value, float)}
    if "failed" in values[0]:
        found["failed"] = sum(v["failed"] for v in values)
    return structs.replace(rounds[0], **found)


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(prog="bench.gateway")
    parser.add_argument("--seconds", type=float, default=5, help="of each load in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rates", default="200,400")
    parser.add_argument("--million", action="store_true", help="also ask a million times and watch memory")
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gateway", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--asyncio", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parsing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.parsing:
        print(json.encode(parse_cost()).decode())
    elif options.upstream or options.gateway:
        with contextlib.suppress(KeyboardInterrupt):
            if options.upstream:
                asyncio.run(_serve_upstream(options.upstream))
            else:
                (asyncio.run if options.asyncio else loop.run)(_serve_gateway(*options.gateway))
    else:
        if not shutil.which("wrk"):
            sys.exit("bench.gateway: wrk is missing: apt-get install wrk")
        from bench import report  # not by the peers' interpreter

        figures = measure(
            options.seconds, [int(r) for r in options.rates.split(",")], options.rounds, million=options.million
        )
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "gateway.json").write_bytes(json.format(json.encode(figures), indent=1))
        report.print_blocks(report.gateway_blocks(figures))


if __name__ == "__main__":
    main()
