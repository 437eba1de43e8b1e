"""The catalogue of one master: which file is which shards where, over any engine.

Every change is judged in order by one task. What waits is gathered into one transaction of the engine,
and while that is flushed the next changes gather: the more wait, the less each costs. Each transaction
compares the term's key, so that a master that was deposed changes nothing more. Reads go to the engine.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import trio

from droppexd.background import open_background
from droppexd.catalog import survey
from droppexd.catalog.batch import EXTENTS_AT_ONCE, Batch, Change
from droppexd.catalog.changes import (
    CommitVersion,
    ConfirmGarbage,
    Expected,
    ForgetController,
    ForgetOutcomes,
    OpenSession,
    RemoveName,
    RenameName,
    SaveController,
    SavePool,
    SaveSession,
)
from droppexd.catalog.engine import MAX_RANGE, Compare, Engine, Entry, Operation
from droppexd.catalog.enrolment import AddFounders, AddToken, Enrol, ForgetTokens, Revoke
from droppexd.catalog.grace import Grace
from droppexd.catalog.group import Ranges
from droppexd.catalog.keys import (
    CLUSTER,
    CONTROLLERS,
    COPYING,
    DEGRADED,
    EXTENTS,
    MEMBERS,
    MEMBERS_VERSION,
    NEXT_POOL,
    PLACEMENTS,
    POOLS,
    REBUILT,
    RESTORED,
    SESSIONS,
    TERM,
    TERMS,
    TOKENS,
    TOTALS,
    UPLOADS,
    degraded_key,
    digest_key,
    end_of,
    extent_key,
    garbage_key,
    name_key,
    parse_degraded,
    parse_id,
    parse_placement,
    parse_session,
    parse_work,
    version_key,
    work_key,
)
from droppexd.catalog.listing import Page, find_names, list_names
from droppexd.catalog.orphans import AdoptVersion, DropOrphans
from droppexd.catalog.placements import Counts, survives_machines, survives_pools
from droppexd.catalog.reconciling import Judge, Stretch, reconcile
from droppexd.catalog.records import (
    StoredExtent,
    Totals,
    pack_fields,
    unpack_controller,
    unpack_extent,
    unpack_fields,
    unpack_garbage,
    unpack_member,
    unpack_name,
    unpack_pool,
    unpack_session,
    unpack_token,
    unpack_totals,
    unpack_upload,
    unpack_version,
)
from droppexd.catalog.relayouts import SwapExtent
from droppexd.catalog.repairs import (
    Barrier,
    EndRebuild,
    EndRestore,
    LosePool,
    LoseShards,
    Place,
    PlaceShards,
    ReleaseGarbage,
)
from droppexd.catalog.state import Session, State
from droppexd.catalog.terms import begin_term, compare_term
from droppexd.catalog.uploads import CommitUpload, DropUpload, ExtendUpload, TakeUpload
from droppexd.errors import (
    CatalogError,
    CatalogFull,
    DroppexError,
    IdentityError,
    InvalidRequest,
    NotFound,
    NotMaster,
    SessionClosed,
    StaleRead,
)
from droppexd.held import Held
from droppexd.model import (
    MISSING,
    ControllerRecord,
    Extent,
    ExtentId,
    Holding,
    Layout,
    MemberRecord,
    OperationId,
    PoolRecord,
    Receipt,
    SurvivalCount,
    TokenRecord,
    UploadRecord,
    Version,
    VersionId,
)
from droppexd.runtime import Runtime

T = TypeVar("T")

MAX_BATCH = 512
"""Changes in one transaction."""

MAX_BATCH_KEYS = 8192
"""Keys in one transaction, about: a large version may write more by itself."""

FLOOR_STEP = 1000
"""A session's floor that rose by so much is made durable."""

_EXTENT_BYTES = 350
"""In one transaction, for each extent of a version: its record, and if it replaces another as large, the
removal of that with an entry for each pool that must confirm."""

_RULING_BITS = 32
_START_BYTES = 3
"""Of a random number for each opening of the catalogue. Not the term: the next start after an older copy was
put back may have the term of the last one."""

_BEHIND_ALL_COUNTERS = 2**48

_LOOKUP_TRIES = 16
"""How often a look-up starts again because the name changed while it was read."""


class Found(NamedTuple):
    """A version with its extents."""

    version: Version
    extents: tuple[Extent, ...]


class _Waiting:
    """A change on its way. Its task waits for `done`."""

    __slots__ = ("change", "done", "error", "result")

    def __init__(self, change: Change[Any]) -> None:
        self.change = change
        self.done = trio.Event()
        self.result: Any = None
        self.error: DroppexError | None = None


class Catalogue:
    """All files, pools and sessions of a cluster; made by `open_catalogue`, which begins a term.

    Every method raises NotMaster once another master has begun a later term, and CatalogError when the engine
    failed. What changes anything raises CatalogFull when the disk has no room: then it has changed nothing.
    """

    def __init__(
        self, engine: Engine, runtime: Runtime, state: State, grace_s: float, identity: "Identity"
    ) -> None:
        self.cluster_id = identity.cluster_id
        self.incarnation = identity.incarnation
        self.term = identity.term
        self._engine = engine
        self._runtime = runtime
        self._clock = runtime.clock
        self._state = state
        self._start = 0
        self._compare_anew()
        self._fence = Compare(TERM, identity.term_revision)
        self._grace = Grace(identity.term, grace_s, runtime.clock.now())
        self._waiting: deque[_Waiting] = deque()
        self._wake = trio.Event()
        self._failure: DroppexError | None = None
        self._large_changes = 0
        self._large_files = survey.LargeFiles()
        self._large_files_by_machine = survey.LargeFiles()

    # -- what is in memory ---------------------------------------------------------------------

    @property
    def pools(self) -> dict[int, PoolRecord]:
        """The permanent records of all pools, by number. Not to be changed."""
        return self._state.pools

    @property
    def controllers(self) -> dict[str, ControllerRecord]:
        """The permanent records of all controllers, by name. Not to be changed."""
        return self._state.controllers

    @property
    def sessions(self) -> dict[int, Session]:
        """All sessions that ever were, by number. Not to be changed."""
        return self._state.sessions

    @property
    def totals(self) -> Totals:
        """Sums over the whole catalogue."""
        return self._state.totals

    @property
    def ruling(self) -> int:
        """A number that is another after each decision about shards of unknown sessions.

        Shifted by 32 bits to the right it is another for each opening of the catalogue.
        """
        return (self.start << _RULING_BITS) + self._state.rulings

    @property
    def start(self) -> int:
        """A number, never 0: another one has pools compare all that they hold, as each opening does."""
        return self._start

    @property
    def restored_ms(self) -> int | None:
        """When the backup was written that this was restored from; None once all pools were compared."""
        return self._state.restored_ms

    @property
    def rebuilt_from(self) -> int | None:
        """How many pools this was made anew from, while what only shards tell of is still to be adopted."""
        return self._state.rebuilt_from

    def _compare_anew(self) -> None:
        drawn = int.from_bytes(self._runtime.entropy.token(_START_BYTES))
        following = self._start % (2 ** (8 * _START_BYTES) - 1) + 1
        self._start = drawn if drawn not in (0, self._start) else following

    def set_out(self, pools: Collection[int]) -> None:
        """Count these pools as lost for good: new versions record their shards as missing."""
        self._state.out = frozenset(pools)

    # -- reading -------------------------------------------------------------------------------

    async def lookup(self, name: str) -> Found:
        """Return what a name points at; raise NotFound."""
        self.check()
        for _ in range(_LOOKUP_TRIES):
            (entry,) = await self._engine.get((name_key(name),))
            if entry is None:
                raise NotFound(f"there is no file {name!r}")
            found = await self._read_version(unpack_name(entry.value).version)
            if found is not None:
                return found
        raise StaleRead(f"{name!r} changes faster than it can be read")

    def lookup_now(self, name: str) -> Found | None:
        """Return what `lookup` would, when that takes no waiting; None where it would; raise NotFound."""
        self.check()
        found = self._engine.peek((name_key(name),))
        if found is None:
            return None
        if found[0] is None:
            raise NotFound(f"there is no file {name!r}")
        version_id = unpack_name(found[0].value).version
        found = self._engine.peek((version_key(version_id),))
        if found is None or found[0] is None:
            return None
        version = unpack_version(version_id, found[0].value)
        found = self._engine.peek([extent_key(extent) for extent in version.extents])
        if found is None:
            return None
        extents: list[Extent] = []
        for extent_id, entry in zip(version.extents, found, strict=True):
            if entry is None:
                return None
            extents.append(unpack_extent(extent_id, entry.value).extent)
        return Found(version, tuple(extents))

    async def lookup_version(self, version: VersionId) -> Found:
        """Return a version, whatever its names are now; raise StaleRead when it is gone."""
        self.check()
        found = await self._read_version(version)
        if found is None:
            raise StaleRead(f"version {version} was removed")
        return found

    async def _read_version(self, version_id: VersionId) -> Found | None:
        (entry,) = await self._engine.get((version_key(version_id),))
        if entry is None:
            return None
        version = unpack_version(version_id, entry.value)
        extents: list[Extent] = []
        for start in range(0, len(version.extents), EXTENTS_AT_ONCE):
            some = version.extents[start : start + EXTENTS_AT_ONCE]
            entries = await self._engine.get([extent_key(extent) for extent in some])
            for extent_id, found in zip(some, entries, strict=True):
                if found is None:
                    return None
                extents.append(unpack_extent(extent_id, found.value).extent)
        return Found(version, tuple(extents))

    async def list_names(self, prefix: str, after: str, limit: int, *, recursive: bool) -> Page:
        """Return a page of names; see `listing.list_names`."""
        self.check()
        return await list_names(self._engine, prefix, after, limit, recursive=recursive)

    async def find_names(self, pattern: str, after: str, limit: int) -> Page:
        """Return a page of the names that match a glob; see `listing.find_names`."""
        self.check()
        return await find_names(self._engine, pattern, after, limit)

    async def degraded(self, after: tuple[int, ExtentId] | None, limit: int) -> list[tuple[int, ExtentId]]:
        """Return a page of extents with missing shards, the most endangered first, with what they survive."""
        self.check()
        start = DEGRADED if after is None else _degraded_after(*after)
        found = await self._engine.range(start, end_of(DEGRADED), limit)
        return [parse_degraded(entry.key) for entry in found]

    async def records(self, extents: Sequence[ExtentId]) -> list[StoredExtent | None]:
        """Return the records of these extents, with their versions; None where there is none."""
        self.check()
        entries = await self._engine.get([extent_key(extent) for extent in extents])
        return [
            None if entry is None else unpack_extent(extent, entry.value)
            for extent, entry in zip(extents, entries, strict=True)
        ]

    async def extents(self, after: ExtentId | None, limit: int) -> list[Extent]:
        """Return a page of all extents, in the order of their ids."""
        self.check()
        start = EXTENTS if after is None else extent_key(after) + b"\0"
        found = await self._engine.range(start, end_of(EXTENTS), limit)
        return [unpack_extent(ExtentId(*parse_id(entry.key)), entry.value).extent for entry in found]

    def places(self, pool: int) -> int:
        """Return how many extents have a shard on this pool."""
        return sum(
            counts.extents for (_, _, pools), counts in self._state.placements.items() if pool in pools
        )

    def widest(self, pool: int) -> Layout | None:
        """Return the layout with the most shards of what has one on this pool; None when nothing has."""
        found = [(k + m, m) for (k, m, pools) in self._state.placements if pool in pools]
        return Layout(max(found)[0] - max(found)[1], max(found)[1]) if found else None

    @property
    def missing(self) -> int:
        """How many shards are missing, of all extents together."""
        return sum(
            counts.extents * pools.count(MISSING) for (_, _, pools), counts in self._state.placements.items()
        )

    async def survival(self, lost: Collection[int]) -> tuple[SurvivalCount, ...]:
        """Count files and extents by how many more pools they may lose, when these are lost already.

        Empty files are left out: nothing of them is on a pool. Exact. Placements are counted as they come and
        go; only files of several extents are read, and only when they or the lost pools have changed.
        """
        self.check()
        gone = frozenset(lost)
        return await survey.survival(
            self._engine,
            self._state,
            lambda placement: survives_pools(placement, gone),
            self._large_files,
            (self._large_changes, gone),
        )

    async def machine_survival(self, lost: Collection[int]) -> tuple[SurvivalCount, ...]:
        """Count files and extents by how many more machines they may lose, as `survival` does by pools."""
        self.check()
        gone = frozenset(lost)
        machines = {number: pool.machine for number, pool in self._state.pools.items()}
        return await survey.survival(
            self._engine,
            self._state,
            lambda placement: survives_machines(placement, machines, gone),
            self._large_files_by_machine,
            (self._large_changes, gone, machines),
        )

    # -- names ---------------------------------------------------------------------------------

    async def commit(
        self,
        operation: OperationId,
        name: str,
        expected: Expected,
        version: Version,
        extents: Sequence[Extent],
        note: str = "",
    ) -> Receipt:
        """Make an uploaded version visible under a (normal) name.

        Raise Conflict, NotEnoughShards, SessionClosed, and InvalidRequest for what no app should send, or
        what is more than the engine takes in one transaction.
        """
        most = self._engine.most_bytes // _EXTENT_BYTES
        if len(version.extents) > most:
            raise InvalidRequest(
                f"{name!r} has {len(version.extents)} extents, and this catalogue takes files of up to "
                f"{most}; store it in parts"
            )
        return await self._change(CommitVersion(operation, name, expected, version, extents, note))

    async def remove(self, operation: OperationId, name: str, expected: Expected) -> VersionId:
        """Remove a name and return the version it had; raise NotFound, Conflict, SessionClosed."""
        return await self._change(RemoveName(operation, name, expected))

    async def rename(
        self, operation: OperationId, source: str, target: str, expected: Expected, *, keep: bool
    ) -> VersionId:
        """Give a version another name, or with `keep` one more; `expected` is about the target.

        Raise NotFound, Conflict, SessionClosed.
        """
        return await self._change(RenameName(operation, source, target, expected, keep))

    # -- shards --------------------------------------------------------------------------------

    async def place_shards(self, pool: int, boot_id: bytes, places: Sequence[Place]) -> list[Place]:
        """Record that a pool has these shards, where the records still have that edition.

        Return those that were refused: all of them when this start of the pool is not its last.
        """
        return await self._change(PlaceShards(pool, boot_id, places))

    async def lose_shards(self, pool: int, shards: Sequence[tuple[ExtentId, int, bool]]) -> int:
        """Record shards as missing that a pool lost, or has damaged; return how many it was named for.

        Each is an extent, an index, and whether the shard is there but damaged.
        """
        return await self._change(LoseShards(pool, shards))

    async def lose_pool(self, pool: int, extents: Sequence[ExtentId]) -> int:
        """Record as missing what these extents have on a pool that is out or removed; return how many."""
        return await self._change(LosePool(pool, extents))

    async def release_garbage(self, pool: int) -> None:
        """Wait no longer for a removed pool to confirm what it dropped."""
        while await self._change(ReleaseGarbage(pool)):
            pass

    async def end_restore(self) -> None:
        """Trust the records of a restored catalogue again, and have all pools compare once more.

        For the caller to decide: every member has compared what it holds with the records since this was
        opened, and no record names a pool that is removed.
        """
        await self._change(EndRestore())
        self._compare_anew()

    async def end_rebuild(self) -> None:
        """Remember that all that shards alone tell of was adopted, as far as it can be read."""
        await self._change(EndRebuild())

    async def settle(self) -> None:
        """Return when all changes that came before are committed or refused."""
        await self._change(Barrier())

    # -- uploads -------------------------------------------------------------------------------

    @property
    def uploads(self) -> Mapping[VersionId, UploadRecord]:
        """The uploads that can be gone on with. Not to be changed."""
        return self._state.uploads

    async def upload_digests(self, version: VersionId) -> tuple[bytes, ...]:
        """Return the digests of an upload's extents; fewer when it changes meanwhile."""
        self.check()
        upload = self._state.uploads.get(version)
        keys = [digest_key(version, place) for place in range(upload.extents if upload else 0)]
        digests: list[bytes] = []
        for start in range(0, len(keys), EXTENTS_AT_ONCE):
            for entry in await self._engine.get(keys[start : start + EXTENTS_AT_ONCE]):
                if entry is None:
                    return tuple(digests)
                digests.append(unpack_fields(entry.value, "digest")[0])
        return tuple(digests)

    async def extend_upload(
        self, operation: OperationId, upload: UploadRecord, extent: Extent, digest: bytes
    ) -> None:
        """Add a durable extent to an upload, which the first begins.

        Raise Conflict when somebody else holds it or there are too many, NotEnoughShards, SessionClosed,
        InvalidRequest.
        """
        await self._change(ExtendUpload(operation, upload, extent, digest))

    async def take_upload(self, operation: OperationId, version: VersionId, keep: int) -> Found:
        """Go on with the first extents of an upload, and return them. Raise NotFound, SessionClosed."""
        await self._change(TakeUpload(operation, version, keep))
        return await self.lookup_version(version)

    async def commit_upload(
        self,
        operation: OperationId,
        name: str,
        expected: Expected,
        version: Version,
        rest: Sequence[Extent],
        note: str,
        holder: OperationId,
    ) -> Receipt:
        """Make an upload visible under a (normal) name; see `commit`. `rest` was not added to it before."""
        return await self._change(CommitUpload(operation, name, expected, version, rest, note, holder))

    async def drop_upload(self, version: VersionId, before_ms: int | None = None) -> bool:
        """Give an upload up, if nothing came since a moment; return whether it was. Raise NotFound."""
        return await self._change(DropUpload(version, before_ms))

    # -- sessions ------------------------------------------------------------------------------

    async def open_session(self, address: str, boot_id: bytes) -> int:
        """Register an app and return the number of its session."""
        return await self._change(OpenSession(address, boot_id))

    async def raise_floor(self, session: int, floor: int) -> None:
        """Note the lowest counter that an app still uses; it only goes up.

        It counts at once for what is refused, and is made durable when it has risen by FLOOR_STEP;
        `save_floors` does the rest. Raise SessionClosed.
        """
        self.check()
        found = self._state.open_session(session)
        found.floor = max(found.floor, floor)
        if found.floor - found.safe_floor >= FLOOR_STEP:
            await self._change(SaveSession(session))

    async def save_floors(self) -> None:
        """Make the floors of all open sessions durable."""
        for number, session in list(self._state.sessions.items()):
            if session.floor > session.safe_floor and not session.closing:
                await self._change(SaveSession(number))

    async def close_session(self, session: int) -> None:
        """End a session, durably; nothing of it is committed any more. Idempotent."""
        if session not in self._state.sessions:
            raise SessionClosed(f"session {session:x} is not known")
        await self._change(SaveSession(session, close=True))

    async def forget_outcomes(self) -> None:
        """Forget the outcomes that nobody can ask for any more, a bounded number at a time."""
        for number, session in list(self._state.sessions.items()):
            while session.trimmed < (2**48 - 1 if session.closed else session.floor):
                await self._change(ForgetOutcomes(number))

    # -- controllers ---------------------------------------------------------------------------

    async def save_controller(self, record: ControllerRecord) -> None:
        """Write a controller's record; raise Conflict when there are too many."""
        await self._change(SaveController(record))

    async def forget_controller(self, name: str) -> None:
        """Delete a controller's record; raise NotFound."""
        await self._change(ForgetController(name))

    # -- members -------------------------------------------------------------------------------

    @property
    def members(self) -> Mapping[bytes, MemberRecord]:
        """Whose each public key is, or was."""
        return self._state.members

    @property
    def members_version(self) -> int:
        """Another number after each change of the members."""
        return self._state.members_version

    @property
    def tokens(self) -> Mapping[bytes, TokenRecord]:
        """The join tokens by public key."""
        return self._state.tokens

    async def change_members(self, change: AddToken | ForgetTokens | Enrol | AddFounders | Revoke) -> Any:
        """Carry out a change of the members or tokens; return and raise what it does. One at a time."""
        return await self._change(change)

    # -- pools and garbage ---------------------------------------------------------------------

    async def save_pool(self, record: PoolRecord) -> PoolRecord:
        """Write a pool's record, with number 0 under a new number; return it as it was written."""
        return await self._change(SavePool(record))

    async def has_garbage(self, pool: int) -> bool:
        """Return whether a pool holds shards that it may drop now."""
        return bool(await self.garbage(pool, None, 1))

    async def garbage(self, pool: int, after: ExtentId | None, limit: int) -> list[ExtentId]:
        """Return a page of dead extents past their grace that a pool must still confirm, oldest first.

        `after` is the last of the page before. Was it confirmed by everybody since, the page begins with
        the oldest again.
        """
        self.check()
        ripe = self._grace.ripe(self._clock.now())
        if ripe < 0:
            return []
        start = work_key(pool, 0)
        if after is not None:
            (entry,) = await self._engine.get((garbage_key(after),))
            if entry is not None:
                start = work_key(pool, unpack_garbage(entry.value).epoch, after) + b"\0"
        found = await self._engine.range(start, work_key(pool, ripe + 1), limit)
        return [parse_work(entry.key) for entry in found]

    async def confirm_dropped(self, pool: int, extents: Sequence[ExtentId]) -> None:
        """Note that a pool holds no shard of these dead extents any more."""
        await self._change(ConfirmGarbage(pool, extents))

    async def review(self, pool: int, holdings: Sequence[Holding]) -> list[Holding]:
        """Return those of a pool's shards that are dead.

        Dead are: shards of garbage past its grace; shards that a live extent's record places on another pool;
        and shards of extents without a record, once no commit can name them: their session is closed, or they
        lie below its floor. Shards of a session that this catalogue does not know are never dead: they belong
        to another history of it. While a restored catalogue is compared with the pools, no shard is that an
        extent's record names at all.
        """
        self.check()
        # What allows a drop is read before what forbids it: a commit that was judged before the floor
        # rose is then seen as a record.
        placed = self._state.restored_ms is None
        ripe = self._grace.ripe(self._clock.now())
        over = [self._is_over(holding.extent) for holding in holdings]
        keys = [extent_key(holding.extent) for holding in holdings]
        keys += [garbage_key(holding.extent) for holding in holdings]
        found = await self._engine.get(keys)
        records, garbage = found[: len(holdings)], found[len(holdings) :]
        return [
            holding
            for holding, record, dead, is_over in zip(holdings, records, garbage, over, strict=True)
            if _is_dead(pool, holding, record, dead, ripe, is_over=is_over, placed=placed)
        ]

    async def adopt(
        self, operation: OperationId, name: str, version: Version, extents: Sequence[Extent]
    ) -> Receipt:
        """Enter a version of a session that this catalogue does not know, under a name like this one.

        Raise Conflict when any of it has a record or is garbage, or its session is known; NotEnoughShards,
        SessionClosed, InvalidRequest.
        """
        return await self._change(AdoptVersion(operation, name, version, extents))

    async def swap_extent(
        self, operation: OperationId, version: VersionId, place: int, old: ExtentId, new: Extent
    ) -> None:
        """Let a version name a newly coded extent in the place of the one that it names there.

        Raise Conflict when that one is not there any more or the new one lacks shards, SessionClosed, and
        InvalidRequest.
        """
        await self._change(SwapExtent(operation, version, place, old, new))

    async def drop_orphans(self, orphans: Sequence[tuple[ExtentId, Sequence[int]]]) -> list[ExtentId]:
        """Call these extents of unknown sessions dead, and these pools their holders.

        Return those that are left alone, since they have a record or a session that is known.
        """
        return await self._change(DropOrphans(orphans))

    async def reconcile(
        self, pool: int, after: ExtentId | None, held: Held, *, last: bool, compared: Collection[int] = ()
    ) -> Stretch:
        """Compare a stretch of what a pool holds with the records; see `reconciling.reconcile`.

        `compared` are the pools of which that is done since this catalogue was opened.
        """
        self.check()
        proven = None if self._state.restored_ms is None else frozenset(compared)
        judge = Judge(self._grace.ripe(self._clock.now()), self._spent, proven)
        return await reconcile(self._engine, judge, self._clock, pool, after, held, last=last)

    def _is_over(self, extent: ExtentId) -> bool:
        spent = self._spent(extent.session)
        return spent is not None and extent.counter < spent

    def _spent(self, session: int) -> int | None:
        """Return the counter below which no commit can name an extent any more, even after a crash.

        None for a session that this catalogue does not know.
        """
        found = self._state.sessions.get(session)
        if found is None:
            return None
        return _BEHIND_ALL_COUNTERS if found.closed else found.safe_floor

    # -- the writer ----------------------------------------------------------------------------

    def when_placed(self, action: Callable[[Extent], None]) -> None:
        """Have this called with each extent that is recorded from now on, or recorded with other pools."""
        self._state.on_placed = action

    @property
    def shortage(self) -> str:
        """Why nothing is added now, for the disk is full; empty while it may be."""
        return self._engine.shortage

    def failed(self) -> bool:
        """Return whether the catalogue takes no more changes."""
        return self._failure is not None

    def check(self) -> None:
        """Raise NotMaster or CatalogError when the catalogue takes no more changes."""
        if self._failure is not None:
            raise _again(self._failure)

    async def _change(self, change: Change[T]) -> T:
        self.check()
        waiting = _Waiting(change)
        self._waiting.append(waiting)
        self._wake.set()
        await waiting.done.wait()
        if waiting.error is not None:
            raise waiting.error
        result: T = waiting.result
        return result

    async def write(self) -> None:
        """Judge and commit waiting changes for ever: the writer task."""
        try:
            while True:
                if self._waiting:
                    await self._write_batch()
                else:
                    self._wake = trio.Event()
                    await self._wake.wait()
        finally:
            self._fail(CatalogError("the catalogue is closed"))

    async def _write_batch(self) -> None:
        waiting = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
        failure: DroppexError | None = CatalogError("the catalogue was closed before this was decided")
        try:
            await self._judge_and_commit(waiting)
            failure = None
        except (CatalogError, NotMaster) as error:
            failure = error
        finally:
            for one in waiting:
                if failure is not None:
                    one.error = _again(failure)
                one.done.set()
            if failure is not None and not isinstance(failure, CatalogFull):
                self._fail(failure)

    async def _judge_and_commit(self, waiting: list[_Waiting]) -> None:
        """Commit these changes, or the first of them: the rest is taken off the list and waits on."""
        batch = Batch(self._engine, self._state, self._grace, self._runtime)
        await batch.load([key for one in waiting for key in one.change.reads()])
        for index, one in enumerate(waiting):
            if batch.size > MAX_BATCH_KEYS or batch.bytes > self._engine.most_bytes // 4:
                self._waiting.extendleft(reversed(waiting[index:]))
                del waiting[index:]
                break
            try:
                one.result = await one.change.judge(batch)
            except DroppexError as error:
                if isinstance(error, CatalogError) and not isinstance(error, CatalogFull):
                    raise
                one.error = error
        await self._commit(batch)

    async def _commit(self, batch: Batch) -> None:
        operations = batch.operations()
        try:
            if operations and await self._engine.txn((self._fence,), operations) is None:
                raise NotMaster("another controller has become the master")
        except CatalogFull:
            batch.refused()
            raise
        self._large_changes += batch.large_changed
        batch.committed()

    def depose(self) -> None:
        """Take no more changes and answer no more: another controller may be the master."""
        self._fail(NotMaster("another controller may be the master by now"))

    def _fail(self, error: DroppexError) -> None:
        """Refuse everything from now on: what is in memory may differ from what is on the disk."""
        if self._failure is None:
            self._failure = error
        while self._waiting:
            one = self._waiting.popleft()
            one.error = _again(error)
            one.done.set()


def _again(error: DroppexError) -> DroppexError:
    """Return an error like this one, to be raised in another task."""
    return type(error)(str(error))


def _degraded_after(survives: int, extent: ExtentId) -> bytes:
    return degraded_key(survives, extent) + b"\0"


def _is_dead(
    pool: int,
    holding: Holding,
    record: Entry | None,
    dead: Entry | None,
    ripe: int,
    *,
    is_over: bool,
    placed: bool,
) -> bool:
    if record is not None:
        if not placed:
            return False
        pools = unpack_extent(holding.extent, record.value).extent.pools
        return holding.shard < len(pools) and pools[holding.shard] not in (pool, MISSING)
    if dead is not None:
        return unpack_garbage(dead.value).epoch <= ripe
    return is_over


class Identity(NamedTuple):
    """What a master is known by."""

    cluster_id: bytes
    incarnation: bytes
    term: int
    term_revision: int


async def _begin_term(
    engine: Engine, runtime: Runtime, expected: bytes, begins_with: bytes, above_term: int
) -> Identity:
    """Begin the next term, and in an empty engine a new cluster, unless one is expected there."""
    while True:
        cluster, term, terms, copying = await engine.get((CLUSTER, TERM, TERMS, COPYING))
        if copying is not None:
            raise CatalogError(
                "a catalogue was being copied here, and that broke off: run `droppexd catalog copy` again"
            )
        found = unpack_fields(cluster.value, "cluster")[0] if cluster else b""
        expected = expected or (begins_with if found else b"")
        if expected and found != expected:
            raise IdentityError(
                f"this controller is of the cluster {expected.hex()}, and its catalogue "
                + (f"of {found.hex()}" if found else "is empty")
            )
        compare = [compare_term(term)]
        number = max(unpack_fields(term.value, "term")[0] if term else 0, above_term) + 1
        then = begin_term(number, term, terms)
        if cluster is not None:
            cluster_id, incarnation = unpack_fields(cluster.value, "cluster")
        else:
            cluster_id, incarnation = begins_with or runtime.entropy.token(16), runtime.entropy.token(16)
            compare.append(Compare(CLUSTER, 0))
            then.append(Operation(CLUSTER, pack_fields((cluster_id, incarnation))))
            then.append(Operation(NEXT_POOL, pack_fields((1,))))
        revision = await engine.txn(compare, then)
        if revision is not None:
            return Identity(cluster_id, incarnation, number, revision)


async def read_all(engine: Ranges, prefix: bytes) -> list[Entry]:
    """Return all entries with a prefix: for what there are not too many of."""
    entries: list[Entry] = []
    start, end = prefix, end_of(prefix)
    while True:
        some = await engine.range(start, end, MAX_RANGE)
        entries += some
        if len(some) < MAX_RANGE:
            return entries
        start = some[-1].key + b"\0"


async def _read_state(engine: Engine) -> State:
    next_pool, totals, restored, rebuilt, version = await engine.get(
        (NEXT_POOL, TOTALS, RESTORED, REBUILT, MEMBERS_VERSION)
    )
    if next_pool is None:
        raise CatalogError("the catalogue is damaged: the next number is missing; restore a copy of it")
    pools = [unpack_pool(entry.value) for entry in await read_all(engine, POOLS)]
    controllers = [unpack_controller(entry.value) for entry in await read_all(engine, CONTROLLERS)]
    return State(
        next_pool=unpack_fields(next_pool.value, "next pool")[0],
        totals=unpack_totals(totals.value) if totals else Totals(),
        restored_ms=unpack_fields(restored.value, "restored")[0] if restored else None,
        rebuilt_from=unpack_fields(rebuilt.value, "rebuilt")[0] if rebuilt else None,
        pools={pool.number: pool for pool in pools},
        controllers={controller.name: controller for controller in controllers},
        members={
            (public := entry.key[len(MEMBERS) :]): unpack_member(public, entry.value)
            for entry in await read_all(engine, MEMBERS)
        },
        members_version=unpack_fields(version.value, "members")[0] if version else 0,
        tokens={
            (public := entry.key[len(TOKENS) :]): unpack_token(public, entry.value)
            for entry in await read_all(engine, TOKENS)
        },
        uploads={
            (upload := VersionId(*parse_id(entry.key))): unpack_upload(upload, entry.value)
            for entry in await read_all(engine, UPLOADS)
        },
        sessions={
            parse_session(entry.key): Session.of(unpack_session(entry.value))
            for entry in await read_all(engine, SESSIONS)
        },
        placements={
            parse_placement(entry.key): Counts(*unpack_fields(entry.value, "placement"))
            for entry in await read_all(engine, PLACEMENTS)
        },
    )


@asynccontextmanager
async def open_catalogue(
    engine: Engine,
    runtime: Runtime,
    *,
    delete_grace_s: float = 60.0,
    cluster_id: bytes = b"",
    begins_with: bytes = b"",
    above_term: int = 0,
) -> AsyncIterator[Catalogue]:
    """Become the master of the catalogue in this engine: begin a term and open it.

    The engine stays the caller's. The term is the next one, or the next above `above_term`. Garbage is kept
    for `delete_grace_s`, and for as long after each opening.
    Raise CatalogError when the catalogue cannot be read or written, and IdentityError when it is not of the
    cluster `cluster_id`, where that is given. An empty engine becomes that of the cluster `begins_with`.
    """
    identity = await _begin_term(engine, runtime, cluster_id, begins_with, above_term)
    catalogue = Catalogue(engine, runtime, await _read_state(engine), delete_grace_s, identity)
    async with open_background() as nursery:
        nursery.start_soon(catalogue.write)
        yield catalogue
