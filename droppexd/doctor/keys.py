"""Key files, and whether the cluster lets their owners in."""

from collections.abc import Sequence
from pathlib import Path

from droppexd.config import Config
from droppexd.doctor.verdicts import Verdict, error, ok, warning
from droppexd.errors import ConfigError
from droppexd.model import MemberRecord
from droppexd.wire.keys import MemberKey, read_cluster_key, read_member_key, read_members

_MAKE = "`droppexd join` with a token of `droppexd join-token` makes keys"


def check_key_files(config: Config) -> tuple[list[Verdict], list[MemberKey]]:
    """Read the key files of a configuration; return what is to be said, and the keys that can be used.

    Blocking.
    """
    if not config.keys_own:
        return [ok("keys", "there are no keys: only processes on this machine can reach each other")], []
    verdicts: list[Verdict] = []
    cluster_public = _check_cluster_key(config, verdicts)
    keys: list[MemberKey] = []
    for file in map(Path, config.keys_own):
        key = read_key(file, verdicts)
        if key is None:
            continue
        if cluster_public is not None and key.cluster_public != cluster_public:
            text = f"{file} and {config.keys_cluster} are of different clusters"
            verdicts.append(error("keys", text, _MAKE, subject=str(file)))
            continue
        keys.append(key)
    missing = set(config.roles) - {key.member.role for key in keys}
    if missing and not any(verdict.advice for verdict in verdicts):
        text = f"there is no key for the role {', '.join(sorted(missing))}"
        verdicts.append(error("keys", text, _MAKE))
    return verdicts, keys


def _check_cluster_key(config: Config, verdicts: list[Verdict]) -> bytes | None:
    """Read the key of the cluster, and the members file if there is one; return the public half."""
    try:
        if config.keys_members:
            read_members(Path(config.keys_members))
        pair = read_cluster_key(Path(config.keys_cluster))
    except ConfigError as problem:
        verdicts.extend(_unusable(problem))
        return None
    verdicts.append(ok("keys", f"{config.keys_cluster} is the cluster's", subject=config.keys_cluster))
    return pair.public


def read_key(file: Path, verdicts: list[Verdict]) -> MemberKey | None:
    """Read a member's key file and note what there is to say of it. Blocking."""
    try:
        key = read_member_key(file)
    except ConfigError as problem:
        verdicts.extend(_unusable(problem))
        return None
    verdicts.append(ok("keys", f"{file} is that of the {key.member.role} {key.member.name}"))
    return key


def _unusable(problem: ConfigError) -> list[Verdict]:
    return [error("keys", line, _mending(line)) for line in problem.problems]


def _mending(problem: str) -> str:
    """Return what to do about a key file that cannot be used."""
    if "is open to others" in problem:
        return "do so; if somebody may have copied it, revoke it: `droppex members revoke`"
    if "Permission denied" in problem:
        return "give it to the user that uses it, or run this as that user"
    return f"put it back from where it was made; {_MAKE}"


def judge_membership(key: MemberKey, members: Sequence[MemberRecord]) -> Verdict:
    """Say whether the cluster lets the owner of a key in."""
    who = f"the {key.member.role} {key.member.name}"
    record = next((member for member in members if member.public == key.pair.public), None)
    if record is None:
        # Who answers has let the key in: by the members file, or for want of keys of its own.
        text = f"the cluster lets {who} in, and its catalogue does not list it"
        return warning("keys", text, "`droppex members` shows who is listed; the master lists founders")
    if record.revoked_ms:
        return refused(key, "it was revoked")
    if (record.role, record.name) != (key.member.role, key.member.name):
        text = f"the key of {who} is known to the cluster as that of the {record.role} {record.name}"
        return error("keys", text, _MAKE)
    return ok("keys", f"the cluster knows the key of {who}")


def refused(key: MemberKey, why: str) -> Verdict:
    """Return that the cluster does not let a key in."""
    who = f"the {key.member.role} {key.member.name}"
    text = f"the cluster does not let {who} in: {why}"
    return error("keys", text, "make it a member anew: `droppexd join-token` there, `droppexd join` here")
