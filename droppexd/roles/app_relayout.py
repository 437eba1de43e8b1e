"""Giving files another layout: each extent is read, coded anew, and takes the old one's place in one step.

What was coded anew stays so whatever happens then: the work goes on with the extent at which it stopped, for
those that have the layout are passed over. Readers see the old extents or the new ones, with the same bytes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import trio

from droppexd.errors import Conflict, DroppexError, NotEnoughShards, PeerBusy, PeerError
from droppexd.model import (
    MISSING,
    SMALL_SIZE,
    Extent,
    Layout,
    VersionId,
    chunk_count,
    chunk_length,
    normal_name,
    piece_size,
)
from droppexd.placement import small_layout
from droppexd.roles.app_download import Download, Reader
from droppexd.roles.app_upload import COMMIT_S, Outlets, Upload, Wanted
from droppexd.roles.budget import Budget, Lease
from droppexd.wire.messages import ANYTHING, MOST_TOGETHER, Found, Lookup, Request
from droppexd.wire.relayout_messages import Relayout, RelayoutTold, SwapExtent
from droppexd.wire.rpc import Answer, Call, Handler
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.app")

_POLL_S = 5.0
"""A client is answered after this, finished or not."""
_FORGET_S = 60.0
"""What nobody asked about for so long is given up."""
_MOST_OTHERS = 3
"""How often a file is begun anew that changed under the work."""
_MOST_FILES = 64
"""Under way at once, for all clients together."""

Body = Sequence[Frame]


@dataclass(eq=False, slots=True)
class _File:
    """A file that gets another layout, and how far it is."""

    name: str
    wanted: Layout | None
    asked_at: float
    target: Layout | None = None
    size: int = 0
    coded: int = 0
    kept: int = 0
    changed: int = 0
    before: int = 0
    after: int = 0
    error: DroppexError | None = None
    done: trio.Event = field(default_factory=trio.Event)

    def told(self) -> RelayoutTold:
        """Return what a client is told."""
        return RelayoutTold(
            layout="" if self.target is None else str(self.target),
            size=self.size,
            coded=self.coded,
            kept=self.kept,
            changed=self.changed,
            before=self.before,
            after=self.after,
            finished=self.done.is_set(),
        )


class _Part(NamedTuple):
    """One extent of a version, and where in the version it is."""

    version: VersionId
    place: int
    start: int
    extent: Extent


class Relayouts:
    """The app's part. `run` is its task."""

    def __init__(self, outlets: Outlets, reader: Reader, budget: Budget) -> None:
        self._outlets = outlets
        self._clock = outlets.runtime.clock
        self._reader = reader
        self._budget = budget
        self._files: dict[tuple[str, Layout | None], _File] = {}
        self._versions: dict[VersionId, trio.Event] = {}
        self._nursery: trio.Nursery | None = None

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return the handlers by kind of request."""
        return {Relayout: self.relayout}

    async def run(self) -> None:
        """Code files anew, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    async def relayout(self, _call: Call, request: Relayout, _body: Body) -> Answer:
        """Begin with a file, or tell how far it is."""
        name = normal_name(request.name)
        if request.layout is not None:
            request.layout.check_survives()
        key = name, request.layout
        file = self._files.get(key)
        if file is None:
            if self._nursery is None or len(self._files) >= _MOST_FILES:
                raise PeerBusy("the app gives as many files another layout as it takes; try again later")
            file = self._files[key] = _File(name, request.layout, self._clock.now())
            self._nursery.start_soon(self._carry_out, file)
        file.asked_at = self._clock.now()
        with trio.move_on_after(_POLL_S):
            await file.done.wait()
        if file.error is not None:
            raise file.error
        return file.told()

    async def _carry_out(self, file: _File) -> None:
        """Give one file its layout; who asks then is told of that, and who asks later begins anew."""
        try:
            for others in range(_MOST_OTHERS):
                try:
                    await self._recode(file)
                    break
                except Conflict:  # Another app does the same, or the name has another version by now.
                    if others == _MOST_OTHERS - 1:
                        raise
        except DroppexError as error:
            log.info("file not coded anew name=%r: %s", file.name, error)
            file.error = error
        del self._files[file.name, file.wanted]
        file.done.set()

    async def _recode(self, file: _File) -> None:
        """Give a file its layout, once nobody here does so under another of its names."""
        found = await self._reader.look_up(Lookup(name=file.name))
        while (other := self._versions.get(found.version.id)) is not None:
            await other.wait()
            found = await self._reader.look_up(Lookup(name=file.name))
        done = self._versions[found.version.id] = trio.Event()
        try:
            await self._recode_version(file, found)
        finally:
            del self._versions[found.version.id]
            done.set()

    async def _recode_version(self, file: _File, found: Found) -> None:
        file.size = found.version.size
        file.coded = file.kept = 0
        target = file.target = self._target(file)
        start = 0
        for place, extent in enumerate(found.extents):
            part = _Part(found.version.id, place, start, extent)
            start += extent.size
            if extent.layout == target:
                file.coded += extent.size
            elif file.wanted is None and extent.layout.m > target.m:
                file.coded += extent.size
                file.kept += extent.size
            else:
                await self._recode_extent(file, found, part, target)

    def _target(self, file: _File) -> Layout:
        """Return the layout that the file is to have; raise NotEnoughShards when the pools are too few."""
        view = self._outlets.registration.view
        target = view.layout(file.wanted or self._outlets.layout)
        if file.wanted is None and file.size <= SMALL_SIZE:
            target = small_layout(target)
        if file.size and len(view.takers) < target.total:
            raise NotEnoughShards(
                f"{target} takes {target.total} pools, and {len(view.takers)} take writes now; "
                "`droppex status` says why"
            )
        return target

    async def _recode_extent(self, file: _File, found: Found, part: _Part, target: Layout) -> None:
        """Write an extent anew, have it take the old one's place, and count."""
        old = part.extent
        outlets = replace(self._outlets, chunk_size=old.chunk_size)
        wanted = Wanted(name=file.name, condition=ANYTHING, layout=target, metadata=(), size=old.size)
        lease = await self._budget.lease()
        try:
            with self._outlets.registration.session.work() as ids:
                upload = Upload(outlets, wanted, ids, part.version, part.place)
                try:
                    await self._copy(file, Download(self._reader, found, part.start, old.size), upload, lease)
                    (new,) = await upload.records()
                    _check_whole(new, target)
                except BaseException:
                    await upload.abort()
                    raise
                swap = SwapExtent(
                    operation=ids.operation(), version=part.version, place=part.place, old=old.id, new=new
                )
                await self._outlets.master.call(swap, timeout_s=COMMIT_S)
        finally:
            lease.release()
        file.changed += old.size
        file.before += stored_bytes(old)
        file.after += stored_bytes(new)

    async def _copy(self, file: _File, download: Download, upload: Upload, lease: Lease) -> None:
        """Read an extent and send it out again, as many chunks at once as there is memory for."""
        chunk_size = download.found.extents[0].chunk_size
        room = trio.Semaphore(2)  # One message is read while another is sent.
        failed: list[DroppexError] = []

        async def copy(part: int, count: int) -> None:
            try:
                frames, _ = await download.read_parts(part, count)
                chunks = await self._outlets.runtime.run_blocking(_joined, frames, chunk_size)
                last = part + count == download.parts
                await upload.send_chunks(part, chunks, last=last)
                file.coded += sum(map(len, chunks))
            except DroppexError as error:
                failed.append(error)
                nursery.cancel_scope.cancel()
            finally:
                room.release()

        async with trio.open_nursery() as nursery:
            part = 0
            while part < download.parts:
                await room.acquire()
                if self._clock.now() - file.asked_at > _FORGET_S:
                    failed.append(PeerError("nobody asked about the new layout any more"))
                    nursery.cancel_scope.cancel()
                    break
                most = max(1, min(download.together, MOST_TOGETHER, lease.adjust() // 2))
                count = min(most, download.parts - part)
                nursery.start_soon(copy, part, count)
                part += count
        if failed:
            raise failed[0]


def _joined(frames: Sequence[Frame], chunk_size: int) -> list[Frame]:
    """Return whole chunks from the pieces of consecutive ones. Blocking."""
    data = memoryview(b"".join(frames))
    return [data[start : start + chunk_size] for start in range(0, len(data), chunk_size)]


def _check_whole(extent: Extent, target: Layout) -> None:
    """Raise NotEnoughShards unless each shard is on a pool: what replaces another must not survive less."""
    missing = extent.pools.count(MISSING)
    if missing or extent.layout != target:
        raise NotEnoughShards(
            f"only {len(extent.pools) - missing} pools took a shard, and {target} has {target.total}; "
            "the file is as it was, try again later",
            [f"shard {index}" for index, pool in enumerate(extent.pools) if pool == MISSING],
        )


def stored_bytes(extent: Extent) -> int:
    """Return how many bytes all shards of an extent have together, missing ones included."""
    chunks = chunk_count(extent.size, extent.chunk_size)
    if not chunks:
        return 0
    last = chunk_length(extent.size, extent.chunk_size, chunks - 1)
    k = extent.layout.k
    pieces = (chunks - 1) * piece_size(extent.chunk_size, k) + piece_size(last, k)
    return pieces * extent.layout.total
