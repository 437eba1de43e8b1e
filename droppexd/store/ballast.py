"""A file that only takes up room, so that there is some when a full disk must delete."""

import os
from pathlib import Path

from droppexd.store.files import SYSTEM_FILES, Files

BALLAST_BYTES = 16 * 1024 * 1024
_SHARE = 256
_LEAST_BYTES = 256 * 1024
_PORTIONS = 16
_LEAST_PORTION_BYTES = 128 * 1024
"""Enough to open a database and to delete something from it."""
_CRAMPED_BYTES = 1024 * 1024
"""With less room than this the ballast goes before the folder is opened: opening writes."""


class Ballast:
    """The ballast of one folder: at most one part in `share` of the disk, none on a tiny one.

    Deleting from a database takes room in its log first. `release` makes some, in portions, for somebody
    else may fill the disk again and again; `refill` takes it back when the disk has it. Failing to do either
    is no error: ballast is a courtesy.
    """

    def __init__(
        self, folder: Path, size: int, *, reserve: int = 0, share: int = _SHARE, files: Files = SYSTEM_FILES
    ) -> None:
        self._folder = str(folder)
        self._path = str(folder / "ballast")
        self._files = files
        self._reserve = reserve
        size = min(size, files.space(self._folder).capacity // share)
        self._size = size if size >= _LEAST_BYTES else 0
        self._portion = max(_LEAST_PORTION_BYTES, self._size // _PORTIONS)

    def _kept(self) -> int:
        try:
            return Path(self._path).stat().st_size
        except FileNotFoundError:
            return 0

    def make_way(self) -> None:
        """Give some room up if nearly none is free, for what opening writes. Raise OSError."""
        if self._files.space(self._folder).free < _CRAMPED_BYTES:
            self.release()

    def release(self) -> bool:
        """Give a portion of the room up; return False when there was none to give."""
        try:
            kept = self._kept()
            if kept <= self._portion:
                self._remove()
            else:
                self._shorten(kept - self._portion)
        except OSError:
            return False
        return kept > 0

    def _remove(self) -> None:
        self._files.unlink(self._path)
        self._files.fsync_folder(self._folder)

    def _shorten(self, size: int) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self._files.fdatasync(fd)  # Some file systems hand the room out only then.
        finally:
            os.close(fd)

    def refill(self) -> bool:
        """Take the room again if as much as all of it is free besides; return whether the disk has that."""
        try:
            kept = self._kept()
            if kept >= max(1, self._size):
                return True
            wanted = self._reserve + 2 * max(self._size, _LEAST_BYTES) - kept
            if self._files.space(self._folder).free < wanted:
                return False
            return self._size == 0 or self._take(kept)
        except OSError:
            return False

    def _take(self, kept: int) -> bool:
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC) if kept else self._files.create(self._path)
        try:
            taken = self._files.allocate(fd, self._size)
        except OSError:
            os.ftruncate(fd, kept)
            return False
        finally:
            os.close(fd)
        if not taken:
            self._remove()  # Where the file system keeps nothing, there is none to be had back either.
        return True
