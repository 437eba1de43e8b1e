"""One transaction of the engine in the making: many changes, each of which sees those before it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

from droppexd.catalog.engine import Engine, Operation
from droppexd.catalog.grace import Grace
from droppexd.catalog.keys import (
    NEXT_POOL,
    TOTALS,
    Placement,
    degraded_key,
    extent_key,
    garbage_key,
    large_key,
    name_key,
    placement_key,
    placement_of,
    session_key,
    version_key,
    work_key,
)
from droppexd.catalog.placements import Counts
from droppexd.catalog.records import (
    Garbage,
    Name,
    StoredExtent,
    Totals,
    pack_extent,
    pack_fields,
    pack_garbage,
    pack_name,
    pack_version,
    unpack_extent,
    unpack_name,
    unpack_version,
)
from droppexd.catalog.state import Session, State
from droppexd.errors import CatalogError, CatalogFull
from droppexd.model import MISSING, Extent, ExtentId, Version, VersionId
from droppexd.runtime import Runtime

Result_co = TypeVar("Result_co", covariant=True)

EXTENTS_AT_ONCE = 500
"""Extents of a large version that are read together."""

_SESSION_BYTES, _SESSION_BITS = 6, 47


class Change(Protocol[Result_co]):
    """One change that is judged within a batch."""

    def reads(self) -> list[bytes]:
        """Return keys that judging will want, to be read together with those of the whole batch."""
        ...

    async def judge(self, batch: "Batch") -> Result_co:
        """Check everything, then write to the batch, and return the answer.

        A refusal is an error that is raised before anything is written, unless it is written itself.
        """
        ...


class Batch:
    """Reads through to the engine, keeps what was read and what is to be written.

    The catalogue has one writer and one batch at a time, so nothing that was read can change under it.
    """

    def __init__(self, engine: Engine, state: State, grace: Grace, runtime: Runtime) -> None:
        self.engine = engine
        self.state = state
        self.clock = runtime.clock
        self._entropy = runtime.entropy
        self._grace = grace
        self._seen: dict[bytes, bytes | None] = {}
        self._writes: dict[bytes, bytes | None] = {}
        self._placements: dict[Placement, Counts] = {}
        self._totals = state.totals
        self._next_pool = state.next_pool
        self._epoch = -1
        self._bytes = 0
        self._after: list[Callable[[], None]] = []
        self._else: list[Callable[[], None]] = []
        self.large_changed = False
        """Whether a version of several extents came, went or moved."""

    # -- reading and writing -------------------------------------------------------------------

    async def load(self, keys: Sequence[bytes]) -> None:
        """Read these keys at once, so that later reads of them cost nothing."""
        seen = self._seen
        wanted = [key for key in keys if key not in seen]
        if wanted:
            found = await self.engine.get(wanted)
            for key, entry in zip(wanted, found, strict=True):
                seen[key] = None if entry is None else entry.value

    async def get(self, key: bytes) -> bytes | None:
        """Return the value under a key as the changes before this one left it."""
        seen = self._seen
        if key not in seen:
            (entry,) = await self.engine.get((key,))
            seen[key] = None if entry is None else entry.value
        return seen[key]

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value."""
        self._seen[key] = self._writes[key] = value
        self._bytes += len(key) + len(value)

    def delete(self, key: bytes) -> None:
        """Delete a key."""
        self._seen[key] = self._writes[key] = None
        self._bytes += len(key)

    @property
    def bytes(self) -> int:
        """How many bytes the transaction has so far, at most."""
        return self._bytes

    @property
    def size(self) -> int:
        """How many keys the transaction writes so far."""
        return len(self._writes)

    def after_commit(self, action: Callable[[], None]) -> None:
        """Change memory once the transaction is durable."""
        self._after.append(action)

    def if_refused(self, action: Callable[[], None]) -> None:
        """Change memory back when there was no room for the transaction."""
        self._else.append(action)

    def require_room(self) -> None:
        """Raise CatalogFull when nothing is to be added now."""
        if self.engine.shortage:
            raise CatalogFull(self.engine.shortage)

    def operations(self) -> list[Operation]:
        """Return the transaction; empty when nothing is to be written."""
        for placement, counts in self._placements.items():
            if counts == self.state.placements.get(placement, Counts()):
                continue
            if counts == Counts():
                self.delete(placement_key(placement))
            else:
                self.put(placement_key(placement), pack_fields(counts))
        if self._totals != self.state.totals:
            self.put(TOTALS, pack_fields(self._totals))
        if self._next_pool != self.state.next_pool:
            self.put(NEXT_POOL, pack_fields((self._next_pool,)))
        return [Operation(key, value) for key, value in self._writes.items()]

    def committed(self) -> None:
        """Carry over into memory what is durable now."""
        self.state.totals = self._totals
        self.state.next_pool = self._next_pool
        for placement, counts in self._placements.items():
            if counts == Counts():
                self.state.placements.pop(placement, None)
            else:
                self.state.placements[placement] = counts
        if self._epoch >= 0:
            self._grace.end(self.clock.now())
        for action in self._after:
            action()

    def refused(self) -> None:
        """Forget all of it: there was no room, and nothing was written."""
        if self._epoch >= 0:
            self._grace.end(self.clock.now())
        for action in self._else:
            action()

    # -- numbers and sums ----------------------------------------------------------------------

    async def new_session(self) -> int:
        """Return a random number that no session here has.

        Not the next one: a copy of the catalogue that is older than some sessions would hand their numbers
        out again, and take the shards of those sessions for its own.
        """
        while True:
            token = int.from_bytes(self._entropy.token(_SESSION_BYTES))
            number = token >> (8 * _SESSION_BYTES - _SESSION_BITS)
            if number and await self.get(session_key(number)) is None:
                return number

    def new_pool(self) -> int:
        """Hand out the number of a new pool."""
        number = self._next_pool
        self._next_pool += 1
        return number

    def add_totals(
        self, files: int = 0, size: int = 0, extents: int = 0, garbage: int = 0, empty_files: int = 0
    ) -> None:
        """Add to the totals."""
        old = self._totals
        self._totals = Totals(
            old.files + files,
            old.size + size,
            old.extents + extents,
            old.garbage + garbage,
            old.empty_files + empty_files,
        )

    def _count(self, placement: Placement, extents: int = 0, files: int = 0) -> None:
        old = self._placements.get(placement)
        if old is None:
            old = self.state.placements.get(placement, Counts())
        self._placements[placement] = Counts(old.extents + extents, old.files + files)

    # -- names ---------------------------------------------------------------------------------

    async def name(self, name: str) -> Name | None:
        """Return what a name points at."""
        value = await self.get(name_key(name))
        return None if value is None else unpack_name(value)

    def put_name(self, name: str, record: Name) -> None:
        """Let a name point at a version; its version's count is the caller's."""
        self.put(name_key(name), pack_name(record))

    # -- versions ------------------------------------------------------------------------------

    async def version(self, version: VersionId) -> Version:
        """Return a version that some name points at."""
        value = await self.get(version_key(version))
        if value is None:
            raise CatalogError(f"the catalogue is damaged: version {version} has a name but no record")
        return unpack_version(version, value)

    def add_version(self, version: Version, extents: Sequence[Extent]) -> None:
        """Write a new version with all of its extents."""
        self.put(version_key(version.id), pack_version(version))
        self._add_extents(version, extents)
        self.add_totals(size=version.size)
        placement = placement_of(extents[0].layout, extents[0].pools) if len(extents) == 1 else None
        self._count_names(version, placement, version.names)

    def extend_version(self, version: Version, extent: Extent) -> None:
        """Write one more extent of a version that has no name yet."""
        extents = (*version.extents, extent.id)
        longer = replace(version, size=version.size + extent.size, extents=extents)
        self.put(version_key(version.id), pack_version(longer))
        self._add_extents(longer, (extent,))
        self.add_totals(size=extent.size)

    def _add_extents(self, version: Version, extents: Sequence[Extent]) -> None:
        """Write extents that are new in a version's list, and count them."""
        for extent in extents:
            self._put_extent(extent, version.id)
            self._count(placement_of(extent.layout, extent.pools), extents=1)
        if len(version.extents) > 1:
            self.put(large_key(version.id), b"")
            self.large_changed = True
        self.add_totals(extents=len(extents))

    async def shorten_version(self, version: Version, count: int) -> None:
        """Leave a version that has no name yet its first extents; the others are garbage."""
        gone = 0
        for extent_id in version.extents[count:]:
            extent = (await self.extent(extent_id)).extent
            gone += extent.size
            self._discard_extent(extent)
        shorter = replace(version, size=version.size - gone, extents=version.extents[:count])
        self.put(version_key(version.id), pack_version(shorter))
        if len(shorter.extents) <= 1 < len(version.extents):
            self.delete(large_key(version.id))
        self.large_changed |= len(version.extents) > 1
        self.add_totals(size=-gone, extents=count - len(version.extents))

    async def finish_version(self, begun: Version, version: Version, rest: Sequence[Extent]) -> None:
        """Write a version that had no name before, with the rest of its extents."""
        self.put(version_key(version.id), pack_version(version))
        self._add_extents(version, rest)
        self.add_totals(size=version.size - begun.size)
        placement = None
        if len(version.extents) == 1:
            extent = (await self.extent(version.extents[0])).extent
            placement = placement_of(extent.layout, extent.pools)
        self._count_names(version, placement, version.names)

    async def change_names(self, version_id: VersionId, change: int) -> None:
        """Count names of a version up or down; without any, it and its extents are garbage."""
        if change == 0:
            return
        version = await self.version(version_id)
        placement = None
        if len(version.extents) == 1:
            extent = (await self.extent(version.extents[0])).extent
            placement = placement_of(extent.layout, extent.pools)
        self._count_names(version, placement, change)
        names = version.names + change
        if names > 0:
            self.put(version_key(version_id), pack_version(replace(version, names=names)))
        else:
            await self.discard_version(version)

    def _count_names(self, version: Version, placement: Placement | None, names: int) -> None:
        """Count files; `placement` is that of a version with just one extent."""
        self.add_totals(files=names, empty_files=0 if version.extents else names)
        if placement is not None:
            self._count(placement, files=names)
        elif version.extents:
            self.large_changed = True

    async def discard_version(self, version: Version) -> None:
        """Delete a version; its extents become garbage."""
        self.delete(version_key(version.id))
        if len(version.extents) > 1:
            self.delete(large_key(version.id))
        for start in range(0, len(version.extents), EXTENTS_AT_ONCE):
            some = version.extents[start : start + EXTENTS_AT_ONCE]
            await self.load([extent_key(extent) for extent in some])
            for extent in some:
                self._discard_extent((await self.extent(extent)).extent)
        self.add_totals(size=-version.size, extents=-len(version.extents))

    # -- extents -------------------------------------------------------------------------------

    async def extent(self, extent: ExtentId) -> StoredExtent:
        """Return an extent that some version has."""
        value = await self.get(extent_key(extent))
        if value is None:
            raise CatalogError(f"the catalogue is damaged: extent {extent} has a version but no record")
        return unpack_extent(extent, value)

    def _put_extent(self, extent: Extent, version: VersionId) -> None:
        self.put(extent_key(extent.id), pack_extent(extent, version))
        if MISSING in extent.pools:
            self.put(degraded_key(extent.survives, extent.id), b"")
        if self.state.on_placed is not None:
            self.after_commit(partial(self.state.on_placed, extent))

    def replace_extent(self, old: Extent, new: Extent, version: Version) -> None:
        """Write a changed extent record; the counters and the degraded index follow."""
        before = placement_of(old.layout, old.pools)
        after = placement_of(new.layout, new.pools)
        files = version.names if len(version.extents) == 1 else 0
        self._count(before, extents=-1, files=-files)
        self._count(after, extents=1, files=files)
        if MISSING in old.pools:
            self.delete(degraded_key(old.survives, old.id))
        self._put_extent(new, version.id)
        self.large_changed |= len(version.extents) > 1

    def swap_extent(self, version: Version, place: int, old: Extent, new: Extent) -> None:
        """Put another extent into a version's list; the old one becomes garbage."""
        extents = (*version.extents[:place], new.id, *version.extents[place + 1 :])
        self.put(version_key(version.id), pack_version(replace(version, extents=extents)))
        self._discard_extent(old)
        self._put_extent(new, version.id)
        files = version.names if len(extents) == 1 else 0
        self._count(placement_of(old.layout, old.pools), files=-files)
        self._count(placement_of(new.layout, new.pools), extents=1, files=files)
        self.large_changed |= len(extents) > 1

    def _discard_extent(self, extent: Extent) -> None:
        self.delete(extent_key(extent.id))
        if MISSING in extent.pools:
            self.delete(degraded_key(extent.survives, extent.id))
        self._count(placement_of(extent.layout, extent.pools), extents=-1)
        self.bury(extent.id, extent.pools)

    def bury(self, extent: ExtentId, holders: Iterable[int]) -> None:
        """Call an extent without a record dead: who may hold shards of it must confirm that they are gone."""
        pools = self.state.confirmers(holders)
        if not pools:
            return
        if self._epoch < 0:
            self._epoch = self._grace.begin(self.clock.now())
        self.put(garbage_key(extent), pack_garbage(Garbage(self._epoch, pools)))
        for pool in pools:
            self.put(work_key(pool, self._epoch, extent), b"")
        self.add_totals(garbage=1)

    def confirm_garbage(self, extent: ExtentId, garbage: Garbage, confirmed: Iterable[int]) -> None:
        """Take pools off a garbage record; without any left, it goes."""
        done = set(confirmed)
        left = tuple(pool for pool in garbage.pools if pool not in done)
        for pool in garbage.pools:
            if pool in done:
                self.delete(work_key(pool, garbage.epoch, extent))
        if left:
            self.put(garbage_key(extent), pack_garbage(Garbage(garbage.epoch, left)))
        else:
            self.delete(garbage_key(extent))
            self.add_totals(garbage=-1)

    # -- sessions ------------------------------------------------------------------------------

    def put_session(self, number: int, session: Session) -> None:
        """Write a session as it is now; what rests on its record holds once that is durable."""
        record = session.record()
        self.put(session_key(number), pack_fields(record))

        def durable() -> None:
            session.safe_floor = max(session.safe_floor, record.floor)
            session.closed = session.closed or not record.open

        self.after_commit(durable)
