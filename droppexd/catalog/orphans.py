"""The changes about shards that no record names, and whose session this catalogue does not know.

They belong to another history of the catalogue, one that was lost with a newer copy of it. Nothing is decided
about them but by a person, and nothing of a live version is touched by what is decided: both changes look
first whether there is a record, in the transaction that they write.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from droppexd.catalog.batch import EXTENTS_AT_ONCE, Batch
from droppexd.catalog.changes import RememberedChange, check_pools, check_sizes
from droppexd.catalog.keys import (
    extent_key,
    garbage_key,
    name_key,
    outcome_key,
    placement_of,
    version_key,
)
from droppexd.catalog.records import Decided, Name, Taken
from droppexd.catalog.state import Session, State
from droppexd.errors import Conflict, InvalidRequest, NotEnoughShards
from droppexd.model import (
    EXTENT_CHUNKS,
    MAX_NAME_BYTES,
    MISSING,
    Extent,
    ExtentId,
    OperationId,
    Receipt,
    Version,
    VersionId,
)

_ROOM_BYTES = 64
"""Of a name, kept free for what makes it unique."""
_MOST_NAMES = 100


@dataclass(frozen=True, slots=True)
class AdoptVersion(RememberedChange):
    """Enter a version that was found on pools, under a name that is free."""

    operation: OperationId
    name: str
    """The name that it gets if that is free; else one that begins so."""
    version: Version
    extents: Sequence[Extent]

    def reads(self) -> list[bytes]:
        """Return what judging reads at once; the extents of a large version are read in steps."""
        return [outcome_key(self.operation), name_key(self.name), version_key(self.version.id)]

    async def decide(self, batch: Batch, _session: Session) -> Taken:
        """Check that no part of it is known, then write name, version and extents."""
        state = batch.state
        await self._check_unknown(batch)
        check_sizes(self.version, self.extents)
        _check_order(self.version.id, self.extents)
        extents = [_as_recorded(extent, state) for extent in self.extents]
        name = await self._free_name(batch)
        created_ms = batch.clock.wall_ms()
        version = replace(self.version, names=1, created_ms=created_ms)
        batch.add_version(version, extents)
        batch.put_name(name, Name(version.id, version.size, created_ms))
        batch.after_commit(state.count_ruling)
        survives = [state.survives(placement_of(extent.layout, extent.pools)) for extent in extents]
        return Taken(
            name=name,
            version=version.id,
            survives_pools=min(pools for pools, _ in survives),
            survives_machines=min(machines for _, machines in survives),
        )

    def answer(self, outcome: Decided) -> Receipt:
        """Return the receipt."""
        if not isinstance(outcome, Taken) or outcome.version != self.version.id:
            raise self.wrong_repeat()
        return Receipt(
            name=outcome.name,
            version=self.version.id,
            size=self.version.size,
            blake3=self.version.blake3,
            layout=" ".join(sorted({str(extent.layout) for extent in self.extents}))[:128],
            survives_pools=outcome.survives_pools,
            survives_machines=outcome.survives_machines,
        )

    async def _check_unknown(self, batch: Batch) -> None:
        """Raise Conflict unless nothing of the version has a record, is garbage, or has a known session."""
        version = self.version.id
        if await batch.get(version_key(version)) is not None:
            raise Conflict(f"version {version} is in the catalogue already")
        for session in {version.session, *(extent.id.session for extent in self.extents)}:
            if session in batch.state.sessions:
                raise Conflict(
                    f"version {version} is of session {session:x}, which this catalogue knows: "
                    "its shards are no orphans"
                )
        for start in range(0, len(self.extents), EXTENTS_AT_ONCE):
            ids = [extent.id for extent in self.extents[start : start + EXTENTS_AT_ONCE]]
            await batch.load([key(extent) for extent in ids for key in (extent_key, garbage_key)])
            for extent in ids:
                if await batch.get(extent_key(extent)) is not None:
                    raise Conflict(f"extent {extent} has a record by now")
                if await batch.get(garbage_key(extent)) is not None:
                    raise Conflict(f"extent {extent} was dropped")

    async def _free_name(self, batch: Batch) -> str:
        for name in _names_like(self.name, self.version.id):
            if await batch.name(name) is None:
                return name
        raise Conflict(f"{self.name!r} exists, and every name like it")


def _names_like(name: str, version: VersionId) -> Iterator[str]:
    yield name
    short = name
    if len(name.encode()) > MAX_NAME_BYTES - _ROOM_BYTES:
        short = name.encode()[: MAX_NAME_BYTES - _ROOM_BYTES].decode(errors="ignore")
    yield f"{short}.{version}"
    for number in range(2, _MOST_NAMES):
        yield f"{short}.{version}.{number}"


def _check_order(version: VersionId, extents: Sequence[Extent]) -> None:
    """Raise InvalidRequest unless the extents can be those of one version, by their ids and sizes."""
    if not extents:
        raise InvalidRequest(f"version {version} has no extent: nothing of an empty file is on any pool")
    for place, extent in enumerate(extents):
        if extent.id.session == version.session and extent.id.counter <= version.counter:
            raise InvalidRequest(f"extent {extent.id} cannot stand there in version {version}")
        if place < len(extents) - 1 and extent.size != extent.chunk_size * EXTENT_CHUNKS:
            raise InvalidRequest(f"extent {extent.id} is not full, and not the last of version {version}")


def _as_recorded(extent: Extent, state: State) -> Extent:
    """Return an extent as it is recorded: shards on pools that are out are missing."""
    check_pools(extent, extent.pools, state)
    pools = tuple([MISSING if pool != MISSING and state.gone(pool) else pool for pool in extent.pools])
    present = len(pools) - pools.count(MISSING)
    if present < extent.layout.k:
        raise NotEnoughShards(
            f"extent {extent.id} has {present} shards on pools that count; {extent.layout} is read from "
            f"{extent.layout.k}",
            [f"extent {extent.id} shard {index}" for index, pool in enumerate(pools) if pool == MISSING],
        )
    return replace(extent, pools=pools, edition=0)


@dataclass(frozen=True, slots=True)
class DropOrphans:
    """Call extents dead that no record names, on a person's word. May be repeated without harm.

    No operation id is needed: what was called dead stays so, and what was adopted in between has a record.
    """

    orphans: Sequence[tuple[ExtentId, Sequence[int]]]
    """Extents, and the pools that hold shards of them."""

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [key(extent) for extent, _ in self.orphans for key in (extent_key, garbage_key)]

    async def judge(self, batch: Batch) -> list[ExtentId]:
        """Write garbage records; return the extents that are left alone."""
        state = batch.state
        for _, pools in self.orphans:
            for pool in pools:
                if pool not in state.pools:
                    raise InvalidRequest(f"pool {pool} is not known")
        refused: list[ExtentId] = []
        for extent, pools in self.orphans:
            if extent.session in state.sessions or await batch.get(extent_key(extent)) is not None:
                refused.append(extent)
            elif await batch.get(garbage_key(extent)) is None:
                batch.bury(extent, pools)
        batch.after_commit(state.count_ruling)
        return refused
