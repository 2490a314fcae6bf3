"""hotstart keys new | ls | trust | distrust | policy | rotate."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from hotstart.cli.common import Parser, choose_command, open_hotstart, parser, print_json, print_table, say
from hotstart.errors import BadUsage, NotFound

if TYPE_CHECKING:
    from hotstart.store.port import Store
    from hotstart.store.signing import Keyring

_SUMMARIES = {
    "new": "make this machine's signing key, and print its public part",
    "ls": "list this machine's own key and the trusted ones",
    "trust": "let snapshots that a key signed run here",
    "distrust": "forget a trusted key",
    "policy": "whether snapshots must be signed by a trusted key",
    "rotate": "change the key that opens an encrypted store",
}


def main(arguments: list[str], _entered: float) -> int:
    """Run one of the commands about keys."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "new": _new,
        "ls": _ls,
        "trust": _trust,
        "distrust": _distrust,
        "policy": _policy,
        "rotate": _rotate,
    }
    return choose_command("keys", commands, _SUMMARIES, arguments)


def _parser(command: str, *, json_output: bool = True) -> Parser:
    return parser(f"keys {command}", _SUMMARIES[command], json_output=json_output)


def _keyring() -> Keyring:
    from hotstart.store.signing import Keyring

    return Keyring(os.path.join(open_hotstart().home, "keys"))


def _new(arguments: list[str]) -> int:
    from hotstart.store.signing import key_id

    options = _parser("new").parse_args(arguments)
    keyring = _keyring()
    made = keyring.own() is None
    key = keyring.signer().key
    if options.json:
        print_json({"id": key_id(key), "key": key, "made": made})
        return 0
    if not made:
        say("there is a signing key already; this is its public part")
    print(key)
    return 0


def _ls(arguments: list[str]) -> int:
    from hotstart.store.signing import key_id

    options = _parser("ls").parse_args(arguments)
    keyring = _keyring()
    own, policy = keyring.own(), keyring.policy()
    rows = [{"id": key_id(own.key), "key": own.key, "comment": "", "own": True}] if own else []
    rows += [{"id": key_id(k.key), "key": k.key, "comment": k.comment, "own": False} for k in keyring.trusted()]
    if options.json:
        print_json({"policy": policy, "keys": rows})
        return 0
    print(f"signatures are {policy}")
    print_table(
        ("ID", "WHOSE", "KEY", "COMMENT"),
        ([r["id"], "own" if r["own"] else "trusted", r["key"], r["comment"]] for r in rows),
    )
    return 0


def _trust(arguments: list[str]) -> int:
    p = _parser("trust", json_output=False)
    p.add_argument("key", metavar="KEY")
    p.add_argument("comment", metavar="COMMENT", nargs="?", default="", help="whose it is")
    options = p.parse_args(arguments)
    _keyring().trust(options.key, options.comment)
    return 0


def _distrust(arguments: list[str]) -> int:
    p = _parser("distrust", json_output=False)
    p.add_argument("key", metavar="KEYID|KEY")
    options = p.parse_args(arguments)
    _keyring().distrust(options.key)
    return 0


def _policy(arguments: list[str]) -> int:
    p = _parser("policy")
    p.add_argument("policy", metavar="required|optional", nargs="?", help="set it; else it is printed")
    options = p.parse_args(arguments)
    keyring = _keyring()
    if options.policy is not None:
        keyring.set_policy(options.policy)
    if options.json:
        print_json({"policy": keyring.policy()})
    elif options.policy is None:
        print(keyring.policy())
    return 0


def _rotate(arguments: list[str]) -> int:
    from hotstart.store.encryption import (
        KEY,
        KEY_COMMAND,
        KEY_FILE,
        key_source_from_environment,
        read_key_file,
        rotate,
        store_key_id,
    )

    p = _parser("rotate")
    p.add_argument("store", metavar="STORE", help="a folder or a URL")
    p.add_argument("--to-file", metavar="FILE", required=True, help="holds the new key")
    options = p.parse_args(arguments)
    source = key_source_from_environment(os.environ)
    if source is None:
        raise BadUsage(f"which is the old key? Set {KEY}, {KEY_FILE} or {KEY_COMMAND}")
    old, new = source.read(), read_key_file(options.to_file)
    count = rotate(_open_store(options.store), old, new)
    if not count:
        raise NotFound(f"no data key of {options.store} is opened by the old key, the one with id {store_key_id(old)}")
    if options.json:
        print_json({"data_keys": count, "old_id": store_key_id(old), "new_id": store_key_id(new)})
    else:
        print(f"{count} data key{'s' if count > 1 else ''} now opened by the key with id {store_key_id(new)}")
    return 0


def _open_store(where: str) -> Store:
    if "://" in where:
        from importlib import import_module

        store: Store = import_module("hotstart.adapters.objects").open_store(where)
        return store
    from hotstart.store.directory import DirectoryStore

    return DirectoryStore(where)
