"""Whose folder it is: the lock, the permanent identity, and the record of each start.

    lock        flock while the store is open; holds the process id, for people
    pool.json   format, pool id, cluster id: written once, and once more by `join`
    boot.json   number and id of the latest start, and the id of the one before
    scrub.json  how far the scrub is: one of the notes of the pool's tasks, which may be lost

All records are one line of JSON with a checksum over the rest, replaced atomically. The boot record is
written after the index is open and before anything is served; so a folder with a boot record must have
an index, and one with shards must have a boot record.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from droppexd.errors import IdentityError, IntegrityError, StoreError
from droppexd.folders import make_folder
from droppexd.store.checks import ID_BYTES
from droppexd.store.files import Files

FORMAT = 1
"""The version of everything in the folder. A release refuses folders of a later one."""

POOL_FILE = "pool.json"
BOOT_FILE = "boot.json"
LOCK_FILE = "lock"

_NEW = ".new"
_PID_BYTES = 32
_HARMLESS = frozenset({LOCK_FILE, POOL_FILE + _NEW, "lost+found"})
"""What a folder may hold and still become a new pool: traces of an interrupted start, a file system's own."""


class PoolIdentity(NamedTuple):
    """What is permanent. `cluster_id` is empty until `join`."""

    pool_id: bytes
    cluster_id: bytes


class Boot(NamedTuple):
    """One start: starts are numbered from 1."""

    number: int
    boot_id: bytes
    previous_boot_id: bytes


def lock_folder(folder: Path) -> int:
    """Create the folder if it must be, lock it, and return the descriptor that holds the lock.

    Raise IdentityError when it is in use, or holds other things than a pool.
    """
    try:
        make_folder(folder)
        names = {entry.name for entry in folder.iterdir()}
        if POOL_FILE not in names and not names <= _HARMLESS:
            raise IdentityError(
                f"{folder} is not empty and not the data folder of a pool (it has no {POOL_FILE}): "
                "give the pool an empty folder or a new one"
            )
        fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(f"cannot use the data folder {folder}: {error}") from error
    take_lock(fd, folder)
    # A courtesy to whoever is refused; what else is written here tells of the disk. Each of the two takes
    # away the number of the start before, also where the other fails: that may be another process's by now.
    with suppress(OSError):
        os.ftruncate(fd, 0)
    with suppress(OSError):
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def take_lock(fd: int, folder: Path) -> None:
    """Lock an open lock file; close it and raise IdentityError when another process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(fd)
        os.close(fd)
        named = f" (process {holder})" if holder else ""
        raise IdentityError(
            f"{folder} is in use by another droppexd{named}: stop that one, "
            "or give this pool a data folder of its own"
        ) from error


def _holder(fd: int) -> int | None:
    """Return the process that says in a lock file that it holds it; None when there is no such process.

    A holder that could not write leaves the number of an earlier one, or nothing.
    """
    try:
        line, newline, _ = os.pread(fd, _PID_BYTES, 0).partition(b"\n")
        holder = int(line) if newline and line.isdigit() else 0
        if not holder:
            return None
        os.kill(holder, 0)
    except PermissionError:
        return holder  # It is there, and another user's.
    except (OSError, OverflowError):
        return None
    return holder


def read_identity(folder: Path) -> PoolIdentity | None:
    """Return the identity of a pool folder, or None when it is a new one.

    Raise StoreError when the record is damaged or of a later release.
    """
    fields = _read_sealed(folder / POOL_FILE)
    if fields is None:
        return None
    return PoolIdentity(_id(fields, "pool_id", folder), _id(fields, "cluster_id", folder))


def write_identity(folder: Path, identity: PoolIdentity, files: Files) -> None:
    """Replace the identity, durably. Raise OSError."""
    fields = {"pool_id": identity.pool_id.hex(), "cluster_id": identity.cluster_id.hex()}
    write_sealed(folder / POOL_FILE, fields, files)


def read_boot(folder: Path) -> Boot | None:
    """Return the record of the latest start, or None when the folder was never served."""
    fields = _read_sealed(folder / BOOT_FILE)
    if fields is None:
        return None
    number = fields.get("number")
    if type(number) is not int or number < 1:
        raise _damaged(folder / BOOT_FILE)
    return Boot(number, _id(fields, "boot_id", folder), _id(fields, "previous_boot_id", folder))


def write_boot(folder: Path, boot: Boot, files: Files) -> None:
    """Replace the boot record, durably. Raise OSError."""
    fields = {
        "number": boot.number,
        "boot_id": boot.boot_id.hex(),
        "previous_boot_id": boot.previous_boot_id.hex(),
    }
    write_sealed(folder / BOOT_FILE, fields, files)


def _checksum(fields: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())


def note_path(folder: Path, subject: str) -> Path:
    """Return the file of what is remembered of a subject."""
    return folder / f"{subject}.json"


def read_note(folder: Path, subject: str) -> Mapping[str, object] | None:
    """Return what is remembered of a subject, None when nothing is. Raise IntegrityError when damaged."""
    path = note_path(folder, subject)
    try:
        fields = _read_sealed(path)
    except StoreError as error:
        raise IntegrityError(f"{path} cannot be used: {error}") from error
    return None if fields is None else {name: value for name, value in fields.items() if name != "format"}


def write_sealed(path: Path, fields: Mapping[str, object], files: Files) -> None:
    """Replace a record, durably. Raise OSError."""
    sealed = {"format": FORMAT, **fields}
    line = json.dumps({**sealed, "checksum": _checksum(sealed)}) + "\n"
    temporary = f"{path}{_NEW}"
    files.unlink(temporary)
    fd = files.create(temporary)
    try:
        files.pwrite(fd, line.encode(), 0)
        files.fdatasync(fd)
    finally:
        os.close(fd)
    files.rename(temporary, str(path))
    files.fsync_folder(str(path.parent))


def _read_sealed(path: Path) -> Mapping[str, object] | None:
    try:
        line = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise _damaged(path) from error
    if type(fields) is not dict or fields.pop("checksum", None) != _checksum(fields):
        raise _damaged(path)
    if fields.get("format") != FORMAT:
        raise StoreError(
            f"{path} has format {fields.get('format')}, and this release knows only {FORMAT}: "
            "run the release that wrote it, or a later one"
        )
    return fields


def _id(fields: Mapping[str, object], name: str, folder: Path) -> bytes:
    text = fields.get(name)
    try:
        value = bytes.fromhex(text) if isinstance(text, str) else None
    except ValueError:
        value = None
    if value is None or len(value) not in (0, ID_BYTES):
        raise _damaged(folder)
    return value


def _damaged(path: Path) -> StoreError:
    return StoreError(
        f"{path} is damaged: restore it from a backup, or start the pool on an empty folder "
        "and let the cluster rebuild its shards"
    )
