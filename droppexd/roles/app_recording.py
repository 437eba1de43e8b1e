"""Noting an upload's extents with the master as they become durable, so that it can be gone on with.

The extents are noted in their order. What cannot be noted now goes along with a later one, or with the
commit: no upload fails for it, only that more of it is sent again when it is interrupted.
"""

import logging
from dataclasses import replace

import trio

from droppexd.errors import Conflict, DroppexError, PeerError
from droppexd.model import Extent, OperationId, UploadRecord, Version
from droppexd.roles.app_session import Ids
from droppexd.roles.master import MasterLink
from droppexd.wire.upload_messages import ExtendUpload, TakeUpload

log = logging.getLogger("droppex.app")

NOTE_S = 30.0


class Recording:
    """What the master knows of one upload."""

    def __init__(self, master: MasterLink, ids: Ids, upload: UploadRecord) -> None:
        """Begin with an upload of which the master knows nothing."""
        self._master = master
        self._ids = ids
        self._upload = upload
        self._waiting: dict[int, tuple[Extent, bytes]] = {}
        self._asked: OperationId | None = None
        """The operation whose outcome is not known."""
        self._off = False
        self._lock = trio.Lock()

    @property
    def holder(self) -> OperationId:
        """The operation that began the upload or took it over."""
        return self._upload.holder

    @property
    def count(self) -> int:
        """How many extents the master knows."""
        return self._upload.extents

    async def take(self, upload: UploadRecord, keep: int) -> tuple[Version, tuple[Extent, ...]]:
        """Go on with another upload's first extents; return its version and them."""
        operation = self._ids.operation()
        request = TakeUpload(operation=operation, version=upload.version, keep=keep)
        found = await self._master.call(request, timeout_s=NOTE_S)
        self._upload = replace(upload, holder=operation, extents=keep, size=self._upload.size)
        return found.version, found.extents

    async def add(self, place: int, extent: Extent, digest: bytes) -> None:
        """Note an extent that is durable. Raise Conflict when somebody else has taken the upload over."""
        self._waiting[place] = extent, digest
        try:
            await self.settle()
        except PeerError as error:
            log.info("an extent was not noted yet upload=%s: %s", self._upload.version, error)

    async def settle(self) -> None:
        """Note what can be noted. Raise PeerError when it is not known whether that was done."""
        async with self._lock:
            while not self._off and (following := self._waiting.get(self.count)) is not None:
                extent, digest = following
                self._asked = self._asked or self._ids.operation()
                request = ExtendUpload(
                    operation=self._asked, upload=self._upload, extent=extent, digest=digest
                )
                try:
                    await self._master.call(request, timeout_s=NOTE_S)
                except PeerError:
                    raise
                except DroppexError as error:
                    self._refused(error)
                else:
                    del self._waiting[self.count]
                    self._upload = replace(self._upload, extents=self.count + 1)
                self._asked = None

    def _refused(self, error: DroppexError) -> None:
        """Go on without; not when the extents that were noted are no longer this upload's."""
        log.warning("the rest of an upload is not noted upload=%s: %s", self._upload.version, error)
        self._off = True
        if isinstance(error, Conflict) and self.count:
            raise error
