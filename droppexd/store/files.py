"""The file operations whose failure decides something, as the system does them.

The store reaches its folder through a `Files`, so that tests hand in one whose disk is full or whose
flush fails. Every method raises OSError as the system does (`commit`: sqlite3.Error).
"""

import ctypes
import errno
import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

from droppexd.store.interface import Buffer

_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Space(NamedTuple):
    """Bytes of a file system: all of it, and what an ordinary user may still write."""

    capacity: int
    free: int


class Files:
    """The operations, done by the system. Stateless: one serves any number of stores and threads."""

    def create(self, path: str) -> int:
        """Create a file that must not exist and return its descriptor, open for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`."""
        written = os.pwrite(fd, data, offset)
        while written < len(data):
            data = memoryview(data)[written:]
            offset += written
            written = os.pwrite(fd, data, offset)

    def allocate(self, fd: int, size: int) -> bool:
        """Reserve blocks for the first `size` bytes; return False where the file system cannot.

        Not `os.posix_fallocate`: without support below it, glibc writes to every block instead.
        """
        if _fallocate is None:
            return False
        if _fallocate(fd, 0, 0, size) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        raise OSError(code, os.strerror(code))

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """Let the disk begin to write this range, and do not wait. A hint: failure means nothing."""
        if _sync_file_range is not None:
            _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def fdatasync(self, fd: int) -> None:
        """Make the content and the length of a file durable."""
        os.fdatasync(fd)

    def fsync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, replacing what had it."""
        Path(source).rename(target)

    def unlink(self, path: str) -> None:
        """Remove a name; a missing one is not an error."""
        Path(path).unlink(missing_ok=True)

    def commit(self, connection: sqlite3.Connection) -> None:
        """Commit the open transaction of a database."""
        connection.execute("COMMIT")

    def space(self, folder: str) -> Space:
        """Return how full the file system of `folder` is."""
        found = os.statvfs(folder)
        return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


SYSTEM_FILES = Files()
"""The real thing."""
