"""hotstart snapshot create | ls | inspect | verify | rm | store."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from msgspec import json

from hotstart.cli.common import (
    Parser,
    add_warmup_options,
    add_worker_options,
    as_plain,
    open_hotstart,
    oracle_ignore,
    parser,
    print_json,
    print_table,
    process_start,
    read_warmup,
    say,
    seconds,
    size,
    split_command,
    worker_spec,
)
from hotstart.errors import BadUsage, Damaged, NotFound
from hotstart.snapshot.worker import check_name

_SUMMARIES = {
    "create": "checkpoint a running worker, or run one, warm it up and checkpoint it",
    "ls": "list snapshots",
    "inspect": "what a snapshot is made of",
    "verify": "read every byte of a snapshot and compare it with its digest",
    "rm": "remove snapshots",
    "store": "go on with packing a snapshot into the store",
}


def main(arguments: list[str], _entered: float) -> int:
    """Run one of the snapshot commands."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "create": _create,
        "ls": _ls,
        "inspect": _inspect,
        "verify": _verify,
        "rm": _rm,
        "store": _store,
    }
    if not arguments:
        raise BadUsage("no command: `hotstart snapshot --help` lists them")
    if arguments[0] in ("-h", "--help"):
        print("usage: hotstart snapshot COMMAND ...\n")
        for name, summary in _SUMMARIES.items():
            print(f"  {name:<8} {summary}")
        return 0
    if arguments[0] not in commands:
        raise BadUsage(f"no command `snapshot {arguments[0]}`: `hotstart snapshot --help` lists them")
    return commands[arguments[0]](arguments[1:])


def _parser(command: str, *, json_output: bool = True) -> Parser:
    return parser(f"snapshot {command}", _SUMMARIES[command], json_output=json_output)


def _create(arguments: list[str]) -> int:
    from hotstart.api.capturing import SnapshotOptions, take_snapshot
    from hotstart.cli.progress import TerminalProgress

    asked = process_start()
    p = _parser("create")
    p.usage = "hotstart snapshot create SNAP [options] (--from NAME | -- COMMAND...)"
    p.add_argument("name", metavar="SNAP")
    p.add_argument("--from", dest="source", metavar="NAME", help="checkpoint this running worker or replica")
    p.add_argument("--keep", action="store_true", help="leave the worker running")
    p.add_argument("--wait-stored", action="store_true", help="return when it is packed in the store")
    p.add_argument(
        "--plain", action="store_true", help="dump as CRIU alone does, for comparison: restores copy all memory"
    )
    add_warmup_options(p)
    add_worker_options(p)
    before, command = split_command(arguments)
    options = p.parse_args(before)
    check_name(options.name, "snapshot")
    if bool(options.source) == bool(command):
        raise BadUsage("say what to checkpoint: either --from NAME or -- COMMAND")
    if options.keep and command:
        raise BadUsage("--keep goes with --from NAME: run the worker first if it is to stay")
    wanted = SnapshotOptions(
        warmup=read_warmup(options.warmup),
        oracle_ignore=oracle_ignore(options),
        keep=options.keep,
        fold=not options.plain,
        wait_stored=options.wait_stored,
    )
    progress = TerminalProgress(quiet=options.json)
    hotstart = open_hotstart()
    source = options.source or worker_spec(options, command)
    taken = take_snapshot(hotstart, options.name, source, wanted, asked, progress)
    progress.close()
    if taken.stored_bytes is None:
        _store_in_background(options.name)
    if options.json:
        print_json(as_plain(taken))
        return 0
    if taken.fold_refused and not options.plain:
        say(f"its memory could not be mapped, restores will copy it: {taken.fold_refused}")
    print(
        f"{taken.snapshot}: {size(taken.logical_bytes)}, stood still {seconds(taken.frozen_s)}, "
        f"could be restored after {seconds(taken.usable_s)}, tried after {seconds(taken.total_s)}"
    )
    return 0


def _store_in_background(name: str) -> None:
    """Packing goes on without us; what a kill interrupts, the next `snapshot store` or `create` of another does not lose."""
    import subprocess

    subprocess.Popen(
        [sys.executable, "-m", "hotstart.cli.main", "snapshot", "store", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def _store(arguments: list[str]) -> int:
    from hotstart.api.capturing import store_snapshot
    from hotstart.cli.progress import TerminalProgress

    p = _parser("store")
    p.add_argument("name", metavar="SNAP")
    options = p.parse_args(arguments)
    check_name(options.name, "snapshot")
    progress = TerminalProgress(quiet=options.json)
    progress.stage("storing")
    added = store_snapshot(open_hotstart(), options.name, progress)
    progress.close()
    if options.json:
        print_json({"snapshot": options.name, "stored_bytes": added})
    return 0


def _ls(arguments: list[str]) -> int:
    from hotstart.store.published import published_names

    options = _parser("ls").parse_args(arguments)
    hotstart = open_hotstart()
    here, stored = set(hotstart.snapshots.names()), set(published_names(hotstart.store))
    rows = []
    for name in sorted(here | stored):
        row: dict[str, object] = {
            "snapshot": name,
            "where": "both" if name in here and name in stored else "local" if name in here else "stored",
        }
        try:
            manifest = hotstart.manifest(name)
            row |= {
                "logical_bytes": manifest.logical_bytes,
                "created_unix_s": manifest.created_unix_s,
                "processes": len(manifest.processes),
                "damaged": False,
            }
        except Damaged:
            row |= {"logical_bytes": None, "created_unix_s": None, "processes": None, "damaged": True}
        rows.append(row)
    if options.json:
        print_json(rows)
        return 0
    print_table(("SNAPSHOT", "WHERE", "MEMORY", "PROCESSES", "TAKEN"), map(_ls_line, rows))
    return 0


def _ls_line(row: dict[str, object]) -> list[object]:
    memory = row["logical_bytes"]
    shown = size(memory) if isinstance(memory, int) else "damaged"
    return [row["snapshot"], row["where"], shown, row["processes"] or "-", _when(row["created_unix_s"])]


def _when(unix_s: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s)) if isinstance(unix_s, int) else "-"


def _inspect(arguments: list[str]) -> int:
    from hotstart.api.capturing import REGIONS
    from hotstart.store.content import digest_of

    p = _parser("inspect")
    p.add_argument("name", metavar="SNAP")
    p.add_argument("--memory", action="store_true", help="each area of each process: where it went, and why")
    options = p.parse_args(arguments)
    hotstart = open_hotstart()
    if options.memory:
        local = hotstart.local_snapshot(options.name, note=say)
        with open(local.path(REGIONS), "rb") as f:
            regions = json.decode(f.read())
        if options.json:
            print_json(regions)
            return 0
        for pid, areas in regions.items():
            print(f"process {pid}")
            print_table(
                ("START", "END", "SIZE", "PROT", "WHY", "BACKED BY"),
                (
                    (
                        a["start"],
                        a["end"],
                        size(int(a["end"], 16) - int(a["start"], 16)),
                        a["protection"],
                        a["why"],
                        a["path"],
                    )
                    for a in areas
                ),
            )
        return 0
    manifest = hotstart.manifest(options.name)
    document = as_plain(manifest)
    document["worker"].pop("environment")  # it may hold secrets
    document["digest"] = digest_of(manifest.to_bytes())
    if options.json:
        print_json(document)
        return 0
    print(f"{manifest.name}  {document['digest']}")
    print(f"command   {' '.join(manifest.worker.command)}")
    print(
        f"taken on  {manifest.host.architecture}, kernel {manifest.host.kernel}, CRIU {manifest.host.criu}, {manifest.host.libc}"
    )
    print(
        f"memory    {size(manifest.logical_bytes)} resident, {size(sum(m.data_bytes for m in manifest.memory))} in memory files"
    )
    print(
        f"files     {len(manifest.files)} of its own ({size(sum(f.size_bytes for f in manifest.files))}), needs {len(manifest.needs)} of the host"
    )
    if manifest.recorded:
        print(
            f"recorded  resumed {seconds(manifest.recorded.resumed_s)}, first answer {seconds(manifest.recorded.first_answer_s)}"
        )
    print_table(
        ("PID", "PROCESS", "THREADS", "STRATEGY", "MEMORY FILE"),
        ((x.pid, x.name, x.threads, x.strategy, x.memory_file or "-") for x in manifest.processes),
    )
    return 0


def _verify(arguments: list[str]) -> int:
    from hotstart.api.capturing import complete_digests
    from hotstart.cli.progress import TerminalProgress
    from hotstart.store.published import published_names, verify_published

    p = _parser("verify")
    p.add_argument("name", metavar="SNAP")
    p.add_argument("--repair", action="store_true", help="replace a damaged local copy by the store's")
    options = p.parse_args(arguments)
    check_name(options.name, "snapshot")
    hotstart = open_hotstart()
    progress = TerminalProgress(quiet=options.json)
    report: dict[str, object] = {"snapshot": options.name, "local": None, "stored": None}
    problems: list[Damaged] = []
    stored = options.name in published_names(hotstart.store)
    if stored:
        progress.stage("stored copy")
        try:
            verify_published(hotstart.store, options.name, progress.measured(_logical(hotstart.manifest, options.name)))
            report["stored"] = "good"
        except Damaged as e:
            report["stored"] = f"damaged: {e}"
            problems.append(e)
    progress.stage("local copy")
    try:
        local = hotstart.snapshots.open(options.name)
        complete_digests(local, progress)
        local.verify(progress=progress.measured(local.manifest.logical_bytes))
        local.check()
        report["local"] = "good"
    except NotFound:
        if not stored:
            raise
    except Damaged as e:
        report["local"] = f"damaged: {e}"
        if options.repair and report["stored"] == "good":
            progress.stage("repairing")
            hotstart.repair(options.name, progress.measured(0))
            report["local"] = "repaired"
        else:
            problems.append(e)
    if options.repair and report["local"] == "good" and str(report["stored"]).startswith("damaged"):
        raise problems[0]
    progress.close()
    if options.json:
        print_json(report)
    if problems:
        raise problems[0]
    if not options.json:
        print(f"{options.name}: local copy {report['local'] or 'none'}, stored copy {report['stored'] or 'none'}")
    return 0


def _logical(manifest_of: Callable[[str], object], name: str) -> int:
    try:
        return int(getattr(manifest_of(name), "logical_bytes", 0))
    except Damaged:
        return 0


def _rm(arguments: list[str]) -> int:
    p = _parser("rm", json_output=False)
    p.add_argument("names", metavar="SNAP", nargs="+")
    options = p.parse_args(arguments)
    hotstart = open_hotstart()
    for name in options.names:
        hotstart.remove_snapshot(name)
    return 0
