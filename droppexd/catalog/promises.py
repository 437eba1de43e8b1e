"""What a controller with a copy of the catalogue has promised: durable before it is told to anybody.

A controller that has promised a term takes nothing from the master of a lower one, ever. The file is small,
and for people too.
"""

import errno
import json
from pathlib import Path
from typing import NamedTuple, Protocol

from droppexd.errors import CatalogError, CatalogFull
from droppexd.folders import read_small_file, replace_file
from droppexd.runtime import RunBlocking

PROMISE_FILE = "promise.json"
"""Its name in a controller's folder."""

MOST_LED = 64
"""Terms of its own that a controller remembers."""

MOST_NAMES = 16
"""What a controller was called, that is remembered."""

_FORMAT = 1
_MOST_BYTES = 64 * 1024


class Promise(NamedTuple):
    """The highest term that a controller has heard of."""

    term: int = 0
    name: str = ""
    """Of the controller that has this term, or asked for it."""
    address: str = ""
    led: tuple[int, ...] = ()
    """Terms that this controller was the master of, or was about to be."""
    names: tuple[str, ...] = ()
    """What it is called, and was: whoever has this folder is the same controller."""


class Promises(Protocol):
    """Where a promise is kept."""

    async def read(self) -> Promise:
        """Return the last promise. Raise CatalogError when it cannot be read."""
        ...

    async def write(self, promise: Promise) -> None:
        """Replace it, durably. Raise CatalogError: the old one or the new one is kept then."""
        ...


class FilePromises:
    """A promise in a controller's folder."""

    def __init__(self, folder: Path, run_blocking: RunBlocking) -> None:
        self._path = folder / PROMISE_FILE
        self._run_blocking = run_blocking

    async def read(self) -> Promise:
        """Return the last promise. Raise CatalogError when it cannot be read."""
        return await self._run_blocking(_read, self._path)

    async def write(self, promise: Promise) -> None:
        """Replace it, durably. Raise CatalogError: the old one or the new one is kept then."""
        await self._run_blocking(_write, self._path, promise)


class SimulatedPromises:
    """A promise in memory, which outlives a crash; for simulations."""

    def __init__(self) -> None:
        self.promise = Promise()

    async def read(self) -> Promise:
        """Return the last promise."""
        return self.promise

    async def write(self, promise: Promise) -> None:
        """Replace it."""
        self.promise = promise


def _read(path: Path) -> Promise:
    try:
        text = read_small_file(path, _MOST_BYTES)
        return Promise() if text is None else _parsed(text)
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CatalogError(
            f"{path} is damaged ({error}). It says which master this controller listens to: take away the "
            "folder and let the controller join again, or restore a backup"
        ) from error


def _parsed(text: bytes) -> Promise:
    fields = json.loads(text)
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise ValueError("not a format that this release reads")
    term, name, address, led = fields["term"], fields["name"], fields["address"], fields["led"]
    names = fields["names"]
    if not all(isinstance(number, int) and 0 <= number < 2**63 for number in (term, *led)):
        raise ValueError("terms that are none")
    if not all(isinstance(text, str) and len(text) <= 256 for text in (name, address, *names)):
        raise ValueError("fields of a wrong kind")
    return Promise(term, name, address, tuple(led), tuple(names))


def _write(path: Path, promise: Promise) -> None:
    fields = {"format": _FORMAT, **promise._asdict()}
    try:
        replace_file(path, (json.dumps(fields) + "\n").encode())
    except OSError as error:
        kind = CatalogFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else CatalogError
        raise kind(f"{path} cannot be written: {error.strerror}") from error
