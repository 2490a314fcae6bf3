"""hotstart snapshot create | ls | inspect | verify | rm; the rest is in snapshot_store.py."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import json

from hotstart.cli.common import (
    Parser,
    add_warmup_options,
    add_worker_options,
    as_plain,
    choose_command,
    open_hotstart,
    oracle_ignore,
    parser,
    print_json,
    print_table,
    process_start,
    read_quiesce,
    read_warmup,
    say,
    seconds,
    size,
    split_command,
    worker_spec,
)
from hotstart.errors import BadUsage, Damaged, Refused
from hotstart.snapshot.worker import check_name

_SUMMARIES = {
    "create": "checkpoint a running worker, or run one, warm it up and checkpoint it",
    "ls": "list snapshots",
    "inspect": "what a snapshot is made of, and what it takes",
    "diff": "what a second snapshot has that the first has not",
    "verify": "read every byte of a snapshot and compare it with its digest",
    "push": "put a snapshot into a store, our own or one at a URL",
    "pull": "get a snapshot from a store, ready to be restored",
    "export": "write a snapshot to one file",
    "import": "read a snapshot from such a file",
    "record": "find out anew what a replica touches first, for this machine",
    "rm": "remove snapshots",
    "gc": "remove what no snapshot needs any more; keep the last ones, keep to a quota",
}


def main(arguments: list[str], _entered: float) -> int:
    """Run one of the snapshot commands."""
    from hotstart.cli import snapshot_store

    commands: dict[str, Callable[[list[str]], int]] = {
        "create": _create,
        "ls": _ls,
        "inspect": _inspect,
        "verify": _verify,
        "record": _record,
        "rm": _rm,
        **snapshot_store.COMMANDS,
    }
    code = choose_command("snapshot", commands, _SUMMARIES, arguments)
    if arguments[0] not in ("rm", "-h") and "--help" not in arguments:
        snapshot_store.push_rest_in_background()
    return code


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
    p.add_argument(
        "--quiesce",
        metavar="FILE",
        help="JSON lines as of --warmup, with what must be in the answer as `expect`: sent last, to drop what need not be kept",
    )
    p.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="PATH",
        help="the model's weight file, or a folder of safetensors files: what memory has of it is shared by all its snapshots",
    )
    p.add_argument(
        "--leave-weights-out",
        action="store_true",
        help="leave that out of stores: other machines need the weight files to restore it",
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
        quiesce=read_quiesce(options.quiesce),
        weights=tuple(options.weights),
        store_weights=not options.leave_weights_out,
    )
    progress = TerminalProgress(quiet=options.json)
    hotstart = open_hotstart()
    source = options.source or worker_spec(options, command)
    taken = take_snapshot(hotstart, options.name, source, wanted, asked, progress)
    progress.close()
    if options.json:
        print_json(as_plain(taken))
        return 0
    if taken.fold_refused and not options.plain:
        say(f"its memory could not be mapped, restores will copy it: {taken.fold_refused}")
    if taken.secrets:
        say(
            f"what looks like secrets is in it, as in the worker's environment: {', '.join(taken.secrets)} (--omit-env)"
        )
    print(
        f"{taken.snapshot}: {size(taken.logical_bytes)}, stood still {seconds(taken.frozen_s)}, "
        f"could be restored after {seconds(taken.usable_s)}, tried after {seconds(taken.total_s)}"
    )
    return 0


def _ls(arguments: list[str]) -> int:
    p = _parser("ls")
    p.add_argument("--remote", action="store_true", help="ask the stores of HOTSTART_REMOTE, too")
    options = p.parse_args(arguments)
    hotstart = open_hotstart()
    here, stored = set(hotstart.snapshots.names()), set(hotstart.store.home.names())
    remote = (
        {n for url in hotstart.store.remotes() for n in hotstart.store.at(url).names()} if options.remote else set()
    )
    rows = []
    for name in sorted(here | stored | remote):
        where = "both" if name in here and name in stored else "local" if name in here else "stored"
        row: dict[str, object] = {"snapshot": name, "where": where if name in here | stored else "remote"}
        try:
            manifest = hotstart.manifest(name)
            row |= {
                "logical_bytes": manifest.logical_bytes,
                "created_unix_s": manifest.created_unix_s,
                "processes": len(manifest.processes),
                "damaged": False,
            }
        except Refused as e:
            row |= {"logical_bytes": None, "created_unix_s": None, "processes": None, "damaged": isinstance(e, Damaged)}
        rows.append(row)
    if options.json:
        print_json(rows)
        return 0
    print_table(("SNAPSHOT", "WHERE", "MEMORY", "PROCESSES", "TAKEN"), map(_ls_line, rows))
    return 0


def _ls_line(row: dict[str, object]) -> list[object]:
    memory = row["logical_bytes"]
    shown = size(memory) if isinstance(memory, int) else "damaged" if row["damaged"] else "refused"
    return [row["snapshot"], row["where"], shown, row["processes"] or "-", _when(row["created_unix_s"])]


def _when(unix_s: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s)) if isinstance(unix_s, int) else "-"


def _inspect(arguments: list[str]) -> int:
    from hotstart.api.storing import sizes_of
    from hotstart.snapshot.capture import REGIONS

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
        if not regions:
            print("a plain dump: what was not mapped before is in CRIU's images, and copied by a restore")
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
    digest, sizes = sizes_of(hotstart, options.name)
    document = as_plain(manifest)
    document["worker"].pop("environment")  # it may hold secrets
    document |= {"digest": digest, "sizes": as_plain(sizes)}
    if options.json:
        print_json(document)
        return 0
    print(f"{manifest.name}  {digest}")
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
    print(
        f"sizes     {size(sizes.data_bytes)} of data, {size(sizes.unique_bytes)} without duplicates, "
        f"{size(sizes.stored_bytes)} stored, {size(sizes.only_here_bytes)} of that for this snapshot alone"
    )
    for weights in manifest.weights:
        print(f"weights   {weights.path}: {'stored, too' if weights.stored else 'left out of stores'}")
    if manifest.weights:
        print(
            f"          {size(sizes.weights_bytes)} of memory are in them, {size(sizes.stored_weights_bytes)} of what is stored is theirs"
        )
    if manifest.recorded:
        print(
            f"recorded  resumed {seconds(manifest.recorded.resumed_s)}, first answer {seconds(manifest.recorded.first_answer_s)}"
        )
    print_table(
        ("PID", "PROCESS", "THREADS", "STRATEGY", "MEMORY FILE, OR WHY NONE"),
        ((x.pid, x.name, x.threads, x.strategy, x.memory_file or x.reason or "-") for x in manifest.processes),
    )
    return 0


def _verify(arguments: list[str]) -> int:
    from hotstart.api.storing import verify_snapshot
    from hotstart.cli.progress import TerminalProgress

    p = _parser("verify")
    p.add_argument("name", metavar="SNAP")
    p.add_argument(
        "--repair", action="store_true", help="replace a damaged copy by a good one: the store's, or the local one"
    )
    options = p.parse_args(arguments)
    check_name(options.name, "snapshot")
    progress = TerminalProgress(quiet=options.json)
    report, problems = verify_snapshot(open_hotstart(), options.name, progress, repair=options.repair)
    progress.close()
    if options.json:
        print_json(as_plain(report))
    if problems:
        raise problems[0]
    if not options.json:
        print(f"{options.name}: local copy {report.local or 'none'}, stored copy {report.stored or 'none'}")
    return 0


def _record(arguments: list[str]) -> int:
    from hotstart.api.recording import record_anew

    p = _parser("record")
    p.add_argument("name", metavar="SNAP")
    options = p.parse_args(arguments)
    working_set = record_anew(open_hotstart(), options.name)
    if options.json:
        print_json({"working_set_bytes": working_set.memory_bytes, "needs_bytes": working_set.needs_bytes})
    else:
        print(
            f"{options.name}: a replica touches {size(working_set.memory_bytes)} of its memory files and "
            f"{size(working_set.needs_bytes)} of the host's files until its first answer"
        )
    return 0


def _rm(arguments: list[str]) -> int:
    p = _parser("rm", json_output=False)
    p.add_argument("names", metavar="SNAP", nargs="+")
    options = p.parse_args(arguments)
    hotstart = open_hotstart()
    for name in options.names:
        hotstart.remove_snapshot(name)
    return 0
