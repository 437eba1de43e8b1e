"""The messages about uploads that can be gone on with. Their kinds are numbered from 180."""

from typing import Annotated

from droppexd.model import (
    MAX_EXTENTS,
    Digest,
    Extent,
    FileName,
    OperationId,
    Role,
    UploadRecord,
    Version,
    VersionId,
)
from droppexd.schema import Bounds
from droppexd.wire.messages import (
    Committed,
    Condition,
    Done,
    Extents,
    Found,
    Limit,
    Reply,
    Request,
    StreamId,
    message,
)

_CLIENT = (Role.CLIENT, Role.APP)
_APP = (Role.APP,)

Digests = Annotated[tuple[Digest, ...], Bounds(0, MAX_EXTENTS)]
Source = Annotated[bytes, Bounds(1, 32)]

UPLOADS_LIMIT = 500
"""Uploads in a page, whose names may have 1024 bytes each."""


@message(181)
class UploadsListed(Reply):
    """A page of uploads, in the order of their versions; `more` when there are some behind it."""

    uploads: Annotated[tuple[UploadRecord, ...], Bounds(0, UPLOADS_LIMIT)]
    more: bool = False


@message(180, reply=UploadsListed, callers=_CLIENT)
class ListUploads(Request[UploadsListed]):
    """List uploads that have not become files, behind the version `after`."""

    after: VersionId | None = None
    limit: Limit = UPLOADS_LIMIT


@message(182, reply=Done, callers=_CLIENT)
class DropUpload(Request[Done]):
    """Give an upload up: what was sent of it becomes garbage."""

    version: VersionId


@message(185)
class UploadFound(Reply):
    """The upload that has come furthest, with a digest for each of its extents; or none."""

    upload: UploadRecord | None = None
    digests: Digests = ()


@message(184, reply=UploadFound, callers=_APP)
class FindUpload(Request[UploadFound]):
    """Look for an upload of a name from a source."""

    name: FileName
    source: Source


@message(186, reply=Done, callers=_APP)
class ExtendUpload(Request[Done]):
    """Add a durable extent to an upload; to one without extents the first, which begins it."""

    operation: OperationId
    upload: UploadRecord
    extent: Extent
    digest: Digest


@message(188, reply=Found, callers=_APP)
class TakeUpload(Request[Found]):
    """Go on with the first extents of an upload; who held it before can add no more."""

    operation: OperationId
    version: VersionId
    keep: Annotated[int, Bounds(1, MAX_EXTENTS)]


@message(190, reply=Committed, callers=_APP)
class CommitUpload(Request[Committed]):
    """Make an upload visible under a name. `rest` are the extents that were not added to it before."""

    operation: OperationId
    holder: OperationId
    name: FileName
    condition: Condition
    version: Version
    rest: Extents
    note: Annotated[str, Bounds(0, 1024)] = ""


@message(192, reply=Done, callers=_CLIENT)
class PutResume(Request[Done]):
    """Begin a put with the first extents of the upload that PutOpened told of; 0: begin anew.

    It comes before the first chunk. Chunks are numbered as in the whole file.
    """

    stream: StreamId
    keep: Annotated[int, Bounds(0, MAX_EXTENTS)]
