"""hotstart snapshot push | pull | gc | diff | export | import: snapshots and stores."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from hotstart.cli.common import (
    Parser,
    as_plain,
    open_hotstart,
    parser,
    print_json,
    print_table,
    say,
    size,
)
from hotstart.errors import BadUsage
from hotstart.snapshot.sizes import parse_size
from hotstart.snapshot.worker import check_name


def _parser(command: str, description: str) -> Parser:
    return parser(f"snapshot {command}", description)


def _push(arguments: list[str]) -> int:
    from hotstart.api.storing import push_snapshot
    from hotstart.cli.progress import TerminalProgress

    p = _parser("push", "put a snapshot into a store; what was interrupted goes on where it stopped")
    p.add_argument("name", metavar="SNAP")
    p.add_argument(
        "store", metavar="STORE", nargs="?", help="s3://BUCKET/PREFIX, gs://, az://, or a folder; default: our own"
    )
    options = p.parse_args(arguments)
    check_name(options.name, "snapshot")
    progress = TerminalProgress(quiet=options.json)
    progress.stage("storing")
    added = push_snapshot(open_hotstart(), options.name, options.store, progress)
    progress.close()
    if options.json:
        print_json({"snapshot": options.name, "stored_bytes": added})
    else:
        print(f"{options.name}: {size(added)} added to {options.store or 'the store'}")
    return 0


def push_rest_in_background() -> None:
    """Put what was just made, and what a kill kept from being stored, into our own store; it goes on without us."""
    import subprocess

    from hotstart.api.storing import unstored

    if os.geteuid() != 0:
        return
    for name in unstored(open_hotstart()):
        pusher = subprocess.Popen(
            [sys.executable, "-m", "hotstart.cli.main", "snapshot", "push", name, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        with suppress(OSError):  # replicas that answer come first
            os.sched_setscheduler(pusher.pid, os.SCHED_IDLE, os.sched_param(0))


def _pull(arguments: list[str]) -> int:
    from hotstart.api.storing import pull_snapshot
    from hotstart.cli.progress import TerminalProgress

    p = _parser(
        "pull", "get a snapshot from a store, every byte verified; what was interrupted goes on where it stopped"
    )
    p.add_argument("name", metavar="SNAP")
    p.add_argument("store", metavar="STORE", nargs="?", help="default: our own, then those of HOTSTART_REMOTE")
    options = p.parse_args(arguments)
    check_name(options.name, "snapshot")
    progress = TerminalProgress(quiet=options.json)
    progress.stage("pulling")
    local = pull_snapshot(open_hotstart(), options.name, options.store, progress)
    progress.close()
    if options.json:
        print_json({"snapshot": options.name, "digest": local.digest(), "local_bytes": local.disk_bytes()})
    else:
        print(f"{options.name}: {size(local.disk_bytes())} here, `hotstart restore {options.name}` starts replicas")
    return 0


def _export(arguments: list[str]) -> int:
    from hotstart.api.storing import export_snapshot
    from hotstart.cli.progress import TerminalProgress

    p = _parser("export", "write a snapshot, its signatures included, to one file")
    p.add_argument("name", metavar="SNAP")
    p.add_argument("file", metavar="FILE")
    options = p.parse_args(arguments)
    check_name(options.name, "snapshot")
    progress = TerminalProgress(quiet=options.json)
    progress.stage("exporting")
    written = export_snapshot(open_hotstart(), options.name, options.file, progress)
    progress.close()
    if options.json:
        print_json({"snapshot": options.name, "file": options.file, "bytes": written})
    else:
        print(f"{options.name}: {size(written)} in {options.file}")
    return 0


def _import(arguments: list[str]) -> int:
    from hotstart.api.storing import import_snapshot
    from hotstart.cli.progress import TerminalProgress

    p = _parser("import", "put a snapshot that was exported into the store; it must be signed by a trusted key")
    p.add_argument("file", metavar="FILE")
    options = p.parse_args(arguments)
    progress = TerminalProgress(quiet=options.json)
    progress.stage("importing")
    name = import_snapshot(open_hotstart(), options.file, progress)
    progress.close()
    print_json({"snapshot": name}) if options.json else print(f"{name}: `hotstart restore {name}` starts replicas")
    return 0


def _diff(arguments: list[str]) -> int:
    from hotstart.api.storing import contents_of
    from hotstart.store.comparing import compare

    p = _parser("diff", "what a second snapshot has that the first has not, by region of memory")
    p.add_argument("first", metavar="A")
    p.add_argument("second", metavar="B")
    p.add_argument("--all", action="store_true", help="regions that did not change, too")
    options = p.parse_args(arguments)
    hotstart = open_hotstart()
    for name in (options.first, options.second):
        check_name(name, "snapshot")
    found = compare(contents_of(hotstart, options.first), contents_of(hotstart, options.second))
    if options.json:
        print_json(as_plain(found))
        return 0
    regions = [r for r in found.regions if r.new_bytes or options.all]
    print_table(
        ("PID", "START", "END", "PROT", "DATA", "NEW", "BACKED BY"),
        ((r.pid, r.start, r.end, r.protection, size(r.data_bytes), size(r.new_bytes), r.path) for r in regions),
    )
    part = found.new_bytes / max(1, found.second_bytes)
    print(
        f"{found.second}: {size(found.new_bytes)} of {size(found.second_bytes)} ({part:.1%}) are not in {found.first}; "
        f"{len(regions) if not options.all else sum(1 for r in regions if r.new_bytes)} of {len(found.regions)} regions changed"
    )
    return 0


def _gc(arguments: list[str]) -> int:
    from hotstart.api.storing import Retention, collect_garbage

    p = _parser("gc", "remove what no snapshot needs any more, here and in the store; safe beside anything else")
    p.add_argument("--store", metavar="STORE", help="of this store instead of our own")
    p.add_argument("--keep-last", type=int, metavar="N", help="remove all snapshots but the N that were taken last")
    p.add_argument(
        "--keep-younger", metavar="AGE", help="but those younger than AGE, like 12h or 7d; with --keep-last: either"
    )
    p.add_argument(
        "--quota", metavar="SIZE", help="give up local copies of stored snapshots until the cache is no larger"
    )
    p.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    options = p.parse_args(arguments)
    if options.keep_last is not None and options.keep_last < 0:
        raise BadUsage("--keep-last needs 0 or more")
    retention = Retention(
        options.keep_last, _seconds(options.keep_younger) if options.keep_younger is not None else None
    )
    quota = parse_size(options.quota) if options.quota is not None else None
    report = collect_garbage(open_hotstart(), options.store, retention, quota, only_look=options.dry_run)
    if options.json:
        print_json(as_plain(report))
        return 0
    verb = "would remove" if options.dry_run else "removed"
    if report.removed:
        print(f"{verb} {', '.join(report.removed)}")
    if report.evicted:
        print(f"local copies given up: {', '.join(report.evicted)}")
    print(f"{verb} {report.objects} objects, {size(report.freed_bytes)}")
    if report.waiting_for:
        say(f"{report.waiting_for}; run it again later")
    return 0


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
    if text[-1:] not in units or not text[:-1].isascii() or not text[:-1].isdigit():
        raise BadUsage(f"{text!r} is not an age: write it like 12h or 7d")
    return float(int(text[:-1]) * units[text[-1]])


COMMANDS = {
    "push": _push,
    "pull": _pull,
    "export": _export,
    "import": _import,
    "diff": _diff,
    "gc": _gc,
}
