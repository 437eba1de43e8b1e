"""What the master answers about uploads that can be gone on with, and how long it keeps them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from droppexd.catalog.catalogue import Catalogue
from droppexd.catalog.changes import Expected
from droppexd.errors import NotFound
from droppexd.model import UploadRecord, VersionId, normal_name
from droppexd.runtime import Clock
from droppexd.wire.messages import Committed, Done, Found, Request
from droppexd.wire.rpc import Answer, Call, Handler
from droppexd.wire.transport import Frame
from droppexd.wire.upload_messages import (
    UPLOADS_LIMIT,
    CommitUpload,
    DropUpload,
    ExtendUpload,
    FindUpload,
    ListUploads,
    TakeUpload,
    UploadFound,
    UploadsListed,
)

log = logging.getLogger("droppex.controller")

Body = Sequence[Frame]


class UploadDesk:
    """The handlers."""

    def __init__(
        self, catalogue: Catalogue, clock: Clock, keep_s: float, check_term: Callable[[], None]
    ) -> None:
        self._catalogue = catalogue
        self._clock = clock
        self._keep_s = keep_s
        self._check_term = check_term

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return the handlers by kind of request."""
        return {
            ListUploads: self.list_uploads,
            FindUpload: self.find,
            ExtendUpload: self.extend,
            TakeUpload: self.take,
            CommitUpload: self.commit,
            DropUpload: self.drop,
        }

    async def list_uploads(self, _call: Call, request: ListUploads, _body: Body) -> Answer:
        """Return a page of uploads."""
        self._check_term()
        after = request.after or VersionId(0, 0)
        found = sorted(one for one in self._catalogue.uploads if one > after)
        page = [self._catalogue.uploads[one] for one in found[: min(request.limit, UPLOADS_LIMIT)]]
        return UploadsListed(uploads=tuple(page), more=len(found) > len(page))

    async def find(self, _call: Call, request: FindUpload, _body: Body) -> Answer:
        """Return the upload of a name from a source that has come furthest."""
        self._check_term()
        name = normal_name(request.name)
        found = [
            upload
            for upload in self._catalogue.uploads.values()
            if (upload.name, upload.source) == (name, request.source)
        ]
        if not found:
            return UploadFound()
        upload = max(found, key=_progress)
        return UploadFound(upload=upload, digests=await self._catalogue.upload_digests(upload.version))

    async def extend(self, _call: Call, request: ExtendUpload, _body: Body) -> Answer:
        """Add an extent to an upload."""
        self._check_term()
        await self._catalogue.extend_upload(request.operation, request.upload, request.extent, request.digest)
        return Done()

    async def take(self, _call: Call, request: TakeUpload, _body: Body) -> Answer:
        """Hand an upload over to who goes on with it."""
        self._check_term()
        version, extents = await self._catalogue.take_upload(request.operation, request.version, request.keep)
        return Found(name=self._catalogue.uploads[request.version].name, version=version, extents=extents)

    async def commit(self, _call: Call, request: CommitUpload, _body: Body) -> Answer:
        """Make an upload a file."""
        self._check_term()
        receipt = await self._catalogue.commit_upload(
            request.operation,
            normal_name(request.name),
            Expected(absent=request.condition.absent, version=request.condition.version),
            request.version,
            request.rest,
            request.note,
            request.holder,
        )
        return Committed(receipt=receipt)

    async def drop(self, _call: Call, request: DropUpload, _body: Body) -> Answer:
        """Give an upload up, as a person or its client says."""
        self._check_term()
        await self._catalogue.drop_upload(request.version)
        return Done()

    async def expire(self) -> None:
        """Give up the uploads of which nothing came for long."""
        before_ms = self._clock.wall_ms() - round(self._keep_s * 1000)
        old = [one for one in self._catalogue.uploads.values() if one.touched_ms < before_ms]
        for upload in old:
            try:
                if await self._catalogue.drop_upload(upload.version, before_ms):
                    log.warning("upload given up name=%r extents=%d", upload.name, upload.extents)
            except NotFound:
                continue


def _progress(upload: UploadRecord) -> tuple[int, int, VersionId]:
    return upload.extents, upload.touched_ms, upload.version
