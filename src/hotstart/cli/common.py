"""What several commands share: the parser, the worker's options, output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from hotstart.errors import BadUsage

if TYPE_CHECKING:
    from hotstart.api import Hotstart, Publish
    from hotstart.snapshot.warmup import Request
    from hotstart.snapshot.worker import WorkerSpec

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise BadUsage instead of printing the usage."""
        raise BadUsage(f"{message}: see `{self.prog} --help`")


def parser(command: str, description: str, *, json_output: bool = True) -> Parser:
    """Return a command's parser, with --json where it prints."""
    p = Parser(prog=f"hotstart {command}", description=description, allow_abbrev=False)
    if json_output:
        p.add_argument("--json", action="store_true", help="print JSON")
    return p


def open_hotstart(clock_start: float | None = None) -> Hotstart:
    """Return the API for this process."""
    from hotstart.api import Hotstart

    return Hotstart(clock_start=clock_start)


def process_start() -> float:
    """CLOCK_MONOTONIC seconds at which this process started: where every duration's clock begins."""
    from hotstart.adapters.linux.procfs import process_start_clock

    return process_start_clock()


def print_json(value: object) -> None:
    """Print a value as JSON."""
    from msgspec import json

    print(json.format(json.encode(value)).decode())


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns."""
    lines = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def seconds(value: float | None) -> str:
    """Print a duration for people."""
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def size(value: float | None) -> str:
    """Print bytes for people."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def parse_publish(text: str | None) -> Publish | None:
    """Read [HOST:]PORT. Raises BadUsage."""
    if text is None:
        return None
    from hotstart.api import Publish

    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise BadUsage(f"--publish takes [HOST:]PORT with a port from 0 to 65535, not {text!r}")
    return Publish(host.strip("[]") or "127.0.0.1", int(port))


def add_worker_options(p: argparse.ArgumentParser) -> None:
    """Add the options that describe a worker."""
    p.add_argument("--port", type=int, help="what the worker listens on inside")
    p.add_argument("--ready-url", metavar="URL", help="answers 2xx once the worker is ready; asked inside")
    p.add_argument("--ready-timeout", type=float, default=600.0, metavar="S", help="seconds to wait for that (600)")
    p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="add to the environment")
    p.add_argument("--network", choices=("isolated", "egress"), default="isolated", help="egress: it may call out")
    p.add_argument("--memory", metavar="SIZE", help="limit, like 4G")
    p.add_argument("--cpus", type=float, help="limit, like 1.5")
    p.add_argument(
        "--writable", action="append", default=[], metavar="DIR", help="open a folder of the host for writing"
    )


def add_warmup_options(p: argparse.ArgumentParser) -> None:
    """Add the options about warm-up requests."""
    p.add_argument(
        "--warmup", metavar="FILE", help="JSON lines {method, path, headers, body}; the last answer is the oracle"
    )
    p.add_argument(
        "--oracle-ignore", default="", metavar="FIELD,...", help="JSON fields dropped before answers are compared"
    )


def oracle_ignore(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the fields of --oracle-ignore."""
    return tuple(field for field in options.oracle_ignore.split(",") if field)


def split_command(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split what stands before and after `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def worker_spec(options: argparse.Namespace, command: list[str]) -> WorkerSpec:
    """Make a worker's description of its options. Raises BadUsage."""
    from hotstart.adapters.criu.program import find_criu
    from hotstart.adapters.linux.host import host_folders_below_private
    from hotstart.snapshot.worker import WorkerSpec

    if not command:
        raise BadUsage("no command: write it after --, like `-- python server.py`")
    if options.port is not None and not 0 < options.port < 65536:
        raise BadUsage(f"--port {options.port} is not a port")
    if options.ready_timeout <= 0 or (options.cpus is not None and options.cpus <= 0):
        raise BadUsage("--ready-timeout and --cpus must be more than 0")
    if options.ready_url and not options.ready_url.startswith("http://"):
        raise BadUsage(f"--ready-url takes http://..., not {options.ready_url!r}")
    environment = {
        name: value
        for name, value in os.environ.items()
        # The key of an encrypted store must not be in a snapshot, whose environment is not encrypted.
        if _is_utf8(name + value) and not name.startswith("HOTSTART_STORE_KEY")
    }
    for entry in options.env:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise BadUsage(f"--env takes NAME=VALUE, not {entry!r}")
        environment[name] = value
    writable = [os.path.abspath(folder) for folder in options.writable]
    for folder in writable:
        if not os.path.isdir(folder):
            raise BadUsage(f"--writable {folder}: there is no such folder")
    cwd = os.getcwd()
    return WorkerSpec(
        command=tuple(command),
        cwd=cwd,
        environment=environment,
        port=options.port,
        ready_url=options.ready_url,
        ready_timeout_s=options.ready_timeout,
        network=options.network,
        memory_bytes=parse_size(options.memory) if options.memory else None,
        cpus=options.cpus,
        writable=tuple(writable),
        visible=host_folders_below_private(cwd, tuple(command), (find_criu().path,)),
    )


def _is_utf8(text: str) -> bool:
    """Say whether a variable can be kept in a snapshot's document; the few that cannot are left out."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def parse_size(text: str) -> int:
    """Read bytes with an optional unit. Raises BadUsage.

    >>> parse_size("1.5G")
    1610612736
    """
    number, unit = text.rstrip("iBb"), ""
    if number and number[-1].upper() in _UNITS:
        number, unit = number[:-1], number[-1].upper()
    try:
        value = int(float(number) * _UNITS[unit])
    except ValueError:
        value = 0
    if value <= 0:
        raise BadUsage(f"{text!r} is not a size: write it like 512M or 4G")
    return value


def read_warmup(path: str | None) -> list[Request]:
    """Read a warm-up file. Raises BadUsage."""
    from hotstart.snapshot.warmup import parse_warmup

    if path is None:
        return []
    try:
        with open(path, encoding="utf-8") as f:
            requests = parse_warmup(f.read(), path)
    except (OSError, UnicodeDecodeError) as e:
        raise BadUsage(f"--warmup {path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if not requests:
        raise BadUsage(f"--warmup {path} holds no request")
    return requests


def say(message: str) -> None:
    """Tell the user something that is not the result."""
    print(f"hotstart: {message}", file=sys.stderr)


def one_name(p: argparse.ArgumentParser, what: str) -> None:
    """Add the one name that a command takes."""
    p.add_argument("name", metavar=what)


def as_plain(value: Any) -> Any:
    """Return what json.dumps takes of a value of ours."""
    from hotstart.snapshot.codec import to_plain

    return to_plain(value)
