"""A controller's folder after a crash: opened by the real engine and the real catalogue, and read whole."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass

import msgpack
import trio

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.engine import MAX_RANGE
from droppexd.catalog.keys import EXTENTS, NAMES, name_key, version_key
from droppexd.catalog.records import unpack_extent, unpack_name
from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.daemon import system_runtime
from droppexd.errors import DroppexError
from droppexd.model import ExtentId, VersionId
from droppexd.runtime import Runtime
from powerloss.pools import Entropy

FILE = "catalogue.sqlite"


class History:
    """All transactions of a catalogue in order, and what stands in it after each."""

    def __init__(self, path):
        """Read the file of a catalogue that was closed and has forgotten nothing."""
        with closing(sqlite3.connect(path)) as connection:
            log = connection.execute("SELECT revision, operations FROM log ORDER BY revision").fetchall()
            rows = connection.execute("SELECT key, value, revision FROM kv").fetchall()
        assert [revision for revision, _ in log] == list(range(1, len(log) + 1))
        self.transactions = [msgpack.unpackb(operations) for _, operations in log]
        self._states = [{}]
        for revision, operations in enumerate(self.transactions, 1):
            state = dict(self._states[-1])
            for key, value in operations:
                if value is None:
                    state.pop(key, None)
                else:
                    state[key] = value, revision
            self._states.append(state)
        assert self._states[-1] == {key: (value, revision) for key, value, revision in rows}

    @property
    def newest(self):
        return len(self.transactions)

    def state(self, revision):
        """Return (value, revision that wrote it) by key, as of a revision."""
        return self._states[revision]

    def committed(self, version):
        """Return the revision that brought a version."""
        return self._first(1, version_key(_parsed(version)), lambda value: value is not None)

    def named(self, name, version):
        """Return the revision that let a name point at a version."""
        return self._first(
            1,
            name_key(name),
            lambda value: value is not None and unpack_name(value).version == _parsed(version),
        )

    def removed(self, name, version):
        """Return the revision that took a name from a version."""
        return self._first(self.named(name, version) + 1, name_key(name), lambda value: value is None)

    def _first(self, start, wanted, holds):
        return next(
            revision
            for revision, operations in enumerate(self.transactions[start - 1 :], start)
            for key, value in operations
            if key == wanted and holds(value)
        )

    def shards_of(self, version, number):
        """Return (extent, index) of every shard that the records of a new version place on a pool."""
        revision = self.committed(version)
        return self.shards_on(number, revision) - self.shards_on(number, revision - 1)

    def shards_on(self, number, revision):
        """Return (extent, index) of every shard that the extent records of a revision place on a pool."""
        placed = set()
        for key, (value, _) in self.state(revision).items():
            if key.startswith(EXTENTS):
                extent = unpack_extent(ExtentId.from_bytes(key[len(EXTENTS) :]), value).extent
                placed |= {
                    (str(extent.id), index) for index, pool in enumerate(extent.pools) if pool == number
                }
        return placed


def _parsed(version):
    session, counter = version.split("-")
    return VersionId(int(session, 16), int(counter, 16))


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The revision up to which a catalogue is whole, or what is wrong with it."""

    revision: int
    wrong: str


def open_catalogue_folder(folder, history):
    """Return what the catalogue in a folder is, or the error with which it is refused."""
    return trio.run(_open, folder, history)


async def _inline(function, *args):
    await trio.lowlevel.checkpoint()
    return function(*args)


async def _open(folder, history):
    runtime = Runtime(clock=system_runtime().clock, entropy=Entropy(1), run_blocking=_inline)
    try:
        async with open_sqlite_engine(folder / FILE, runtime) as engine:
            revision = engine.revision
            wrong = await _compare(engine, history)
            if not wrong and revision:
                async with open_catalogue(engine, runtime) as catalogue:
                    wrong = await _walk(catalogue, history.state(revision))
            return Catalogue(revision, wrong)
    except DroppexError as error:
        return error


async def _compare(engine, history):
    """Return how the engine differs from the history up to the engine's own revision; empty when not at all."""
    revision = engine.revision
    if revision > history.newest:
        return f"revision {revision} never was"
    expected = history.state(revision)
    found = {
        entry.key: (entry.value, entry.revision) for entry in await engine.range(b"", b"\xff", MAX_RANGE)
    }
    assert len(found) < MAX_RANGE
    if found != expected:
        return f"not what revision {revision} was: {sorted(dict(found.items() ^ expected.items()))}"
    log = [] if not revision else await engine.log(0, MAX_RANGE)
    told = [(entry.revision, entry.key, entry.value) for entry in log]
    written = [
        (number, key, value)
        for number, operations in enumerate(history.transactions[:revision], 1)
        for key, value in operations
    ]
    return "" if told == written else f"the log up to revision {revision} is not what it was"


async def _walk(catalogue, state):
    """Return what the catalogue does not find; empty when each name leads to its version and its extents."""
    for key, (value, _) in state.items():
        if key.startswith(NAMES):
            found = await catalogue.lookup(key[len(NAMES) :].decode())
            if found.version.id != unpack_name(value).version or len(found.extents) != len(
                found.version.extents
            ):
                return f"{key} leads to {found.version.id}"
    return ""
