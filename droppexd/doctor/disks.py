"""Data folders: whether they can be written, on what they are, how full that is, and how fast it flushes."""

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from droppexd.doctor.verdicts import Verdict, error, ok, warning
from droppexd.model import Role
from droppexd.store.files import SYSTEM_FILES, Files

_GIB = 1024**3
_MB = 1_000_000

Clock = Callable[[], float]
"""Seconds since an unspecified moment."""


class Mount(NamedTuple):
    """A file system where it is mounted."""

    place: str
    kind: str
    read_only: bool


class FlushSpeed(NamedTuple):
    """How fast a disk makes small writes durable, one after another, and large ones."""

    flushes_per_s: float
    bytes_per_s: float


class Folder(NamedTuple):
    """What was seen of a data folder. `looked_at` is the folder, or what is there of the way to it."""

    path: Path
    looked_at: Path
    failure: str
    """Why nothing can be written there; empty when it can."""
    mount: Mount | None
    capacity: int
    free: int
    flush: FlushSpeed | None
    """None when it was not measured: the folder is not there yet, cannot be written, or is full."""


# -- looking ---------------------------------------------------------------------------------------

FLUSH_FILE_PREFIX = ".droppex-doctor-"

_SMALL_BYTES = 4096
_LARGE_BYTES = 4 * 1024 * 1024
_MOST_LARGE_BYTES = 32 * 1024 * 1024
_MEASURE_S = 0.5
"""For each of the two; one write that is under way then is waited for."""


def look_at_folder(path: Path, clock: Clock, files: Files = SYSTEM_FILES) -> Folder:
    """Look at a data folder, and measure how fast it flushes. Blocking, for about a second.

    Nothing is left behind: the file that is written for that is removed.
    """
    path = path.absolute()
    looked_at = next(part for part in (path, *path.parents) if part.exists())
    mount = mount_of(looked_at.resolve(), read_mounts())
    try:
        space = files.space(str(looked_at))
    except OSError as failure:
        return Folder(path, looked_at, _reason(failure), mount, 0, 0, None)
    if looked_at != path:
        return Folder(path, looked_at, _cannot_make(looked_at), mount, *space, None)
    try:
        flush = measure_flush(path, clock, files=files, room_bytes=space.free)
    except OSError as failure:
        return Folder(path, looked_at, _reason(failure), mount, *space, None)
    return Folder(path, looked_at, "", mount, *space, flush)


def _cannot_make(parent: Path) -> str:
    """Return why no folder can be made in another; empty when one can."""
    if not parent.is_dir():
        return f"{parent} is not a folder"
    return "" if os.access(parent, os.W_OK | os.X_OK) else "no right to make it"


def _reason(failure: OSError) -> str:
    return failure.strerror or str(failure)


def measure_flush(
    folder: Path, clock: Clock, *, room_bytes: int, files: Files = SYSTEM_FILES
) -> FlushSpeed | None:
    """Write to a file in a folder, and flush each write; None when there is too little room. Blocking.

    The file has a name while it is used: what has none, some file systems do not flush. Raise OSError.
    """
    fd, name = tempfile.mkstemp(prefix=FLUSH_FILE_PREFIX, dir=folder)
    try:
        if room_bytes < 2 * _MOST_LARGE_BYTES:
            return None
        small, small_s = _write(fd, _SMALL_BYTES, _MOST_LARGE_BYTES, clock, files)
        large, large_s = _write(fd, _LARGE_BYTES, _MOST_LARGE_BYTES, clock, files)
    finally:
        os.close(fd)
        files.unlink(name)
    return FlushSpeed(small / _SMALL_BYTES / small_s, large / large_s)


def _write(fd: int, part_bytes: int, most_bytes: int, clock: Clock, files: Files) -> tuple[int, float]:
    """Write and flush parts until the time or the bytes are used up; return bytes and seconds."""
    part = os.urandom(part_bytes)
    began, written = clock(), 0
    while True:
        files.pwrite(fd, part, written)
        files.fdatasync(fd)
        written += part_bytes
        taken_s = clock() - began
        if taken_s >= _MEASURE_S or written + part_bytes > most_bytes:
            return written, max(taken_s, 1e-9)


_OCTAL = re.compile(r"\\([0-7]{3})")


def read_mounts(file: Path = Path("/proc/self/mountinfo")) -> list[Mount]:
    """Return what is mounted, in order (proc_pid_mountinfo(5)); nothing where the kernel does not tell."""
    try:
        lines = file.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        front, _, behind = line.partition(" - ")
        fields, about = front.split(), behind.split()
        if len(fields) < 6 or not about:
            continue
        place = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
        options = {*fields[5].split(","), *(about[2].split(",") if len(about) > 2 else ())}
        mounts.append(Mount(place, about[0], "ro" in options))
    return mounts


def mount_of(path: Path, mounts: Iterable[Mount]) -> Mount | None:
    """Return on which mount a path without links is: the deepest, of several at one place the last."""
    found = None
    for mount in mounts:
        deeper = found is None or len(Path(mount.place).parts) >= len(Path(found.place).parts)
        if deeper and path.is_relative_to(mount.place):
            found = mount
    return found


# -- judging ---------------------------------------------------------------------------------------

_SLOW_FLUSHES = 50
"""Below so many a second each small file waits longer for its flush than for all else."""
_SLOW_BYTES = 20 * _MB
_LEAST_CATALOGUE = _GIB
"""What its log may come to."""
_NEARLY = 20
"""A disk with less than a twentieth of it left, beyond the reserve, is nearly full."""

_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))
_MEMORY = ("tmpfs", "ramfs")
_REMOTE = re.compile(r"(nfs|cifs|smb|9p|ceph|glusterfs|afs|fuse\.(sshfs|s3fs|rclone|davfs))")


def judge_folder(role: Role, folder: Folder, reserve_bytes: int) -> list[Verdict]:
    """Say whether a role can work with its folder. A pool leaves `reserve_bytes` free."""
    wrong = [
        *_judge_kind(role, folder),
        *_judge_writing(role, folder),
        *_judge_space(role, folder, reserve_bytes),
    ]
    flush = [] if folder.flush is None else _judge_flush(role, folder, folder.flush)
    return [*(wrong or [_can_be_written(role, folder)]), *flush]


def _named(role: Role, folder: Folder) -> str:
    return f"{folder.path} ({role})"


def _can_be_written(role: Role, folder: Folder) -> Verdict:
    named, kind = _named(role, folder), f", {folder.mount.kind}" if folder.mount else ""
    room = f"{_size(folder.free)} free of {_size(folder.capacity)}{kind}"
    if folder.looked_at != folder.path:
        text = f"{named} is made by the first start, in {folder.looked_at}: {room}"
        return ok("disk", text, subject=str(folder.path))
    return ok("disk", f"{named} can be written: {room}", subject=str(folder.path))


def _judge_writing(role: Role, folder: Folder) -> list[Verdict]:
    named, subject = _named(role, folder), str(folder.path)
    if folder.mount and folder.mount.read_only:
        text = f"{named} is on a file system that is mounted read-only, at {folder.mount.place}"
        advice = "the kernel's log may say why (`dmesg`); then mount it anew"
        return [error("disk", text, advice, subject=subject)]
    if folder.failure:
        text = f"{named} cannot be written by this user: {folder.failure}"
        advice = f"give {folder.looked_at} to the user that runs the {role}, or run this as that user"
        if folder.failure in _FULL:
            advice = "make room on that disk"
        return [error("disk", text, advice, subject=subject)]
    return []


def _judge_kind(role: Role, folder: Folder) -> list[Verdict]:
    named, subject = _named(role, folder), str(folder.path)
    kind = folder.mount.kind if folder.mount else ""
    if kind in _MEMORY:
        text = f"{named} is in memory ({kind}): a restart of the machine loses it"
        return [warning("disk", text, "give it a folder on a disk", subject=subject)]
    if kind == "overlay":
        text = f"{named} is in the layer of a container (overlay), and goes with it"
        return [warning("disk", text, "mount a folder of the machine there", subject=subject)]
    if _REMOTE.match(kind):
        text = f"{named} is on another machine ({kind}): locks and flushes are less sure there"
        return [warning("disk", text, "give it a folder on a disk of this machine", subject=subject)]
    return []


def _judge_space(role: Role, folder: Folder, reserve_bytes: int) -> list[Verdict]:
    if not folder.capacity:
        return []
    subject, where = str(folder.path), f"the disk of {folder.path} ({role})"
    left = f"{_size(folder.free)} free of {_size(folder.capacity)}"
    if role != Role.POOL:
        if folder.free >= _LEAST_CATALOGUE:
            return []
        return [warning("disk", f"{where} is nearly full: {left}", "make room", subject=subject)]
    left += f", {_size(reserve_bytes)} of it the reserve"
    if folder.free <= reserve_bytes:
        advice = "delete files, add a pool, or make room beside it; `reserve` in [pool] says how much is kept"
        return [error("disk", f"{where} is full: {left}; the pool takes no shards", advice, subject=subject)]
    if (folder.free - reserve_bytes) * _NEARLY < folder.capacity:
        return [warning("disk", f"{where} is nearly full: {left}", "add a pool", subject=subject)]
    return []


def _judge_flush(role: Role, folder: Folder, flush: FlushSpeed) -> list[Verdict]:
    subject = str(folder.path)
    measured = (
        f"{_named(role, folder)} flushes {flush.flushes_per_s:.0f} small writes a second, "
        f"and writes {flush.bytes_per_s / _MB:.0f} MB/s"
    )
    if flush.flushes_per_s >= _SLOW_FLUSHES and flush.bytes_per_s >= _SLOW_BYTES:
        return [ok("flush", measured, subject=subject)]
    advice = "puts wait for flushes: use a faster disk, or see what else keeps this one busy"
    return [warning("flush", f"{measured}: that is slow", advice, subject=subject)]


def _size(size: int) -> str:
    """Return a size for people."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB // 10 else f"{size / 1024**2:.1f} MiB"
