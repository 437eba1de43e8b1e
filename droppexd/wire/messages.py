"""Every kind of message. A request names its reply and the roles that may send it.

A message is a header (this record, packed) and raw body frames; `body_frames` and `body_bytes` bound the
body. Kind numbers are never used again. This module imports neither trio nor zmq.
"""

from collections.abc import Callable, Collection
from typing import Annotated, Any, ClassVar, Generic, TypeVar, dataclass_transform

from droppexd.errors import DroppexError, LocalProtocolError, from_wire
from droppexd.model import (
    CHUNK_SIZE,
    EXTENT_CHUNKS,
    MAX_EXTENTS,
    MAX_K,
    MAX_M,
    MAX_NAME_BYTES,
    SMALL_SIZE,
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
    PoolNumber,
    Receipt,
    Role,
    Survives,
    Token16,
    Version,
    VersionId,
)
from droppexd.schema import Bounds, record

PROTOCOL_VERSION = 1

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
_ANYONE = tuple(Role)

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
    """Who answers a Ping."""

    role: Label
    name: Label
    boot_id: BootId
    term: int = 0


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
    """A put has begun: send chunks of `chunk_size`, at most `credit` unanswered and `together` a message."""

    stream: StreamId
    credit: Credit
    chunk_size: Annotated[int, Bounds(1, CHUNK_SIZE)]
    together: Together = 1


@message(12, reply=PutOpened, callers=_CLIENT)
class PutOpen(Request[PutOpened]):
    """Begin to store a file, of `size` bytes when that is known."""

    name: FileName
    condition: Condition
    size: int | None = None
    layout: Layout | None = None
    metadata: Metadata = ()


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


@message(30, reply=Listed, callers=_CLIENT)
class List(Request[Listed]):
    """List names that start with `prefix`, in order, after the name `after`.

    Without `recursive`, names with a slash behind the prefix are folded into one folder entry.
    """

    prefix: Pattern = ""
    recursive: bool = False
    after: Annotated[str, Bounds(0, MAX_NAME_BYTES + 8)] = ""
    limit: Limit = PAGE_LIMIT


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


@message(73)
class Heard(Reply):
    """The master has heard. `review` asks the pool to look through its garbage now."""

    review: bool
    term: int


@message(72, reply=Heard, callers=_POOL)
class Heartbeat(Request[Heard]):
    """A pool lives, and how full it is."""

    number: PoolNumber
    boot_id: Token16
    capacity: int
    free: int
    shards: int
    read_only: bool


ExtentIds = Annotated[tuple[ExtentId, ...], Bounds(0, PAGE_LIMIT)]
Holdings = Annotated[tuple[Holding, ...], Bounds(0, PAGE_LIMIT)]


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
    file data, told with the last piece. A shard of one piece is stored by this one message.
    """

    extent: ExtentId
    index: Annotated[int, Bounds(0, MAX_K + MAX_M - 1)]
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


@message(92, reply=Done, callers=_PEERS)
class AbortShard(Request[Done]):
    """Give up a shard that is being written."""

    extent: ExtentId
    index: Annotated[int, Bounds(0, MAX_K + MAX_M - 1)]


@message(95, reply=Done, callers=_PEERS)
class KeepShard(Request[Done]):
    """Say that a shard that is being written goes on."""

    extent: ExtentId
    index: Annotated[int, Bounds(0, MAX_K + MAX_M - 1)]


@message(94, body_frames=MOST_TOGETHER, body_bytes=MOST_TOGETHER * CHUNK_SIZE)
class Piece(Reply):
    """Pieces as they are stored, one a frame; the reader verifies each against its checksum and identity.

    `checksum` is the first piece's, and `following` those of the pieces behind it.
    """

    checksum: Checksum
    following: Annotated[tuple[Checksum, ...], Bounds(0, MOST_TOGETHER - 1)] = ()


@message(93, reply=Piece, callers=_PEERS)
class ReadPiece(Request[Piece]):
    """Read `count` pieces of a shard, from that of `chunk` on."""

    extent: ExtentId
    index: Annotated[int, Bounds(0, MAX_K + MAX_M - 1)]
    chunk: Annotated[int, Bounds(0, EXTENT_CHUNKS - 1)]
    count: Together = 1
