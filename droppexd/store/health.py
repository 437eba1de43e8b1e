"""Whether a store still takes writes, and what a failed operation means for that.

A flush that failed may have thrown the dirty pages away and report success the next time (Rebello et al.,
"Can Applications Recover from fsync Failures?", USENIX ATC 2020). So it is never tried again: the store
turns read-only until it is opened anew and has read back what is really there.
"""

import errno
import sqlite3

from droppexd.errors import StoreError, StoreFull

_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = (errno.EIO, errno.EROFS)

_SQLITE_PRIMARY = 0xFF
_SQLITE_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM)


def primary_code(error: sqlite3.Error) -> int | None:
    """Return SQLite's primary result code; None when it was Python's module that complained."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & _SQLITE_PRIMARY


class Health:
    """The state of one open store: writable, or read-only with a reason, for good."""

    def __init__(self) -> None:
        self.reason = ""

    def require_writable(self) -> None:
        """Raise StoreError when the store is read-only."""
        if self.reason:
            raise StoreError(f"the store is read-only: {self.reason}")

    def flush_failed(self, what: str, error: Exception) -> StoreError:
        """Turn read-only and return the error to raise."""
        return self.distrust(f"flushing {what} failed ({error})")

    def distrust(self, what_happened: str) -> StoreError:
        """Turn read-only, unless it is that already, and return the error to raise."""
        self.reason = self.reason or f"{what_happened}; check the disk, then restart the pool"
        return StoreError(f"the store is read-only: {self.reason}")

    def write_failed(self, what: str, error: OSError) -> StoreError:
        """Return the error to raise for a failed write: StoreFull when the disk is full."""
        if error.errno in _FULL:
            return StoreFull(f"the disk is full: {what}: {error.strerror}")
        if error.errno in _BROKEN:
            self.distrust(f"{what} failed ({error})")
        return StoreError(f"{what} failed: {error}")

    def database_failed(self, what: str, error: sqlite3.Error, *, committing: bool) -> StoreError:
        """Return the error to raise for a failed statement or commit of the database.

        A full disk is found before anything is flushed, and the transaction is rolled back.
        """
        code = primary_code(error)
        if code == sqlite3.SQLITE_FULL:
            return StoreFull(f"the disk is full: {what}: {error}")
        if code in _SQLITE_PASSING and not committing:
            return StoreError(f"{what} failed: {error}")
        return self.distrust(f"{what} failed ({error})")
