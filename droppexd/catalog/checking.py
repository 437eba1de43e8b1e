"""Whether a catalogue is sound: each record by itself, and all of them against each other.

Blocking, and in bounded memory: what must be remembered of ten million records is in temporary tables. A
record is sound when its fields are what `model.py` says; the catalogue is, when what is written twice agrees:
names with the names that versions count, extents with the versions that list them, the degraded index, the
index of large versions, the placements' counts and the totals with the records they are about, and garbage
with the work of the pools.
"""

import sqlite3
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar, TypeVarTuple

import msgpack

from droppexd import schema
from droppexd.catalog.copies import Facts, read_facts, require_format, structure_complaints
from droppexd.catalog.keys import (
    CLUSTER,
    CONTROLLERS,
    COPYING,
    DEGRADED,
    DIGESTS,
    EXTENTS,
    GARBAGE,
    LARGE,
    MEMBERS,
    MEMBERS_VERSION,
    NAMES,
    NEXT_POOL,
    OUTCOMES,
    PLACEMENTS,
    POOLS,
    REBUILT,
    RESTORED,
    SESSIONS,
    SYNC,
    TERM,
    TERMS,
    TOKENS,
    TOTALS,
    UPLOADS,
    VERSIONS,
    WORK,
    Placement,
    controller_key,
    degraded_key,
    digest_key,
    end_of,
    extent_key,
    large_key,
    name_key,
    parse_degraded,
    parse_id,
    parse_placement,
    placement_of,
    pool_key,
    session_key,
    upload_key,
    version_key,
    work_key,
)
from droppexd.catalog.records import (
    Garbage,
    Name,
    SessionRecord,
    Totals,
    pack_fields,
    unpack_controller,
    unpack_extent,
    unpack_fields,
    unpack_garbage,
    unpack_member,
    unpack_name,
    unpack_outcome,
    unpack_pool,
    unpack_session,
    unpack_token,
    unpack_totals,
    unpack_upload,
    unpack_version,
)
from droppexd.catalog.terms import unpack_terms
from droppexd.errors import CatalogError, DroppexError
from droppexd.model import MISSING, Extent, ExtentId, UploadRecord, Version, VersionId, normal_name

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MOST_PROBLEMS = 1000
_REPORT_EVERY = 1000

_SINGLE = frozenset(
    (CLUSTER, COPYING, TERM, TERMS, SYNC, NEXT_POOL, TOTALS, RESTORED, REBUILT, MEMBERS_VERSION)
)
_PREFIXES = (
    NAMES, VERSIONS, EXTENTS, LARGE, DEGRADED, GARBAGE, WORK, POOLS, CONTROLLERS, SESSIONS, OUTCOMES,
    PLACEMENTS, MEMBERS, TOKENS, UPLOADS, DIGESTS
)  # fmt: skip

_MALFORMED = (
    DroppexError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    struct.error,
    msgpack.UnpackException,
)
"""What unpacking bytes that are no record may raise."""

_TABLES = """
CREATE TEMP TABLE version
    (key BLOB PRIMARY KEY, size INTEGER, created_ms INTEGER, names INTEGER, bytes INTEGER) WITHOUT ROWID;
CREATE TEMP TABLE listed (key BLOB PRIMARY KEY, version BLOB, files INTEGER) WITHOUT ROWID;
"""
"""Versions, with the names and bytes that were not met yet; and extents with the versions that list them, and
with the names of a version that has no other extent."""

_EPOCHS_PER_TERM_BITS = 32


@dataclass(slots=True)
class CatalogueReport:
    """What was found."""

    facts: Facts | None = None
    problems: list[str] = field(default_factory=list)
    """The first thousand, a line each."""
    wrong: int = 0
    """How many there are."""
    records: Counter[str] = field(default_factory=Counter)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    def add(self, problem: str) -> None:
        """Note a problem."""
        self.wrong += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)


def check_catalogue(connection: sqlite3.Connection, progress: Callable[[int, int], None]) -> CatalogueReport:
    """Read and check everything; `progress` is told how many records of how many were looked at.

    What SQLite cannot read is a problem like another.
    """
    report = CatalogueReport()
    try:
        require_format(connection)
        for complaint in structure_complaints(connection):
            report.add(f"the database is damaged: {complaint}")
        connection.execute("BEGIN")
        report.facts = read_facts(connection)
        _Check(connection, report, progress).run()
    except CatalogError as error:
        report.add(str(error))
    except sqlite3.Error as error:
        report.add(f"the database cannot be read: {error}")
    return report


class _Check:
    """Goes through one kind of record after another."""

    def __init__(
        self, connection: sqlite3.Connection, report: CatalogueReport, progress: Callable[[int, int], None]
    ) -> None:
        self._sql = connection
        self._report = report
        self._progress = progress
        self._done = 0
        self._rows = 0
        self._pools: set[int] = set()
        self._term = 0
        self._placements: Counter[Placement] = Counter()
        self._files: Counter[Placement] = Counter()
        self._size = self._empty_files = 0

    def run(self) -> None:
        """Check everything."""
        (self._rows,) = self._sql.execute("SELECT count(*) FROM kv").fetchone()
        self._sql.executescript(_TABLES)
        self._check_keys()
        self._check_single()
        self._check_log()
        self._check_pools()
        self._check_controllers()
        self._check_members()
        self._check_sessions()
        self._check_versions()
        self._check_uploads()
        self._check_names()
        self._check_extents()
        self._check_degraded()
        self._check_garbage()
        self._check_outcomes()
        self._check_counts()
        self._progress(self._rows, self._rows)

    # -- reading -------------------------------------------------------------------------------

    def _all(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values with a prefix."""
        rows = self._sql.execute(
            "SELECT key, value FROM kv WHERE key >= ? AND key < ? ORDER BY key", (prefix, end_of(prefix))
        )
        for key, value in rows:
            self._done += 1
            if self._done % _REPORT_EVERY == 0:
                self._progress(min(self._done, self._rows), self._rows)
            if type(key) is bytes and type(value) is bytes:
                yield key, value
            else:
                self._report.add(f"there is a record {key!r} that is not made of bytes")

    def _value(self, key: bytes) -> bytes | None:
        row = self._sql.execute("SELECT value FROM kv WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def _count(self, prefix: bytes) -> int:
        query = "SELECT count(*) FROM kv WHERE key >= ? AND key < ?"
        count: int = self._sql.execute(query, (prefix, end_of(prefix))).fetchone()[0]
        return count

    def _decoded(self, what: str, key: bytes, decode: Callable[[*Ts], T], *raw: *Ts) -> T | None:
        """Return what a record says; None when it says nothing, which is told."""
        try:
            return decode(*raw)
        except _MALFORMED as error:
            why = "; ".join(str(error).splitlines()) or type(error).__name__
            self._report.add(f"{what} {_told(key)} does not decode: {why}")
            return None

    # -- what is there once --------------------------------------------------------------------

    def _check_keys(self) -> None:
        """Tell of keys that nobody writes."""
        behind = b""
        for prefix in sorted(_PREFIXES):
            self._check_gap("SELECT key FROM kv WHERE key >= ? AND key < ?", behind, prefix)
            behind = end_of(prefix)
        self._check_gap("SELECT key FROM kv WHERE key >= ?", behind)

    def _check_gap(self, query: str, *bounds: bytes) -> None:
        for (key,) in self._sql.execute(query, bounds):
            if key not in _SINGLE:
                self._report.add(f"there is a record {key!r}, which this release does not know")

    def _check_single(self) -> None:
        facts = self._report.facts
        if facts is not None:
            self._term = facts.term
            if len(facts.cluster_id) != 16 or len(facts.incarnation) != 16:
                self._report.add("the ids of cluster and incarnation are not 16 bytes each")
        restored = self._value(RESTORED)
        if restored is not None:
            self._decoded("mark of a restore", RESTORED, _only_number, restored, "restored")
        rebuilt = self._value(REBUILT)
        if rebuilt is not None:
            self._decoded("mark of a rebuild", REBUILT, _only_number, rebuilt, "rebuilt")
        version = self._value(MEMBERS_VERSION)
        if version is not None:
            self._decoded("version of the members", MEMBERS_VERSION, _only_number, version, "members")
        terms, sync = self._value(TERMS), self._value(SYNC)
        if terms is not None:
            self._decoded("list of terms", TERMS, unpack_terms, terms)
        if sync is not None:
            self._decoded("number of copies", SYNC, _only_number, sync, "sync")

    def _check_log(self) -> None:
        newest, oldest, count = self._sql.execute(
            "SELECT max(revision), min(revision), count(*) FROM log"
        ).fetchone()
        if count and newest - oldest + 1 != count:
            self._report.add(f"the log has {count} of the revisions from {oldest} to {newest}")
        later = self._sql.execute("SELECT count(*) FROM kv WHERE revision > ?", (newest or 0,)).fetchone()[0]
        if later:
            self._report.add(f"{later} records are of a later revision than the last of the log")
        for revision, operations in self._sql.execute("SELECT revision, operations FROM log"):
            try:
                sound = all(len(pair) == 2 for pair in msgpack.unpackb(operations))
            except _MALFORMED:
                sound = False
            if not sound:
                self._report.add(f"the log's revision {revision} does not decode")

    # -- pools and sessions --------------------------------------------------------------------

    def _check_pools(self) -> None:
        next_pool = self._decoded(
            "next number", NEXT_POOL, _only_number, self._value(NEXT_POOL) or b"", "next pool"
        )
        ids: dict[bytes, int] = {}
        for key, value in self._all(POOLS):
            pool = self._decoded("pool", key, unpack_pool, value)
            if pool is None:
                continue
            self._report.records["pools"] += 1
            self._pools.add(pool.number)
            if pool_key(pool.number) != key or not pool.number:
                self._report.add(f"pool {_told(key)} says that its number is {pool.number}")
            if next_pool is not None and pool.number >= next_pool:
                self._report.add(f"pool {pool.number} has a number that is still to be given out")
            if pool.pool_id in ids:
                self._report.add(f"pools {ids[pool.pool_id]} and {pool.number} have the same id")
            ids[pool.pool_id] = pool.number

    def _check_controllers(self) -> None:
        for key, value in self._all(CONTROLLERS):
            controller = self._decoded("controller", key, unpack_controller, value)
            self._report.records["controllers"] += 1
            if controller is not None and controller_key(controller.name) != key:
                self._report.add(f"controller {_told(key)} says that its name is {controller.name!r}")

    def _check_members(self) -> None:
        """Members that still are one differ in role and name, or two would be told apart by nobody."""
        named: dict[tuple[str, str], bytes] = {}
        for key, value in self._all(MEMBERS):
            member = self._decoded("member", key, unpack_member, key[len(MEMBERS) :], value)
            self._report.records["members"] += 1
            if member is not None and not member.revoked_ms:
                other = named.setdefault((member.role, member.name), key)
                if other != key and member.token:
                    self._report.add(f"members {_told(other)} and {_told(key)} have the same role and name")
        for key, value in self._all(TOKENS):
            self._decoded("join token", key, unpack_token, key[len(TOKENS) :], value)
            self._report.records["join tokens"] += 1

    def _check_sessions(self) -> None:
        for key, value in self._all(SESSIONS):
            number = int.from_bytes(key[2:])
            record = self._decoded("session", key, _session, value)
            self._report.records["sessions"] += 1
            if record is not None and (not number or session_key(number) != key):
                self._report.add(f"session {_told(key)} has a number that no session has")

    # -- files ---------------------------------------------------------------------------------

    def _check_versions(self) -> None:
        large = 0
        for key, value in self._all(VERSIONS):
            version = self._decoded("version", key, _version, key, value)
            if version is None:
                continue
            self._report.records["versions"] += 1
            self._size += version.size
            if not version.names and self._value(upload_key(version.id)) is None:
                self._report.add(f"version {version.id} has no name")
            if bool(version.size) != bool(version.extents):
                self._report.add(
                    f"version {version.id} of {version.size} bytes has {len(version.extents)} extents"
                )
            if not version.extents:
                self._empty_files += version.names
            if len(version.extents) > 1:
                large += 1
                if self._value(large_key(version.id)) is None:
                    self._report.add(f"version {version.id} does not stand in the index of large versions")
            self._sql.execute(
                "INSERT INTO temp.version VALUES (?, ?, ?, ?, ?)",
                (key[2:], version.size, version.created_ms, version.names, version.size),
            )
            files = version.names if len(version.extents) == 1 else 0
            for extent in version.extents:
                done = self._sql.execute(
                    "INSERT OR IGNORE INTO temp.listed VALUES (?, ?, ?)",
                    (extent.to_bytes(), key[2:], files),
                )
                if not done.rowcount:
                    self._report.add(f"extent {extent} is listed twice, the second time by {version.id}")
        if self._count(LARGE) != large:
            self._report.add(
                f"the index of large versions has {self._count(LARGE)} entries, and there are {large}"
            )

    def _check_uploads(self) -> None:
        """Uploads are versions without names, with a digest for each extent."""
        digests = 0
        for key, value in self._all(UPLOADS):
            upload = self._decoded("upload", key, _upload, key, value)
            if upload is None:
                continue
            self._report.records["uploads"] += 1
            digests += upload.extents
            found = self._value(version_key(upload.version))
            version = (
                None
                if found is None
                else self._decoded("version", key, _version, version_key(upload.version), found)
            )
            if version is None or version.names or len(version.extents) != upload.extents:
                self._report.add(f"upload {_told(key)} is not what its version is")
            for place in range(upload.extents):
                if self._value(digest_key(upload.version, place)) is None:
                    self._report.add(f"upload {_told(key)} has no digest of its extent {place}")
        if self._count(DIGESTS) > digests:
            self._report.add(f"there are {self._count(DIGESTS)} digests of uploads, and {digests} extents")

    def _check_names(self) -> None:
        for key, value in self._all(NAMES):
            name = self._decoded("name", key, _name, key)
            record = self._decoded("name", key, _points_at, value)
            if name is None or record is None:
                continue
            self._report.records["files"] += 1
            packed = self._decoded("name", key, record.version.to_bytes)
            row = self._sql.execute(
                "SELECT size, created_ms FROM temp.version WHERE key = ?", (packed,)
            ).fetchone()
            if row is None:
                self._report.add(f"name {name!r} points at version {record.version}, which has no record")
                continue
            if row != (record.size, record.created_ms):
                self._report.add(f"name {name!r} has another size or time than version {record.version}")
            self._sql.execute("UPDATE temp.version SET names = names - 1 WHERE key = ?", (packed,))
        for key, names in self._sql.execute("SELECT key, names FROM temp.version WHERE names != 0"):
            how = "fewer" if names > 0 else "more"
            self._report.add(
                f"version {VersionId.from_bytes(key)} has {abs(names)} {how} names than it counts"
            )

    def _check_extents(self) -> None:
        for key, value in self._all(EXTENTS):
            found = self._decoded("extent", key, _extent, key, value)
            if found is None:
                continue
            extent, version = found
            self._report.records["extents"] += 1
            row = self._sql.execute(
                "SELECT version, files FROM temp.listed WHERE key = ?", (key[2:],)
            ).fetchone()
            if row is None:
                self._report.add(f"extent {extent.id} is listed by no version")
            else:
                if version.to_bytes() != row[0]:
                    owner = VersionId.from_bytes(row[0])
                    self._report.add(f"extent {extent.id} is of version {version}, and {owner} lists it")
                self._sql.execute(
                    "UPDATE temp.version SET bytes = bytes - ? WHERE key = ?", (extent.size, row[0])
                )
            self._check_extent(extent)
            placement = placement_of(extent.layout, extent.pools)
            self._placements[placement] += 1
            self._files[placement] += 0 if row is None else row[1]
        self._check_listed()

    def _check_listed(self) -> None:
        """Tell of extents that versions list and that have no record, and of versions of another size."""
        listed = self._sql.execute(
            "SELECT key, version FROM temp.listed WHERE key NOT IN "
            "(SELECT substr(key, 3) FROM kv WHERE key >= ? AND key < ?)",
            (EXTENTS, end_of(EXTENTS)),
        )
        for key, owner in listed:
            self._report.add(
                f"extent {ExtentId.from_bytes(key)} of version {VersionId.from_bytes(owner)} has no record"
            )
        for key, size, left in self._sql.execute(
            "SELECT key, size, bytes FROM temp.version WHERE bytes != 0"
        ):
            self._report.add(
                f"version {VersionId.from_bytes(key)} has {size} bytes, and its extents {size - left}"
            )

    def _check_extent(self, extent: Extent) -> None:
        present = [pool for pool in extent.pools if pool != MISSING]
        strange = [pool for pool in present if pool not in self._pools]
        if strange:
            self._report.add(f"extent {extent.id} names pool {strange[0]}, which has no record")
        if len(set(present)) != len(present):
            self._report.add(f"extent {extent.id} has two shards on one pool")
        if MISSING in extent.pools and self._value(degraded_key(extent.survives, extent.id)) is None:
            self._report.add(f"extent {extent.id} lacks a shard and is not in the degraded index")

    def _check_degraded(self) -> None:
        for key, _ in self._all(DEGRADED):
            parsed = self._decoded("degraded entry", key, parse_degraded, key)
            if parsed is None:
                continue
            self._report.records["degraded"] += 1
            survives, extent_id = parsed
            value = self._value(extent_key(extent_id))
            if value is None:
                self._report.add(f"the degraded index has extent {extent_id}, which has no record")
                continue
            try:
                extent, _ = _extent(extent_key(extent_id), value)
            except _MALFORMED:
                continue  # Told already.
            if MISSING not in extent.pools:
                self._report.add(f"the degraded index has extent {extent_id}, which lacks no shard")
            elif extent.survives != survives:
                self._report.add(
                    f"the degraded index has extent {extent_id} at {survives}; it survives {extent.survives}"
                )

    # -- garbage and outcomes ------------------------------------------------------------------

    def _check_garbage(self) -> None:
        work = 0
        for key, value in self._all(GARBAGE):
            garbage = self._decoded("garbage", key, _garbage, value)
            extent = self._decoded("garbage", key, _id, key)
            if garbage is None or extent is None:
                continue
            self._report.records["garbage"] += 1
            work += len(garbage.pools)
            if self._value(extent_key(extent)) is not None:
                self._report.add(f"extent {extent} is dead, and has a record")
            if not garbage.pools or not set(garbage.pools) <= self._pools:
                self._report.add(f"dead extent {extent} waits for pools {list(garbage.pools)}")
            if not 0 <= garbage.epoch < (self._term + 1) << _EPOCHS_PER_TERM_BITS:
                self._report.add(f"extent {extent} died in a term that has not come yet")
                continue
            for pool in garbage.pools:
                if self._value(work_key(pool, garbage.epoch, extent)) is None:
                    self._report.add(f"dead extent {extent} does not stand in the work of pool {pool}")
        if self._count(WORK) != work:
            self._report.add(
                f"the pools have {self._count(WORK)} dead extents to drop; the garbage records name {work}"
            )

    def _check_outcomes(self) -> None:
        for key, value in self._all(OUTCOMES):
            self._report.records["outcomes"] += 1
            self._decoded("outcome", key, _id, key)
            self._decoded("outcome", key, unpack_outcome, value)

    # -- sums ----------------------------------------------------------------------------------

    def _check_counts(self) -> None:
        records = self._report.records
        counted = Totals(
            records["files"], self._size, records["extents"], records["garbage"], self._empty_files
        )
        value = self._value(TOTALS) or pack_fields(Totals())
        totals = self._decoded("the totals", TOTALS, _totals, value)
        if totals is not None:
            for what, told, there in zip(Totals._fields, totals, counted, strict=True):
                if told != there:
                    self._report.add(f"the totals say {told} {what}, and there are {there}")
        for key, value in self._all(PLACEMENTS):
            placement = self._decoded("placement", key, parse_placement, key)
            counts = self._decoded("placement", key, unpack_fields, value, "placement")
            if placement is None or counts is None:
                continue
            found = [self._placements.pop(placement, 0), self._files.pop(placement, 0)]
            if counts != found:
                self._report.add(
                    f"placement {_placement_text(placement)} counts {counts} extents and files, "
                    f"and there are {found}"
                )
        for placement, extents in self._placements.items():
            self._report.add(f"placement {_placement_text(placement)} has {extents} extents and no count")


# -- records ---------------------------------------------------------------------------------------


def _valid(kind: type[T], record: T) -> T:
    """Return the record; raise RemoteProtocolError when a field is not what its class says."""
    return schema.unpack(kind, schema.pack(record))


def _only_number(value: bytes, what: str) -> int:
    (number,) = unpack_fields(value, what)
    return int(number)


def _session(value: bytes) -> SessionRecord:
    return _valid(SessionRecord, unpack_session(value))


def _totals(value: bytes) -> Totals:
    return _valid(Totals, unpack_totals(value))


def _points_at(value: bytes) -> Name:
    return _valid(Name, unpack_name(value))


def _garbage(value: bytes) -> Garbage:
    return _valid(Garbage, unpack_garbage(value))


def _id(key: bytes) -> ExtentId:
    return ExtentId(*parse_id(key))


def _name(key: bytes) -> str:
    name = key[len(NAMES) :].decode()
    if normal_name(name) != name or name_key(name) != key:
        raise ValueError("it is not a name as the catalogue keeps them")
    return name


def _upload(key: bytes, value: bytes) -> UploadRecord:
    return unpack_upload(VersionId(*parse_id(key)), value)


def _version(key: bytes, value: bytes) -> Version:
    return _valid(Version, unpack_version(VersionId(*parse_id(key)), value))


def _extent(key: bytes, value: bytes) -> tuple[Extent, VersionId]:
    stored = unpack_extent(ExtentId(*parse_id(key)), value)
    extent = _valid(Extent, stored.extent)
    if len(extent.pools) != extent.layout.total:
        raise ValueError(f"layout {extent.layout} with {len(extent.pools)} shards")
    return extent, _valid(VersionId, stored.version)


def _told(key: bytes) -> str:
    """Return a key for people."""
    prefix, rest = key[:2], key[2:]
    if prefix in (NAMES, CONTROLLERS):
        return repr(rest.decode(errors="backslashreplace"))
    if prefix in (VERSIONS, EXTENTS, LARGE, GARBAGE, OUTCOMES, UPLOADS) and len(rest) == 12:
        return str(ExtentId.from_bytes(rest))
    if prefix == POOLS:
        return str(int.from_bytes(rest))
    if prefix == SESSIONS:
        return f"{int.from_bytes(rest):x}"
    return repr(key)[1:]


def _placement_text(placement: Placement) -> str:
    k, m, pools = placement
    return f"{k}+{m} on pools {', '.join(map(str, pools))}"
