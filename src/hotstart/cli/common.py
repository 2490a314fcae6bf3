"""What several commands share: the parser, the worker's options, output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from hotstart.errors import BadUsage, NotFound

if TYPE_CHECKING:
    from hotstart.adapters.linux.runfolder import SandboxState
    from hotstart.api import Hotstart, Publish
    from hotstart.snapshot.quiesce import QuiesceStep
    from hotstart.snapshot.warmup import Request
    from hotstart.snapshot.worker import WorkerSpec

T = TypeVar("T")
_FEWEST_CPUS, _MOST_CPUS = 0.01, 1e6  # what the kernel takes: a quota of 1 ms in 100 ms, and more than any machine has


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


def choose_command(
    group: str, commands: Mapping[str, Callable[[list[str]], int]], summaries: Mapping[str, str], arguments: list[str]
) -> int:
    """Run the one of a group's commands that the arguments begin with. Raises BadUsage."""
    if not arguments:
        raise BadUsage(f"no command: it is one of {', '.join(summaries)}; `hotstart {group} --help` explains them")
    name = arguments[0]
    if name in ("-h", "--help"):
        print(f"usage: hotstart {group} COMMAND ...\n")
        for command, summary in summaries.items():
            print(f"  {command:<10} {summary}")
        return 0
    if name not in commands:
        raise BadUsage(f"no command `{group} {name}`: `hotstart {group} --help` lists them")
    return commands[name](arguments[1:])


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
    if not is_whole(port) or int(port) > 65535:
        raise BadUsage(f"--publish takes [HOST:]PORT with a port from 0 to 65535, not {text[:80]!r}")
    return Publish(host.strip("[]") or "127.0.0.1", int(port))


def is_whole(text: str) -> bool:
    """Say whether it is a whole number as people write it: int() takes '²', '٣', '1_0' and ' 1', or raises on 5000 digits."""
    return text.isascii() and text.isdigit() and len(text) < 19


def whole_number(text: str) -> int:
    """Read a whole number, for argparse. Raises ArgumentTypeError."""
    if not is_whole(text.removeprefix("-")):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number")
    return int(text)


def number(text: str) -> float:
    """Read a number that is finite, for argparse. Raises ArgumentTypeError."""
    import re

    if not re.fullmatch(r"-?(\d{1,15}(\.\d*)?|\.\d+)", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number like 30 or 1.5")
    return float(text)


def add_worker_options(p: argparse.ArgumentParser) -> None:
    """Add the options that describe a worker."""
    p.add_argument("--port", type=whole_number, help="what the worker listens on inside")
    p.add_argument("--ready-url", metavar="URL", help="answers 2xx once the worker is ready; asked inside")
    p.add_argument("--ready-timeout", type=number, default=600.0, metavar="S", help="seconds to wait for that (600)")
    p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="add to the environment")
    p.add_argument(
        "--omit-env", action="append", default=[], metavar="NAME", help="leave a secret out; `restore --env` gives it"
    )
    p.add_argument("--network", choices=("isolated", "egress"), default="isolated", help="egress: it may call out")
    p.add_argument("--memory", metavar="SIZE", help="limit, like 4G")
    p.add_argument("--cpus", type=number, help="limit, like 1.5")
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
    from hotstart.snapshot.sizes import parse_size
    from hotstart.snapshot.warmup import ready_request
    from hotstart.snapshot.worker import WorkerSpec

    if not command:
        raise BadUsage("no command: write it after --, like `-- python server.py`")
    if options.port is not None and not 0 < options.port < 65536:
        raise BadUsage(f"--port {options.port} is not a port")
    if options.ready_timeout <= 0:
        raise BadUsage("--ready-timeout must be more than 0")
    if options.cpus is not None and not _FEWEST_CPUS <= options.cpus <= _MOST_CPUS:
        raise BadUsage(f"--cpus {options.cpus:g} cannot be kept to: give {_FEWEST_CPUS:g} or more")
    if options.ready_url is not None:
        ready_request(options.ready_url)
    environment = {
        name: value
        for name, value in os.environ.items()
        # The key of an encrypted store must not be in a snapshot.
        if is_utf8(name + value) and not name.startswith("HOTSTART_STORE_KEY")
    }
    environment |= parse_environment(options.env)
    for name in options.omit_env:
        environment.pop(name, None)
    cwd = _working_directory()
    for folder in options.writable:
        if not os.path.isdir(folder):
            raise BadUsage(f"--writable {folder or repr(folder)}: there is no such folder")
    return WorkerSpec(
        command=tuple(command),
        cwd=cwd,
        environment=environment,
        port=options.port,
        ready_url=options.ready_url,
        ready_timeout_s=options.ready_timeout,
        network=options.network,
        memory_bytes=None if options.memory is None else parse_size(options.memory),
        cpus=options.cpus,
        writable=tuple(map(os.path.abspath, options.writable)),
        omitted=tuple(options.omit_env),
        visible=host_folders_below_private(cwd, tuple(command), (find_criu().path,)),
    )


def _working_directory() -> str:
    try:
        cwd = os.getcwd()
    except FileNotFoundError as e:
        raise BadUsage("the working directory is gone: change to another one") from e
    if not is_utf8(cwd):
        raise BadUsage("the working directory's path is not UTF-8: change to another one")
    return cwd


def parse_environment(entries: Sequence[str]) -> dict[str, str]:
    """Read NAME=VALUE entries. Raises BadUsage, which does not repeat a value: it may be a secret."""
    environment = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise BadUsage(f"--env takes NAME=VALUE, not {name[:80]!r} alone")
        environment[name] = value
    return environment


def is_utf8(text: str) -> bool:
    """Say whether a text from the system can be kept in a snapshot's document; variables that cannot are left out."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def read_warmup(path: str | None) -> list[Request]:
    """Read a warm-up file. Raises BadUsage."""
    from hotstart.snapshot.warmup import parse_warmup

    return _read_requests("--warmup", path, parse_warmup)


def read_quiesce(path: str | None) -> list[QuiesceStep]:
    """Read a file of --quiesce. Raises BadUsage."""
    from hotstart.snapshot.quiesce import parse_quiesce

    return _read_requests("--quiesce", path, parse_quiesce)


def _read_requests(option: str, path: str | None, parse: Callable[[str, str], list[T]]) -> list[T]:
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8", newline="") as f:
            requests = parse(f.read(), path)
    except (OSError, UnicodeDecodeError) as e:
        raise BadUsage(f"{option} {path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if not requests:
        raise BadUsage(f"{option} {path} holds no request")
    return requests


def say(message: str) -> None:
    """Tell the user something that is not the result."""
    print(f"hotstart: {message}", file=sys.stderr)


def pid_of(state: SandboxState) -> int | None:
    """Return the root's pid on the host; None if it has ended, perhaps just now."""
    try:
        return state.host_root_pid()
    except NotFound:
        return None


def as_plain(value: Any) -> Any:
    """Return what json.dumps takes of a value of ours."""
    from hotstart.snapshot.codec import to_plain

    return to_plain(value)
