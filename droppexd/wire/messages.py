"""Every kind of message. A request names its reply and the roles that may send it.

A message is a header (this record, packed) and raw body frames; `body_frames` and `body_bytes` bound the
body. Kind numbers are never used again. This module imports neither trio nor zmq.
"""

from collections.abc import Callable, Collection
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar, dataclass_transform

from droppexd.errors import DroppexError, LocalProtocolError, from_wire
from droppexd.held import HELD_BYTES
from droppexd.model import (
    CHUNK_SIZE,
    EXTENT_CHUNKS,
    MAX_EXTENTS,
    MAX_K,
    MAX_M,
    MAX_NAME_BYTES,
    MEMBER_ROLES,
    SMALL_SIZE,
    UNKNOWN_PLACE,
    Address,
    Checksum,
    ClusterMap,
    ClusterStatus,
    Digest,
    Extent,
    ExtentId,
    ExtentPlaces,
    FileEntry,
    FileName,
    Holding,
    Label,
    Layout,
    Metadata,
    OperationId,
    PlaceInVersion,
    PoolNumber,
    Receipt,
    Role,
    ScrubReport,
    Survives,
    Token16,
    Trouble,
    Version,
    VersionId,
)
from droppexd.schema import Bounds, record

PROTOCOL_VERSION = 1
"""Told with every message, and one more in a release that adds a kind or a field of a message.

A peer of the version before and one of the version after are talked to as well. So within one step a kind
may only be added, and a field only behind the others and with a default: see ADR 12.
"""

FIRST_VERSION = 1

MOST_TOGETHER = 4
"""Consecutive chunks, or pieces of one shard, that one message may carry: one a frame.

Each is as large as before; what is saved is the work around a message, at both of its ends.
"""

MAX_BODY_FRAMES = MAX_K
"""Frames of file content in one answer: at the least, all data pieces of one chunk."""

PAGE_LIMIT = 1000
"""Names, shards or extents in one page of anything."""


class Message:
    """A kind of message. Subclasses are records made by `message`."""

    __slots__ = ()
    kind: ClassVar[int]
    body_frames: ClassVar[int] = 0
    body_bytes: ClassVar[int] = 0


class Reply(Message):
    """An answer to a request."""

    __slots__ = ()


R = TypeVar("R", bound=Reply)


class Request(Message, Generic[R]):
    """Something asked of a peer, answered by an R or by Failed."""

    __slots__ = ()
    reply: ClassVar[type[Reply]]
    callers: ClassVar[frozenset[Role]]


M = TypeVar("M", bound=Message)

KINDS: dict[int, type[Message]] = {}
"""Every kind by its number."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def message(
    kind: int,
    *,
    reply: type[Reply] | None = None,
    callers: Collection[Role] = (),
    body_frames: int = 0,
    body_bytes: int = 0,
) -> Callable[[type[M]], type[M]]:
    """Make a class a record and enter it into KINDS."""

    def decorate(cls: type[M]) -> type[M]:
        made: Any = record(cls)
        if kind in KINDS:
            raise LocalProtocolError(f"kind {kind} is both {KINDS[kind].__name__} and {cls.__name__}")
        made.kind = kind
        made.body_frames = body_frames
        made.body_bytes = body_bytes
        if issubclass(cls, Request):
            if reply is None or not callers:
                raise LocalProtocolError(f"{cls.__name__} names no reply or no callers")
            made.reply = reply
            made.callers = frozenset(callers)
        KINDS[kind] = made
        return made  # type: ignore[no-any-return]

    return decorate


_CLIENT = (Role.CLIENT, Role.APP)
_APP = (Role.APP,)
_POOL = (Role.POOL,)
_ANYONE = MEMBER_ROLES

Extents = Annotated[tuple[Extent, ...], Bounds(0, MAX_EXTENTS)]
Pattern = Annotated[str, Bounds(0, MAX_NAME_BYTES)]
Credit = Annotated[int, Bounds(0, 64)]
Together = Annotated[int, Bounds(1, MOST_TOGETHER)]
StreamId = Annotated[int, Bounds(0, 2**63 - 1)]
ErrorDetails = Annotated[tuple[Annotated[str, Bounds(0, 1024)], ...], Bounds(0, 256)]
BootId = Annotated[bytes, Bounds(0, 16)]
Limit = Annotated[int, Bounds(1, PAGE_LIMIT)]


# -- any role --------------------------------------------------------------------------------------


@message(1)
class Failed(Reply):
    """The answer to a request that could not be done: an error of `droppexd.errors`."""

    code: Annotated[str, Bounds(0, 64)]
    text: Annotated[str, Bounds(0, 8192)]
    details: ErrorDetails = ()

    @classmethod
    def of(cls, error: DroppexError) -> "Failed":
        """Return the message for an error, cut to what fits."""
        details = tuple(detail[:1024] for detail in error.details[:256])
        return cls(code=error.code, text=str(error)[:8192], details=details)

    def error(self) -> DroppexError:
        """Return the error as it was raised on the other side."""
        return from_wire(self.code, self.text, self.details)


@message(2)
class Done(Reply):
    """The request was carried out; there is nothing more to say."""


@message(4)
class Pong(Reply):
    """Who answers a Ping, what it runs, and what time it is there. An older release leaves the last three."""

    role: Label
    name: Label
    boot_id: BootId
    term: int = 0
    release: Label = ""
    python: Label = ""
    wall_ms: int = 0


@message(3, reply=Pong, callers=_ANYONE)
class Ping(Request[Pong]):
    """Ask a peer who it is."""


# -- client to app: files in -----------------------------------------------------------------------


@record
class Condition:
    """What must hold of a name for a change of it: `absent`, or pointing at `version`; neither: anything."""

    absent: bool = False
    version: VersionId | None = None


ANYTHING = Condition()
ABSENT = Condition(absent=True)


@message(11)
class Stored(Reply):
    """The put is durable and has its name."""

    receipt: Receipt


@message(10, reply=Stored, callers=_CLIENT, body_frames=1, body_bytes=SMALL_SIZE)
class PutSmall(Request[Stored]):
    """Store a whole small file; the body is its content."""

    name: FileName
    condition: Condition
    blake3: Digest
    layout: Layout | None = None
    metadata: Metadata = ()


@message(13)
class PutOpened(Reply):
    """A put has begun: send chunks of `chunk_size`, at most `credit` unanswered and `together` a message.

    With `digests` an earlier put from the same source was interrupted, and these are of the extents that it
    left (`coding.extent_digest`): PutResume must say how many of them are those of the source still.
    """

    stream: StreamId
    credit: Credit
    chunk_size: Annotated[int, Bounds(1, CHUNK_SIZE)]
    together: Together = 1
    digests: Annotated[tuple[Digest, ...], Bounds(0, MAX_EXTENTS)] = ()


@message(12, reply=PutOpened, callers=_CLIENT)
class PutOpen(Request[PutOpened]):
    """Begin to store a file, of `size` bytes when that is known.

    With `source` it can be gone on with by a put from the same source, should it be interrupted.
    """

    name: FileName
    condition: Condition
    size: int | None = None
    layout: Layout | None = None
    metadata: Metadata = ()
    source: Annotated[bytes, Bounds(0, 32)] = b""


@message(15)
class PutProgress(Reply):
    """The chunks are with their pools; at most `credit` may now be unanswered. The last has the receipt."""

    credit: Credit
    receipt: Receipt | None = None


@message(
    14,
    reply=PutProgress,
    callers=_CLIENT,
    body_frames=MOST_TOGETHER,
    body_bytes=MOST_TOGETHER * CHUNK_SIZE,
)
class PutChunk(Request[PutProgress]):
    """Send chunks, in order, one a frame; `sequence` is the number of the first.

    `checksums` has one for each (`coding.chunk_checksum`). Only the last chunk of all may be short. The
    message that holds it says so, and brings the BLAKE3 of the whole.
    """

    stream: StreamId
    sequence: int
    last: bool = False
    blake3: Digest | None = None
    checksums: Annotated[tuple[Checksum, ...], Bounds(0, MOST_TOGETHER)] = ()


@message(16, reply=Done, callers=_CLIENT)
class PutAbort(Request[Done]):
    """Give up a put: nothing of it becomes visible."""

    stream: StreamId


@message(17, reply=Done, callers=_CLIENT)
class KeepStream(Request[Done]):
    """Say that an open put or get goes on, though nothing was sent or asked for some time."""

    stream: StreamId
    put: bool


# -- client to app: files out ----------------------------------------------------------------------


@message(21, body_frames=MAX_BODY_FRAMES, body_bytes=SMALL_SIZE + CHUNK_SIZE)
class GetOpened(Reply):
    """What the name holds. Small content is the body and `stream` is 0; else ask for its chunks.

    `start` and `end` delimit the bytes that will be sent. The stream sends `parts` parts, up to `together`
    of them in one answer.
    """

    stream: StreamId
    credit: Credit
    version: VersionId
    size: int
    start: int
    end: int
    parts: int
    blake3: Digest
    created_ms: int
    metadata: Metadata = ()
    rebuilt: bool = False
    together: Together = 1


@message(20, reply=GetOpened, callers=_CLIENT)
class GetOpen(Request[GetOpened]):
    """Begin to read a name, or a part of it; with `version`, only that version."""

    name: FileName
    start: int = 0
    length: int | None = None
    version: VersionId | None = None


@message(23, body_frames=MAX_BODY_FRAMES, body_bytes=MOST_TOGETHER * CHUNK_SIZE)
class GetData(Reply):
    """The parts asked for: the body frames one after another. In `rebuilt` of them pieces were missing."""

    credit: Credit
    rebuilt: Annotated[int, Bounds(0, MOST_TOGETHER)] = 0


@message(22, reply=GetData, callers=_CLIENT)
class GetPart(Request[GetData]):
    """Ask for `count` parts of an open read from `part` on, of 0 to `parts` - 1, in any order."""

    stream: StreamId
    part: int
    count: Together = 1


@message(24, reply=Done, callers=_CLIENT)
class GetClose(Request[Done]):
    """The reader needs no more."""

    stream: StreamId


# -- client to app, app to controller: names -------------------------------------------------------


@message(31)
class Listed(Reply):
    """A page of entries; ask again with `after = next` unless it is empty."""

    entries: Annotated[tuple[FileEntry, ...], Bounds(0, PAGE_LIMIT)]
    next: Annotated[str, Bounds(0, MAX_NAME_BYTES + 8)] = ""
    told_by: Label = ""
    """A controller that is not the master, or may not be: what it says may be old. Empty: this is current."""
    age_ms: int | None = None
    """How old that is at most; None when nobody knows."""


@message(30, reply=Listed, callers=_CLIENT)
class List(Request[Listed]):
    """List names that start with `prefix`, in order, after the name `after`.

    Without `recursive`, names with a slash behind the prefix are folded into one folder entry. Where there is
    no master, what another controller knows is the answer when it may be stale.
    """

    prefix: Pattern = ""
    recursive: bool = False
    after: Annotated[str, Bounds(0, MAX_NAME_BYTES + 8)] = ""
    limit: Limit = PAGE_LIMIT
    stale_ok: bool = False


@message(32, reply=Listed, callers=_CLIENT)
class Find(Request[Listed]):
    """List names that match a glob (`*`, `**`, `?`, `[...]`); a page may be empty and not the last."""

    pattern: Pattern
    after: Annotated[str, Bounds(0, MAX_NAME_BYTES + 8)] = ""
    limit: Limit = PAGE_LIMIT


@message(34)
class Described(Reply):
    """All that is known of one file, and where its shards are now."""

    name: FileName
    version: VersionId
    size: int
    blake3: Digest
    created_ms: int
    names: int
    metadata: Metadata
    extents: Annotated[tuple[ExtentPlaces, ...], Bounds(0, MAX_EXTENTS)]
    survives_pools: Survives | None
    """None, as `survives_machines`, for an empty file: it is kept in the catalogue alone."""
    survives_machines: Survives | None


@message(33, reply=Described, callers=_CLIENT)
class Describe(Request[Described]):
    """Describe one file (`droppex stat`)."""

    name: FileName


@message(36)
class Changed(Reply):
    """A change of names is durable."""

    version: VersionId


@message(35, reply=Changed, callers=_CLIENT)
class Remove(Request[Changed]):
    """Remove a name. `operation` is set by the app, which a client never is."""

    name: FileName
    condition: Condition = ANYTHING
    operation: OperationId | None = None


@message(37, reply=Changed, callers=_CLIENT)
class Rename(Request[Changed]):
    """Give a file another name (`mv`), or one more (`cp`, with `keep`); metadata only.

    `condition` is about the target name.
    """

    source: FileName
    target: FileName
    condition: Condition = ABSENT
    keep: bool = False
    operation: OperationId | None = None


@message(39)
class Status(Reply):
    """The cluster at a glance."""

    status: ClusterStatus
    apps: Annotated[tuple[Address, ...], Bounds(0, 256)] = ()


@message(38, reply=Status, callers=_CLIENT)
class GetStatus(Request[Status]):
    """Ask how the cluster is."""


# -- app to controller -----------------------------------------------------------------------------


@message(51)
class SessionOpened(Reply):
    """The app's session; ids are (session, counter) with counters from 1."""

    session: int
    lease_ms: int
    map: ClusterMap


@message(50, reply=SessionOpened, callers=_APP)
class OpenSession(Request[SessionOpened]):
    """Register an app with the master."""

    address: Address
    boot_id: Token16


@message(53)
class SessionKept(Reply):
    """The session lives; `map` comes when it changed."""

    map: ClusterMap | None = None


@message(52, reply=SessionKept, callers=_APP)
class KeepSession(Request[SessionKept]):
    """The app's heartbeat. `floor` is its lowest counter still in use."""

    session: int
    floor: int
    map_version: int


@message(54, reply=Done, callers=_APP)
class CloseSession(Request[Done]):
    """The app goes away in order: ids of this session are used no more."""

    session: int


@message(56)
class Committed(Reply):
    """The version has its name; the same answer however often the commit is repeated."""

    receipt: Receipt


@message(55, reply=Committed, callers=_APP)
class Commit(Request[Committed]):
    """Make an uploaded version visible under a name, in one transaction."""

    operation: OperationId
    name: FileName
    condition: Condition
    version: Version
    extents: Extents
    note: Annotated[str, Bounds(0, 1024)] = ""


@message(58)
class Found(Reply):
    """What a name points at, with all its extents."""

    name: FileName
    version: Version
    extents: Extents


@message(57, reply=Found, callers=_APP)
class Lookup(Request[Found]):
    """Look a name up, or one version (which may have lost this name since)."""

    name: FileName
    version: VersionId | None = None


# -- pool to controller ----------------------------------------------------------------------------


@message(71)
class Welcomed(Reply):
    """The pool is known to the catalogue under `number`."""

    number: PoolNumber
    cluster_id: Token16
    incarnation: Token16
    term: int
    heartbeat_ms: int
    ruling: int = 0


@message(70, reply=Welcomed, callers=_POOL)
class Announce(Request[Welcomed]):
    """A pool that started says who it is and where; `cluster_id` is empty before its first time."""

    pool_id: Token16
    cluster_id: BootId
    boot_id: Token16
    previous_boot_id: BootId
    name: Label
    machine: Label
    zone: Label
    address: Address
    capacity: int
    free: int
    shards: int
    read_only: bool
    trouble: Trouble = ""


@message(73)
class Heard(Reply):
    """The master has heard. `review` asks the pool to look through its garbage now, `work` to take work.

    `ruling` is another number after each decision about shards of unknown sessions: who has some compares
    them with the records again. Its part above 32 bits is another for each start of a master: who hears of
    one compares everything, for its records may be those of an older copy.
    """

    review: bool
    term: int
    work: bool = False
    ruling: int = 0


@message(72, reply=Heard, callers=_POOL)
class Heartbeat(Request[Heard]):
    """A pool lives, and how full it is. `reconciled` once it has compared what it holds with the records.

    `trouble` is why it is `read_only`. `compared` is the start of a master, as rulings have it in their upper
    half, since which it has compared everything.
    """

    number: PoolNumber
    boot_id: Token16
    capacity: int
    free: int
    shards: int
    read_only: bool
    reconciled: bool = True
    quarantined: int = 0
    scrub: ScrubReport = ScrubReport()
    trouble: Trouble = ""
    compared: int = 0


ExtentIds = Annotated[tuple[ExtentId, ...], Bounds(0, PAGE_LIMIT)]
Holdings = Annotated[tuple[Holding, ...], Bounds(0, PAGE_LIMIT)]
ShardIndex = Annotated[int, Bounds(0, MAX_K + MAX_M - 1)]


@message(75)
class GarbagePage(Reply):
    """Extents whose shards on this pool may go: dead, and past the grace."""

    extents: ExtentIds


@message(74, reply=GarbagePage, callers=_POOL)
class ListGarbage(Request[GarbagePage]):
    """Ask which extents the pool should look at, after `after`."""

    number: PoolNumber
    after: ExtentId | None = None
    limit: Limit = PAGE_LIMIT


@message(77)
class Verdicts(Reply):
    """The shards of the page that are dead; the pool drops exactly these instances."""

    drop: Holdings
    term: int


@message(76, reply=Verdicts, callers=_POOL)
class Review(Request[Verdicts]):
    """Ask about shards that the pool holds."""

    number: PoolNumber
    holdings: Holdings


@message(78, reply=Done, callers=_POOL)
class ConfirmDropped(Request[Done]):
    """The pool holds no shard of these extents any more."""

    number: PoolNumber
    extents: ExtentIds


# -- pool to controller: what is there, what is lost, what is to be rebuilt -------------------------


class ExpectedShard(NamedTuple):
    """A shard that a record names for a pool, or wants and a pool may have; `edition` is the record's."""

    extent: ExtentId
    shard: ShardIndex
    edition: int


ExpectedShards = Annotated[tuple[ExpectedShard, ...], Bounds(0, PAGE_LIMIT)]


@message(61)
class Reconciled(Reply):
    """What the records say of a stretch of a pool's shards, which ends with all shards of `upto`.

    `absent`: the records name them, the page did not. `wanted`: the page has them, the records call them
    missing: verify them and report them stored. `drop`: dead. `unknown`: of sessions that this catalogue
    does not know; they are kept. Without `upto` nothing follows.
    """

    absent: ExpectedShards
    wanted: ExpectedShards
    drop: Holdings
    unknown: Holdings
    term: int
    upto: ExtentId | None = None


MOST_HELD = 4000
"""Holdings in one `Reconcile`."""


@message(100, reply=Reconciled, callers=_POOL, body_frames=1, body_bytes=MOST_HELD * HELD_BYTES)
class Reconcile(Request[Reconciled]):
    """Compare a stretch of what a pool holds with the records, both ways.

    The stretch begins behind all shards of `after` and ends with the last holding; with `last` it has no end.
    The holdings are the body, as `held.py` packs them.
    """

    number: PoolNumber
    boot_id: Token16
    after: ExtentId | None = None
    last: bool = False


class LostShard(NamedTuple):
    """A shard that a pool should have and has not, or has with damaged bytes."""

    extent: ExtentId
    shard: ShardIndex
    damaged: bool


@message(62, reply=Done, callers=_POOL)
class ReportLost(Request[Done]):
    """Tell that shards are absent or damaged: where the records name them for this pool, they are missing.

    An extent of which fewer than k shards would be left keeps its record: some piece may still be readable.
    """

    number: PoolNumber
    boot_id: Token16
    shards: Annotated[tuple[LostShard, ...], Bounds(0, PAGE_LIMIT)]


class RepairOrder(NamedTuple):
    """Rebuild shard `shard` of an extent and keep it; `extent` says where the others are."""

    extent: Extent
    shard: ShardIndex


MAX_ORDERS = 256
"""Orders in one answer, and results in one report."""


class PoolAddress(NamedTuple):
    """Where a pool can be reached."""

    number: PoolNumber
    address: Address


@message(65)
class Work(Reply):
    """Shards that the pool is to rebuild; none when there is nothing for it now.

    `pools` are those of the extents that can be read from.
    """

    orders: Annotated[tuple[RepairOrder, ...], Bounds(0, MAX_ORDERS)]
    pools: Annotated[tuple[PoolAddress, ...], Bounds(0, 4096)]
    term: int


@message(64, reply=Work, callers=_POOL)
class TakeWork(Request[Work]):
    """Ask for at most `room` orders. `running` are those in work: others of this pool are handed out anew.

    `failed` could not be carried out; they are tried again later, or elsewhere.
    """

    number: PoolNumber
    boot_id: Token16
    room: Annotated[int, Bounds(0, MAX_ORDERS)]
    running: ExtentIds = ()
    failed: ExtentIds = ()


@message(67)
class Recorded(Reply):
    """The records name the pool for these shards now, those that were refused apart."""

    refused: ExpectedShards


@message(66, reply=Recorded, callers=_POOL)
class ShardsStored(Request[Recorded]):
    """Tell that the pool has these shards, flushed, read back and verified.

    Each is recorded if the extent's record still has that edition.
    """

    number: PoolNumber
    boot_id: Token16
    shards: ExpectedShards


# -- client to app, app to controller: pools -------------------------------------------------------


@message(69)
class PoolReplaced(Reply):
    """The pool is removed for good; so many extents had a shard there."""

    number: PoolNumber
    name: Label
    shards: int


@message(68, reply=PoolReplaced, callers=_CLIENT)
class ReplacePool(Request[PoolReplaced]):
    """Remove a pool that is lost, by name or number: its shards are rebuilt elsewhere.

    Without `force` refused while it is up, and when files would be lost with it.
    """

    pool: Label
    force: bool = False


# -- orphans: client to app, app to controller and to pools ----------------------------------------

ORPHANS_LIMIT = 500
"""Shards, or extents, of unknown sessions in one page, about: each may bring a name of 1 KiB."""

ORPHANS_AT_ONCE = 12
"""Extents that a pool is asked about by their ids: a page holds all shards of each."""

MAX_HOLDERS = 64
"""Shards of one extent that are told of: those of a layout, and some that pools have twice."""


@record
class OrphanHeader:
    """What the header of a shard says of it: all but its checksums."""

    incarnation: Token16
    layout: Layout
    size: Annotated[int, Bounds(1, CHUNK_SIZE * EXTENT_CHUNKS)]
    chunk_size: Annotated[int, Bounds(1, CHUNK_SIZE)]
    version: VersionId
    name: Annotated[str, Bounds(0, MAX_NAME_BYTES)] = ""
    place: PlaceInVersion = UNKNOWN_PLACE


class OrphanShard(NamedTuple):
    """A shard that a pool holds; without a header when that is damaged."""

    holding: Holding
    header: OrphanHeader | None


@message(99)
class OrphansFound(Reply):
    """A page of shards, with all that the pool has of each extent.

    It ends with `upto`; without that nothing follows. `complete` tells that the pool has compared what it
    holds with the records, and remembers every session that these do not know.
    """

    shards: Annotated[tuple[OrphanShard, ...], Bounds(0, ORPHANS_LIMIT + MAX_K + MAX_M)]
    complete: bool
    upto: ExtentId | None = None


@message(98, reply=OrphansFound, callers=_APP)
class FindOrphans(Request[OrphansFound]):
    """Ask which shards a pool holds that the records do not know, behind all of the extent `after`.

    With `extents`: what it holds of these, whatever the records say.
    """

    after: ExtentId | None = None
    limit: Annotated[int, Bounds(1, ORPHANS_LIMIT)] = ORPHANS_LIMIT
    extents: Annotated[tuple[ExtentId, ...], Bounds(0, ORPHANS_AT_ONCE)] = ()


class OrphanPlace(NamedTuple):
    """A pool that holds a shard of an extent. `agrees`: its header can be read, and says what most say."""

    shard: ShardIndex
    pool: PoolNumber
    agrees: bool


@record
class OrphanExtent:
    """An extent without a record, whose session the catalogue does not know, and who has shards of it.

    `header` is what most headers say; None when all are damaged.
    """

    id: ExtentId
    header: OrphanHeader | None
    places: Annotated[tuple[OrphanPlace, ...], Bounds(0, MAX_HOLDERS)]


@message(47)
class OrphansListed(Reply):
    """A page of orphans in the order of their ids; ask again with `after = next` unless it is None.

    `away` names pools that may hold more: they are down, did not answer, or are still comparing.
    """

    extents: Annotated[tuple[OrphanExtent, ...], Bounds(0, ORPHANS_LIMIT)]
    away: Annotated[tuple[Label, ...], Bounds(0, 256)] = ()
    next: ExtentId | None = None


@message(46, reply=OrphansListed, callers=_CLIENT)
class ListOrphans(Request[OrphansListed]):
    """List the extents of which pools hold shards and which the catalogue never knew, behind `after`."""

    after: ExtentId | None = None
    limit: Annotated[int, Bounds(1, ORPHANS_LIMIT)] = ORPHANS_LIMIT


@message(49)
class Adoption(Reply):
    """How far an adoption is, in bytes; the receipt once it is done."""

    read: int
    size: int
    receipt: Receipt | None = None


@message(48, reply=Adoption, callers=_CLIENT)
class AdoptOrphan(Request[Adoption]):
    """Read a version whole that the catalogue does not know, and give it a name in `folder`.

    `extents` are all of its extents in order. It is answered after some seconds, done or not: ask again.
    """

    version: VersionId
    extents: Annotated[tuple[ExtentId, ...], Bounds(1, MAX_EXTENTS)]
    folder: FileName


@message(87)
class Adopted(Reply):
    """The version has a name; the same answer however often the request is repeated."""

    receipt: Receipt


@message(86, reply=Adopted, callers=_APP)
class Adopt(Request[Adopted]):
    """Enter a version that was read whole from shards, under `name` or one like it that is free.

    Refused when there is a record of any part of it, or the catalogue knows a session of it.
    """

    operation: OperationId
    name: FileName
    version: Version
    extents: Extents


class Orphan(NamedTuple):
    """An extent that no record names, and the pools that hold shards of it."""

    extent: ExtentId
    pools: Annotated[tuple[PoolNumber, ...], Bounds(0, MAX_HOLDERS)]


@message(89)
class OrphansDropped(Reply):
    """So many extents are garbage now; `refused` have a record, or a session that the catalogue knows."""

    dropped: int
    refused: ExtentIds = ()


@message(88, reply=OrphansDropped, callers=_CLIENT)
class DropOrphans(Request[OrphansDropped]):
    """Call extents dead that the catalogue never knew: the pools drop what they have of them."""

    extents: Annotated[tuple[Orphan, ...], Bounds(1, PAGE_LIMIT)]


# -- app and pool to pool --------------------------------------------------------------------------

_PEERS = (Role.APP, Role.POOL)


@message(91)
class PieceWritten(Reply):
    """The piece is taken; after the last, the shard is flushed. At most `credit` may be unanswered."""

    boot_id: Token16
    credit: Credit
    generation: int = 0


@message(
    90,
    reply=PieceWritten,
    callers=_PEERS,
    body_frames=MOST_TOGETHER,
    body_bytes=MOST_TOGETHER * CHUNK_SIZE,
)
class WritePiece(Request[PieceWritten]):
    """Write pieces of a shard, in the order of their chunks, from 0; the body is the pieces, one a frame.

    `chunk` and `checksum` are the first piece's, and `following` the checksums of those behind it.

    `boot_id` is empty for chunk 0 and then the one that the pool answered. `size` is the extent's bytes of
    file data, told with the last piece. `name` and `place`, hints of the shard's header, come with chunk 0. A
    shard of one piece is stored by this one message.
    """

    extent: ExtentId
    index: ShardIndex
    layout: Layout
    chunk: Annotated[int, Bounds(0, EXTENT_CHUNKS - 1)]
    chunk_size: Annotated[int, Bounds(1, CHUNK_SIZE)]
    checksum: Checksum
    boot_id: BootId
    incarnation: Token16
    version: VersionId
    last: bool = False
    size: Annotated[int, Bounds(0, CHUNK_SIZE * EXTENT_CHUNKS)] = 0
    name: Annotated[str, Bounds(0, MAX_NAME_BYTES)] = ""
    following: Annotated[tuple[Checksum, ...], Bounds(0, MOST_TOGETHER - 1)] = ()
    place: PlaceInVersion = UNKNOWN_PLACE


@message(92, reply=Done, callers=_PEERS)
class AbortShard(Request[Done]):
    """Give up a shard that is being written."""

    extent: ExtentId
    index: ShardIndex


@message(95, reply=Done, callers=_PEERS)
class KeepShard(Request[Done]):
    """Say that a shard that is being written goes on."""

    extent: ExtentId
    index: ShardIndex


@message(94, body_frames=MOST_TOGETHER, body_bytes=MOST_TOGETHER * CHUNK_SIZE)
class Piece(Reply):
    """Pieces as they are stored, one a frame; the reader verifies each against its checksum and identity.

    `checksum` is the first piece's, and `following` those of the pieces behind it. `version`, `name` and
    `place`, hints of the header, come to who repairs with the piece of chunk 0.
    """

    checksum: Checksum
    following: Annotated[tuple[Checksum, ...], Bounds(0, MOST_TOGETHER - 1)] = ()
    version: VersionId | None = None
    name: Annotated[str, Bounds(0, MAX_NAME_BYTES)] = ""
    place: PlaceInVersion = UNKNOWN_PLACE


@message(93, reply=Piece, callers=_PEERS)
class ReadPiece(Request[Piece]):
    """Read `count` pieces of a shard, from that of `chunk` on. `repair`: no client waits for it."""

    extent: ExtentId
    index: ShardIndex
    chunk: Annotated[int, Bounds(0, EXTENT_CHUNKS - 1)]
    count: Together = 1
    repair: bool = False


class ShardName(NamedTuple):
    """Which shard of which extent."""

    extent: ExtentId
    shard: ShardIndex


class ShardCheck(NamedTuple):
    """What reading a whole shard found: `state` is sound, absent, damaged or unreadable."""

    shard: ShardName
    state: Annotated[str, Bounds(0, 16)]
    size: int


CHECK_LIMIT = 64
"""Shards that are read in one request: 4 GiB at the most, some seconds from a page cache."""


@message(97)
class ShardsChecked(Reply):
    """What a pool found; the master knows of what is absent or damaged."""

    checks: Annotated[tuple[ShardCheck, ...], Bounds(0, CHECK_LIMIT)]


@message(96, reply=ShardsChecked, callers=_PEERS)
class CheckShards(Request[ShardsChecked]):
    """Read these shards whole and verify every piece; report what is absent or damaged to the master."""

    shards: Annotated[tuple[ShardName, ...], Bounds(1, CHECK_LIMIT)]


# -- app to pool: scrubs ---------------------------------------------------------------------------


@record
class ScrubSummary:
    """A pass through everything that a pool holds; `ended_ms` is 0 while it is under way.

    `requested` passes go at full speed. `lost` counts shards that were damaged or gone, `unreadable` those
    that the store could not judge; `trouble` says why a pass ended before everything was read.
    """

    number: int
    requested: bool
    begun_ms: int
    ended_ms: int
    shards: int
    size: int
    lost: int
    unreadable: int
    trouble: Annotated[str, Bounds(0, 1024)] = ""


@record
class ScrubProgress:
    """Where a pool's scrub is: the pass under way, and the last that ended.

    `held` shards are there now; `expected_size` is a guess of what the current pass will have read, in
    bytes, and `rate` its speed in bytes a second.
    """

    current: ScrubSummary | None
    last: ScrubSummary | None
    held: int
    expected_size: int
    rate: int


@message(81)
class ScrubState(Reply):
    """Where the pool's scrub is."""

    progress: ScrubProgress


@message(80, reply=ScrubState, callers=_APP)
class StartScrub(Request[ScrubState]):
    """Begin a pass at full speed, from the first shard, or join one that runs so."""


@message(82, reply=ScrubState, callers=_APP)
class GetScrub(Request[ScrubState]):
    """Ask where the scrub is."""


class ScrubFinding(NamedTuple):
    """A shard that was not sound. `name` and `version` are what its header says, where that can be read."""

    shard: ShardName
    state: Annotated[str, Bounds(0, 16)]
    size: int
    name: Annotated[str, Bounds(0, MAX_NAME_BYTES)]
    version: VersionId | None
    reason: Annotated[str, Bounds(0, 1024)]


@message(84)
class ScrubFindings(Reply):
    """What a pass found: the first hundred of it; none of a pass that the pool has forgotten."""

    findings: Annotated[tuple[ScrubFinding, ...], Bounds(0, 256)]


@message(83, reply=ScrubFindings, callers=_APP)
class GetScrubFindings(Request[ScrubFindings]):
    """Ask what the pass of that number found, while it is the current or the last one."""

    number: int


# -- client to app: scrubs and checks --------------------------------------------------------------


@record
class PoolScrub:
    """A pool and its scrub; without `progress` it could not be asked, and `error` says why."""

    pool: PoolNumber
    name: Label
    machine: Label
    progress: ScrubProgress | None = None
    error: Annotated[str, Bounds(0, 512)] = ""


@message(41)
class Scrubs(Reply):
    """The scrubs of all pools that count."""

    pools: Annotated[tuple[PoolScrub, ...], Bounds(0, 4096)]


@message(40, reply=Scrubs, callers=_CLIENT)
class WatchScrubs(Request[Scrubs]):
    """Ask all pools where their scrubs are; with `start`, begin or join a pass at full speed on each."""

    start: bool = False


@message(42, reply=ScrubFindings, callers=_CLIENT)
class ListFindings(Request[ScrubFindings]):
    """Ask what pass `number` of a pool found."""

    pool: PoolNumber
    number: int


class ShardFault(NamedTuple):
    """A shard of a file that does not count now.

    `extent` is its extent's place in the file, from 0. `state` is missing (by the record), absent, damaged,
    unreadable, or unreachable (its pool could not be asked); `pool` is 0 where it is missing.
    """

    extent: Annotated[int, Bounds(0, MAX_EXTENTS - 1)]
    shard: ShardIndex
    state: Annotated[str, Bounds(0, 16)]
    pool: PoolNumber
    name: Label
    machine: Label
    reason: Annotated[str, Bounds(0, 512)]


CHECKED_EXTENTS = 16
"""Extents that are checked in one request: 4 GiB of file data."""


@message(45)
class FileChecked(Reply):
    """What the pools found of some extents of a file; go on with the extent `next`, unless it is 0.

    `size` is that of the file and `extents` how many it has; `checked_size` and `shards` are about these
    extents, `verified_size` is what their sound shards take. `survives_...` counts sound shards alone.
    """

    name: FileName
    version: VersionId
    size: int
    extents: int
    next: int
    checked_size: int
    shards: int
    verified_size: int
    faults: Annotated[tuple[ShardFault, ...], Bounds(0, CHECKED_EXTENTS * (MAX_K + MAX_M))]
    survives_pools: Survives | None
    survives_machines: Survives | None


@message(44, reply=FileChecked, callers=_CLIENT)
class CheckFile(Request[FileChecked]):
    """Have the pools read every shard of some extents of a file, from the extent `first` on."""

    name: FileName
    version: VersionId | None = None
    first: Annotated[int, Bounds(0, MAX_EXTENTS - 1)] = 0
