"""Room on the disk of a catalogue, kept so that files can be deleted when there is no other.

Every change takes room before it gives any: it stands in the log as well. So a ballast keeps some. A part of
it goes when a write finds the disk full, or a start finds nearly nothing free; from then on there is a
*shortage*, and what is left is for changes that give room or keep the cluster going, until the ballast is
whole again.
"""

import sqlite3
from pathlib import Path
from typing import Protocol


class Ballast(Protocol):
    """A file that only takes up room (`droppexd.store.ballast`)."""

    def make_way(self) -> None:
        """Give some room up if nearly none is free. Raise OSError."""
        ...

    def release(self) -> bool:
        """Give some room up; return False when there was none to give."""
        ...

    def refill(self) -> bool:
        """Take the room again if there is enough besides; return whether there is."""
        ...


class Room:
    """The ballast of one catalogue, and whether it is whole. Blocking; for one thread at a time."""

    def __init__(self, path: Path, ballast: Ballast | None) -> None:
        self._path = path
        self._ballast = ballast
        self.shortage = ""
        """Why nothing is to be added; empty while it may be."""

    def before_opening(self) -> None:
        """Make room for what opening writes. Raise OSError."""
        if self._ballast is not None:
            self._ballast.make_way()

    def make(self) -> bool:
        """Give up some ballast, for a write found no room; return False when there was none."""
        if self._ballast is None:
            return False
        self._fall_short()
        return self._ballast.release()

    def regain(self) -> None:
        """Make the ballast whole, where the disk has room for it again."""
        if self._ballast is None or self._ballast.refill():
            self.shortage = ""
        else:
            self._fall_short()

    def _fall_short(self) -> None:
        self.shortage = (
            f"the disk of the catalogue {self._path} is full: nothing is added until there is room on it"
        )


def is_full(error: sqlite3.Error) -> bool:
    """Whether a statement or a commit found no room: then SQLite has written nothing that counts."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
