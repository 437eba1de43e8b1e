"""`droppexd keygen`: the files of a cluster's keys in one folder."""

import os
from pathlib import Path

from droppexd.errors import ConfigError, StoreError
from droppexd.model import Role
from droppexd.wire.keys import (
    Member,
    MemberKey,
    check_member,
    format_member,
    generate_keypair,
    read_cluster_key,
    write_cluster_key,
    write_member_key,
)


def make_key(folder: Path, role: Role, name: str) -> str:
    """Make the key of a member, and the cluster's if it has none yet; return what to do with the files.

    Raise ConfigError when the name is not allowed or has a key already.
    """
    member = Member(role, name)
    check_member(member)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror}") from error
    cluster_file, members_file = folder / "cluster.key", folder / "members.toml"
    own_file = folder / f"{role}-{name}.key"
    if own_file.exists():
        raise ConfigError([f"{own_file} exists already: remove it, and its entry in {members_file}"])
    if not cluster_file.exists():
        write_cluster_key(cluster_file, generate_keypair())
    key = MemberKey(
        member=member, pair=generate_keypair(), cluster_public=read_cluster_key(cluster_file).public
    )
    write_member_key(own_file, key)
    with members_file.open("a", encoding="utf-8") as file:
        file.write(format_member(key.pair.public, member))
        file.flush()
        os.fsync(file.fileno())
    if role == Role.CLIENT:
        return f"{own_file}: for {name} alone; and {members_file} goes to every controller again"
    return (
        f"{own_file}, {cluster_file} and {members_file}: for the {role} {name}, as\n"
        f'[keys]\nown = ["{own_file}"]\ncluster = "{cluster_file}"\nmembers = "{members_file}"\n'
        f"{members_file} goes to every controller again: the others learn of it from these"
    )
