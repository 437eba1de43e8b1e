"""The client itself: one app, and everything that it can be asked."""

import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from typing import BinaryIO

import trio

from droppexd.client.changes import Changes
from droppexd.client.download import Download, Progress
from droppexd.client.keeping import kept_alive
from droppexd.client.orphans import OrphanListing, OrphanVersion, pools_of
from droppexd.client.patience import NONE, Patience, Trying
from droppexd.client.putting import Attempt, OnAgain, Put
from droppexd.client.upload import Resumed, Upload
from droppexd.errors import DroppexError, InvalidName, InvalidRequest, StaleRead
from droppexd.model import (
    SMALL_SIZE,
    ExtentId,
    FileEntry,
    Layout,
    MemberRecord,
    Metadata,
    Receipt,
    Role,
    UploadRecord,
    VersionId,
    normal_name,
    normal_prefix,
)
from droppexd.runtime import Runtime
from droppexd.wire.examining import Acquaintance, examine_peers
from droppexd.wire.group_messages import (
    ControllersListed,
    ExaminePeers,
    ListControllers,
    PeerReport,
    PeersExamined,
    RemoveController,
)
from droppexd.wire.member_messages import ListMembers, RevokeMember
from droppexd.wire.messages import (
    ABSENT,
    ANYTHING,
    PAGE_LIMIT,
    AdoptOrphan,
    CheckFile,
    Condition,
    Describe,
    Described,
    DropOrphans,
    FileChecked,
    Find,
    GetClose,
    GetOpen,
    GetOpened,
    GetStatus,
    KeepStream,
    List,
    Listed,
    ListFindings,
    Orphan,
    OrphanExtent,
    PoolReplaced,
    PoolScrub,
    R,
    Remove,
    Rename,
    ReplacePool,
    Request,
    ScrubFinding,
    Status,
    WatchScrubs,
)
from droppexd.wire.pool_messages import DrainPool, PoolDrained, PoolRemoved, RemovePool
from droppexd.wire.relayout_messages import Relayout, RelayoutTold
from droppexd.wire.replication_messages import Promote, Promoted
from droppexd.wire.rpc import Connections, Terms, open_connections
from droppexd.wire.transport import Frame, Transport
from droppexd.wire.upload_messages import DropUpload, ListUploads

_CLOSE_S = 2.0
ANSWER_S = 45.0
"""Longer than an app looks for a master."""

_CHECK_S = 3000.0

OnStale = Callable[[str, float | None], None]
"""Is told which controller a page is from that may be old, and how many seconds at most, if that is known."""

_PROMOTE_S = 330.0
"""The app gives a controller that is promoted a little less."""
"""Some gigabytes are read for one answer, from disks that may be busy. An app that goes away is noticed."""


@asynccontextmanager
async def open_client(
    address: str,
    transport: Transport,
    runtime: Runtime,
    *,
    timeout_s: float = ANSWER_S,
    patience: Patience = NONE,
) -> AsyncIterator["Client"]:
    """Open a client of the app at `address`; `timeout_s` bounds each question about names.

    With `patience` it goes on over a restart of the app: see `Client`. Nothing is sent before the first call.
    """
    async with open_connections(transport, terms=Terms()) as connections:
        yield Client(address, connections, runtime, timeout_s, patience)


class Client:
    """Files through one app. Names are normalised: one without a folder goes to `files/`.

    Every method raises the errors of `droppexd.errors`: PeerError when the app is unreachable, NotFound,
    Conflict, InvalidName, NotEnoughShards, IntegrityError.

    A client with patience asks again while the app is away: what changes nothing as it is, a change of a name
    so that it is made once; a read goes on where it was; a put begins anew, if its source can be read again.
    What an operator does to the cluster is asked once.
    """

    def __init__(
        self,
        address: str,
        connections: Connections,
        runtime: Runtime,
        timeout_s: float,
        patience: Patience = NONE,
    ) -> None:
        self._address = address
        self._connections = connections
        self._runtime = runtime
        self._timeout_s = timeout_s
        self._patience = patience
        self._changes = Changes(self._ask_once, self._trying)

    def _trying(self) -> Trying:
        return Trying(self._patience, self._runtime)

    async def connect(self, *, timeout_s: float) -> None:
        """Return when the app is there. Raise PeerError when it is not, or not in time.

        The other methods connect by themselves, but a put waits for its turn much longer than one waits for
        an app that may not be there at all.
        """
        await self._trying().until_done(lambda: self._connections.connect(self._address, timeout_s=timeout_s))

    async def put_file(
        self,
        name: str,
        source: BinaryIO,
        *,
        size: int | None = None,
        condition: Condition = ABSENT,
        layout: Layout | None = None,
        metadata: Metadata = (),
        progress: Progress | None = None,
        origin: bytes = b"",
        on_resume: Resumed | None = None,
        on_again: OnAgain | None = None,
    ) -> Receipt:
        """Store what `source` holds, to its end, and return the receipt. Raise Conflict if the name exists.

        `source` is read in a worker thread; `progress` is told of bytes as they become durable, and
        `on_again` when the put begins anew.

        With `origin`, up to 32 bytes that say where they come from, and `size`, a put of a large file that
        was interrupted is gone on with by the next of the same name and origin. What is stored already is
        read again and compared, and not sent; `on_resume` is told how much that is. `source` must be
        seekable.
        """
        upload = self._upload(name, condition, layout, metadata, origin, on_resume)

        async def attempt(progress: Progress | None) -> Receipt:
            return await upload.put_file(source, size, progress)

        return await self._put(name, source, attempt, progress, on_again)

    async def uploads(self) -> AsyncGenerator[UploadRecord, None]:
        """Yield the uploads that were interrupted, or are under way."""
        after: VersionId | None = None
        while True:
            page = await self._ask(ListUploads(after=after))
            for upload in page.uploads:
                yield upload
                after = upload.version
            if not page.more or not page.uploads:
                return

    async def drop_upload(self, version: VersionId) -> None:
        """Give an upload up, so that what it has stored is cleared away. Raise NotFound."""
        await self._ask(DropUpload(version=version))

    async def put_bytes(
        self,
        name: str,
        data: bytes,
        *,
        condition: Condition = ABSENT,
        layout: Layout | None = None,
        metadata: Metadata = (),
    ) -> Receipt:
        """Store bytes and return the receipt. Raise Conflict if the name exists."""
        upload = self._upload(name, condition, layout, metadata)
        source = io.BytesIO(data)

        async def attempt(progress: Progress | None) -> Receipt:
            if len(data) <= SMALL_SIZE:
                return await upload.put_bytes(data)
            return await upload.put_file(source, len(data), progress)

        return await self._put(name, source, attempt)

    async def _put(
        self,
        name: str,
        source: BinaryIO,
        attempt: Attempt,
        progress: Progress | None = None,
        on_again: OnAgain | None = None,
    ) -> Receipt:
        if not self._patience.total_s:
            return await attempt(progress)
        put = Put(
            source,
            attempt=attempt,
            describe=lambda: self.describe(name),
            run_blocking=self._runtime.run_blocking,
            progress=progress,
            on_again=on_again,
        )
        return await put.run(self._trying())

    def _upload(
        self,
        name: str,
        condition: Condition,
        layout: Layout | None,
        metadata: Metadata,
        origin: bytes = b"",
        on_resume: Resumed | None = None,
    ) -> Upload:
        return Upload(
            self._connections,
            self._runtime,
            self._address,
            name=normal_name(name),
            condition=condition,
            layout=layout,
            metadata=metadata,
            origin=origin,
            on_resume=on_resume,
        )

    def open_read(
        self, name: str, *, start: int = 0, length: int | None = None, version: VersionId | None = None
    ) -> AbstractAsyncContextManager[Download]:
        """Open a name, or a part of it, for reading."""
        return self._open_read(normal_name(name), start, length, version)

    @asynccontextmanager
    async def _open_read(
        self, name: str, start: int, length: int | None, version: VersionId | None
    ) -> AsyncIterator[Download]:
        request = GetOpen(name=name, start=start, length=length, version=version)
        info, first = await self._trying().until_done(lambda: self._open_at_app(request))
        download = Download(
            self._connections,
            self._runtime,
            self._address,
            name,
            info,
            first,
            self._open_at_app,
            self._trying(),
        )

        def keep() -> KeepStream | None:
            stream = download.opened.stream
            return KeepStream(stream=stream, put=False) if stream else None

        try:
            if info.stream:
                async with kept_alive(self._connections, self._address, keep):
                    yield download
            else:
                yield download
        finally:
            await download.aclose()
            if download.opened.stream:
                await self._close_read(download.opened.stream)

    async def _open_at_app(self, request: GetOpen) -> tuple[GetOpened, Sequence[Frame]]:
        return await self._connections.call(self._address, request, timeout_s=self._timeout_s)

    async def _close_read(self, stream: int) -> None:
        with trio.move_on_after(_CLOSE_S, shield=True):
            try:
                await self._connections.call(self._address, GetClose(stream=stream), timeout_s=_CLOSE_S)
            except DroppexError:
                return  # The app forgets reads that it hears nothing of.

    async def get_bytes(self, name: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return the content of a name, or a part of it."""
        try:
            return await self._read_bytes(name, start, length)
        except StaleRead:
            if not self._patience.total_s:
                raise
        return await self._read_bytes(name, start, length)

    async def _read_bytes(self, name: str, start: int, length: int | None) -> bytes:
        async with self.open_read(name, start=start, length=length) as download:
            return b"".join([frame async for frames in download for frame in frames])

    async def get_file(
        self,
        name: str,
        target: BinaryIO,
        *,
        start: int = 0,
        length: int | None = None,
        progress: Progress | None = None,
    ) -> Download:
        """Write the content of a name to `target`, in a worker thread, and return what was read.

        Raise IntegrityError when a whole read does not match its BLAKE3: discard what was written then.
        """
        async with self.open_read(name, start=start, length=length) as download:
            await download.write_to(target, progress)
            return download

    async def list(
        self, prefix: str = "", *, recursive: bool = False, on_stale: OnStale | None = None
    ) -> AsyncGenerator[FileEntry, None]:
        """Yield the names that start with `prefix`, in order, sub-folders folded unless `recursive`.

        With `on_stale` they may be those that another controller knows while there is no master; it is told
        of each page for which that is so.
        """
        request = List(prefix=normal_prefix(prefix), recursive=recursive, stale_ok=on_stale is not None)
        async with aclosing(self._pages(request, on_stale)) as entries:
            async for entry in entries:
                yield entry

    async def find(self, pattern: str) -> AsyncGenerator[FileEntry, None]:
        """Yield the names that match a glob pattern, in order. Raise InvalidName when it is not UTF-8."""
        try:
            pattern.encode()
        except UnicodeEncodeError:
            raise InvalidName("the pattern is not valid UTF-8") from None
        async with aclosing(self._pages(Find(pattern=pattern))) as entries:
            async for entry in entries:
                yield entry

    async def _pages(
        self, request: List | Find, on_stale: OnStale | None = None
    ) -> AsyncGenerator[FileEntry, None]:
        while True:
            page: Listed = await self._ask(request)
            if page.told_by and on_stale is not None:
                on_stale(page.told_by, None if page.age_ms is None else page.age_ms / 1000)
            for entry in page.entries:
                yield entry
            if not page.next:
                return
            request = replace(request, after=page.next)

    async def describe(self, name: str) -> Described:
        """Return all that is known of a file, and where its shards are."""
        return await self._ask(Describe(name=normal_name(name)))

    async def remove(
        self, name: str, *, condition: Condition = ANYTHING, known: VersionId | None = None
    ) -> VersionId:
        """Remove a name and return the version it pointed at; `known` is what a listing said that this is."""
        request = Remove(name=normal_name(name), condition=condition)
        if not self._patience.total_s:
            return (await self._ask_once(request)).version
        return await self._changes.remove(request, known)

    async def rename(
        self, source: str, target: str, *, condition: Condition = ABSENT, keep: bool = False
    ) -> VersionId:
        """Give a file another name, or with `keep` one more. `condition` is about the target."""
        request = Rename(
            source=normal_name(source), target=normal_name(target), condition=condition, keep=keep
        )
        if not self._patience.total_s:
            return (await self._ask_once(request)).version
        return await self._changes.rename(request)

    async def relayout(
        self, name: str, *, layout: Layout | None = None, progress: Progress | None = None
    ) -> RelayoutTold:
        """Give a file another layout, or that of new files of its size; return what that came to.

        `progress` is told of bytes that have it. Raise NotFound, and NotEnoughShards when the pools that
        take writes are too few: the file is as it was then, or a part of it has the layout already.
        """
        request = Relayout(name=normal_name(name), layout=layout)
        coded = 0
        while True:
            told = await self._ask(request)
            if progress is not None and told.coded > coded:
                progress(told.coded - coded)
                coded = told.coded
            if told.finished:
                return told

    async def replace_pool(self, pool: str, *, force: bool = False) -> PoolReplaced:
        """Remove a lost pool for good, by name or number: its shards are rebuilt on others.

        Raise NotFound, and Conflict while it is up or when files would be lost with it, unless `force`.
        """
        # By number: it may be repeated on its way, and an empty folder may have taken the name by then.
        pools = (await self.status()).status.pools
        numbers = [str(one.number) for one in pools if one.name == pool]
        wanted = numbers[0] if len(numbers) == 1 else pool
        return await self._ask_once(ReplacePool(pool=wanted, force=force))

    async def drain_pool(
        self, pool: str, *, undo: bool = False, force: bool = False, ask: bool = False
    ) -> PoolDrained:
        """Have everything moved off a pool, by name or number, or with `ask` nothing; return how far that is.

        Raise NotFound, and Conflict when the others are too few for what is on it, unless `force`.
        """
        return await self._ask_once(DrainPool(pool=pool, undo=undo, force=force, ask=ask))

    async def remove_pool(self, pool: str) -> PoolRemoved:
        """Remove a pool for good that was emptied. Raise NotFound, and Conflict while anything is there."""
        return await self._ask_once(RemovePool(pool=pool))

    async def controllers(self) -> ControllersListed:
        """Return which controllers there are, and how each of them is."""
        return await self._ask(ListControllers())

    async def examine_app(self) -> PeerReport:
        """Return what comes of asking the app who it is; a failure is a part of it."""
        app = Acquaintance(Role.APP, "", self._address)
        (report,) = await examine_peers(self._connections, self._runtime.clock, [app])
        return report

    async def examine_peers(self, *, timeout_s: float) -> PeersExamined:
        """Return what the app finds when it asks all controllers, apps and pools who they are."""
        return await self._ask(ExaminePeers(), timeout_s=timeout_s)

    async def remove_controller(self, name: str, *, force: bool = False) -> None:
        """Forget a controller that is gone for good.

        Raise NotFound, and Conflict while it answers, or too few others are left without `force`.
        """
        await self._ask_once(RemoveController(name=name, force=force))

    async def promote(self, address: str, *, accept_loss: bool = False, trial: bool = False) -> Promoted:
        """Make the controller at this address the master, or with `trial` ask what would come of it.

        Raise Conflict when there are too few others, and not `accept_loss`.
        """
        return await self._ask_once(
            Promote(address=address, accept_loss=accept_loss, trial=trial), timeout_s=_PROMOTE_S
        )

    async def members(self) -> tuple[MemberRecord, ...]:
        """Return whose keys may connect, those that were revoked among them."""
        found: tuple[MemberRecord, ...] = ()
        while True:
            page = await self._ask(ListMembers(after=found[-1].public if found else b""))
            found += page.members
            if not page.more or not page.members:
                return found

    async def revoke_member(self, name: str, role: str = "") -> tuple[MemberRecord, ...]:
        """Never let a member in again; return whose keys those were.

        Raise NotFound, Conflict when several roles have this name and none is given, and InvalidRequest for
        the master itself.
        """
        return (await self._ask_once(RevokeMember(name=name, role=role))).members

    def orphans(self, *, after: ExtentId | None = None) -> OrphanListing:
        """Return an iterator over the versions that pools hold and the catalogue never knew.

        With `after` over those with an extent behind that one. Its `away` tells which pools may hold more.
        """
        return OrphanListing(self._ask, after)

    async def adopt_orphan(
        self, orphan: OrphanVersion, *, folder: str, progress: Progress | None = None
    ) -> Receipt:
        """Have a version read whole and entered into the catalogue, below a folder; return its receipt.

        Raise InvalidRequest for what is no version, NotEnoughShards, and Conflict when a part of it is known.
        """
        if orphan.version is None:
            raise InvalidRequest("no header of these shards can be read: there is nothing to adopt")
        request = AdoptOrphan(
            version=orphan.version, extents=tuple(extent.id for extent in orphan.extents), folder=folder
        )
        read = 0
        while True:
            adoption = await self._ask_once(request)
            if progress is not None and adoption.read > read:
                progress(adoption.read - read)
                read = adoption.read
            if adoption.receipt is not None:
                return adoption.receipt

    async def drop_orphans(self, extents: Sequence[OrphanExtent]) -> tuple[ExtentId, ...]:
        """Have the pools drop what they hold of these extents; return those that have a record after all."""
        refused: tuple[ExtentId, ...] = ()
        for start in range(0, len(extents), PAGE_LIMIT):
            some = pools_of(extents[start : start + PAGE_LIMIT])
            request = DropOrphans(extents=tuple(Orphan(*one) for one in some))
            refused += (await self._ask_once(request)).refused
        return refused

    async def status(self) -> Status:
        """Return how the cluster is."""
        return await self._ask(GetStatus())

    async def watch_scrubs(self, *, start: bool = False) -> tuple[PoolScrub, ...]:
        """Return where each pool's scrub is; with `start` each begins, or joins, one at full speed."""
        return (await self._ask(WatchScrubs(start=start))).pools

    async def list_findings(self, pool: int, number: int) -> tuple[ScrubFinding, ...]:
        """Return what a pool's pass of that number found: the first hundred of it."""
        return (await self._ask(ListFindings(pool=pool, number=number))).findings

    async def check_file(self, name: str) -> AsyncGenerator[FileChecked, None]:
        """Have the pools read every shard of a file; yield what they found, some extents at a time."""
        request = CheckFile(name=normal_name(name))
        while True:
            page = await self._ask(request, timeout_s=_CHECK_S)
            yield page
            if not page.next:
                return
            request = replace(request, version=page.version, first=page.next)

    async def _ask(self, request: Request[R], *, timeout_s: float = 0.0) -> R:
        """Ask what may be asked again without harm."""
        return await self._trying().until_done(lambda: self._ask_once(request, timeout_s=timeout_s))

    async def _ask_once(self, request: Request[R], *, timeout_s: float = 0.0) -> R:
        reply, _ = await self._connections.call(
            self._address, request, timeout_s=timeout_s or self._timeout_s
        )
        return reply
