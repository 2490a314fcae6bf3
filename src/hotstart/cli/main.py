"""Finds the command's file and turns errors into one line and an exit code."""

from __future__ import annotations

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
    "snapshot": ("snapshot", "create, ls, inspect, verify, rm: snapshots of warm workers"),
    "restore": ("restore", "start replicas of a snapshot"),
    "plan": ("plan", "what a restore would do here, and how long it should take"),
    "receipt": ("receipt", "what a replica's restore did, stage by stage"),
    "ps": ("ps", "list workers and replicas"),
    "logs": ("logs", "what a worker or replica wrote"),
    "exec": ("exec", "run a command inside a sandbox"),
    "stop": ("stop", "end workers and replicas"),
    "rm": ("rm", "forget workers and replicas that have ended"),
    "keys": ("keys", "new, ls, trust, distrust, policy, rotate: who may make snapshots, and who can read them"),
    "bench": ("bench", "cold start, plain CRIU and Hotstart side by side"),
}


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
        "damaged), 5 this machine lacks something.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    entered = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments[: _command_at(arguments) + 1]
    arguments = [a for i, a in enumerate(arguments) if not (a == "--debug" and i <= _command_at(arguments))]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from hotstart import __version__

        print(f"hotstart {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"hotstart: no command {arguments[0]!r}: `hotstart --help` lists them", file=sys.stderr)
        return 2
    return _run(arguments, debug, entered)


def _command_at(arguments: list[str]) -> int:
    return next((i for i, a in enumerate(arguments) if not a.startswith("-")), 0)


def _run(arguments: list[str], debug: bool, entered: float) -> int:
    from importlib import import_module

    from hotstart.errors import HotstartError

    signal.signal(signal.SIGTERM, _end)
    try:
        module = import_module(f"hotstart.cli.{COMMANDS[arguments[0]][0]}")
        return int(module.main(arguments[1:], entered))
    except HotstartError as e:
        if debug:
            import traceback

            traceback.print_exc()
        print(f"hotstart: {e}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read our output has gone; nothing more to say
        return 0
    except KeyboardInterrupt:
        print("hotstart: interrupted; what was begun has been undone", file=sys.stderr)
        return 130
    except OSError as e:
        if debug:
            raise
        if isinstance(e, PermissionError) and os.geteuid() != 0:
            print(f"hotstart: {e.filename or 'this'} is root's: run this as root", file=sys.stderr)
            return 5
        print(f"hotstart: {e}; --debug shows where", file=sys.stderr)
        return 1


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
