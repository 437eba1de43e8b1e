"""A file that only takes up room, so that there is some when a full disk must delete."""

import os
from pathlib import Path

from droppexd.store.files import Files

BALLAST_BYTES = 16 * 1024 * 1024
_SHARE = 256
_LEAST_BYTES = 256 * 1024


class Ballast:
    """The ballast of one folder: at most a 256th of the disk, none on a tiny one.

    Deleting from a database takes room in its log first. `release` makes that room, `refill` takes it
    back when the disk has it. Failing to do either is no error: ballast is a courtesy.
    """

    def __init__(self, folder: Path, size: int, *, reserve: int, files: Files) -> None:
        self._folder = str(folder)
        self._path = str(folder / "ballast")
        self._files = files
        self._reserve = reserve
        size = min(size, files.space(self._folder).capacity // _SHARE)
        self._size = size if size >= _LEAST_BYTES else 0

    @property
    def present(self) -> bool:
        """Whether there is any to release."""
        return Path(self._path).exists()

    def release(self) -> bool:
        """Give the room up; return False when there was none to give."""
        try:
            if not self.present:
                return False
            self._files.unlink(self._path)
            self._files.fsync_folder(self._folder)
        except OSError:
            return False
        return True

    def refill(self) -> None:
        """Take the room again if twice as much is free."""
        try:
            if self._size == 0 or self.present:
                return
            if self._files.space(self._folder).free < self._reserve + 2 * self._size:
                return
            fd = self._files.create(self._path)
        except OSError:
            return
        try:
            kept = self._files.allocate(fd, self._size)
        except OSError:
            kept = False
        finally:
            os.close(fd)
        if not kept:
            self.release()
