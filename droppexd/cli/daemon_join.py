"""`droppexd init`, `join-token` and `join`: the files by which a machine is part of a cluster.

Nothing that exists is overwritten. The configuration is written last: where it is, all the rest is.
"""

import fcntl
import json
import os
import pwd
import re
import secrets
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from droppexd.config import APP_PORT, CONTROLLER_PORT, POOL_PORT, Config, is_loopback
from droppexd.errors import ConfigError, KeyRefused, StoreError
from droppexd.folders import make_folder
from droppexd.model import SERVER_ROLES, Role
from droppexd.wire.keys import (
    KeyPair,
    Member,
    MemberKey,
    check_member,
    format_member,
    generate_keypair,
    keypair_of,
    read_cluster_key,
    read_member_key,
    read_members,
    write_cluster_key,
    write_member_key,
)
from droppexd.wire.member_messages import Enrolled
from droppexd.wire.tokens import Token

CONFIG_FILE = "droppex.toml"
CLIENT_FILE = "client.toml"
SYSTEM_FOLDER = Path("/etc/droppex")
SERVICE_UNIT = Path("/etc/systemd/system/droppexd@.service")
SERVICE_USER = "droppex"
"""Whom `scripts/install` makes for the services."""

_PORTS = {Role.CONTROLLER: CONTROLLER_PORT, Role.APP: APP_PORT, Role.POOL: POOL_PORT}
_NOT_IN_NAMES = re.compile("[^0-9A-Za-z._-]+")
_SIOCGIFADDR = 0x8915
"""Of Linux, netdevice(7): the IPv4 address of an interface."""

_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^:/]+):([0-9]{1,5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is known of the machine that becomes a part of a cluster."""

    folder: Path
    """Of its configuration and keys."""
    data: Path
    name: str
    machine: str
    zone: str
    host: str
    """Where others reach it."""
    ports: Mapping[Role, int]

    @property
    def keys(self) -> Path:
        """The folder of its keys."""
        return self.folder / "keys"

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self.folder / CONFIG_FILE

    def key(self, role: Role) -> Path:
        """Return the file with its key for a role."""
        return self.keys / f"{role}-{self.name}.key"

    def listen(self, role: Role) -> str:
        """Return where it listens in a role."""
        return f"tcp://{self.host}:{self.ports[role]}"


def config_folder(environment: Mapping[str, str]) -> Path:
    """Return where the configuration goes unless told otherwise."""
    if os.geteuid() == 0:
        return SYSTEM_FOLDER
    base = environment.get("XDG_CONFIG_HOME") or str(Path("~/.config").expanduser())
    return Path(base) / "droppex"


def data_folder(environment: Mapping[str, str]) -> Path:
    """Return where the data goes unless told otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/droppex")
    base = environment.get("XDG_DATA_HOME") or str(Path("~/.local/share").expanduser())
    return Path(base) / "droppex"


def describe_machine(
    environment: Mapping[str, str],
    *,
    folder: Path | None,
    data: Path | None,
    name: str,
    machine: str,
    zone: str,
    address: str,
    towards: str,
) -> Machine:
    """Return what the options say of this machine, and what follows where they say nothing.

    `address` is a host, or a host and the port of the first role; `towards` is an address on whose way this
    machine's own is looked for. Raise ConfigError.
    """
    host, port = _split(address) if address else (own_host(towards), "")
    first = int(port) if port else CONTROLLER_PORT
    if not 0 < first <= 65535 - len(_PORTS):
        raise ConfigError([f"{address!r}: the port must be between 1 and {65535 - len(_PORTS)}"])
    hostname = socket.gethostname()
    named = name or _NOT_IN_NAMES.sub("-", hostname)[:64] or "machine"
    check_member(Member(Role.POOL, named))
    return Machine(
        folder=(folder or config_folder(environment)).absolute(),
        data=(data or data_folder(environment)).absolute(),
        name=named,
        machine=machine or hostname,
        zone=zone,
        host=host,
        ports={role: first + offset for offset, role in enumerate(_PORTS)},
    )


def _split(address: str) -> tuple[str, str]:
    """Take HOST, HOST:PORT or [IPV6]:PORT apart. Raise ConfigError."""
    text = address.removeprefix("tcp://")
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", text)
    if match is None:
        raise ConfigError([f"{address!r} is no address: HOST, or HOST:PORT, with [...] around one of IPv6"])
    return match[1], match[2] or ""


def own_host(towards: str) -> str:
    """Return the address of this machine that leads to another. Nothing is sent."""
    match = _ADDRESS.fullmatch(towards)
    host, port = (match[1].strip("[]"), int(match[2])) if match else ("192.0.2.1", 9)
    try:
        for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(place)
                found: str = probe.getsockname()[0]
            return f"[{found}]" if family == socket.AF_INET6 else found
    except OSError:
        pass
    return "127.0.0.1" if match else _host_without_routes()


def _host_without_routes() -> str:
    """Return an address of this machine where no route leads anywhere: in a network of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue  # It has none.
            if not found.startswith("127."):
                return found
    return "127.0.0.1"


# -- init ------------------------------------------------------------------------------------------


class Begun(NamedTuple):
    """What `init` came to."""

    cluster: str
    """The cluster's id."""
    controller: str
    """Where others reach its first controller; empty when that is not known here."""
    made: tuple[Path, ...]
    """The files that were not there yet."""


def begin_cluster(machine: Machine, roles: Sequence[Role]) -> Begun:
    """Make what the first machine of a cluster needs; what is there stays as it is.

    Raise ConfigError when what is there does not fit, and StoreError when a file cannot be written.
    """
    made: list[Path] = []
    if machine.config.exists():
        there = Config.load({}, {}, machine.config)
        return Begun(there.cluster, next(iter(there.controllers), ""), ())
    _make_folders(machine, roles)
    cluster_file = machine.keys / "cluster.key"
    if not cluster_file.exists():
        write_cluster_key(cluster_file, generate_keypair())
        made.append(cluster_file)
    cluster_public = read_cluster_key(cluster_file).public
    founders = machine.keys / "members.toml"
    listed = read_members(founders) if founders.exists() else {}
    for role in (*roles, Role.CLIENT):
        pair, is_new = _own_key(machine, role, cluster_public)
        if is_new:
            made.append(machine.key(role))
        if pair.public not in listed:
            with founders.open("a", encoding="utf-8") as file:
                file.write(format_member(pair.public, Member(role, machine.name)))
                file.flush()
                os.fsync(file.fileno())
    made += _write_client_file(machine, machine.listen(Role.APP) if Role.APP in roles else "")
    cluster = secrets.token_hex(16)
    lines = [
        "# Written by `droppexd init`. What else can stand here is in droppex.toml.example.",
        *_common_lines(machine, roles),
        f"cluster = {_quoted(cluster)}",
        f"controllers = [{_quoted(machine.listen(Role.CONTROLLER))}]",
        *_key_lines(roles, machine),
        'members = "keys/members.toml"',
        *_role_lines(machine, roles),
    ]
    hand_over(machine, roles)
    _write_new(machine.config, lines)
    return Begun(cluster, machine.listen(Role.CONTROLLER), (*made, machine.config))


def _make_folders(machine: Machine, roles: Sequence[Role]) -> None:
    try:
        make_folder(machine.folder)
        machine.keys.mkdir(mode=0o700, exist_ok=True)
        if set(roles) & {Role.CONTROLLER, Role.POOL}:
            make_folder(machine.data)
    except OSError as error:
        raise StoreError(f"cannot make the folder {error.filename}: {error.strerror}") from error


def _own_key(machine: Machine, role: Role, cluster_public: bytes) -> tuple[KeyPair, bool]:
    """Return this machine's key for a role, made if it has none; and whether it was."""
    file = machine.key(role)
    if file.exists():
        known = read_member_key(file)
        if known.cluster_public != cluster_public or known.member != Member(role, machine.name):
            raise ConfigError([f"{file} is a key of another member or cluster: move it away, or give --dir"])
        return known.pair, False
    pair = generate_keypair()
    member = Member(role, machine.name)
    write_member_key(file, MemberKey(member=member, pair=pair, cluster_public=cluster_public))
    return pair, True


# -- join ------------------------------------------------------------------------------------------


def has_joined(machine: Machine, roles: Sequence[Role]) -> Path | None:
    """Return the file that shows that this machine is a member already, if there is one.

    Raise ConfigError when it has not joined in all of these roles: what is there is not changed.
    """
    file = machine.folder / CLIENT_FILE if set(roles) == {Role.CLIENT} else machine.config
    if not file.exists():
        return None
    lacking = _lacking_roles(machine, roles)
    if lacking:
        names = ", ".join(lacking)
        how = "say --role client" if lacking == [Role.CLIENT] else "give --dir"
        there = f"{file} is there already, and not for {names}: nothing was changed"
        raise ConfigError([f"{there}. To join as {names} as well {how}"])
    return file


def _lacking_roles(machine: Machine, roles: Sequence[Role]) -> list[Role]:
    """Return which of the roles the files of a machine that has joined are not for."""
    there: set[Role] = {Role.CLIENT} if (machine.folder / CLIENT_FILE).exists() else set()
    if machine.config.exists():
        there.update(Config.load({}, {}, machine.config).roles)
    return [role for role in roles if role not in there]


def join_cluster(machine: Machine, token: Token, roles: Sequence[Role]) -> tuple[Path, ...]:
    """Make this machine's keys, have them made members, and write what it needs; return the files.

    May be repeated until it has worked. Raise ConfigError, StoreError, PeerError when no controller can be
    reached, and NotAuthorised or Conflict when the master does not want it.
    """
    import trio

    from droppexd.daemon import enroll

    _make_folders(machine, roles)
    pairs: dict[Role, KeyPair] = {}
    made: list[Path] = []
    for role in roles:
        pairs[role], _ = _own_key(machine, role, token.cluster_public)
        made.append(machine.key(role))
    try:
        enrolled: Enrolled = trio.run(enroll, token, machine.name, pairs)
    except KeyRefused as error:
        raise KeyRefused(
            "this join token has expired, or was used: make another with `droppexd join-token`"
        ) from error
    serving = [role for role in roles if role in SERVER_ROLES]
    if serving:
        _take_cluster_key(machine, token, enrolled)
        made.append(machine.keys / "cluster.key")
    if Role.CLIENT in roles:
        beside = machine.listen(Role.APP) if Role.APP in serving else ""
        made += _write_client_file(machine, beside or next(iter(enrolled.apps), ""))
    if serving:
        controllers = ", ".join(map(_quoted, enrolled.controllers))
        lines = [
            "# Written by `droppexd join`. What else can stand here is in droppex.toml.example.",
            *_common_lines(machine, serving),
            f"{'master' if Role.CONTROLLER in serving else 'controllers'} = [{controllers}]",
            *_key_lines(serving, machine),
            *_role_lines(machine, serving),
        ]
        hand_over(machine, serving)
        _write_new(machine.config, lines)
        made.append(machine.config)
    return tuple(made)


def _take_cluster_key(machine: Machine, token: Token, enrolled: Enrolled) -> None:
    file = machine.keys / "cluster.key"
    pair = keypair_of(enrolled.cluster_secret)
    if pair.public != token.cluster_public:
        raise ConfigError(["the controller gave a key that is not the cluster's: nothing was written"])
    if not file.exists():
        write_cluster_key(file, pair)
    elif read_cluster_key(file) != pair:
        raise ConfigError([f"{file} is the key of another cluster: move it away, or give --dir"])


# -- files -----------------------------------------------------------------------------------------


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _common_lines(machine: Machine, roles: Sequence[Role]) -> list[str]:
    zone = [f"zone = {_quoted(machine.zone)}"] if machine.zone else []
    return [
        f"roles = [{', '.join(_quoted(role) for role in roles)}]",
        f"name = {_quoted(machine.name)}",
        f"machine = {_quoted(machine.machine)}",
        *zone,
    ]


def _key_lines(roles: Sequence[Role], machine: Machine) -> list[str]:
    own = ", ".join(_quoted(f"keys/{machine.key(role).name}") for role in roles)
    return ["", "[keys]", f"own = [{own}]", 'cluster = "keys/cluster.key"']


def _role_lines(machine: Machine, roles: Sequence[Role]) -> list[str]:
    lines: list[str] = []
    for role in roles:
        lines += ["", f"[{role}]", f"listen = {_quoted(machine.listen(role))}"]
        if role != Role.APP:
            lines.append(f"data = {_quoted(str(machine.data / role))}")
    return lines


def _write_client_file(machine: Machine, app: str) -> list[Path]:
    file = machine.folder / CLIENT_FILE
    if file.exists():
        return []
    where = f"app = {_quoted(app)}" if app else '# app = "tcp://HOST:PORT"'
    _write_new(file, [where, f"key = {_quoted(f'keys/{machine.key(Role.CLIENT).name}')}"])
    return [file]


def _write_new(file: Path, lines: Sequence[str]) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "w", encoding="utf-8") as new:
            new.write("\n".join(lines) + "\n")
            new.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise StoreError(f"cannot write {file}: {error.strerror}") from error


def hand_over(machine: Machine, roles: Sequence[Role]) -> None:
    """Give what a service reads to its user, where root made it for the services of this machine.

    A person's own key stays root's. Raise StoreError.
    """
    if os.geteuid() != 0 or machine.folder != SYSTEM_FOLDER:
        return
    try:
        user = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return  # Without the services, whoever starts the roles is root.
    shared = [machine.keys, machine.keys / "cluster.key", machine.keys / "members.toml"]
    try:
        for path in (*shared, *(machine.key(role) for role in roles if role in SERVER_ROLES)):
            if path.exists():
                os.chown(path, user.pw_uid, user.pw_gid)
    except OSError as error:
        raise StoreError(f"cannot give {error.filename} to {SERVICE_USER}: {error.strerror}") from error


def next_steps(
    machine: Machine, roles: Sequence[Role], environment: Mapping[str, str], *, controller: str = ""
) -> list[str]:
    """Return what to do next, a line each. Files where they are looked for anyway are not named.

    `controller`, of the first machine, is where its controller is reached.
    """
    first = bool(controller)
    serving = [role for role in roles if role in SERVER_ROLES]
    found = machine.folder == config_folder(environment)
    client = "" if found else f" --config {machine.folder / CLIENT_FILE}"
    lines: list[str] = []
    if serving:
        lines.append(f"start it:       droppexd --config {machine.config}")
    if serving and machine.folder == SYSTEM_FOLDER and SERVICE_UNIT.exists():
        units = " ".join(f"droppexd@{role}" for role in serving)
        lines[-1] = f"start it:       systemctl enable --now {units}"
    if Role.CLIENT in roles or first:
        lines.append(f"try it:         droppex{client} status")
    if first:
        lines.append(f"add a machine:  droppexd join-token{'' if found else f' --config {machine.config}'}")
        if is_loopback(controller):
            lines.append(
                f"only this machine can reach it: for others move {machine.folder} and {machine.data} away, "
                "and say `droppexd init --address HOST`"
            )
    return lines
