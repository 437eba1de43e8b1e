"""From flags, environment and a TOML file to one frozen, validated `Config`.

`Config` is the one table of options: each field carries how it is read and what it is for. Flags,
variables, keys of the file and `droppex.toml.example` all follow from it. A flag wins over the
environment, the environment over the file, the file over the default.
"""

import dataclasses
import difflib
import os
import re
import socket
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import urlsplit

from droppexd.errors import ConfigError, InvalidRequest
from droppexd.model import MAX_CONTROLLERS, Layout, Role

ENVIRONMENT_PREFIX = "DROPPEX_"

CONTROLLER_PORT, APP_PORT, POOL_PORT = 7700, 7701, 7702

SECTIONS = ("controller", "catalog", "app", "pool", "keys")
"""Tables of the file. A field `pool_listen` is the key `listen` of `[pool]`."""

LOG_LEVELS = ("debug", "info", "warning", "error")

Parse = Callable[[Any], Any]
"""From what TOML gives, or the text of a flag or variable, to a value. Raises ValueError or TypeError."""

_LEAST_REPAIR = 64 * 1024
_MIB = 1024**2
_GIB = 1024**3


# -- how values are read ---------------------------------------------------------------------------

_DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _SIZE_UNITS[f"{_letter}b"] = 1000**_power
    _SIZE_UNITS[_letter] = _SIZE_UNITS[f"{_letter}ib"] = 1024**_power

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_ENDPOINT = re.compile(r"https?://([a-zA-Z0-9.-]+|\[[0-9a-fA-F:]+\]):([0-9]{1,5})")
_PREFIX = re.compile(r"[a-zA-Z0-9._/-]{1,64}")
_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+|\*):([0-9]{1,5})")


def parse_duration(value: object) -> float:
    """Return seconds for `10s`, `5m`, `1.5h`, or a bare number of seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
        unit = match[2].lower() or "s" if match else ""
        if not match or unit not in _DURATION_UNITS_S:
            raise ValueError(f"{value!r} is not a duration, for example 10s, 5m or 1h")
        seconds = float(match[1]) * _DURATION_UNITS_S[unit]
    if not 0 < seconds < 10**9:
        raise ValueError(f"{value!r} is not a duration above zero")
    return seconds


def parse_size(value: object) -> int:
    """Return bytes for `1 GiB`, `64MB`, `512k` (binary, as without the B), or a bare number."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if not match or match[2].lower() not in _SIZE_UNITS:
        raise ValueError(f"{value!r} is not a size, for example 512MB or 1 GiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2].lower()])


def _bandwidth(value: object) -> int:
    rate = parse_size(value)
    if rate < 1000:
        raise ValueError(f"{value!r} a second is too little: at least 1kB")
    return rate


def is_loopback(address: str) -> bool:
    """Say whether an address is reached from this machine only."""
    match = _ADDRESS.fullmatch(address)
    host = match[1].strip("[]") if match else ""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", host) is not None


def _is_everywhere(address: str) -> bool:
    return address.startswith(("tcp://*:", "tcp://0.0.0.0:", "tcp://[::]:"))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text in quotes")
    if len(value) > 128 or not value.isprintable():
        raise ValueError(f"{value!r:.40} is longer than 128 characters or has control characters")
    return value


def _path(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{value!r} is not a path")
    return str(Path(value).expanduser()) if value else ""


def _listen_address(value: object) -> str:
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if not match or int(match[2]) > 65535:
        raise ValueError(f"{value!r} is not an address of the form tcp://HOST:PORT")
    return match[0]


def _peer_address(value: object) -> str:
    address = _listen_address(value)
    if address.endswith(":0") or _is_everywhere(address):
        raise ValueError(f"{address!r} cannot be connected to: it needs a host and a port above 0")
    return address


def _endpoint(value: object) -> str:
    match = _ENDPOINT.fullmatch(value.rstrip("/")) if isinstance(value, str) else None
    if not match or not 0 < int(match[2]) <= 65535:
        raise ValueError(f"{value!r} is not an endpoint of the form https://HOST:PORT")
    return match[0]


def _bucket(value: object) -> str:
    parts = urlsplit(value) if isinstance(value, str) else urlsplit("")
    loopback = parts.hostname is not None and is_loopback(f"tcp://{parts.hostname}:1")
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return parts.geturl()
    if parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and loopback)):
        return parts.geturl()
    raise ValueError(f"{value!r} is neither https://HOST/... nor file:///PATH")


def _cluster_id(value: object) -> str:
    """Return the 32 hex digits of a cluster's id."""
    text = _text(value)
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise ValueError(f"{text!r} is not the id of a cluster, which has 32 hex digits")
    return text


def _public_key(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is not a public key of 64 hexadecimal digits")
    return value


def _etcd_prefix(value: object) -> str:
    if not isinstance(value, str) or not _PREFIX.fullmatch(value):
        raise ValueError(f"{value!r} is not a prefix: 1 to 64 letters, digits, '-', '_', '.' and '/'")
    return value


def _listed(parse: Parse, separator: str = ",") -> Parse:
    def parse_list(value: object) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(separator) if part.strip()]
        if not isinstance(value, list | tuple):
            raise TypeError(f"{value!r} is not a list")
        return tuple(dict.fromkeys(parse(one) for one in value))

    return parse_list


def _one_of(*names: str) -> Parse:
    def parse_choice(value: object) -> str:
        if value not in names:
            raise ValueError(f"{value!r} is none of {', '.join(names)}")
        return str(value)

    return parse_choice


def _io_threads(value: object) -> int:
    try:
        count = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else 0
    except ValueError:
        count = 0
    if not 1 <= count <= 16:
        raise ValueError(f"{value!r} is not a number of threads from 1 to 16")
    return count


def _few_controllers(value: object) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_CONTROLLERS:
        raise ValueError(f"{value!r} is no number from 0 to {MAX_CONTROLLERS - 1}")
    return value


def _role(value: object) -> Role:
    return Role(_one_of(Role.CONTROLLER, Role.APP, Role.POOL)(value))


T = TypeVar("T")


def _auto_or(parse: Callable[[object], T]) -> Callable[[object], T | None]:
    """Return a parser that takes "auto" as well, as None."""
    return lambda value: None if value == "auto" else parse(value)


def parse_layout(value: object) -> Layout | None:
    """Return the layout for `4+2`, None for `auto`."""
    if value == "auto":
        return None
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is neither auto nor K+M in quotes")
    try:
        layout = Layout.parse(value)
        layout.check_survives()
    except InvalidRequest as error:
        raise ValueError(str(error)) from None
    return layout


def _or_empty(parse: Parse) -> Parse:
    return lambda value: "" if value == "" else parse(value)


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """How one field of `Config` is read, and what it is for."""

    parse: Parse
    help: str
    flags: tuple[str, ...] = ()
    metavar: str = "TEXT"
    repeatable: bool = False

    @property
    def is_path(self) -> bool:
        """Whether values are paths on this machine."""
        return self.metavar in ("DIR", "FILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that the operator decides. Times in seconds, sizes in bytes; empty text means not set."""

    roles: Annotated[
        tuple[Role, ...],
        Option(
            _listed(_role),
            "What this process is: controller, app, pool, or several of them.",
            ("--role",),
            "ROLE",
            repeatable=True,
        ),
    ] = ()
    name: Annotated[str, Option(_text, "What people call this process; the machine's name if not set.")] = ""
    machine: Annotated[
        str,
        Option(
            _text,
            "What is lost together with this process: shards of a file go to different machines. "
            "The host name if not set.",
        ),
    ] = ""
    zone: Annotated[
        str,
        Option(_text, "A room, building or provider that may fail as one; at most m shards go to one zone."),
    ] = ""
    controllers: Annotated[
        tuple[str, ...],
        Option(
            _listed(_peer_address),
            "Where the controllers are. Not needed by a process that is the controller itself.",
            ("--controller",),
            "ADDRESS",
            repeatable=True,
        ),
    ] = (f"tcp://127.0.0.1:{CONTROLLER_PORT}",)
    master: Annotated[
        tuple[str, ...],
        Option(
            _listed(_peer_address),
            "A controller of a cluster that runs, master or not: a controller joins that cluster, and pools "
            "and apps look for their master there first.",
            ("--master",),
            "ADDRESS",
            repeatable=True,
        ),
    ] = ()
    cluster: Annotated[
        str,
        Option(
            _or_empty(_cluster_id),
            "The id of the cluster, which a controller without a catalogue begins (droppexd init).",
            metavar="HEX",
        ),
    ] = ""
    bucket: Annotated[
        str,
        Option(
            _or_empty(_bucket),
            "A signed document that says where the controllers are, read when none is found otherwise: "
            "https://... or file:///...; each new master rewrites a file.",
            metavar="URL",
        ),
    ] = ""
    bucket_key: Annotated[
        str,
        Option(
            _or_empty(_public_key),
            "The public key that the document is signed by (droppexd bucket-key).",
            metavar="HEX",
        ),
    ] = ""
    bucket_signing_key: Annotated[
        str,
        Option(_path, "File with the secret key of that, for controllers that write it.", metavar="FILE"),
    ] = ""
    data: Annotated[
        str,
        Option(
            _path,
            "The folder for the data of this process; with several roles each has a folder of its own in it.",
            metavar="DIR",
        ),
    ] = ""
    listen: Annotated[
        str,
        Option(
            _or_empty(_listen_address),
            "Where the only role of this process listens; several roles have an address each.",
            metavar="ADDRESS",
        ),
    ] = ""
    layout: Annotated[
        Layout | None,
        Option(
            parse_layout,
            'How new files are coded: K+M, or "auto" for a choice by the number of machines.',
            metavar="K+M",
        ),
    ] = None
    log_level: Annotated[
        str, Option(_one_of(*LOG_LEVELS), f"How much is logged: {', '.join(LOG_LEVELS)}.", metavar="LEVEL")
    ] = "info"

    io_threads: Annotated[
        int,
        Option(
            _io_threads,
            "So many threads of each role encrypt and send. More than 1 only for links above 1 GB/s.",
            metavar="N",
        ),
    ] = 1

    controller_listen: Annotated[
        str, Option(_listen_address, "Where the controller listens.", metavar="ADDRESS")
    ] = f"tcp://127.0.0.1:{CONTROLLER_PORT}"
    controller_advertise: Annotated[
        str,
        Option(
            _or_empty(_peer_address), "Where others reach the controller, if not there.", metavar="ADDRESS"
        ),
    ] = ""
    controller_data: Annotated[
        str, Option(_path, "The folder of the catalogue: which file is which shards where.", metavar="DIR")
    ] = ""
    controller_heartbeat: Annotated[
        float, Option(parse_duration, "How often pools report to the controller.", metavar="DURATION")
    ] = 2.0
    controller_down_after: Annotated[
        float,
        Option(
            parse_duration,
            "A pool that was not heard of for so long is down: nothing is sent there.",
            metavar="DURATION",
        ),
    ] = 10.0
    controller_replace_after: Annotated[
        float,
        Option(
            parse_duration,
            "A pool that was down for so long is out: its shards are rebuilt on others.",
            metavar="DURATION",
        ),
    ] = 600.0
    controller_delete_grace: Annotated[
        float,
        Option(
            parse_duration,
            "Shards of a deleted file are kept for so long, for reads that are under way.",
            metavar="DURATION",
        ),
    ] = 60.0
    controller_uploads_kept: Annotated[
        float,
        Option(
            parse_duration,
            "An interrupted put of a large file can be gone on with for so long.",
            metavar="DURATION",
        ),
    ] = 7 * 86400.0
    controller_session_lease: Annotated[
        float,
        Option(
            parse_duration,
            "An app that was not heard of for so long has lost its session, and what it had under way.",
            metavar="DURATION",
        ),
    ] = 60.0

    catalog_engine: Annotated[
        str,
        Option(
            _one_of("sqlite", "etcd"),
            "What keeps the catalogue: sqlite, a file of each controller, or etcd.",
            metavar="ENGINE",
        ),
    ] = "sqlite"
    catalog_sync: Annotated[
        int,
        Option(
            _few_controllers,
            "With sqlite and several controllers: so many standbys write down what is acknowledged.",
            metavar="N",
        ),
    ] = 1
    catalog_journal: Annotated[
        int,
        Option(
            _few_controllers,
            "With sqlite: so many pools on other machines write down each change of a name.",
            metavar="N",
        ),
    ] = 1
    catalog_endpoints: Annotated[
        tuple[str, ...],
        Option(_listed(_endpoint), "Where the members of etcd are.", metavar="URL", repeatable=True),
    ] = ()
    catalog_etcd_ca: Annotated[
        str, Option(_path, "File with the certificates that etcd's is checked against.", metavar="FILE")
    ] = ""
    catalog_etcd_cert: Annotated[
        str, Option(_path, "File with the certificate that controllers show to etcd.", metavar="FILE")
    ] = ""
    catalog_etcd_key: Annotated[
        str, Option(_path, "File with the key of that certificate.", metavar="FILE")
    ] = ""
    catalog_etcd_prefix: Annotated[
        str, Option(_etcd_prefix, "What the keys of droppex in etcd begin with.", metavar="TEXT")
    ] = "droppex/"
    catalog_etcd_lease: Annotated[
        float,
        Option(
            parse_duration,
            "A master that etcd has not heard of for so long is none any more.",
            metavar="DURATION",
        ),
    ] = 10.0
    catalog_etcd_quota: Annotated[
        int,
        Option(parse_size, "How large etcd's database may be: its --quota-backend-bytes.", metavar="SIZE"),
    ] = 2 * _GIB

    app_listen: Annotated[
        str, Option(_listen_address, "Where the app listens for clients.", metavar="ADDRESS")
    ] = f"tcp://127.0.0.1:{APP_PORT}"
    app_advertise: Annotated[
        str,
        Option(_or_empty(_peer_address), "Where others reach the app, if not there.", metavar="ADDRESS"),
    ] = ""
    app_buffer: Annotated[
        int, Option(parse_size, "Memory for all transfers of the app together.", metavar="SIZE")
    ] = 96 * _MIB
    app_idle: Annotated[
        float,
        Option(
            parse_duration,
            "A transfer whose client was silent for so long is given up.",
            metavar="DURATION",
        ),
    ] = 90.0

    pool_listen: Annotated[
        str, Option(_listen_address, "Where the pool listens for apps and other pools.", metavar="ADDRESS")
    ] = f"tcp://127.0.0.1:{POOL_PORT}"
    pool_advertise: Annotated[
        str,
        Option(_or_empty(_peer_address), "Where others reach the pool, if not there.", metavar="ADDRESS"),
    ] = ""
    pool_data: Annotated[str, Option(_path, "The folder of the shards.", metavar="DIR")] = ""
    pool_reserve: Annotated[
        int | None,
        Option(
            _auto_or(parse_size),
            'Space on the disk that the pool leaves free; "auto" for 5% of it or 10 GiB, the smaller.',
            metavar="SIZE",
        ),
    ] = None
    pool_idle: Annotated[
        float,
        Option(
            parse_duration, "A shard whose writer was silent for so long is given up.", metavar="DURATION"
        ),
    ] = 120.0
    pool_scrub_every: Annotated[
        float,
        Option(
            parse_duration,
            "In this time the pool reads and verifies everything that it holds.",
            metavar="DURATION",
        ),
    ] = 30 * 86400.0
    pool_scrub_limit: Annotated[
        int,
        Option(
            _bandwidth,
            "Bytes a second that this may read; a quarter of it while clients are served.",
            metavar="SIZE",
        ),
    ] = 50_000_000
    pool_repair_limit: Annotated[
        int,
        Option(
            parse_size,
            "What the pool rebuilds of lost shards a second while it serves clients; more while it does not.",
            metavar="SIZE",
        ),
    ] = 16 * _MIB
    keys_own: Annotated[
        tuple[str, ...],
        Option(
            _listed(_path, separator=os.pathsep),
            "File with the secret key of this process, one for each of its roles (droppexd keygen). "
            "Without keys only loopback works.",
            ("--key",),
            "FILE",
            repeatable=True,
        ),
    ] = ()
    keys_cluster: Annotated[
        str, Option(_path, "File with the secret key that all servers of the cluster share.", metavar="FILE")
    ] = ""
    keys_members: Annotated[
        str,
        Option(
            _path,
            "File with the public keys of who may connect besides those that the catalogue names.",
            metavar="FILE",
        ),
    ] = ""

    def listen_address(self, role: Role) -> str:
        """Return where a role listens."""
        return str(getattr(self, f"{role}_listen"))

    def folder(self, role: Role) -> Path:
        """Return the data folder of the controller or the pool."""
        return Path(getattr(self, f"{role}_data"))

    @classmethod
    def load(
        cls,
        flags: Mapping[str, object],
        environment: Mapping[str, str],
        file: Path | None = None,
        *,
        hostname: Callable[[], str] = socket.gethostname,
    ) -> Self:
        """Return the validated configuration; raise ConfigError with everything that is wrong.

        `flags` maps fields to what was given on the command line, as text or lists of texts.
        """
        given = _Given()
        if file is not None:
            given.take_file(file)
        for name in OPTIONS:
            variable = variable_of(name)
            if environment.get(variable):
                given.take(name, environment[variable], variable, _FROM_ENVIRONMENT)
        for name, value in flags.items():
            given.take(name, value, flags_of(name)[0], _FROM_FLAG)
        config = cls(**given.values)
        config = dataclasses.replace(config, **_resolved(config, given.origins, hostname))
        problems = given.problems + _complaints(config, given.origins)
        if problems:
            raise ConfigError(problems)
        return config


def _options() -> dict[str, Option]:
    hints = typing.get_type_hints(Config, include_extras=True)
    return {field.name: typing.get_args(hints[field.name])[1] for field in dataclasses.fields(Config)}


OPTIONS: dict[str, Option] = _options()
"""The options by field of `Config`."""


def key_of(name: str) -> tuple[str, str]:
    """Return the section of the file ("" for the top) and the key there, for a field of `Config`."""
    section, _, rest = name.partition("_")
    return (section, rest) if section in SECTIONS else ("", name)


def flags_of(name: str) -> tuple[str, ...]:
    """Return the flags for a field of `Config`."""
    return OPTIONS[name].flags or ("--" + name.replace("_", "-"),)


def variable_of(name: str) -> str:
    """Return the environment variable for a field of `Config`."""
    return ENVIRONMENT_PREFIX + name.upper()


_FROM_FILE, _FROM_ENVIRONMENT, _FROM_FLAG = 1, 2, 3
"""Where a value came from; the highest counts."""

Origins = Mapping[str, int]


class _Given:
    """What was set anywhere, later over earlier, and what was wrong with it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, int] = {}
        self.problems: list[str] = []

    def take(self, name: str, value: object, where: str, origin: int) -> None:
        """Read one value for a field of `Config`."""
        self.origins[name] = origin
        try:
            self.values[name] = OPTIONS[name].parse(value)
        except (ValueError, TypeError) as error:
            self.problems.append(f"{where}: {error}")

    def take_file(self, file: Path) -> None:
        """Read a TOML file. Relative paths in it start at its folder."""
        try:
            document = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            self.problems.append(f"{file}: {error.strerror}")
            return
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self.problems.append(f"{file}: not valid TOML: {error}")
            return
        for key, value in document.items():
            if key in SECTIONS and isinstance(value, dict):
                for inner, inner_value in value.items():
                    self._take_key(key, inner, inner_value, file)
            else:
                self._take_key("", key, value, file)

    def _take_key(self, section: str, key: str, value: object, file: Path) -> None:
        where = f"{file}: {section}.{key}" if section else f"{file}: {key}"
        name = f"{section}_{key}" if section else key
        if name not in OPTIONS or key_of(name) != (section, key):
            self.problems.append(f"{where}: {_unknown(section, key)}")
            return
        self.take(name, value, where, _FROM_FILE)
        if OPTIONS[name].is_path and name in self.values:
            self.values[name] = _beside(file, self.values[name])


def _beside(file: Path, value: Any) -> Any:
    """Return a path, or several, as seen from the folder of the file that names it."""
    if isinstance(value, tuple):
        return tuple(_beside(file, one) for one in value)
    return str(file.parent / value) if value else ""


def _unknown(section: str, key: str) -> str:
    if not section and key in SECTIONS:
        return f"[{key}] is a table, not a value"
    places = {name: key_of(name) for name in OPTIONS}
    here = [known for part, known in places.values() if part == section]
    if not section:
        here += SECTIONS
    elsewhere = [f"{part}.{known}" if part else known for part, known in places.values() if known == key]
    near = difflib.get_close_matches(key, here, n=1) or elsewhere[:1]
    return f"there is no such option; did you mean {near[0]}?" if near else "there is no such option"


# -- what must fit together ------------------------------------------------------------------------


def _resolved(config: Config, origins: Origins, hostname: Callable[[], str]) -> dict[str, Any]:
    """Return the fields that follow from other options."""
    machine = config.machine or hostname()
    changes: dict[str, Any] = {"machine": machine, "name": config.name or machine}
    alone = len(config.roles) == 1
    for role in config.roles:
        if alone and _outranks("listen", f"{role}_listen", origins):
            changes[f"{role}_listen"] = config.listen
        if role != Role.APP and _outranks("data", f"{role}_data", origins) and config.data:
            changes[f"{role}_data"] = config.data if alone else str(Path(config.data) / role)
    controllers = config.controllers
    if "controllers" not in origins and (config.master or Role.CONTROLLER in config.roles):
        controllers = ()
    changes["controllers"] = tuple(dict.fromkeys((*config.master, *controllers)))
    return changes


def _outranks(general: str, special: str, origins: Origins) -> bool:
    """Say whether an option for any role counts and not the one for this role: a flag beats the file."""
    return origins.get(general, 0) > origins.get(special, 0)


def _complaints(config: Config, origins: Origins) -> list[str]:
    problems: list[str] = []
    if not config.roles and "roles" not in origins:
        problems.append("no role: say --role controller, app or pool (or several), or roles = [...]")
    if config.listen and len(config.roles) > 1:
        separate = ", ".join(flags_of(f"{role}_listen")[0] for role in config.roles)
        problems.append(f"--listen is for a process with one role; here use {separate}")
    problems.extend(_folder_complaints(config))
    problems.extend(_address_complaints(config))
    if config.controller_down_after < 2 * config.controller_heartbeat:
        problems.append("controller.down_after must be at least twice controller.heartbeat")
    if config.controller_replace_after < config.controller_down_after:
        problems.append("controller.replace_after must be at least controller.down_after")
    if config.pool_repair_limit < _LEAST_REPAIR:
        problems.append("pool.repair_limit must be at least 64 KiB")
    if Role.CONTROLLER in config.roles:
        own = {config.controller_listen, config.controller_advertise}
        problems.extend(
            f"--master {address} is this controller itself; name another one, or leave it out to begin a "
            "cluster"
            for address in config.master
            if address in own
        )
    if Role.CONTROLLER in config.roles:
        problems.extend(_catalog_complaints(config))
    if config.bucket and not config.bucket_key:
        problems.append(
            "bucket needs bucket_key: make a pair with `droppexd bucket-key FILE`, give FILE to the "
            "controllers as bucket_signing_key and its public key to all as bucket_key"
        )
    if (config.bucket_key or config.bucket_signing_key) and not config.bucket:
        problems.append("bucket_key and bucket_signing_key are of no use without bucket")
    if Role.APP in config.roles and config.app_buffer < 32 * _MIB:
        problems.append("app.buffer must be at least 32 MiB: a few chunks in flight")
    return problems


def _catalog_complaints(config: Config) -> list[str]:
    problems: list[str] = []
    if config.catalog_engine != "etcd":
        if config.catalog_endpoints:
            problems.append('catalog.endpoints are those of etcd: set catalog.engine = "etcd" as well')
        return problems
    if not config.catalog_endpoints:
        problems.append("catalog.endpoints is empty: name the members of etcd")
    problems.extend(
        f"etcd at {endpoint} is on another machine, which needs https: names and places of files go there"
        for endpoint in config.catalog_endpoints
        if endpoint.startswith("http:") and not is_loopback(endpoint.replace("http:", "tcp:"))
    )
    if bool(config.catalog_etcd_cert) != bool(config.catalog_etcd_key):
        problems.append("catalog.etcd_cert and catalog.etcd_key are needed together")
    if not 2 <= config.catalog_etcd_lease <= 600:
        problems.append("catalog.etcd_lease must be between 2 seconds and 10 minutes")
    return problems


def _folder_complaints(config: Config) -> list[str]:
    problems = []
    folders: dict[Path, Role] = {}
    for role in (Role.CONTROLLER, Role.POOL):
        if role not in config.roles:
            continue
        folder = str(getattr(config, f"{role}_data"))
        if not folder:
            problems.append(f"the {role} needs a folder: --data DIR, or data in [{role}]")
            continue
        other = folders.setdefault(Path(folder).absolute(), role)
        if other != role:
            problems.append(f"{other} and {role} cannot share the folder {folder}")
    return problems


def _address_complaints(config: Config) -> list[str]:
    problems: list[str] = []
    listening = [config.listen_address(role) for role in config.roles]
    if config.listen and config.listen not in listening:
        listening.append(config.listen)
    if not config.keys_own:
        problems.extend(
            f"listening on {address}, where other machines reach it, needs keys: "
            "`droppexd init` or `droppexd join` make them; or listen on 127.0.0.1"
            for address in listening
            if not is_loopback(address)
        )
    for role in config.roles:
        address = config.listen_address(role)
        if _is_everywhere(address) and not getattr(config, f"{role}_advertise"):
            problems.append(
                f"the {role} listens on every interface: say where others reach it "
                f"with {flags_of(f'{role}_advertise')[0]} tcp://HOST:PORT"
            )
    if config.roles and not (config.controllers or config.bucket) and Role.CONTROLLER not in config.roles:
        problems.append("controllers is empty: name at least one controller")
    if not config.keys_own:
        problems.extend(
            f"the controller {address} is on another machine, which needs keys: "
            "`droppexd init` or `droppexd join` make them"
            for address in config.controllers
            if not is_loopback(address)
        )
    if bool(config.keys_own) != bool(config.keys_cluster):
        problems.append("keys.own and keys.cluster are needed together")
    if config.keys_members and not config.keys_own:
        problems.append("keys.members is of no use without keys.own and keys.cluster")
    return problems


def describe_problems(problems: Sequence[str]) -> str:
    """Return the text that an operator sees: one problem a line."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems:", *(f"  {problem}" for problem in problems)])
