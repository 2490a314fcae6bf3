"""What `hotstart serve` is told: models, limits, keys, as a TOML file. Strict: what it does not know it refuses, by its place.

Owns the document and what makes one valid; knows nothing of pools or sockets. docs/serve.md lists every key.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field, structs

from hotstart.errors import BadUsage, NotFound
from hotstart.serve.autoscaler import Policy, Resources
from hotstart.serve.settings import ClientLimits, GatewaySettings, ModelSettings, Timeouts
from hotstart.snapshot.sizes import parse_size
from hotstart.snapshot.warmup import Request, check_target, parse_warmup, ready_request

AUTO, NEVER = "auto", "never"  # of `snapshot`; anything else names one that is there
_FEWEST_CPUS = 0.01
_MODEL_NAME = re.compile(r"[!-~]{1,200}")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}")

Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
SomeSeconds = Annotated[float, Meta(gt=0, le=1e7)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class TimeoutsConfig(Timeouts, frozen=True, forbid_unknown_fields=True):
    """How long a model's requests may take where."""


class LimitsConfig(ClientLimits, frozen=True, forbid_unknown_fields=True):
    """What a client may cost before anybody knows what it wants."""


class ModelConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One model. Paths are absolute once it is read; sizes are text like "4G"."""

    name: str
    command: Annotated[tuple[str, ...], Meta(min_length=1)]
    port: Port
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    pass_env: tuple[str, ...] = ()
    ready_url: str | None = None
    ready_timeout_s: SomeSeconds = 600.0
    warmup: str | None = None
    oracle_ignore: tuple[str, ...] = ("id", "created")
    network: Literal["isolated", "egress"] = "isolated"
    writable: tuple[str, ...] = ()
    cpus: Annotated[float, Meta(ge=_FEWEST_CPUS, le=1e6)] | None = None
    memory: str | None = None
    devices: Whole = 0
    # how it is reached
    route: str | None = None
    hosts: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    api_keys_file: str | None = None
    # its pool
    min_replicas: Whole = 0
    max_replicas: Positive = 1
    concurrency: Positive = 1
    idle_s: Seconds = 60.0
    quiet_s: Seconds = 15.0
    priority: int = 0
    # its requests
    queue: Positive = 1000
    body: str = "64M"
    repeatable: bool = False
    timeouts: TimeoutsConfig = TimeoutsConfig()
    # its replicas' life
    snapshot: str = AUTO
    files: tuple[str, ...] = ()
    ask_oracle: bool = False
    health_every_s: SomeSeconds = 5.0
    health_timeout_s: SomeSeconds = 10.0
    drain_s: Seconds = 60.0

    @property
    def memory_bytes(self) -> int | None:
        """What one replica may take."""
        return None if self.memory is None else parse_size(self.memory)

    @property
    def policy(self) -> Policy:
        """What the autoscaler needs to know of it."""
        return Policy(
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            concurrency=self.concurrency,
            idle_s=self.idle_s,
            quiet_s=self.quiet_s,
            priority=self.priority,
            needs=Resources(self.cpus or 0.0, self.memory_bytes or 0, self.devices),
        )

    @property
    def gateway(self) -> ModelSettings:
        """What the gateway needs to know of it."""
        return ModelSettings(
            name=self.name,
            route=self.route,
            hosts=tuple(h.lower() for h in self.hosts),
            api_keys=self.api_keys,
            queue=self.queue,
            body_bytes=parse_size(self.body),
            repeatable=self.repeatable,
            timeouts=self.timeouts,
        )


class MachineConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What all replicas together may take; what is not said is what the machine has."""

    cores: Annotated[float, Meta(gt=0)] | None = None
    memory: str | None = None
    devices: Whole | None = None

    @property
    def memory_bytes(self) -> int | None:
        """Memory in bytes."""
        return None if self.memory is None else parse_size(self.memory)


class ServeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole document."""

    model: Annotated[tuple[ModelConfig, ...], Meta(min_length=1)]
    listen: str = "127.0.0.1:8080"
    admin_token: str | None = None
    admin_token_file: str | None = None
    log: Literal["text", "json"] = "text"
    log_requests: bool = False
    limits: LimitsConfig = LimitsConfig()
    machine: MachineConfig = MachineConfig()
    trusted_proxies: tuple[str, ...] = ()
    comment_after_s: SomeSeconds = 1.0

    @property
    def gateway(self) -> GatewaySettings:
        """What the gateway needs to know."""
        host, _, port = self.listen.rpartition(":")
        return GatewaySettings(
            models=[m.gateway for m in self.model],
            host=host.strip("[]") or "127.0.0.1",
            port=int(port),
            limits=self.limits,
            trusted_proxies=self.trusted_proxies,
            comment_after_s=self.comment_after_s,
        )

    def find(self, name: str) -> ModelConfig:
        """Return a model. Raises NotFound."""
        for model in self.model:
            if model.name == name:
                return model
        raise NotFound(f"no model {name[:80]}: this server has {', '.join(m.name for m in self.model)[:200]}")


def load_config(path: str) -> ServeConfig:
    """Read a file, and the files of keys and tokens that it names. Raises BadUsage, NotFound."""
    text = _read(path, "the configuration")
    folder = os.path.dirname(os.path.abspath(path))
    config = parse_config(text, path, folder)
    token = config.admin_token_file and _read(config.admin_token_file, f"{path}: admin_token_file").strip()
    models = tuple(
        structs.replace(
            m, api_keys=(*m.api_keys, *_read(m.api_keys_file, f"{path}: model {m.name}: api_keys_file").split())
        )
        if m.api_keys_file
        else m
        for m in config.model
    )
    for m in models:
        if m.api_keys_file and not m.api_keys:
            raise BadUsage(f"{path}: model {m.name}: api_keys_file {m.api_keys_file} holds no key: nobody could ask")
    if config.admin_token_file and not token:
        raise BadUsage(f"{path}: admin_token_file {config.admin_token_file} is empty")
    return structs.replace(config, model=models, admin_token=token or config.admin_token)


def read_requests(model: ModelConfig) -> Sequence[Request]:
    """Read a model's warm-up requests. Raises BadUsage, NotFound."""
    if model.warmup is None:
        return ()
    requests = parse_warmup(_read(model.warmup, f"model {model.name}: warmup"), model.warmup)
    if not requests:
        raise BadUsage(f"model {model.name}: warmup {model.warmup} holds no request")
    return requests


def parse_config(text: str, source: str, folder: str) -> ServeConfig:
    """Parse a document; relative paths are below `folder`. Raises BadUsage that names the place, in one line."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise BadUsage(f"{source}: not TOML ({e})") from e
    try:
        config = msgspec.convert(document, ServeConfig)
    except msgspec.ValidationError as e:
        raise BadUsage(f"{source}: {_in_words(str(e), document)}") from e
    config = structs.replace(config, model=tuple(_with_absolute_paths(m, folder) for m in config.model))
    if config.admin_token_file:
        config = structs.replace(config, admin_token_file=os.path.join(folder, config.admin_token_file))
    try:
        _check(config)
    except (BadUsage, ValueError) as e:
        raise BadUsage(f"{source}: {e}") from e
    return config


def _in_words(message: str, document: Mapping[str, Any]) -> str:
    """Turn what msgspec says (`Expected ... - at `$.model[0].port``) into a place that a person finds."""
    what, _, place = message.partition(" - at ")
    at = re.sub(r"^\$\.?", "", place.strip("`"))
    if found := re.match(r"model\[(\d+)\]\.?", at):
        number, rest = int(found[1]), at[found.end() :]
        name = document["model"][number].get("name") if isinstance(document["model"][number], dict) else None
        at = f"model {name if isinstance(name, str) else number + 1}" + (f", {rest}" if rest else "")
    what = re.sub(r"^Object (contains|missing)", r"\1", what)
    what = what.replace("contains unknown field", "there is no key").replace(
        "missing required field", "it lacks the key"
    )
    return f"{at}: {what[:1].lower()}{what[1:]}" if at else f"{what[:1].lower()}{what[1:]}"


def _with_absolute_paths(m: ModelConfig, folder: str) -> ModelConfig:
    def absolute(path: str) -> str:
        return os.path.normpath(os.path.join(folder, path))

    return structs.replace(
        m,
        cwd=absolute(m.cwd),
        warmup=m.warmup and absolute(m.warmup),
        api_keys_file=m.api_keys_file and absolute(m.api_keys_file),
        writable=tuple(map(absolute, m.writable)),
    )


def _check(config: ServeConfig) -> None:
    host, separator, port = config.listen.rpartition(":")
    if (
        not separator
        or not port.isascii()
        or not port.isdigit()
        or int(port) > 65535
        or (host and host != host.strip())
    ):
        raise BadUsage(f"listen: {config.listen[:80]!r} is not HOST:PORT")
    if config.admin_token is not None and len(config.admin_token) < 8:
        raise BadUsage("admin_token: it is shorter than 8 characters: make one with `openssl rand -hex 16`")
    _check_seconds("limits", config.limits)
    if odd := next((n for n in config.trusted_proxies if not _is_network(n)), None):
        raise BadUsage(f"trusted_proxies: {odd[:80]!r} is no network like 10.0.0.0/8")
    if config.machine.memory:
        _size("machine, memory", config.machine.memory)
    for m in config.model:
        try:
            _check_model(m)
        except (BadUsage, ValueError) as e:
            raise BadUsage(f"model {m.name[:80]}: {e}") from e
    for what, names in (
        ("name", [m.name for m in config.model]),
        ("route", [m.route for m in config.model if m.route]),
        ("host", [h.lower() for m in config.model for h in m.hosts]),
    ):
        if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
            raise BadUsage(f"two models have the {what} {twice}")
    _check_room(config)


def _is_network(text: str) -> bool:
    from ipaddress import ip_network

    try:
        return bool(ip_network(text))
    except ValueError:
        return False


def _check_model(m: ModelConfig) -> None:
    if not _MODEL_NAME.fullmatch(m.name):
        raise BadUsage("name: use 1 to 200 printable ASCII characters without spaces")
    if not m.command[0]:
        raise BadUsage("command: it names no program")
    if m.min_replicas > m.max_replicas:
        raise BadUsage(f"min_replicas {m.min_replicas} is more than max_replicas {m.max_replicas}")
    if m.route is not None:
        check_target(m.route)
        if m.route == "/" or m.route.endswith("/") or "?" in m.route or m.route.split("/")[1] in _OURS:
            raise BadUsage(f"route: {m.route!r} cannot be used: write it like /chat, and not as one of ours")
    if odd := next((h for h in m.hosts if not _HOST.fullmatch(h)), None):
        raise BadUsage(f"hosts: {odd[:80]!r} is no host")
    if m.ready_url is not None:
        ready_request(m.ready_url)
    if m.memory is not None:
        _size("memory", m.memory)
    _size("body", m.body)
    _check_seconds("timeouts", m.timeouts)
    if "" in m.api_keys:
        raise BadUsage("api_keys: one of them is empty")
    if odd := next((n for n in (*m.env, *m.pass_env) if not n or "=" in n or "\0" in n), None):
        raise BadUsage(f"env: {odd[:80]!r} cannot name a variable")


def _check_seconds(place: str, value: Struct) -> None:
    for name in value.__struct_fields__:
        number = getattr(value, name)
        if not 0 < number < 1e12:
            raise BadUsage(f"{place}, {name}: {number} must be more than 0")


_OURS = ("v1", "metrics", "healthz", "ui", "admin")


def _size(place: str, text: str) -> int:
    try:
        return parse_size(text)
    except BadUsage as e:
        raise BadUsage(f"{place}: {e}") from e


def _check_room(config: ServeConfig) -> None:
    machine = config.machine
    least = Resources()
    for m in config.model:
        least = least.plus(m.policy.needs, m.min_replicas)
        for what, needed, there in (
            ("cores", m.cpus or 0, machine.cores),
            ("bytes of memory", m.memory_bytes or 0, machine.memory_bytes),
            ("devices", m.devices, machine.devices),
        ):
            if there is not None and needed > there:
                raise BadUsage(f"model {m.name}: one replica takes {needed:g} {what}, machine has {there:g}")
    have = (machine.cores, machine.memory_bytes, machine.devices)
    wanted = (least.cores, least.memory_bytes, least.devices)
    if any(there is not None and w > there for w, there in zip(wanted, have, strict=True)):
        raise BadUsage("machine: the min_replicas of all models do not fit together")


def _read(path: str, what: str) -> str:
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except FileNotFoundError as e:
        raise NotFound(f"{what}: {path} is not there") from e
    except (OSError, UnicodeDecodeError) as e:
        raise BadUsage(f"{what}: {path} cannot be read: {getattr(e, 'strerror', None) or 'it is not UTF-8'}") from e
