"""The app: the front door. Cuts, codes and sends out; fetches, checks, rebuilds what is missing.

It keeps nothing that it cannot relearn: its session and the map come from the master, and a transfer that
it forgets is one that its client repeats.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import trio
from blake3 import blake3

from droppexd.background import stopping_in_order
from droppexd.errors import (
    Conflict,
    DroppexError,
    IntegrityError,
    NotEnoughShards,
    NotFound,
    PeerBusy,
    RemoteProtocolError,
    StreamGone,
)
from droppexd.model import (
    CHUNK_SIZE,
    EXTENT_CHUNKS,
    SMALL_SIZE,
    Layout,
    Receipt,
    Role,
    UploadRecord,
    Version,
    VersionId,
    normal_name,
    normal_prefix,
)
from droppexd.roles.admission import Admission
from droppexd.roles.app_controllers import ControllerList
from droppexd.roles.app_download import Download, Reader
from droppexd.roles.app_examine import Examiner
from droppexd.roles.app_orphans import Orphans
from droppexd.roles.app_recording import Recording
from droppexd.roles.app_relayout import Relayouts
from droppexd.roles.app_reporter import Reporter
from droppexd.roles.app_session import Ids, Registration
from droppexd.roles.app_upload import Outlets, Upload, Wanted
from droppexd.roles.app_verify import Verifier
from droppexd.roles.budget import Budget, Lease
from droppexd.roles.master import FAILOVER_S, Finding, MasterLink
from droppexd.roles.suspects import Suspects
from droppexd.runtime import Runtime
from droppexd.wire.examining import pong
from droppexd.wire.group_messages import ExaminePeers, ListControllers, RemoveController, TellMaster
from droppexd.wire.keys import AllowList
from droppexd.wire.member_messages import ListMembers, RevokeMember
from droppexd.wire.messages import (
    MOST_TOGETHER,
    Changed,
    CheckFile,
    Describe,
    Done,
    DropOrphans,
    Find,
    GetClose,
    GetData,
    GetOpen,
    GetOpened,
    GetPart,
    GetStatus,
    KeepStream,
    List,
    ListFindings,
    Lookup,
    Ping,
    PutAbort,
    PutChunk,
    PutOpen,
    PutOpened,
    PutProgress,
    PutSmall,
    Remove,
    Rename,
    ReplacePool,
    Reply,
    Request,
    Status,
    Stored,
    WatchScrubs,
)
from droppexd.wire.pool_messages import DrainPool, RemovePool
from droppexd.wire.replication_messages import Promote
from droppexd.wire.rpc import Answer, Call, Connections, Limits, Service, Terms, open_connections, serve
from droppexd.wire.transport import Frame, Peer, Transport
from droppexd.wire.upload_messages import DropUpload, FindUpload, ListUploads, PutResume, UploadFound

log = logging.getLogger("droppex.app")

_REAP_S = 5.0
_SMALL_AT_ONCE = 128
"""Small files in work at once; others wait. More would be refused by the pools, for each of them takes 256
requests of one app at once, and would be memory that no budget counts."""

_MOST_STREAMS = 1024
"""Open transfers of all clients together; further ones are told to come later."""

S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppSettings:
    """What an app is told by its operator."""

    name: str
    layout: Layout | None = None
    """The layout of new files; None chooses by the number of machines."""
    buffer_bytes: int = 96 * 1024 * 1024
    """What all transfers together may hold in memory."""
    advertise: str = ""
    """The address that others reach this app at, when it is not the one it binds."""
    chunk_size: int = CHUNK_SIZE
    idle_s: float = 90.0
    """A transfer whose client was silent for so long is forgotten."""


class _Stream(Generic[S]):
    """An open transfer of one client: the work, its lease of memory, and when it was last heard of."""

    def __init__(self, peer: Peer, work: S, lease: Lease, heard: float) -> None:
        self.peer = peer
        self.work = work
        self.lease = lease
        self.heard = heard
        self.active = 0
        self.arrived = 0
        self.earlier: UploadRecord | None = None
        """What an interrupted put of the same file left, until its client says how much of that it keeps."""
        self.resources = ExitStack()
        self._newest_answered = -1

    def credit(self, number: int) -> int:
        """Return the credit that goes with the answer to request `number` of this stream.

        Work ends in any order, and clients take the answers in theirs. So only an answer that is newer than
        all before it may lower the credit: after it no client sees an older, higher one.
        """
        if number < self._newest_answered:
            return self.lease.units
        self._newest_answered = number
        return self.lease.adjust()


class _Streams(Generic[S]):
    """The open transfers of one direction, by number."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._streams: dict[int, _Stream[S]] = {}
        self._last = 0

    def add(self, stream: _Stream[S]) -> int:
        """Enter a stream and return its number; raise PeerBusy when there are too many."""
        if len(self._streams) >= _MOST_STREAMS:
            raise PeerBusy("the app has as many transfers open as it takes; try again later")
        self._last += 1
        self._streams[self._last] = stream
        return self._last

    def get(self, number: int, peer: Peer) -> _Stream[S]:
        """Return the peer's stream; raise StreamGone when there is none."""
        stream = self._streams.get(number)
        if stream is None or stream.peer.route != peer.route:
            raise StreamGone(f"there is no such {self._what}, or it was silent too long; start again")
        return stream

    def remove(self, number: int) -> _Stream[S] | None:
        """Forget a stream and give back what it holds."""
        stream = self._streams.pop(number, None)
        if stream is not None:
            stream.lease.release()
            stream.resources.close()
        return stream

    def remove_all(self) -> list[_Stream[S]]:
        """Forget all streams, and return what was under way."""
        streams = list(self._streams.values())
        for number in list(self._streams):
            self.remove(number)
        return streams

    def silent(self, since: float) -> list[int]:
        """Return the streams that nobody has used since then."""
        return [
            number for number, stream in self._streams.items() if not stream.active and stream.heard < since
        ]


def _opened(version: Version, download: Download, **fields: Any) -> GetOpened:
    """Return the answer to one who begins to read a version."""
    return GetOpened(
        **{"stream": 0, "credit": 0, **fields},
        version=version.id,
        size=version.size,
        start=download.start,
        end=download.end,
        parts=download.parts,
        blake3=version.blake3,
        created_ms=version.created_ms,
        metadata=version.metadata,
    )


_ADMISSION_S = 10.0


class _App:
    """The handlers of one app."""

    def __init__(
        self,
        connections: Connections,
        registration: Registration,
        master: MasterLink,
        runtime: Runtime,
        settings: AppSettings,
        terms: Terms,
        admission: Admission,
        examiner: Examiner,
    ) -> None:
        self._admission = admission
        self._examiner = examiner
        self._settings = settings
        self._runtime = runtime
        self._terms = terms
        self._controllers = ControllerList(connections, master)
        self._registration = registration
        self._master = master
        self._boot_id = runtime.entropy.token(16)
        suspects = Suspects(runtime.clock)
        self._outlets = Outlets(
            connections=connections,
            registration=registration,
            master=master,
            runtime=runtime,
            suspects=suspects,
            layout=settings.layout,
            chunk_size=settings.chunk_size,
        )
        self._reporter = Reporter(connections, runtime.clock)
        self._reader = Reader(connections, registration, master, runtime, suspects, self._reporter)
        self._verifier = Verifier(connections, registration, master)
        # Coding adds m/k to a chunk; half as much again is the most that a sensible layout adds.
        self._budget = Budget(max(1, settings.buffer_bytes * 2 // (3 * settings.chunk_size)))
        self._orphans = Orphans(
            connections=connections,
            registration=registration,
            master=master,
            runtime=runtime,
            reader=self._reader,
            budget=self._budget,
        )
        self._relayouts = Relayouts(self._outlets, self._reader, self._budget)
        self._small = trio.Semaphore(_SMALL_AT_ONCE)
        self._puts: _Streams[Upload] = _Streams("put")
        self._gets: _Streams[Download] = _Streams("get")

    def service(self) -> Service:
        """Return what an app answers."""
        return Service(
            handlers={
                Ping: self.ping,
                PutSmall: self.put_small,
                PutOpen: self.put_open,
                PutChunk: self.put_chunk,
                PutResume: self.put_resume,
                PutAbort: self.put_abort,
                KeepStream: self.keep_stream,
                GetOpen: self.get_open,
                GetPart: self.get_part,
                GetClose: self.get_close,
                List: self.list_names,
                Find: self.pass_on,
                Describe: self.describe,
                Remove: self.remove,
                Rename: self.rename,
                GetStatus: self.status,
                WatchScrubs: self._verifier.watch_scrubs,
                ListFindings: self._verifier.list_findings,
                CheckFile: self._verifier.check_file,
                ReplacePool: self.pass_on,
                DrainPool: self.pass_on,
                RemovePool: self.pass_on,
                DropOrphans: self.pass_on,
                ListUploads: self.pass_on,
                DropUpload: self.pass_on,
                RemoveController: self.pass_on,
                ListControllers: self._controllers.list_controllers,
                ExaminePeers: self._examiner.examine_peers,
                Promote: self._controllers.promote,
                TellMaster: self.tell_master,
                **self._orphans.handlers(),
                **self._relayouts.handlers(),
                **self._admission.handlers(),
                ListMembers: self.pass_on,
                RevokeMember: self.pass_on,
            },
            admissions={PutChunk: self.admit_chunk, GetPart: self.admit_part},
        )

    async def ping(self, _call: Call, _request: Ping, _body: Sequence[Frame]) -> Answer:
        """Say who this is."""
        return pong(Role.APP, self._settings.name, self._boot_id, self._runtime.clock)

    # -- files in ------------------------------------------------------------------------------

    async def put_small(self, _call: Call, request: PutSmall, body: Sequence[Frame]) -> Answer:
        """Store a whole small file at once."""
        chunk_size = self._settings.chunk_size
        data = body[0] if body else b""
        if blake3(data).digest() != request.blake3:
            raise IntegrityError("what arrived is not what was sent: the BLAKE3 differs; try again")
        wanted = Wanted(
            name=normal_name(request.name),
            condition=request.condition,
            layout=request.layout,
            metadata=request.metadata,
            size=len(data),
        )
        await self._begin_small()
        try:
            with self._registration.session.work() as ids:
                upload = await self._begin_upload(wanted, ids)
                try:
                    for number, start in enumerate(range(0, len(data), chunk_size)):
                        chunk = data[start : start + chunk_size]
                        await upload.send_chunks(number, [chunk], last=start + chunk_size >= len(data))
                    return Stored(receipt=await upload.finish(request.blake3))
                except BaseException:
                    await upload.abort()
                    raise
        finally:
            self._small.release()

    async def _begin_small(self) -> None:
        """Wait for a turn among the small files, at no cost when there is room."""
        try:
            self._small.acquire_nowait()
        except trio.WouldBlock:
            await self._small.acquire()

    async def _begin_upload(self, wanted: Wanted, ids: Ids) -> Upload:
        """Return a new upload. Only a map that the master calls its latest may lack the pools for it."""
        try:
            return Upload(self._outlets, wanted, ids)
        except NotEnoughShards:
            if not await self._registration.refresh():
                raise
        return Upload(self._outlets, wanted, ids)

    async def put_open(self, call: Call, request: PutOpen, _body: Sequence[Frame]) -> Answer:
        """Begin a put; wait for memory if all of it is in use."""
        wanted = Wanted(
            name=normal_name(request.name),
            condition=request.condition,
            layout=request.layout,
            metadata=request.metadata,
            size=request.size,
        )
        await self._check_condition(wanted)
        earlier = await self._earlier_upload(wanted.name, request)
        with ExitStack() as undo:
            ids = undo.enter_context(self._registration.session.work())
            upload = await self._begin_upload(wanted, ids)
            if self._resumable(request):
                upload.record(self._recording(upload.version, wanted.name, request, ids))
            lease = await self._budget.lease()
            undo.callback(lease.release)
            stream = _Stream(call.peer, upload, lease, self._runtime.clock.now())
            stream.earlier = earlier.upload
            number = self._puts.add(stream)
            stream.resources = undo.pop_all()
        return PutOpened(
            stream=number,
            credit=lease.units,
            chunk_size=self._settings.chunk_size,
            together=MOST_TOGETHER,
            digests=earlier.digests,
        )

    def _resumable(self, request: PutOpen) -> bool:
        """Whether the file has more than one extent, and its client would know it again."""
        return bool(request.source) and (request.size or 0) > self._settings.chunk_size * EXTENT_CHUNKS

    async def _earlier_upload(self, name: str, request: PutOpen) -> UploadFound:
        """Return what an interrupted put from the same source left, cut as this app cuts."""
        if not self._resumable(request):
            return UploadFound()
        found = await self._master.call(FindUpload(name=name, source=request.source), timeout_s=FAILOVER_S)
        usable = found.upload is not None and found.upload.chunk_size == self._settings.chunk_size
        return found if usable else UploadFound()

    def _recording(self, version: VersionId, name: str, request: PutOpen, ids: Ids) -> Recording:
        upload = UploadRecord(
            version=version,
            name=name,
            source=request.source,
            size=request.size or 0,
            chunk_size=self._settings.chunk_size,
            holder=ids.operation(),
        )
        return Recording(self._master, ids, upload)

    async def put_resume(self, call: Call, request: PutResume, _body: Sequence[Frame]) -> Answer:
        """Go on with the first extents of an earlier put, or without any."""
        stream: Any = self._puts.get(request.stream, call.peer)
        earlier, stream.earlier = stream.earlier, None
        if earlier is None or stream.arrived or request.keep > earlier.extents:
            raise RemoteProtocolError(f"there are no {request.keep} extents to go on with")
        if request.keep:
            stream.arrived = await stream.work.go_on(earlier, request.keep)
        else:  # The source has changed: nobody will go on with that.
            with suppress(DroppexError):
                await self._master.call(DropUpload(version=earlier.version), timeout_s=FAILOVER_S)
        stream.heard = self._runtime.clock.now()
        return Done()

    async def _check_condition(self, wanted: Wanted) -> None:
        """Refuse early what the commit would refuse: it decides, but only after all bytes were sent."""
        condition = wanted.condition
        if not condition.absent and condition.version is None:
            return
        try:
            found = await self._reader.look_up(Lookup(name=wanted.name))
        except NotFound:
            if condition.version is not None:
                raise Conflict(f"{wanted.name!r} does not exist any more") from None
            return
        if condition.absent:
            raise Conflict(f"{wanted.name!r} exists already")
        if condition.version != found.version.id:
            raise Conflict(f"{wanted.name!r} has another version by now: {found.version.id}")

    def admit_chunk(self, peer: Peer, request: PutChunk, body: Sequence[Frame]) -> object:
        """Hold a put to the order of its chunks and to its credit."""
        stream = self._puts.get(request.stream, peer)
        if request.sequence != stream.arrived:
            raise RemoteProtocolError(f"chunk {request.sequence} came where {stream.arrived} was due")
        count = max(1, len(body))
        if stream.active + count > stream.lease.units:
            raise RemoteProtocolError("more chunks came than credit was given")
        stream.arrived += count
        stream.active += count
        return stream

    async def put_chunk(self, call: Call, request: PutChunk, body: Sequence[Frame]) -> Answer:
        """Take chunks; after the last, commit."""
        stream: Any = call.ticket
        upload: Upload = stream.work
        finished = request.last
        receipt: Receipt | None = None
        try:
            if request.last != (request.blake3 is not None):
                raise RemoteProtocolError("the BLAKE3 of the whole comes with the last chunk")
            await upload.send_chunks(
                request.sequence, body or (b"",), last=request.last, checksums=request.checksums
            )
            if request.blake3 is not None:
                receipt = await upload.finish(request.blake3)
        except BaseException:
            finished = True
            await upload.abort()
            raise
        finally:
            stream.active -= max(1, len(body))
            stream.heard = self._runtime.clock.now()
            if finished:
                self._puts.remove(request.stream)
        return PutProgress(credit=stream.credit(request.sequence) if receipt is None else 0, receipt=receipt)

    async def put_abort(self, call: Call, request: PutAbort, _body: Sequence[Frame]) -> Answer:
        """Give up a put."""
        stream = self._puts.get(request.stream, call.peer)
        self._puts.remove(request.stream)
        await stream.work.abort()
        return Done()

    async def keep_stream(self, call: Call, request: KeepStream, _body: Sequence[Frame]) -> Answer:
        """Wait longer for a client that reads or writes slowly."""
        now = self._runtime.clock.now()
        if request.put:
            put = self._puts.get(request.stream, call.peer)
            put.heard = now
            await put.work.keep()
        else:
            self._gets.get(request.stream, call.peer).heard = now
        return Done()

    # -- files out -----------------------------------------------------------------------------

    async def get_open(self, call: Call, request: GetOpen, _body: Sequence[Frame]) -> Answer:
        """Begin a read; a small one is answered at once."""
        lookup = Lookup(name=normal_name(request.name), version=request.version)
        found = await self._reader.look_up(lookup)
        download = Download(self._reader, found, request.start, request.length)
        version = found.version
        if download.parts <= 1 and download.end - download.start <= SMALL_SIZE:
            if not download.parts:
                return _opened(version, download)
            await self._begin_small()
            try:
                frames, rebuilt = await download.read_parts(0)
            finally:
                self._small.release()
            return _opened(version, download, rebuilt=bool(rebuilt)), frames
        lease = await self._budget.lease()
        stream = _Stream(call.peer, download, lease, self._runtime.clock.now())
        try:
            number = self._gets.add(stream)
        except PeerBusy:
            lease.release()
            raise
        return _opened(version, download, stream=number, credit=lease.units, together=download.together)

    def admit_part(self, peer: Peer, request: GetPart, _body: Sequence[Frame]) -> object:
        """Hold a read to its credit, and number its requests in the order in which they arrive."""
        stream = self._gets.get(request.stream, peer)
        if stream.active + request.count > stream.lease.units:
            raise RemoteProtocolError("more parts were asked for than credit was given")
        stream.arrived += 1
        stream.active += request.count
        return stream, stream.arrived

    async def get_part(self, call: Call, request: GetPart, _body: Sequence[Frame]) -> Answer:
        """Send parts of an open read."""
        ticket: Any = call.ticket
        stream, number = ticket
        try:
            frames, rebuilt = await stream.work.read_parts(request.part, request.count)
        finally:
            stream.active -= request.count
            stream.heard = self._runtime.clock.now()
        return GetData(credit=stream.credit(number), rebuilt=rebuilt), frames

    async def get_close(self, call: Call, request: GetClose, _body: Sequence[Frame]) -> Answer:
        """End a read."""
        self._gets.get(request.stream, call.peer)
        self._gets.remove(request.stream)
        return Done()

    # -- names ---------------------------------------------------------------------------------

    async def pass_on(self, _call: Call, request: Request[Any], _body: Sequence[Frame]) -> Answer:
        """Hand a question on to the master."""
        answer: Reply = await self._master.call(request, timeout_s=FAILOVER_S)
        return answer

    async def list_names(self, call: Call, request: List, body: Sequence[Frame]) -> Answer:
        """List names; where there is no master, as another controller knows them, if that is wanted."""
        question = replace(request, prefix=normal_prefix(request.prefix), stale_ok=False)
        if not request.stale_ok:
            return await self.pass_on(call, question, body)
        return await self._controllers.list_names(question)

    async def describe(self, call: Call, request: Describe, body: Sequence[Frame]) -> Answer:
        """Describe one file."""
        return await self.pass_on(call, Describe(name=normal_name(request.name)), body)

    async def remove(self, _call: Call, request: Remove, _body: Sequence[Frame]) -> Answer:
        """Remove a name, under an operation id so that asking again does no harm."""
        return await self._change(
            lambda operation: replace(request, name=normal_name(request.name), operation=operation)
        )

    async def rename(self, _call: Call, request: Rename, _body: Sequence[Frame]) -> Answer:
        """Give a file another name, or one more."""
        source, target = normal_name(request.source), normal_name(request.target)
        return await self._change(
            lambda operation: replace(request, source=source, target=target, operation=operation)
        )

    async def _change(self, request_of: Callable[[Any], Request[Changed]]) -> Changed:
        with self._registration.session.work() as ids:
            return await self._master.call(request_of(ids.operation()), timeout_s=FAILOVER_S)

    async def status(self, _call: Call, request: GetStatus, _body: Sequence[Frame]) -> Answer:
        """Tell how the cluster is."""
        answer: Status = await self._master.call(request, timeout_s=FAILOVER_S)
        return answer

    async def tell_master(self, call: Call, request: TellMaster, _body: Sequence[Frame]) -> Answer:
        """Take note of the master."""
        if call.term >= self._terms.current:
            self._master.follow(request.address, request.controllers)
        return Done()

    # -- housekeeping --------------------------------------------------------------------------

    async def give_up_puts(self) -> None:
        """Tell the pools, in bounded time, that the puts that are still open come to nothing."""
        async with trio.open_nursery() as nursery:
            for stream in self._puts.remove_all():
                nursery.start_soon(stream.work.abort)

    async def report(self) -> None:
        """Tell pools of shards that readers found missing or wrong, for ever."""
        await self._reporter.run()

    async def adopt(self) -> None:
        """Carry adoptions out, for ever."""
        await self._orphans.run()

    async def relayout(self) -> None:
        """Give files another layout, for ever."""
        await self._relayouts.run()

    async def reap(self) -> None:
        """Forget transfers whose clients have gone, for ever."""
        idle_s = self._settings.idle_s
        while True:
            await trio.sleep(min(_REAP_S, idle_s / 2))
            since = self._runtime.clock.now() - idle_s
            for number in self._gets.silent(since):
                self._gets.remove(number)
            for number in self._puts.silent(since):
                stream = self._puts.remove(number)
                if stream is not None:
                    log.info("put given up: its client was silent for %g s", idle_s)
                    await stream.work.abort()


async def serve_app(
    *,
    transport: Transport,
    address: str,
    controllers: Sequence[str],
    runtime: Runtime,
    settings: AppSettings,
    find: Finding | None = None,
    allowed: AllowList | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run an app until cancelled. Started, with its address, once a master has registered it.

    The transport is the caller's; everything else that the app opens ends with it. `allowed` is its list of
    who is let in, which follows the catalogue's.
    """
    terms = Terms()
    async with stopping_in_order() as serving, open_connections(transport, terms=terms) as connections:
        look = None if find is None else lambda: find(terms.current, b"")
        master = MasterLink(connections, controllers, runtime, look)
        registration = Registration(master, runtime)
        admission = Admission(allowed or AllowList(), partial(master.call, timeout_s=_ADMISSION_S))
        examiner = Examiner(transport, registration, master, runtime.clock)
        app = _App(connections, registration, master, runtime, settings, terms, admission, examiner)
        async with trio.open_nursery() as helpers:
            with serving:
                async with trio.open_nursery() as front:
                    listener = await front.start(_serve, transport, address, app.service(), terms)
                    if allowed is not None:
                        helpers.start_soon(admission.run)
                    await registration.open(settings.advertise or listener.address)
                    helpers.start_soon(registration.run)
                    helpers.start_soon(app.reap)
                    helpers.start_soon(app.report)
                    helpers.start_soon(app.adopt)
                    helpers.start_soon(app.relayout)
                    task_status.started(listener.address)
            helpers.cancel_scope.cancel()
        await app.give_up_puts()
        await registration.close()


async def _serve(
    transport: Transport, address: str, service: Service, terms: Terms, task_status: trio.TaskStatus[Any]
) -> None:
    await serve(
        transport, address, service, terms=terms, limits=Limits(drain_s=_DRAIN_S), task_status=task_status
    )


_DRAIN_S = 2.0
"""Transfers that run when the app is told to stop get this long."""
