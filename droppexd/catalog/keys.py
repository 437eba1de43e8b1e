"""The catalogue's keys. One letter says what a key is; ids are big-endian, so that keys sort as they do.

| key | value (`records.py`) |
| --- | --- |
| `n/` name | what the name points at, and what a listing shows |
| `v/` version id | a version |
| `e/` extent id | an extent, and which version it belongs to |
| `x/` version id | (empty) an index of the versions with more than one extent |
| `d/` survives, extent id | (empty) the degraded index: extents with a missing shard, most endangered first |
| `g/` extent id | garbage: since which epoch, and the pools that must still confirm |
| `w/` pool, epoch, extent id | (empty) garbage by the pool that must confirm, oldest first |
| `p/` pool number | a pool's permanent record |
| `k/` name | a controller's permanent record |
| `a/` public key | a member: whose key it is, or was |
| `t/` public key | a join token |
| `u/` version id | an upload that can be gone on with: a version without a name |
| `h/` version id, place | the digest of an extent of an upload |
| `s/` session | a session, open or closed |
| `o/` operation id | the outcome of an operation, until its app's floor passes it |
| `c/` placement | how many extents and single-extent files are placed so |
| `m/...` | the cluster, the term and those before it, the next pool's number, the totals; how many copies a
change takes; whether this is a restored copy, or one that was made anew |
"""

import struct

from droppexd.model import ExtentId, Layout, OperationId, VersionId

NAMES = b"n/"
VERSIONS = b"v/"
EXTENTS = b"e/"
LARGE = b"x/"
DEGRADED = b"d/"
GARBAGE = b"g/"
WORK = b"w/"
POOLS = b"p/"
CONTROLLERS = b"k/"
MEMBERS = b"a/"
TOKENS = b"t/"
UPLOADS = b"u/"
DIGESTS = b"h/"
SESSIONS = b"s/"
OUTCOMES = b"o/"
PLACEMENTS = b"c/"

CLUSTER = b"m/cluster"
TERM = b"m/term"
TERMS = b"m/terms"
"""The terms before that, with the revisions at which they began."""
SYNC = b"m/sync"
"""How many standbys have written down what is acknowledged, where each has a copy of the catalogue."""
MEMBERS_VERSION = b"m/members"
"""Another number after each change of the members."""
NEXT_POOL = b"m/next-pool"
TOTALS = b"m/totals"
COPYING = b"m/copying"
"""There while a whole catalogue is copied here, and only a part of it is."""
RESTORED = b"m/restored"
REBUILT = b"m/rebuilt"
"""How many pools this was made anew from; there while what only shards tell of is still to be adopted."""

Placement = tuple[int, int, tuple[int, ...]]
"""k, m, and the pool of each shard: all that the survival of an extent depends on."""

_ID_BYTES = 12
_WORK = struct.Struct(">IQ")
_SURVIVES_BIAS = 128


def end_of(prefix: bytes) -> bytes:
    """Return the first key behind all keys with this prefix (whose last byte is below 255)."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def name_key(name: str) -> bytes:
    """Return the key of a name."""
    return NAMES + name.encode()


def member_key(public: bytes) -> bytes:
    """Return the key of a member."""
    return MEMBERS + public


def token_key(public: bytes) -> bytes:
    """Return the key of a join token."""
    return TOKENS + public


def upload_key(version: VersionId) -> bytes:
    """Return the key of an upload."""
    return UPLOADS + version.to_bytes()


def digest_key(version: VersionId, place: int) -> bytes:
    """Return the key of the digest of an upload's extent."""
    return DIGESTS + version.to_bytes() + place.to_bytes(4)


def version_key(version: VersionId) -> bytes:
    """Return the key of a version."""
    return VERSIONS + version.to_bytes()


def extent_key(extent: ExtentId) -> bytes:
    """Return the key of an extent."""
    return EXTENTS + extent.to_bytes()


def large_key(version: VersionId) -> bytes:
    """Return the key of a version in the index of versions with more than one extent."""
    return LARGE + version.to_bytes()


def degraded_key(survives: int, extent: ExtentId) -> bytes:
    """Return the key of an extent in the degraded index."""
    return DEGRADED + bytes((survives + _SURVIVES_BIAS,)) + extent.to_bytes()


def parse_degraded(key: bytes) -> tuple[int, ExtentId]:
    """Return what `degraded_key` was made from."""
    return key[2] - _SURVIVES_BIAS, ExtentId.from_bytes(key[3:])


def garbage_key(extent: ExtentId) -> bytes:
    """Return the key of a dead extent."""
    return GARBAGE + extent.to_bytes()


def work_key(pool: int, epoch: int, extent: ExtentId | None = None) -> bytes:
    """Return the key of a dead extent in a pool's work, or without one where that epoch's work begins."""
    return WORK + _WORK.pack(pool, epoch) + (extent.to_bytes() if extent else b"")


def parse_work(key: bytes) -> ExtentId:
    """Return the extent that `work_key` was made from."""
    return ExtentId.from_bytes(key[-_ID_BYTES:])


def pool_key(number: int) -> bytes:
    """Return the key of a pool's record."""
    return POOLS + number.to_bytes(4)


def controller_key(name: str) -> bytes:
    """Return the key of a controller's record."""
    return CONTROLLERS + name.encode()


def session_key(session: int) -> bytes:
    """Return the key of a session."""
    return SESSIONS + session.to_bytes(6)


def parse_session(key: bytes) -> int:
    """Return the session that `session_key` was made from."""
    return int.from_bytes(key[2:])


def outcome_key(operation: OperationId) -> bytes:
    """Return the key of an operation's outcome."""
    return OUTCOMES + operation.to_bytes()


def parse_id(key: bytes) -> tuple[int, int]:
    """Return session and counter of the id that a version, extent, large, garbage or outcome key ends in."""
    return ExtentId.from_bytes(key[2:])


def placement_key(placement: Placement) -> bytes:
    """Return the key of a placement's counters."""
    k, m, pools = placement
    return PLACEMENTS + struct.pack(f">BB{len(pools)}I", k, m, *pools)


def parse_placement(key: bytes) -> Placement:
    """Return what `placement_key` was made from."""
    k, m = key[2:4]
    pools = struct.unpack(f">{(len(key) - 4) // 4}I", key[4:])
    return k, m, pools


def placement_of(layout: Layout, pools: tuple[int, ...]) -> Placement:
    """Return how an extent with these pools is placed."""
    return layout.k, layout.m, pools
