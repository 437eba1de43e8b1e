"""CURVE keys: who may talk to a cluster, and in which role.

Every member (a pool, an app, a controller, a client) has a key pair of its own, which proves its role to
whoever it connects to. All that *listen* share one more pair, the cluster's: a member needs to know only
the cluster's public key to be sure that it talks to its cluster, whatever the address.

Who is let in is a matter of the catalogue, and of the *members file*, which names the founders of a cluster
or, in one whose keys are made by hand, everybody.

What this does not protect: whoever holds the cluster's secret can pose as any listener of the cluster, so
a broken-into pool can pose as a controller to those that connect to it. Keys for each listener need the
catalogue to hand out their public halves.

Three kinds of files, all TOML. A *member key* (secret, mode 0600) holds role, name, public, secret and the
cluster's public key. The *cluster key* (secret, mode 0600) holds public and secret. The *members file* (no
secret) lists role, name and public key of those who are let in. This module is pure but for the files.
"""

import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from droppexd.errors import ConfigError
from droppexd.model import MEMBER_ROLES, MemberRecord, Role, TokenRecord

_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME = re.compile(r"[0-9A-Za-z._-]{1,64}")


class KeyPair(NamedTuple):
    """A CURVE key pair, each half in the 40 characters of Z85."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair({self.public!r}, ...)"  # Secrets stay out of logs and tracebacks.


class Member(NamedTuple):
    """Whose a public key is."""

    role: Role
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberKey:
    """What a member key file holds."""

    member: Member
    pair: KeyPair
    cluster_public: bytes


class AllowList:
    """Whose keys are let in: those of the members file and of the catalogue, but no revoked one.

    It changes while listeners use it. Each message is looked up in it: who is revoked is refused at once.
    """

    def __init__(self, founders: Mapping[bytes, Member] | None = None) -> None:
        self.founders: Mapping[bytes, Member] = dict(founders or {})
        """Those of the members file."""
        self.version = 0
        """Of what the catalogue names; 0: nothing was heard of that yet."""
        self.records: tuple[MemberRecord, ...] = ()
        self._in = dict(self.founders)

    def get(self, public: bytes) -> Member | None:
        """Return whose key this is; None when it is not let in."""
        return self._in.get(public)

    def learn(
        self, version: int, records: Iterable[MemberRecord], tokens: Iterable[TokenRecord] = ()
    ) -> None:
        """Take what the catalogue says of members, and on a controller of join tokens."""
        self.version, self.records = version, tuple(records)
        allowed = dict(self.founders)
        for record in self.records:
            if record.revoked_ms or record.role not in MEMBER_ROLES:
                allowed.pop(record.public, None)
            else:
                allowed[record.public] = Member(Role(record.role), record.name)
        for token in tokens:
            allowed.setdefault(token.public, Member(Role.JOINER, token.public.decode()))
        self._in = allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportKeys:
    """What a process needs to talk: its own pair, and the cluster's; to listen, also who is let in."""

    own: KeyPair
    cluster_public: bytes
    cluster_secret: bytes | None = field(default=None, repr=False)
    allowed: AllowList = field(default_factory=AllowList)


def generate_keypair() -> KeyPair:
    """Make a new random key pair."""
    from droppexd.wire.zeromq import curve_keypair

    return KeyPair(*curve_keypair())


def keypair_of(secret: bytes) -> KeyPair:
    """Return the pair that a secret key is one half of. Raise ConfigError when it is none."""
    from droppexd.wire.zeromq import curve_public

    if not _KEY.fullmatch(secret.decode("ascii", "replace")):
        raise ConfigError(["a secret key has 40 characters"])
    return KeyPair(curve_public(secret), secret)


def load_keys(own: Path, *, cluster: Path | None = None, members: Path | None = None) -> TransportKeys:
    """Read the files of a process; `cluster` and `members` are needed by those that listen.

    Raise ConfigError that tells all that is wrong with them.
    """
    problems: list[str] = []
    mine = _collect(problems, read_member_key, own)
    shared = _collect(problems, read_cluster_key, cluster)
    listed = _collect(problems, read_members, members)
    if mine is not None and shared is not None and mine.cluster_public != shared.public:
        problems.append(f"{own} and {cluster} belong to different clusters")
    if problems or mine is None:
        raise ConfigError(problems)
    return TransportKeys(
        own=mine.pair,
        cluster_public=mine.cluster_public,
        cluster_secret=None if shared is None else shared.secret,
        allowed=AllowList(listed or {}),
    )


def write_member_key(path: Path, key: MemberKey) -> None:
    """Write a new member key file; raise ConfigError when the file exists or cannot be made."""
    check_member(key.member)
    _write_new(
        path,
        "# The secret key of a droppex member: whoever has this file is that member.\n"
        f'role = "{key.member.role}"\n'
        f'name = "{key.member.name}"\n'
        f'public = "{key.pair.public.decode()}"\n'
        f'secret = "{key.pair.secret.decode()}"\n'
        f'cluster = "{key.cluster_public.decode()}"\n',
    )


def read_member_key(path: Path) -> MemberKey:
    """Read a member key file; raise ConfigError."""
    table = _read_secret(path)
    return MemberKey(
        member=_member(path, table),
        pair=KeyPair(_key(path, table, "public"), _key(path, table, "secret")),
        cluster_public=_key(path, table, "cluster"),
    )


def write_cluster_key(path: Path, pair: KeyPair) -> None:
    """Write a new cluster key file; raise ConfigError when the file exists or cannot be made."""
    _write_new(
        path,
        "# The secret key of a droppex cluster, for controllers, apps and pools only.\n"
        f'public = "{pair.public.decode()}"\n'
        f'secret = "{pair.secret.decode()}"\n',
    )


def read_cluster_key(path: Path) -> KeyPair:
    """Read a cluster key file; raise ConfigError."""
    table = _read_secret(path)
    return KeyPair(_key(path, table, "public"), _key(path, table, "secret"))


def format_member(public: bytes, member: Member) -> str:
    """Return the lines that let a member in, to be appended to a members file."""
    check_member(member)
    return f'\n[[member]]\nrole = "{member.role}"\nname = "{member.name}"\npublic = "{public.decode()}"\n'


def read_members(path: Path) -> dict[bytes, Member]:
    """Read a members file into members by public key; raise ConfigError that tells all problems."""
    entries = _read_toml(path).get("member", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError([f"{path}: `member` must be tables: [[member]]"])
    problems: list[str] = []
    members: dict[bytes, Member] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{path}, member {number}"
        try:
            public = _key(where, entry, "public")
            member = _member(where, entry)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        if public in members:
            problems.append(f"{where}: the same key as {members[public].name}")
        members[public] = member
    if problems:
        raise ConfigError(problems)
    return members


def check_member(member: Member) -> None:
    """Raise ConfigError for a name that cannot be a member's."""
    if not _NAME.fullmatch(member.name):
        raise ConfigError([f"{member.name!r} cannot be a member's name: use 1 to 64 of A-Z a-z 0-9 . _ -"])


def _collect(problems: list[str], read: Any, path: Path | None) -> Any:
    """Read a file if there is one, and note its problems."""
    if path is None:
        return None
    try:
        return read(path)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


def _member(where: object, table: Mapping[str, Any]) -> Member:
    role, name = table.get("role"), table.get("name")
    if role not in MEMBER_ROLES:
        raise ConfigError([f"{where}: `role` must be one of {', '.join(MEMBER_ROLES)}"])
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError([f"{where}: `name` must be 1 to 64 of A-Z a-z 0-9 . _ -"])
    return Member(Role(role), name)


def _key(where: object, table: Mapping[str, Any], item: str) -> bytes:
    value = table.get(item)
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        raise ConfigError([f"{where}: `{item}` must be a key of 40 characters"])
    return value.encode()


def _read_secret(path: Path) -> dict[str, Any]:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError([f"cannot read the key file {path}: {error.strerror}"]) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError([f"{path} is open to others (mode {stat.S_IMODE(mode):o}): chmod 600 it"])
    return _read_toml(path)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not TOML: {error}"]) from error


def _write_new(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise ConfigError([f"cannot write {path}: {error.strerror}"]) from error
