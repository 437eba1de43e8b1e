"""Copies of the catalogue: made while its controller runs, and opened to be read without changing anything.

All of it is blocking, for the command line. A copy is the database as it was at one revision, in one file.
"""

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from droppexd.catalog.keys import CLUSTER, TERM, TOTALS
from droppexd.catalog.records import unpack_fields, unpack_totals
from droppexd.catalog.replacement import pending
from droppexd.catalog.sqlite import APPLICATION_ID, SCHEMA_VERSION, take_lock
from droppexd.databases import uri_of_stopped
from droppexd.errors import CatalogError, IdentityError
from droppexd.folders import flush_folder

_PAGES_AT_ONCE = 2048
"""Of 4 KiB, between two reports of progress."""
_BUSY_S = 30.0
_LAST_MS = 253_402_300_799_999
"""The end of the year 9999: what a damaged record says beyond is no time."""

Progress = Callable[[int, int], None]
"""Told how many bytes of how many are done."""


class Facts(NamedTuple):
    """What a catalogue says of itself."""

    revision: int
    written_ms: int
    """When its last transaction was written, for people; 0 when there is none."""
    cluster_id: bytes
    incarnation: bytes
    term: int
    files: int
    size: int
    """Bytes of file data."""


def read_facts(connection: sqlite3.Connection) -> Facts:
    """Return what the catalogue behind a connection says of itself.

    Raise CatalogError when it is none, or not begun, and sqlite3.Error when it cannot be read.
    """
    require_format(connection)
    row = connection.execute("SELECT revision, time_ms FROM log ORDER BY revision DESC LIMIT 1").fetchone()
    values = {
        bytes(key): bytes(value)
        for key, value in connection.execute(
            "SELECT key, value FROM kv WHERE key IN (?, ?, ?)", (CLUSTER, TERM, TOTALS)
        )
    }
    if CLUSTER not in values or TERM not in values:
        raise CatalogError("the catalogue is empty: no controller has served it yet")
    revision, written_ms = row or (0, 0)
    try:
        cluster_id, incarnation = unpack_fields(values[CLUSTER], "cluster")
        (term,) = unpack_fields(values[TERM], "term")
        totals = unpack_totals(values.get(TOTALS) or b"\x91\x01")
        return Facts(
            revision=revision,
            written_ms=written_ms if 0 <= written_ms <= _LAST_MS else 0,
            cluster_id=bytes(cluster_id),
            incarnation=bytes(incarnation),
            term=term,
            files=totals.files,
            size=totals.size,
        )
    except (TypeError, ValueError, IndexError) as error:
        raise CatalogError("the catalogue's own record of what it is is damaged") from error


def require_format(connection: sqlite3.Connection) -> None:
    """Raise CatalogError unless this is a catalogue that this release reads."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise CatalogError("this is not a catalogue")
    if version != SCHEMA_VERSION:
        raise CatalogError(
            f"it has format {version} and this release reads {SCHEMA_VERSION}; use the release that wrote it"
        )


# -- reading ---------------------------------------------------------------------------------------


def _connect(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_S)
    connection.text_factory = bytes  # A damaged row may claim to be text.
    return connection


@contextmanager
def open_stopped_catalogue(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a catalogue that no controller has open, or a copy of one; nothing is changed.

    Raise IdentityError when it is in use, CatalogError when there is none.
    """
    require_whole(path)
    try:
        lock = take_lock(path, make=False)
    except FileNotFoundError:
        lock = -1  # A copy has none. Who serves a catalogue has made it.
    except OSError as error:
        raise CatalogError(f"the catalogue {path} cannot be opened: {error.strerror}") from error
    try:
        with open_locked_catalogue(path) as connection:
            yield connection
    finally:
        if lock >= 0:
            os.close(lock)


@contextmanager
def open_locked_catalogue(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a catalogue whose lock is the caller's; change nothing. Raise CatalogError when there is none."""
    if not path.is_file():
        raise CatalogError(f"there is no catalogue {path}")
    made: Path | None = None
    try:
        try:
            uri, made = uri_of_stopped(path)
            connection = _connect(uri)
        except (OSError, sqlite3.Error) as error:
            raise CatalogError(f"the catalogue {path} cannot be read: {error}") from error
        with closing(connection):
            yield connection
    finally:
        if made is not None:
            with suppress(OSError):
                made.unlink()


def require_whole(path: Path) -> None:
    """Raise CatalogError when there is no catalogue, or another was about to take its place."""
    if pending(path).exists():
        raise CatalogError(
            f"a restore of {path} was broken off at its end: the next start of the controller finishes it, "
            "or another restore"
        )
    if not path.is_file():
        raise CatalogError(f"there is no catalogue {path}")


# -- making copies ---------------------------------------------------------------------------------


def back_up(source: Path, target: Path, *, force: bool, progress: Progress) -> Facts:
    """Copy the catalogue, whether or not its controller runs, as it is at one revision; return what it is.

    The copy appears under its name when it is whole, flushed, and read back. Raise FileExistsError when there
    is one and not `force`, CatalogError when the catalogue cannot be read or the copy is not sound, and
    OSError.
    """
    require_whole(source)
    if target.resolve().name.startswith(source.name) and target.resolve().parent == source.resolve().parent:
        raise CatalogError(f"{target} is the catalogue itself, or beside it: back it up to another disk")
    _require_free(target, force=force)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    copy = Path(name)
    try:
        try:
            facts = _copy(source, copy, progress)
        finally:
            os.fsync(descriptor)
            os.close(descriptor)
        _read_back(copy, facts)
        _require_free(target, force=force)
        copy.replace(target)
        flush_folder(target.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            copy.unlink()
        raise
    return facts


def _require_free(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name the file")
    if not force and os.path.lexists(target):
        raise FileExistsError(f"{target} exists; --force replaces it")


def _copy(source: Path, copy: Path, progress: Progress) -> Facts:
    try:
        with _reading(source) as connection:
            # One read transaction around all of it: what is committed meanwhile is not seen.
            connection.execute("BEGIN")
            facts = read_facts(connection)
            copy_pages(connection, copy, progress)
            return facts
    except sqlite3.Error as error:
        raise CatalogError(f"the catalogue {source} cannot be copied: {error}") from error
    except CatalogError as error:
        raise CatalogError(f"{source}: {error}") from error


def copy_pages(connection: sqlite3.Connection, copy: Path, progress: Progress) -> None:
    """Copy a database into a new file. The caller flushes it. Raise sqlite3.Error."""
    with closing(sqlite3.connect(copy, isolation_level=None)) as written:
        # The name is not the final one yet: nothing has to survive a crash, and nothing lie beside it.
        written.execute("PRAGMA journal_mode = OFF")
        written.execute("PRAGMA synchronous = OFF")
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()

        def report(_status: int, left: int, pages: int) -> None:
            progress((pages - left) * page_size, pages * page_size)

        connection.backup(written, pages=_PAGES_AT_ONCE, progress=report)


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a catalogue beside its controller, if that runs.

    As one more user of the database, which writes nothing: SQLite's own locks are all that is needed, and a
    controller that starts meanwhile is not in the way. Where that cannot be, on a disk that became read-only,
    the catalogue is read as one that is stopped, if it is.
    """
    try:
        connection = _connect(f"{path.resolve().as_uri()}?mode=rw")
        try:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except BaseException:
            connection.close()
            raise
    except sqlite3.OperationalError as error:
        try:
            with open_stopped_catalogue(path) as stopped:
                yield stopped
        except IdentityError:
            raise error from None
    else:
        with closing(connection):
            yield connection


def _read_back(copy: Path, facts: Facts) -> None:
    """Raise CatalogError unless a copy is whole and what was copied."""
    try:
        with closing(_connect(f"{copy.resolve().as_uri()}?immutable=1")) as connection:
            found = structure_complaints(connection)
            if not found and read_facts(connection) != facts:
                found = ["it is not what was copied"]
    except (sqlite3.Error, CatalogError) as error:
        found = [str(error)]
    if found:
        raise CatalogError(
            f"the copy is not sound, and was not kept: {found[0]}. Keep earlier backups, stop the "
            "controller, and see what `droppexd catalog check` says of the catalogue"
        )


def structure_complaints(connection: sqlite3.Connection, most: int = 100) -> list[str]:
    """Return what SQLite finds wrong with the structure of a database, reading all of it."""
    found: list[tuple[Any]] = connection.execute(f"PRAGMA integrity_check({int(most)})").fetchall()
    lines = [bytes(line).decode(errors="replace") for (line,) in found]
    return [line for line in lines if line != "ok"]
