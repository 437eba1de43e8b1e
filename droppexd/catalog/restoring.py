"""A backup becomes the catalogue again, and knows that it is one.

What a backup does not know happened all the same: files were stored, removed and overwritten, and shards
were moved from pool to pool. So its history begins anew, in the transaction that ends the old one:

* a new *incarnation*;
* no controllers beside the one that serves it next: they have the old history, and come back to learn this;
* no join token;
* no session and no outcome: what was written in any of them later must not be judged (ADR 3), and whoever
  repeats a request gets told that its session is closed;
* a term above all that were begun since, for pools and apps refuse those that they have seen the end of;
* numbers for new pools that none of those had that have joined since;
* the mark *restored*: while it is set, no shard of an extent that has a record is dead, wherever it is. The
  master takes it away when every member has compared what it holds with the records.
"""

import os
import sqlite3
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from droppexd.catalog.catalogue import read_all
from droppexd.catalog.checking import check_catalogue
from droppexd.catalog.copies import (
    Facts,
    Progress,
    copy_pages,
    open_locked_catalogue,
    open_stopped_catalogue,
    read_facts,
)
from droppexd.catalog.engine import Engine, Operation
from droppexd.catalog.keys import (
    CLUSTER,
    CONTROLLERS,
    NEXT_POOL,
    OUTCOMES,
    REBUILT,
    RESTORED,
    SESSIONS,
    TERM,
    TERMS,
    TOKENS,
)
from droppexd.catalog.membership import forget_membership
from droppexd.catalog.records import pack_fields, unpack_fields
from droppexd.catalog.replacement import commit_replacement, finish_replacement, former_catalogues
from droppexd.catalog.sqlite import open_sqlite_engine, take_lock
from droppexd.catalog.terms import begin_term, compare_term
from droppexd.errors import CatalogError, Conflict
from droppexd.folders import make_folder
from droppexd.runtime import Entropy, Runtime

TERMS_AHEAD = 2**20
"""How many starts of a controller may have been forgotten: one a second for twelve days."""
_TERM_BITS = 31
"""Map versions and epochs are made of a term and 32 bits more."""
_POOLS_AHEAD = 1000
"""How many pools may have joined since."""


class Restored(NamedTuple):
    """What a restore came to."""

    facts: Facts
    """Of the catalogue as it is now."""
    former: Path | None
    """Where the catalogue that was there before is kept."""


async def begin_incarnation(
    engine: Engine, entropy: Entropy, *, written_ms: int, above_term: int = 0, rebuilt_from: int | None = None
) -> int:
    """Make the catalogue in an engine one that was restored; return its term, which no master has yet.

    `written_ms`, for people, is when its last transaction was written; `above_term` a term that has been.
    With `rebuilt_from` it was made anew from what so many pools keep.
    """
    cluster, term, terms, next_pool = await engine.get((CLUSTER, TERM, TERMS, NEXT_POOL))
    if cluster is None or term is None or next_pool is None:
        raise CatalogError("the catalogue is damaged: it does not say which cluster it is of")
    cluster_id, _ = unpack_fields(cluster.value, "cluster")
    number: int = max(unpack_fields(term.value, "term")[0], above_term) + TERMS_AHEAD
    if number >= 2**_TERM_BITS:
        raise CatalogError(f"there are no terms left above {number}")
    free = unpack_fields(next_pool.value, "next pool")[0] + _POOLS_AHEAD
    gone = [
        entry.key
        for prefix in (SESSIONS, OUTCOMES, CONTROLLERS, TOKENS)
        for entry in await read_all(engine, prefix)
    ]
    operations = [Operation(key, None) for key in gone]
    operations += [
        Operation(CLUSTER, pack_fields((cluster_id, entropy.token(16)))),
        *begin_term(number, term, terms),
        Operation(NEXT_POOL, pack_fields((free,))),
        Operation(RESTORED, pack_fields((written_ms,))),
    ]
    if rebuilt_from is not None:
        operations.append(Operation(REBUILT, pack_fields((rebuilt_from,))))
    if await engine.txn([compare_term(term)], operations) is None:
        raise CatalogError("the catalogue is in use by a controller")
    return number


async def restore(path: Path, backup: Path, runtime: Runtime, *, force: bool, progress: Progress) -> Restored:
    """Put a backup in the place of a catalogue that no controller has open. Blocking, but for the engine.

    The backup is checked before anything is touched. With `force` the catalogue that is there is kept beside
    it. Raise IdentityError when it is in use, Conflict when there is one and not `force`, CatalogError when
    the backup is not sound, and OSError.
    """
    make_folder(path.parent)
    with ExitStack() as stack:
        stack.callback(os.close, take_lock(path))
        finish_replacement(path)
        _require_other(backup, path)
        if not force and is_begun(path):
            raise Conflict(
                f"there is a catalogue already, {path}; with --force it is kept beside it under another name"
            )
        written_ms = _checked(backup, progress)
        prepared = path.with_name(f"{path.name}.preparing")
        remove_prepared(prepared)
        stack.callback(remove_prepared, prepared)
        above_term = max(_term(path), *map(_term, former_catalogues(path)), 0)
        await _prepare(backup, prepared, runtime, written_ms, above_term)
        forget_membership(path.parent)
        commit_replacement(prepared, path)
        former = finish_replacement(path)
        with open_locked_catalogue(path) as connection:
            return Restored(read_facts(connection), former)


def _require_other(backup: Path, path: Path) -> None:
    if backup.resolve() == path.resolve():
        raise CatalogError(f"{backup} is the catalogue itself")


def is_begun(path: Path) -> bool:
    """Return whether there is anything in the place of the catalogue that somebody may want to keep."""
    beside = (path, path.with_name(f"{path.name}-wal"))
    return any(file.exists() and file.stat().st_size for file in beside)


def _checked(backup: Path, progress: Progress) -> int:
    """Return when a backup was written last; raise CatalogError unless it is sound."""
    with open_stopped_catalogue(backup) as connection:
        report = check_catalogue(connection, progress)
    if report.facts is not None and report.sound:
        return report.facts.written_ms
    more = f", and {report.wrong - 1} more problems" if report.wrong > 1 else ""
    raise CatalogError(f"{backup} is not sound, and nothing was changed: {report.problems[0]}{more}")


def _term(path: Path) -> int:
    """Return the term of a catalogue that was in this place; 0 when it cannot be read."""
    try:
        with open_locked_catalogue(path) as connection:
            return read_facts(connection).term
    except (CatalogError, sqlite3.Error):
        return 0


async def _prepare(backup: Path, prepared: Path, runtime: Runtime, written_ms: int, above_term: int) -> None:
    """Copy a backup, and begin a new history in the copy; what is there then is flushed."""
    try:
        with open_stopped_catalogue(backup) as connection:
            copy_pages(connection, prepared, lambda _done, _total: None)
    except sqlite3.Error as error:
        raise CatalogError(f"{backup} cannot be copied: {error}") from error
    async with open_sqlite_engine(prepared, runtime) as engine:
        await begin_incarnation(engine, runtime.entropy, written_ms=written_ms, above_term=above_term)
    log = prepared.with_name(f"{prepared.name}-wal")
    if log.exists() and log.stat().st_size:
        raise CatalogError(f"{log} was not written back to its database")
    with prepared.open("rb") as file:
        os.fsync(file.fileno())  # The copied pages: SQLite has flushed those of the new history alone.


def remove_prepared(prepared: Path) -> None:
    """Remove what is left of a catalogue that was being prepared, if anything is."""
    for suffix in ("", "-wal", "-shm", ".lock"):
        prepared.with_name(prepared.name + suffix).unlink(missing_ok=True)
