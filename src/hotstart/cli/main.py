"""Finds the command's file and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

# Name -> (module, what it does). Only the command that is asked for is imported: a restore's clock is already running.
COMMANDS = {
    "doctor": ("doctor", "can this machine do it? each check, why it fails, what to do"),
    "run": ("run", "start a worker in its sandbox"),
    "snapshot": ("snapshot", "snapshots of warm workers: create, ls, inspect, push, pull, and more"),
    "restore": ("restore", "start replicas of a snapshot"),
    "plan": ("plan", "what a restore would do here, and how long it should take"),
    "receipt": ("receipt", "what a replica's restore did, stage by stage"),
    "ps": ("ps", "list workers and replicas"),
    "logs": ("logs", "what a worker or replica wrote"),
    "exec": ("exec", "run a command inside a sandbox"),
    "stop": ("stop", "end workers and replicas"),
    "rm": ("rm", "forget workers and replicas that have ended"),
    "serve": ("serve", "gateway, autoscaling, dashboard, metrics: models from zero replicas to many and back"),
    "keys": ("keys", "new, ls, trust, distrust, policy, rotate: who may make snapshots, and who can read them"),
    "operator": ("operator", "the controllers and the admission webhook, on Kubernetes"),
    "k8s": ("k8s", "Hotstart on a Kubernetes cluster: install, status"),
    "agent": ("agent", "the daemon of a Kubernetes node"),
    "bench": ("bench", "cold start, plain CRIU and Hotstart side by side"),
}

_LONGEST_LINE = 1000


def usage() -> str:
    """Return what `hotstart --help` prints."""
    lines = [
        "usage: hotstart [--debug] COMMAND ...",
        "",
        "Freeze a warm AI inference worker once, start replicas of it in milliseconds.",
        "",
        *(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()),
        "",
        "`hotstart COMMAND --help` says more. State is kept in HOTSTART_HOME (default /var/lib/hotstart) and HOTSTART_RUN",
        "(default /run/hotstart). Exit codes: 0 done, 1 failed, 2 bad usage, 3 not found, 4 refused (incompatible, unsigned,",
        "damaged), 5 this machine lacks something, 130 interrupted.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    entered = time.monotonic()
    _mend_standard_files()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments[: _command_at(arguments) + 1]
    arguments = [a for i, a in enumerate(arguments) if not (a == "--debug" and i <= _command_at(arguments))]

    from hotstart.errors import HotstartError

    signal.signal(signal.SIGTERM, _end)
    try:
        code = _run(arguments, entered)
        sys.stdout.flush()
        return code
    except HotstartError as e:
        if debug:
            import traceback

            traceback.print_exc()
        _complain(str(e))
        return e.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; what was begun has been undone")
        return 130
    except OSError as e:
        _drop_output()
        if isinstance(e, BrokenPipeError) and _nobody_reads():
            return 0  # nothing more to say
        if debug:
            raise
        if isinstance(e, PermissionError) and os.geteuid() != 0:
            _complain(f"{e.filename or 'this'} is root's: run this as root")
            return 5
        if e.errno == errno.EMFILE:
            _complain("more files would be open than the limit allows: raise it with `ulimit -n`")
            return 1
        _complain(f"{f'{e.filename}: {e.strerror}' if e.filename else e}; --debug shows where")
        return 1


def _command_at(arguments: list[str]) -> int:
    return next((i for i, a in enumerate(arguments) if not a.startswith("-")), 0)


def _run(arguments: list[str], entered: float) -> int:
    from hotstart.errors import BadUsage

    if not arguments:
        raise BadUsage("no command: `hotstart --help` lists them")
    if arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from hotstart import __version__

        print(f"hotstart {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise BadUsage(f"no command {arguments[0][:40]!r}: `hotstart --help` lists them")
    # What is kept (names, paths, a worker's command) is JSON; `exec` keeps nothing.
    if arguments[0] != "exec" and (odd := next((a for a in arguments if not _is_utf8(a)), None)):
        raise BadUsage(f"argument {odd[:40]!r} is not UTF-8: write it otherwise")

    from importlib import import_module

    module = import_module(f"hotstart.cli.{COMMANDS[arguments[0]][0]}")
    try:
        return int(module.main(arguments[1:], entered))
    except SystemExit as e:  # argparse's way to end after --help
        return int(e.code or 0)


def _complain(message: str) -> None:
    """Print an error: one line that can be read, whatever the input that it names holds."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    if len(shown) > _LONGEST_LINE:
        shown = f"{shown[: _LONGEST_LINE // 2]} ... {shown[-_LONGEST_LINE // 2 :]}"
    print(f"hotstart: {shown}", file=sys.stderr)


def _nobody_reads() -> bool:
    """Say whether who read our output has gone; pipes of our own break for other reasons."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _drop_output() -> None:
    """Forget what could not be written: the interpreter would try again when it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mend_standard_files() -> None:
    """Open the standard files that are closed: else the next ones that we open would be taken for them."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
