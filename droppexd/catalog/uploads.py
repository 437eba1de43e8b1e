"""The changes about uploads that can be gone on with: versions without a name, to which extents are added.

The extents of such an upload are on record like those of any file, so they are repaired and moved and never
taken for left-overs. What makes a version an upload is a record beside it: who holds it, and since when
nothing came. It becomes a file by one change, which takes that record away; or is given up, and is garbage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from droppexd.catalog.batch import EXTENTS_AT_ONCE, Batch
from droppexd.catalog.changes import CommitVersion, RememberedChange, check_new_id, checked_extent
from droppexd.catalog.keys import (
    digest_key,
    extent_key,
    garbage_key,
    outcome_key,
    placement_of,
    upload_key,
    version_key,
)
from droppexd.catalog.records import Decided, Name, Placed, pack_fields, pack_upload, unpack_upload
from droppexd.catalog.state import Session, State
from droppexd.errors import Conflict, InvalidRequest, NotFound
from droppexd.model import EXTENT_CHUNKS, Extent, OperationId, UploadRecord, Version, VersionId

MAX_UPLOADS = 1024
"""Uploads on record. Further ones go on without: they begin anew when they are interrupted."""


async def _record(batch: Batch, version: VersionId) -> UploadRecord | None:
    value = await batch.get(upload_key(version))
    return None if value is None else unpack_upload(version, value)


def _put_record(batch: Batch, record: UploadRecord) -> None:
    batch.put(upload_key(record.version), pack_upload(record))
    batch.after_commit(partial(batch.state.uploads.__setitem__, record.version, record))


async def _delete_record(batch: Batch, record: UploadRecord) -> None:
    batch.delete(upload_key(record.version))
    for place in range(record.extents):
        batch.delete(digest_key(record.version, place))
    batch.after_commit(partial(_forget, batch.state, record.version))


def _forget(state: State, version: VersionId) -> None:
    state.uploads.pop(version, None)


async def _held(batch: Batch, version: VersionId, holder: OperationId) -> UploadRecord:
    """Return the record of an upload; raise Conflict unless this operation began or took it."""
    record = await _record(batch, version)
    if record is None:
        raise Conflict(f"upload {version} was given up meanwhile; begin again")
    if record.holder != holder:
        raise Conflict(f"another put of {record.name!r} from the same file has taken this upload over")
    return record


class _UploadChange(RememberedChange):
    """An operation that is answered by the version."""

    def answer(self, outcome: Decided) -> VersionId:
        """Return the version."""
        if not isinstance(outcome, VersionId):
            raise self.wrong_repeat()
        return outcome


@dataclass(frozen=True, slots=True)
class ExtendUpload(_UploadChange):
    """Add a durable extent, a full one, to an upload; the first begins it."""

    operation: OperationId
    upload: UploadRecord
    """With the number of extents that it has before this one, and no times."""
    extent: Extent
    digest: bytes
    """Of the extent's bytes, as the client makes it."""

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        version, extent = self.upload.version, self.extent.id
        return [
            outcome_key(self.operation),
            upload_key(version),
            version_key(version),
            extent_key(extent),
            garbage_key(extent),
        ]

    async def decide(self, batch: Batch, session: Session) -> VersionId:
        """Check that it is the next one, then write extent, version and record."""
        upload, extent = self.upload, self.extent
        check_new_id(extent.id, self.operation, session)
        for key in (extent_key(extent.id), garbage_key(extent.id)):
            if await batch.get(key) is not None:
                raise InvalidRequest(f"extent {extent.id} was used before")
        if extent.chunk_size != upload.chunk_size or extent.size != EXTENT_CHUNKS * upload.chunk_size:
            raise InvalidRequest(f"extent {extent.id} of upload {upload.version} is not full")
        now_ms = batch.clock.wall_ms()
        if upload.extents == 0:
            version = await self._begun(batch, session)
            created_ms = now_ms
        else:
            created_ms = (await _held(batch, upload.version, upload.holder)).created_ms
            version = await batch.version(upload.version)
        if len(version.extents) != upload.extents:
            raise Conflict(f"upload {upload.version} has {len(version.extents)} extents by now")
        batch.extend_version(version, checked_extent(extent, batch.state))
        batch.put(digest_key(upload.version, upload.extents), pack_fields((self.digest,)))
        _put_record(
            batch, replace(upload, extents=upload.extents + 1, created_ms=created_ms, touched_ms=now_ms)
        )
        return upload.version

    async def _begun(self, batch: Batch, session: Session) -> Version:
        version = self.upload.version
        check_new_id(version, self.operation, session)
        if await batch.get(version_key(version)) is not None:
            raise InvalidRequest(f"version {version} was used before")
        if len(batch.state.uploads) >= MAX_UPLOADS:
            raise Conflict(f"there are {MAX_UPLOADS} uploads on record already: `droppex uploads` lists them")
        return Version(
            id=version, size=0, blake3=bytes(32), extents=(), names=0, created_ms=batch.clock.wall_ms()
        )


@dataclass(frozen=True, slots=True)
class TakeUpload(_UploadChange):
    """Go on with an upload: keep its first extents, and let nobody else add to it."""

    operation: OperationId
    version: VersionId
    keep: int

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [outcome_key(self.operation), upload_key(self.version), version_key(self.version)]

    async def decide(self, batch: Batch, _session: Session) -> VersionId:
        """Write the new holder; the extents that are not kept become garbage."""
        record = await _record(batch, self.version)
        if record is None:
            raise NotFound(f"there is no upload {self.version}")
        if not 0 < self.keep <= record.extents:
            raise InvalidRequest(f"upload {self.version} has {record.extents} extents, not {self.keep}")
        await batch.shorten_version(await batch.version(self.version), self.keep)
        for place in range(self.keep, record.extents):
            batch.delete(digest_key(self.version, place))
        _put_record(
            batch,
            replace(record, holder=self.operation, extents=self.keep, touched_ms=batch.clock.wall_ms()),
        )
        return self.version


@dataclass(frozen=True, slots=True)
class CommitUpload(CommitVersion):
    """Make an upload visible under a name; `extents` are those that were not added to it before."""

    holder: OperationId

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [*CommitVersion.reads(self), upload_key(self.version.id)]

    async def decide(self, batch: Batch, session: Session) -> Placed:
        """Check the version and the condition, then write name, version and the rest of the extents."""
        record = await _held(batch, self.version.id, self.holder)
        begun = await batch.version(self.version.id)
        new = self.version.extents[len(begun.extents) :]
        if self.version.extents[: len(begun.extents)] != begun.extents or len(new) != len(self.extents):
            raise Conflict(f"upload {self.version.id} has other extents by now")
        self._check_rest(begun, new)
        for extent in self.extents:
            check_new_id(extent.id, self.operation, session)
            for key in (extent_key(extent.id), garbage_key(extent.id)):
                if await batch.get(key) is not None:
                    raise InvalidRequest(f"extent {extent.id} was used before")
        rest = [checked_extent(extent, batch.state) for extent in self.extents]
        survives = [batch.state.survives(placement_of(one.layout, one.pools)) for one in rest]
        survives += await self._survive(batch, begun)
        replaced = await batch.name(self.name)
        self.expected.check(self.name, replaced)

        created_ms = self.version.created_ms or batch.clock.wall_ms()
        await batch.finish_version(begun, replace(self.version, names=1, created_ms=created_ms), rest)
        await _delete_record(batch, record)
        batch.put_name(self.name, Name(self.version.id, self.version.size, created_ms))
        if replaced is not None:
            await batch.change_names(replaced.version, -1)
        return Placed(
            version=self.version.id,
            survives_pools=min(pools for pools, _ in survives),
            survives_machines=min(machines for _, machines in survives),
            replaced=replaced is not None,
        )

    def _check_rest(self, begun: Version, new: Sequence[object]) -> None:
        if tuple(extent.id for extent in self.extents) != tuple(new) or len(set(new)) != len(new):
            raise InvalidRequest(f"version {self.version.id} names other extents than the ones that came")
        size = begun.size + sum(extent.size for extent in self.extents)
        if size != self.version.size:
            raise InvalidRequest(
                f"version {self.version.id} has {self.version.size} bytes and its extents {size}"
            )

    async def _survive(self, batch: Batch, begun: Version) -> list[tuple[int, int]]:
        """Return what the extents survive that were added before."""
        survives: list[tuple[int, int]] = []
        for start in range(0, len(begun.extents), EXTENTS_AT_ONCE):
            some = begun.extents[start : start + EXTENTS_AT_ONCE]
            await batch.load([extent_key(extent) for extent in some])
            for extent in some:
                record = (await batch.extent(extent)).extent
                survives.append(batch.state.survives(placement_of(record.layout, record.pools)))
        return survives


@dataclass(frozen=True, slots=True)
class DropUpload:
    """Give an upload up: what was sent becomes garbage. With `before_ms` only if nothing came since."""

    version: VersionId
    before_ms: int | None = None

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [upload_key(self.version), version_key(self.version)]

    async def judge(self, batch: Batch) -> bool:
        """Discard it; return whether that was done. Raise NotFound."""
        record = await _record(batch, self.version)
        if record is None:
            raise NotFound(f"there is no upload {self.version}")
        if self.before_ms is not None and record.touched_ms >= self.before_ms:
            return False
        await batch.discard_version(await batch.version(self.version))
        await _delete_record(batch, record)
        return True
