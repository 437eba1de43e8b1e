"""The words of the design as frozen values: ids, layouts, the cluster map and the catalogue's records.

Everything here is pure. Sizes are in bytes, times in milliseconds since 1970 (for people only).
"""

import enum
import struct
from typing import Annotated, NamedTuple, Self

from droppexd.errors import InvalidName, InvalidRequest
from droppexd.schema import Bounds, record

CHUNK_SIZE = 4 * 1024 * 1024
"""The coding unit: bytes of file data in a chunk, the last of a file apart."""

EXTENT_CHUNKS = 64
"""The placement unit: chunks in an extent, the last of a file apart."""

SMALL_SIZE = 128 * 1024
"""Files up to here are stored as copies (1+m), and shards up to here in the pool's database."""

MAX_EXTENTS = 16384
"""Extents of one version: 4 TiB at 256 MiB each. Keeps look-ups and commits within one message."""

MAX_NAME_BYTES = 1024
DEFAULT_FOLDER = "files"
MAX_K, MAX_M = 32, 8
MISSING = 0
"""Stands in an extent record for a shard that no pool holds. Pool numbers start at 1."""

DIGEST_BYTES = 32
CHECKSUM_BYTES = 16

Digest = Annotated[bytes, Bounds(DIGEST_BYTES, DIGEST_BYTES)]
"""BLAKE3 of a version's content."""
Checksum = Annotated[bytes, Bounds(CHECKSUM_BYTES, CHECKSUM_BYTES)]
"""xxh3-128 of a piece and its identity."""
Token16 = Annotated[bytes, Bounds(16, 16)]
"""A random identity: of a pool, a boot, a cluster, an incarnation."""
PoolNumber = Annotated[int, Bounds(0, 2**32 - 1)]
FileName = Annotated[str, Bounds(1, MAX_NAME_BYTES)]
Address = Annotated[str, Bounds(1, 256)]
Label = Annotated[str, Bounds(0, 128)]
MAX_TROUBLE = 400
Trouble = Annotated[str, Bounds(0, MAX_TROUBLE)]
"""Why a pool takes no writes, in one line."""


class Role(enum.StrEnum):
    """Who a process is to its peers. A key of one role can send only that role's requests."""

    CLIENT = "client"
    APP = "app"
    CONTROLLER = "controller"
    POOL = "pool"
    JOINER = "joiner"
    """Who has a join token, and may ask a controller for one thing: to be made a member."""


MEMBER_ROLES = (Role.CONTROLLER, Role.APP, Role.POOL, Role.CLIENT)
"""What a member can be."""

SERVER_ROLES = (Role.CONTROLLER, Role.APP, Role.POOL)
"""Those that others connect to."""

PublicKey = Annotated[bytes, Bounds(40, 40)]
"""A CURVE key in Z85."""


_ID = struct.Struct(">HIHI")
_ID_LIMIT = 2**48


class Id(NamedTuple):
    """An identity that is never used twice: the app's session, and the app's counter in it."""

    session: Annotated[int, Bounds(0, _ID_LIMIT - 1)]
    counter: Annotated[int, Bounds(0, _ID_LIMIT - 1)]

    def to_bytes(self) -> bytes:
        """Return 12 bytes that sort as the id does."""
        session, counter = self.session, self.counter
        return _ID.pack(session >> 32, session & 0xFFFFFFFF, counter >> 32, counter & 0xFFFFFFFF)

    @classmethod
    def from_bytes(cls, packed: bytes) -> Self:
        """Return the id that `to_bytes` packed."""
        session_high, session_low, counter_high, counter_low = _ID.unpack(packed)
        return cls(session_high << 32 | session_low, counter_high << 32 | counter_low)

    def __str__(self) -> str:
        return f"{self.session:x}-{self.counter:x}"


class ExtentId(Id):
    """An extent: new for every upload attempt and every re-encoding."""

    __slots__ = ()


class VersionId(Id):
    """A version of a file: one upload."""

    __slots__ = ()


class OperationId(Id):
    """One change that an app asks of the master; its outcome is remembered under this id."""

    __slots__ = ()


class Layout(NamedTuple):
    """How a chunk is coded: k data pieces and m parity pieces; any k of them give it back."""

    k: Annotated[int, Bounds(1, MAX_K)]
    m: Annotated[int, Bounds(0, MAX_M)]

    @property
    def total(self) -> int:
        """The number of shards of an extent."""
        return self.k + self.m

    @property
    def least(self) -> int:
        """Shards that must be flushed for an acknowledged write to survive one more loss."""
        return self.k + 1 if self.m else self.k

    def check_survives(self) -> None:
        """Raise InvalidRequest for a layout that survives no loss; 1+0, for a lone pool, may be asked for."""
        if self.m == 0 and self.k > 1:
            raise InvalidRequest(f"layout {self} would survive no loss at all: M must be at least 1")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the layout written as `4+2`."""
        left, plus, right = text.partition("+")
        if not (plus and left.isascii() and left.isdigit() and right.isascii() and right.isdigit()):
            raise InvalidRequest(f"layout {text!r} is not of the form K+M, for example 4+2")
        layout = cls(int(left), int(right))
        if not (1 <= layout.k <= MAX_K and 0 <= layout.m <= MAX_M):
            raise InvalidRequest(f"layout {text}: K must be 1 to {MAX_K} and M 0 to {MAX_M}")
        return layout

    def __str__(self) -> str:
        return f"{self.k}+{self.m}"


def piece_size(chunk_length: int, k: int) -> int:
    """Return the bytes of each piece of a chunk; the last data piece is padded with zeros."""
    return -(-chunk_length // k)


def chunk_count(size: int, chunk_size: int) -> int:
    """Return how many chunks hold `size` bytes."""
    return -(-size // chunk_size)


def chunk_length(size: int, chunk_size: int, chunk: int) -> int:
    """Return the bytes of file data in one chunk of an extent of `size` bytes."""
    return min(chunk_size, size - chunk * chunk_size)


def shard_size(size: int, chunk_size: int, k: int) -> int:
    """Return the bytes of a shard's pieces together, for an extent of `size` bytes."""
    full, rest = divmod(size, chunk_size)
    return full * piece_size(chunk_size, k) + (piece_size(rest, k) if rest else 0)


def normal_name(name: str) -> str:
    """Return the name as the catalogue keeps it, or raise InvalidName.

    A name is `folder/rest`; one without a folder goes to the folder `files`.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise InvalidName("the name is not valid UTF-8") from None
    if not encoded:
        raise InvalidName("the name is empty")
    if "/" not in name:
        name = f"{DEFAULT_FOLDER}/{name}"
        encoded = name.encode()
    if len(encoded) > MAX_NAME_BYTES:
        raise InvalidName(f"the name has {len(encoded)} bytes; at most {MAX_NAME_BYTES} are allowed")
    if "\0" in name:
        raise InvalidName("the name contains a NUL character")
    for segment in name.split("/"):
        if segment == "":
            raise InvalidName(f"{name!r} has an empty part: no leading, trailing or double slash")
        if segment in (".", ".."):
            raise InvalidName(f"{name!r} has the part {segment!r}, which is not allowed")
    return name


def normal_prefix(prefix: str) -> str:
    """Return a listing prefix (`` or `folder/` or `folder/begin`), or raise InvalidName.

    What stands behind the last slash is the beginning of a part, and may be `.` or `..` too.
    """
    if prefix == "":
        return prefix
    folder, slash, begin = prefix.rpartition("/")
    begin = "x" if begin in ("", ".", "..") else begin
    normal_name(f"{folder}/{begin}" if slash else f"{begin}/x")
    return prefix


# ---------------------------------------------------------------------------------------------
# Records of the catalogue


@record
class Extent:
    """Where the shards of one extent are. `pools[i]` holds shard i; MISSING when none does.

    `edition` counts the changes of this record; a compare-and-set names the edition it read.
    """

    id: ExtentId
    layout: Layout
    size: Annotated[int, Bounds(1, CHUNK_SIZE * EXTENT_CHUNKS)]
    chunk_size: Annotated[int, Bounds(1, CHUNK_SIZE)]
    pools: Annotated[tuple[PoolNumber, ...], Bounds(1, MAX_K + MAX_M)]
    edition: int = 0

    @property
    def present(self) -> int:
        """How many shards are on some pool."""
        return sum(1 for pool in self.pools if pool != MISSING)

    @property
    def survives(self) -> int:
        """How many more pools may be lost before data is."""
        return self.present - self.layout.k


Metadata = Annotated[
    tuple[Annotated[tuple[Annotated[str, Bounds(0, 1024)], ...], Bounds(2, 2)], ...], Bounds(0, 32)
]
"""Pairs of key and value that travel with a version: at most 32, 1 KiB each side."""


@record
class Version:
    """One upload of a file: its content, and how many names point at it."""

    id: VersionId
    size: int
    blake3: Digest
    extents: Annotated[tuple[ExtentId, ...], Bounds(0, MAX_EXTENTS)]
    names: Annotated[int, Bounds(0, 2**32)] = 1
    created_ms: int = 0
    metadata: Metadata = ()


class PoolState(enum.StrEnum):
    """What the master makes of a pool."""

    UP = "up"
    """Heard of within the last heartbeats: reads and writes."""
    READ_ONLY = "read-only"
    """Up, but its disk failed or is full: reads only."""
    DOWN = "down"
    """Not heard of for 10 s: nothing is sent there; it may return."""
    CHECKING = "checking"
    """Up, but its folder is older than what was last heard of it: it is read, and not relied on, until it
    has compared what it holds with the records."""
    OUT = "out"
    """Down for `replace_after`: its shards count as missing. It may still return."""


class Membership(enum.StrEnum):
    """What the operators decided about a pool."""

    MEMBER = "member"
    DRAINING = "draining"
    REMOVED = "removed"


@record
class PoolRecord:
    """The permanent record of a pool, empty or not; `number` is never used again."""

    number: PoolNumber
    pool_id: Token16
    name: Label
    machine: Label
    zone: Label
    address: Address
    membership: Label = Membership.MEMBER.value
    boot_id: Annotated[bytes, Bounds(0, 16)] = b""
    joined_ms: int = 0
    checking: bool = False
    """Whether its folder may be older than what the records say of it, until the two are compared."""
    capacity: int = 0
    """Bytes that it offered when it was announced, about; 0: unknown. By it a new master places at first."""


@record
class ControllerRecord:
    """The permanent record of a controller. Its name is its identity, wherever it comes back."""

    name: Label
    address: Address
    joined_ms: int = 0


@record
class MemberRecord:
    """Whose a public key is, for ever: who was revoked stays on record, and out."""

    public: PublicKey
    role: Label
    name: Label
    joined_ms: int = 0
    revoked_ms: int = 0
    """When it was revoked; 0: it is a member."""
    token: Annotated[bytes, Bounds(0, 40)] = b""
    """The public key of the token that it joined with; empty for a founder."""


MAX_MEMBER_ROLES = len(SERVER_ROLES) + 1


@record
class TokenRecord:
    """A join token, known by its public key. Its secret is in the hands of whoever it was given to."""

    public: PublicKey
    roles: Annotated[tuple[Label, ...], Bounds(1, MAX_MEMBER_ROLES)]
    expires_ms: int
    uses: Annotated[int, Bounds(0, 1000)]
    """How many machines may still join with it."""
    used_ms: int = 0
    """When the last of them did."""


@record
class UploadRecord:
    """An upload that can be gone on with: what came of it is a version without a name.

    `source` says where the bytes come from, so that the same command finds it again. `holder` is the
    operation that began it or took it over; nobody else may add to it.
    """

    version: VersionId
    name: FileName
    source: Annotated[bytes, Bounds(1, 32)]
    size: int
    """Of the whole file, as it was announced."""
    chunk_size: Annotated[int, Bounds(1, CHUNK_SIZE)]
    holder: OperationId
    extents: Annotated[int, Bounds(0, MAX_EXTENTS)] = 0
    created_ms: int = 0
    touched_ms: int = 0
    """When something came of it last."""


class ControllerRole(enum.StrEnum):
    """What a controller does."""

    MASTER = "master"
    STANDBY = "standby"
    UNREACHABLE = "unreachable"
    """It does not answer who asks."""


@record
class ControllerInfo:
    """A controller as it says of itself that it is."""

    name: Label
    address: Address
    role: Label
    term: int = 0
    revision: int = 0
    """Of the last transaction that its engine has."""
    lag: int = 0
    """Transactions that the master's engine is ahead."""
    engine: Label = ""
    master: Annotated[str, Bounds(0, 256)] = ""
    """The address of who it takes for the master; empty: of nobody."""
    failure: Trouble = ""
    """Why its engine takes no writes."""
    warnings: Annotated[tuple[Trouble, ...], Bounds(0, 16)] = ()


MAX_CONTROLLERS = 64

ControllerAddresses = Annotated[tuple[Address, ...], Bounds(0, MAX_CONTROLLERS)]


@record
class ScrubReport:
    """What a pool says of its scrubs: when the last that read everything ended, and how far the present is.

    `lost` counts what the two found damaged or gone; it is mended elsewhere.
    """

    ended_ms: int = 0
    percent: Annotated[int, Bounds(0, 100)] = 0
    lost: int = 0


@record
class PoolInfo:
    """A pool in the cluster map: its record and what the master sees of it now."""

    number: PoolNumber
    pool_id: Token16
    name: Label
    machine: Label
    zone: Label
    address: Address
    state: Label
    membership: Label
    capacity: int
    free: int
    shards: int = 0
    scrub: ScrubReport = ScrubReport()
    trouble: Trouble = ""
    """Why it takes no writes while it is read-only."""

    @property
    def readable(self) -> bool:
        """Whether reading from it is worth a try."""
        return self.state in (PoolState.UP, PoolState.READ_ONLY, PoolState.CHECKING)

    @property
    def writable(self) -> bool:
        """Whether new shards may go there."""
        return self.state == PoolState.UP and self.membership == Membership.MEMBER


DISK_FULL = "its disk is full"
"""The trouble of a pool that takes shards again when there is room."""


@record
class ClusterMap:
    """Who is there. `version` says only which of two maps is fresher."""

    cluster_id: Token16
    incarnation: Token16
    term: int
    version: int
    pools: Annotated[tuple[PoolInfo, ...], Bounds(0, 4096)] = ()

    def pool(self, number: int) -> PoolInfo | None:
        """Return the pool with this number."""
        return next((pool for pool in self.pools if pool.number == number), None)


# ---------------------------------------------------------------------------------------------
# What a pool stores beside the bytes


UNKNOWN_PLACE = -1
"""Of an extent whose shards do not tell its place in the version: an older release wrote them."""

PlaceInVersion = Annotated[int, Bounds(UNKNOWN_PLACE, MAX_EXTENTS - 1)]


@record
class ShardHeader:
    """What a shard says of itself, so that a folder explains itself without a catalogue.

    `checksums[c]` is that of the piece of chunk c. `name` and `version` are hints for people, and `place`
    tells which of the version's extents this is, from 0 on.
    """

    incarnation: Token16
    extent: ExtentId
    index: Annotated[int, Bounds(0, MAX_K + MAX_M - 1)]
    layout: Layout
    size: Annotated[int, Bounds(1, CHUNK_SIZE * EXTENT_CHUNKS)]
    chunk_size: Annotated[int, Bounds(1, CHUNK_SIZE)]
    checksums: Annotated[tuple[Checksum, ...], Bounds(1, EXTENT_CHUNKS)]
    version: VersionId
    name: Annotated[str, Bounds(0, MAX_NAME_BYTES)] = ""
    place: PlaceInVersion = UNKNOWN_PLACE

    @property
    def stored_size(self) -> int:
        """The bytes of the shard's pieces together."""
        return shard_size(self.size, self.chunk_size, self.layout.k)

    def piece_range(self, chunk: int) -> tuple[int, int]:
        """Return offset and length of a chunk's piece within the shard's pieces."""
        offset = chunk * piece_size(self.chunk_size, self.layout.k)
        return offset, piece_size(chunk_length(self.size, self.chunk_size, chunk), self.layout.k)


class Holding(NamedTuple):
    """A shard that a pool holds: what it is, and which stored instance of it."""

    extent: ExtentId
    shard: Annotated[int, Bounds(0, MAX_K + MAX_M - 1)]
    generation: Annotated[int, Bounds(0, 2**63 - 1)]


# ---------------------------------------------------------------------------------------------
# What users get


Survives = Annotated[int, Bounds(-MAX_K, MAX_M)]
"""How many more losses something survives; below 0: unreadable now."""


@record
class Receipt:
    """What a put gives its caller: proof of what was stored, and what it survives."""

    name: FileName
    version: VersionId
    size: int
    blake3: Digest
    layout: Label
    survives_pools: Survives | None
    """None, as `survives_machines`, for an empty file: it is kept in the catalogue alone."""
    survives_machines: Survives | None
    replaced: bool = False
    note: Annotated[str, Bounds(0, 1024)] = ""


@record
class FileEntry:
    """One line of a listing: a file, or (with `folder`) a common prefix that ends in a slash."""

    name: FileName
    folder: bool = False
    size: int = 0
    created_ms: int = 0
    version: VersionId | None = None


@record
class ShardPlace:
    """Where a shard is, for `stat`."""

    index: int
    pool: PoolNumber
    name: Label
    machine: Label
    state: Label


@record
class ExtentPlaces:
    """An extent and where its shards are, for `stat`."""

    id: ExtentId
    layout: Layout
    size: int
    shards: Annotated[tuple[ShardPlace, ...], Bounds(0, MAX_K + MAX_M)]


@record
class SurvivalCount:
    """How many files and extents survive the loss of that many more pools; below 0: unreadable now."""

    survives: Survives
    files: int
    extents: int


@record
class RepairStatus:
    """How far the cluster has come in mending itself. All counts are of shards."""

    done: int = 0
    """Put back since the last time that nothing was missing."""
    left: int = 0
    running: int = 0
    stuck: int = 0
    """Of those left: without a pool to go to, or of extents that cannot be read now."""
    bytes_per_s: int = 0
    eta_s: int | None = None
    """Seconds that the rest takes at the present pace; None when there is no pace to tell by."""
    moving: int = 0
    """Still on pools that are to be emptied, for their disks failed or they are drained, and can be read."""
    moving_stuck: int = 0
    """Of those: have nowhere to go now."""
    balancing: int = 0
    """Planned to move to where placement wants them, since there are other pools than there were."""
    balanced: bool = True
    """Whether all that can be where placement wants it was found there, with the pools of now."""


@record
class ClusterStatus:
    """The cluster at a glance, as the master sees it now."""

    cluster_id: Token16
    term: int
    files: int
    size: int
    extents: int
    garbage: int
    survival: Annotated[tuple[SurvivalCount, ...], Bounds(0, 64)]
    pools: Annotated[tuple[PoolInfo, ...], Bounds(0, 4096)]
    controllers: ControllerAddresses
    sessions: int
    warnings: Annotated[tuple[Annotated[str, Bounds(0, 1024)], ...], Bounds(0, 256)] = ()
    empty_files: int = 0
    """Part of `files`, but not of `survival`: they are kept in the catalogue alone."""
    machine_survival: Annotated[tuple[SurvivalCount, ...], Bounds(0, 64)] = ()
    """As `survival`, by how many more machines may be lost."""
    repair: RepairStatus = RepairStatus()
    quarantined: int = 0
    """Shards on pools that belong to no history that this catalogue knows; they are kept."""
