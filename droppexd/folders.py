"""Folders whose names survive a power cut.

A new folder stands in its parent, and no flush of what is inside says anything about that name
(fsync(2): "an explicit fsync() on a file descriptor for the directory is also needed"). Without it a whole
data folder may be gone after a power cut, with everything in it that was flushed.
"""

import errno
import os
from pathlib import Path

_NOT_OURS = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP))
"""What flushing a parent may meet that is someone else's: no right to read it, or another file system's."""


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raise OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder unless it is there, and those above it, all durably. Raise OSError.

    Each is flushed before one is made in it. So where a folder is found only its own name is in doubt: an
    earlier start may have been killed between making and flushing it.
    """
    folder = folder.absolute()
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    try:
        flush_folder(folder.parent)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        flush_folder(new.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file so that there is the old one or the new one, whole, after a power cut at any moment.

    Blocking. Raise OSError.
    """
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        written = 0
        while written < len(content):
            written += os.pwrite(descriptor, content[written:], written)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    new.replace(path)
    flush_folder(path.parent)


def read_small_file(path: Path, most_bytes: int) -> bytes | None:
    """Return a small file's content, or None when there is none. Blocking.

    Raise ValueError when it is larger, and OSError.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError:
        return None
    if len(content) > most_bytes:
        raise ValueError("it is too long")
    return content
