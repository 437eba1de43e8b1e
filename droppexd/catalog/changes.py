"""The changes of the catalogue: what each checks, and what it writes. Judged in order, within a batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from droppexd.catalog.batch import Batch
from droppexd.catalog.keys import (
    controller_key,
    extent_key,
    garbage_key,
    name_key,
    outcome_key,
    placement_of,
    pool_key,
    version_key,
)
from droppexd.catalog.records import (
    Decided,
    Name,
    Placed,
    pack_controller,
    pack_outcome,
    pack_pool,
    unpack_garbage,
    unpack_outcome,
)
from droppexd.catalog.state import Session, State
from droppexd.errors import Conflict, DroppexError, InvalidRequest, NotEnoughShards, NotFound
from droppexd.model import (
    MAX_CONTROLLERS,
    MISSING,
    ControllerRecord,
    Extent,
    ExtentId,
    Id,
    Membership,
    OperationId,
    PoolRecord,
    Receipt,
    Version,
    VersionId,
)

TRIM_OUTCOMES = 500
"""Outcomes that are forgotten in one go."""

REMEMBERED_REFUSALS = (Conflict, NotFound, NotEnoughShards)
"""Refusals that depend on the catalogue's state, and would come out otherwise if asked again later."""


class Expected(NamedTuple):
    """What must hold of a name for a change of it: `absent`, or pointing at `version`; neither: anything."""

    absent: bool = False
    version: VersionId | None = None

    def check(self, name: str, found: Name | None) -> None:
        """Raise Conflict when it does not hold."""
        if self.absent and found is not None:
            raise Conflict(f"{name!r} exists already")
        if self.version is not None and (found is None or found.version != self.version):
            now = "is gone" if found is None else f"has version {found.version} by now"
            raise Conflict(f"{name!r} {now}; the change was for version {self.version}")


class RememberedChange(ABC):
    """A change whose outcome is remembered: repeated, it gets the same answer and changes nothing."""

    operation: OperationId

    @property
    def adds(self) -> bool:
        """Whether it is refused while room is short: it is no way to get any."""
        return True

    async def judge(self, batch: Batch) -> Any:
        """Return the remembered outcome, or decide and remember. Raise CatalogFull."""
        operation = self.operation
        key = outcome_key(operation)
        remembered = await batch.get(key)
        if remembered is not None:
            outcome = unpack_outcome(remembered)
            if isinstance(outcome, DroppexError):
                raise outcome
            return self.answer(outcome)
        session = batch.state.open_session(operation.session)
        _check_floor(operation, session, "operation")
        if self.adds:
            batch.require_room()
        try:
            outcome = await self.decide(batch, session)
        except REMEMBERED_REFUSALS as refusal:
            batch.put(key, pack_outcome(refusal))
            raise
        batch.put(key, pack_outcome(outcome))
        return self.answer(outcome)

    @abstractmethod
    async def decide(self, batch: Batch, session: Session) -> Decided:
        """Check, write and return what is to be remembered."""

    @abstractmethod
    def answer(self, outcome: Decided) -> Any:
        """Return the answer for an outcome, which may be remembered from an earlier request."""

    def wrong_repeat(self) -> InvalidRequest:
        """Return the error for a request that is not what this operation id stood for before."""
        return InvalidRequest(f"operation {self.operation} was another change before; use a new id")


def _check_floor(number: Id, session: Session, what: str) -> None:
    if number.counter < session.floor:
        raise InvalidRequest(f"{what} {number} lies below its session's floor {session.floor}: it is over")


def check_new_id(new: Id, operation: OperationId, session: Session) -> None:
    """Raise InvalidRequest for an id that is not one which the operation's session may use now."""
    if new.session != operation.session:
        raise InvalidRequest(f"{new} was not made in session {operation.session:x}, which commits it")
    _check_floor(new, session, "id")


# -- names -----------------------------------------------------------------------------------------

_IDS_FROM = 2
"""Of the keys that a commit reads, those from here on belong to ids that must be new."""


@dataclass(frozen=True, slots=True)
class CommitVersion(RememberedChange):
    """Make an uploaded version visible under a name."""

    operation: OperationId
    name: str
    expected: Expected
    version: Version
    extents: Sequence[Extent]
    note: str

    def reads(self) -> list[bytes]:
        """Return what judging reads: the outcome, the name, and whether the ids are free."""
        keys = [outcome_key(self.operation), name_key(self.name), version_key(self.version.id)]
        for extent in self.extents:
            extent_id = extent.id
            keys += (extent_key(extent_id), garbage_key(extent_id))
        return keys

    async def decide(self, batch: Batch, session: Session) -> Placed:
        """Check the version and the condition, then write name, version and extents."""
        state = batch.state
        self._check_ids(session)
        check_sizes(self.version, self.extents)
        await self._check_unused(batch)
        extents = [checked_extent(extent, state) for extent in self.extents]
        replaced = await batch.name(self.name)
        self.expected.check(self.name, replaced)

        created_ms = self.version.created_ms or batch.clock.wall_ms()
        version = replace(self.version, names=1, created_ms=created_ms)
        batch.add_version(version, extents)
        batch.put_name(self.name, Name(version.id, version.size, created_ms))
        if replaced is not None:
            await batch.change_names(replaced.version, -1)
        survives = [state.survives(placement_of(extent.layout, extent.pools)) for extent in extents]
        return Placed(
            version=version.id,
            survives_pools=min([pools for pools, _ in survives], default=None),
            survives_machines=min([machines for _, machines in survives], default=None),
            replaced=replaced is not None,
        )

    def answer(self, outcome: Decided) -> Receipt:
        """Return the receipt."""
        if not isinstance(outcome, Placed) or outcome.version != self.version.id:
            raise self.wrong_repeat()
        return Receipt(
            name=self.name,
            version=self.version.id,
            size=self.version.size,
            blake3=self.version.blake3,
            layout=" ".join(sorted({str(extent.layout) for extent in self.extents}))[:128],
            survives_pools=outcome.survives_pools,
            survives_machines=outcome.survives_machines,
            replaced=outcome.replaced,
            note=self.note,
        )

    def _check_ids(self, session: Session) -> None:
        for new in (self.version.id, *self.version.extents):
            check_new_id(new, self.operation, session)

    async def _check_unused(self, batch: Batch) -> None:
        for key in self.reads()[_IDS_FROM:]:
            if await batch.get(key) is not None:
                raise InvalidRequest(f"version {self.version.id} uses an id that was used before")


def check_sizes(version: Version, extents: Sequence[Extent]) -> None:
    """Raise InvalidRequest unless these are the extents of the version, and make up its size."""
    if tuple(extent.id for extent in extents) != version.extents:
        raise InvalidRequest(f"version {version.id} names other extents than the ones that came with it")
    if len(set(version.extents)) != len(extents):
        raise InvalidRequest(f"version {version.id} names an extent twice")
    size = sum(extent.size for extent in extents)
    if size != version.size:
        raise InvalidRequest(f"version {version.id} has {version.size} bytes and its extents {size}")


def check_pools(extent: Extent, pools: Sequence[int], state: State) -> None:
    """Raise InvalidRequest unless each shard of the extent is missing or on a known pool of its own."""
    if len(pools) != extent.layout.total:
        raise InvalidRequest(f"extent {extent.id} of layout {extent.layout} names {len(pools)} shards")
    present = [pool for pool in pools if pool != MISSING]
    if len(set(present)) != len(present):
        raise InvalidRequest(f"extent {extent.id} has two shards on one pool")
    for pool in present:
        if pool not in state.pools:
            raise InvalidRequest(f"extent {extent.id} names pool {pool}, which is not known")


def checked_extent(extent: Extent, state: State) -> Extent:
    """Return a new extent as it is recorded: shards on pools that are out are missing."""
    check_pools(extent, extent.pools, state)
    pools = tuple([MISSING if pool != MISSING and state.gone(pool) else pool for pool in extent.pools])
    present = len(pools) - pools.count(MISSING)
    extent.layout.check_survives()
    if present < extent.layout.least:
        missing = [f"extent {extent.id} shard {index}" for index, pool in enumerate(pools) if pool == MISSING]
        raise NotEnoughShards(
            f"extent {extent.id} has {present} shards on pools that count; {extent.layout} needs "
            f"{extent.layout.least} to survive a loss",
            missing,
        )
    return extent if pools == extent.pools and not extent.edition else replace(extent, pools=pools, edition=0)


class _NameChange(RememberedChange):
    """An operation that is answered by the version whose name changed."""

    def answer(self, outcome: Decided) -> VersionId:
        """Return the version."""
        if not isinstance(outcome, VersionId):
            raise self.wrong_repeat()
        return outcome


@dataclass(frozen=True, slots=True)
class RemoveName(_NameChange):
    """Remove a name."""

    operation: OperationId
    name: str
    expected: Expected

    @property
    def adds(self) -> bool:
        """Whether it is refused while room is short: no, it gives room."""
        return False

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [outcome_key(self.operation), name_key(self.name)]

    async def decide(self, batch: Batch, _session: Session) -> VersionId:
        """Delete the name and count it off its version."""
        found = await batch.name(self.name)
        if found is None:
            raise _no_such_name(self.name)
        self.expected.check(self.name, found)
        batch.delete(name_key(self.name))
        await batch.change_names(found.version, -1)
        return found.version


@dataclass(frozen=True, slots=True)
class RenameName(_NameChange):
    """Give a version another name, or with `keep` one more."""

    operation: OperationId
    source: str
    target: str
    expected: Expected
    keep: bool

    @property
    def adds(self) -> bool:
        """Whether it is refused while room is short: a second name is."""
        return self.keep

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [outcome_key(self.operation), name_key(self.source), name_key(self.target)]

    async def decide(self, batch: Batch, _session: Session) -> VersionId:
        """Move or copy the name; what the target pointed at loses it."""
        source = await batch.name(self.source)
        if source is None:
            raise _no_such_name(self.source)
        target = await batch.name(self.target)
        self.expected.check(self.target, target)
        if self.source == self.target:
            return source.version
        if not self.keep:
            batch.delete(name_key(self.source))
        batch.put_name(self.target, source)
        gained = 1 if self.keep else 0
        if target is not None and target.version == source.version:
            await batch.change_names(source.version, gained - 1)
        else:
            await batch.change_names(source.version, gained)
            if target is not None:
                await batch.change_names(target.version, -1)
        return source.version


def _no_such_name(name: str) -> NotFound:
    return NotFound(f"there is no file {name!r}")


# -- garbage ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConfirmGarbage:
    """A pool holds no shard of these dead extents any more."""

    pool: int
    extents: Sequence[ExtentId]

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [garbage_key(extent) for extent in self.extents]

    async def judge(self, batch: Batch) -> None:
        """Take the pool off the records, and with it those that were removed from the cluster."""
        pools = batch.state.pools
        for extent in self.extents:
            value = await batch.get(garbage_key(extent))
            if value is None:
                continue
            garbage = unpack_garbage(value)
            removed = [pool for pool in garbage.pools if pools[pool].membership == Membership.REMOVED]
            if self.pool in garbage.pools:
                batch.confirm_garbage(extent, garbage, (self.pool, *removed))


# -- sessions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Register an app."""

    address: str
    boot_id: bytes

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> int:
        """Hand out a number and write the session."""
        number = await batch.new_session()
        session = Session(address=self.address, boot_id=self.boot_id)
        batch.put_session(number, session)
        batch.after_commit(lambda: batch.state.sessions.__setitem__(number, session))
        return number


@dataclass(frozen=True, slots=True)
class SaveSession:
    """Make a session's floor durable; with `close`, end it as well."""

    session: int
    close: bool = False

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> None:
        """Write the session. Changes of it that come later in the batch are refused already."""
        session = batch.state.sessions.get(self.session)
        if session is None or session.closing:
            return
        session.closing = self.close
        batch.if_refused(partial(setattr, session, "closing", False))
        batch.put_session(self.session, session)


@dataclass(frozen=True, slots=True)
class ForgetOutcomes:
    """Forget outcomes that nobody can ask for: below the floor, or of a closed session."""

    session: int

    def reads(self) -> list[bytes]:
        """Return nothing: the outcomes are read as a range."""
        return []

    async def judge(self, batch: Batch) -> bool:
        """Delete a bounded number of them; return whether there may be more."""
        session = batch.state.sessions[self.session]
        floor = 2**48 - 1 if session.closed else session.floor
        start = outcome_key(OperationId(self.session, session.trimmed))
        end = outcome_key(OperationId(self.session, floor))
        found = await batch.engine.range(start, end, TRIM_OUTCOMES)
        if found:
            # The floor goes along: had the next master a lower one, it would carry a repeated
            # operation out a second time.
            batch.put_session(self.session, session)
            for entry in found:
                batch.delete(entry.key)
        if len(found) == TRIM_OUTCOMES:
            return True
        batch.after_commit(lambda: setattr(session, "trimmed", floor))
        return False


# -- pools -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SavePool:
    """Write the record of a pool, a new one under a new number."""

    record: PoolRecord

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> PoolRecord:
        """Return the record with its number."""
        record = self.record if self.record.number else replace(self.record, number=batch.new_pool())
        batch.put(pool_key(record.number), pack_pool(record))
        batch.after_commit(lambda: batch.state.put_pool(record))
        return record


# -- controllers -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SaveController:
    """Write the record of a controller."""

    record: ControllerRecord

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> None:
        """Write it. Raise Conflict when there are as many others as there may be."""
        record, known = self.record, batch.state.controllers
        if record.name not in known and len(known) >= MAX_CONTROLLERS:
            raise Conflict(f"there are {len(known)} controllers already, and there may be no more")
        batch.put(controller_key(record.name), pack_controller(record))
        batch.after_commit(lambda: known.__setitem__(record.name, record))


@dataclass(frozen=True, slots=True)
class ForgetController:
    """Delete the record of a controller."""

    name: str

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> None:
        """Delete it; raise NotFound."""
        known = batch.state.controllers
        if self.name not in known:
            raise NotFound(f"there is no controller {self.name!r}")
        batch.delete(controller_key(self.name))
        batch.after_commit(partial(known.__delitem__, self.name))
