"""The pool: stores and serves shards, says that it lives, and drops only what the master calls dead."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from droppexd.background import stopping_in_order
from droppexd.brief import BriefWork
from droppexd.errors import DroppexError, IdentityError, LocalProtocolError, NotFound
from droppexd.model import MAX_TROUBLE, Role
from droppexd.roles.admission import Admission, Keep
from droppexd.roles.master import Finding, MasterLink
from droppexd.roles.pool_check import LossReports, ShardChecker
from droppexd.roles.pool_journal import JournalFolder, PoolJournal
from droppexd.roles.pool_orphans import OrphanFinder
from droppexd.roles.pool_rebuild import Rebuilder
from droppexd.roles.pool_reconcile import Reconciler
from droppexd.roles.pool_scrub import Scrubber, ScrubSettings
from droppexd.roles.pool_writer import (
    CREDIT,
    ShardStream,
    ShardStreams,
    SmallWriter,
    header_of,
    verify_piece,
)
from droppexd.roles.throttle import Throttle
from droppexd.runtime import Runtime
from droppexd.store.interface import ShardStore
from droppexd.wire.examining import pong
from droppexd.wire.group_messages import TellMaster
from droppexd.wire.keys import AllowList
from droppexd.wire.messages import (
    AbortShard,
    Announce,
    CheckShards,
    Done,
    FindOrphans,
    GetScrub,
    GetScrubFindings,
    Heartbeat,
    KeepShard,
    Piece,
    PieceWritten,
    Ping,
    ReadPiece,
    StartScrub,
    Welcomed,
    WritePiece,
)
from droppexd.wire.pool_messages import WorkWaits
from droppexd.wire.rpc import (
    Answer,
    Call,
    Connections,
    Limits,
    Respond,
    Service,
    Terms,
    open_connections,
    serve,
)
from droppexd.wire.transport import Frame, Peer, Transport

log = logging.getLogger("droppex.pool")

_MASTER_S = 10.0
_PAUSE_S = 1.0
"""Before a master that refused is asked again; its disk may be full, and the pool outlives that."""

_DRAIN_S = 2.0
"""Requests that run when the pool is told to stop get this long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """What a pool is told by its operator."""

    name: str
    machine: str
    zone: str = ""
    advertise: str = ""
    """The address that others reach this pool at, when it is not the one it binds."""
    review_s: float = 3600.0
    """Between two looks through everything that is held."""
    idle_s: float = 120.0
    """A shard whose writer was silent for so long is given up."""
    scrub: ScrubSettings = field(default_factory=ScrubSettings)
    repair_bytes_per_s: int = 16 * 1024 * 1024
    """What it rebuilds of lost shards while it serves clients; as much as it can while it does not."""


class _Pool:
    """The handlers of one pool."""

    def __init__(
        self,
        store: ShardStore,
        master: MasterLink,
        connections: Connections,
        runtime: Runtime,
        settings: PoolSettings,
        terms: Terms,
        journal: JournalFolder | None,
        admission: Admission,
    ) -> None:
        self._admission = admission
        self.journal = None
        if journal is not None:
            self.journal = PoolJournal(
                journal,
                connections,
                runtime,
                name=f"pool {settings.name}",
                cluster_id=lambda: store.identity.cluster_id,
                has_room=self._has_room,
            )
        self._store = store
        self._master = master
        self._runtime = runtime
        self._settings = settings
        self._terms = terms
        self._boot_id = store.identity.boot_id
        self._streams = ShardStreams(store, runtime)
        self._small = SmallWriter(store, runtime)
        self._reads = BriefWork(runtime)
        self._client_requests = 0
        self._trouble = ""
        self._losses = LossReports(store, master)
        self._checker = ShardChecker(store, runtime, self._losses)
        self.scrubber = Scrubber(store, runtime, self._losses, lambda: self._client_requests, settings.scrub)
        self._reconciler = Reconciler(store, master, runtime, terms, self._losses, settings.review_s)
        self._orphans = OrphanFinder(store, runtime, self._reconciler)
        self._rebuilder = Rebuilder(
            store=store,
            small=self._small,
            connections=connections,
            master=master,
            runtime=runtime,
            reconciler=self._reconciler,
            throttle=Throttle(runtime.clock, settings.repair_bytes_per_s, lambda: self._client_requests),
        )

    def service(self) -> Service:
        """Return what a pool answers."""
        return Service(
            handlers={
                Ping: self.ping,
                WritePiece: self.write_piece,
                AbortShard: self.abort_shard,
                KeepShard: self.keep_shard,
                ReadPiece: self.read_piece,
                CheckShards: self._checker.check_shards,
                StartScrub: self.scrubber.start_scrub,
                GetScrub: self.scrubber.get_scrub,
                GetScrubFindings: self.scrubber.get_findings,
                FindOrphans: self._orphans.find_orphans,
                TellMaster: self.tell_master,
                WorkWaits: self.take_work,
                **self._admission.handlers(),
                **(self.journal.handlers() if self.journal is not None else {}),
            },
            admissions={WritePiece: self.admit_piece},
            quick={WritePiece: self.write_now, ReadPiece: self.read_now},
        )

    async def _has_room(self) -> bool:
        return (await self._runtime.run_blocking(self._store.usage)).spare > 0

    async def ping(self, _call: Call, _request: Ping, _body: Sequence[Frame]) -> Answer:
        """Say who this is."""
        clock = self._runtime.clock
        return pong(Role.POOL, self._settings.name, self._boot_id, clock, self._terms.current)

    def admit_piece(self, _peer: Peer, request: WritePiece, body: Sequence[Frame]) -> object:
        """Number the pieces of a shard in the order in which they arrive."""
        self._client_requests += 1
        return self._streams.admit(request, body)

    def write_now(self, call: Call, request: WritePiece, body: Sequence[Frame], respond: Respond) -> bool:
        """Take a piece that the disk takes at once, or a whole small shard.

        The latter is answered when the commit that it joins is flushed.
        """
        stream = call.ticket
        if isinstance(stream, ShardStream):
            if not self._streams.write_now(stream, request, body):
                return False
            respond(PieceWritten(boot_id=self._boot_id, credit=CREDIT))
            return True
        piece = bytes(body[0])
        verify_piece(request, piece)

        def done(result: int | DroppexError) -> None:
            if isinstance(result, DroppexError):
                respond(result)
            else:
                respond(PieceWritten(boot_id=self._boot_id, credit=CREDIT, generation=result))

        self._small.submit((header_of(request, request.size, (request.checksum,)), piece), done)
        return True

    async def write_piece(self, call: Call, request: WritePiece, body: Sequence[Frame]) -> Answer:
        """Write a piece of a large shard; after the last one the shard is durable."""
        stream = call.ticket
        if not isinstance(stream, ShardStream):
            raise LocalProtocolError("a small shard came where pieces of large ones are written")
        generation = await self._streams.write(stream, request, body)
        return PieceWritten(boot_id=self._boot_id, credit=CREDIT, generation=generation)

    async def abort_shard(self, _call: Call, request: AbortShard, _body: Sequence[Frame]) -> Answer:
        """Forget a shard that is being written; ask the master soon about one that is stored already."""
        await self._streams.abort(request.extent, request.index)
        self._reconciler.doubt(request.extent)
        return Done()

    async def keep_shard(self, _call: Call, request: KeepShard, _body: Sequence[Frame]) -> Answer:
        """Wait longer for the next piece of a shard."""
        self._streams.keep(request.extent, request.index)
        return Done()

    def read_now(self, _call: Call, request: ReadPiece, _body: Sequence[Frame], respond: Respond) -> bool:
        """Serve a piece without a task, while the disk answers at once."""
        self._client_requests += not request.repair
        if not self._reads.brief:
            return False
        respond(self._reads.now(self._read, request))
        return True

    async def read_piece(self, _call: Call, request: ReadPiece, _body: Sequence[Frame]) -> Answer:
        """Serve pieces as they are stored; their reader verifies them."""
        return await self._runtime.run_blocking(self._read, request)

    def _read(self, request: ReadPiece) -> tuple[Piece, list[Frame]]:
        """Read the pieces of a request, and for who repairs the hints of their shard. Blocking."""
        first = request.chunk
        pieces, checksums = [], []
        for chunk in range(first, first + request.count):
            piece, checksum = self._store.read(request.extent, request.index, chunk)
            pieces.append(piece)
            checksums.append(checksum)
        following = tuple(checksums[1:])
        if not request.repair or first:
            return Piece(checksum=checksums[0], following=following), pieces
        header = self._store.header(request.extent, request.index)
        hints = Piece(
            checksum=checksums[0],
            following=following,
            version=header.version,
            name=header.name,
            place=header.place,
        )
        return hints, pieces

    # -- the master ----------------------------------------------------------------------------

    async def take_work(self, _call: Call, _request: WorkWaits, _body: Sequence[Frame]) -> Answer:
        """Have the master asked for orders at once."""
        self._rebuilder.heard(work=True)
        return Done()

    async def tell_master(self, call: Call, request: TellMaster, _body: Sequence[Frame]) -> Answer:
        """Take note of the master. Raise IdentityError when it is another cluster's."""
        known = self._store.identity.cluster_id
        if known and request.cluster_id != known:
            raise IdentityError("this pool belongs to another cluster")
        if call.term >= self._terms.current:
            self._master.follow(request.address, request.controllers)
        return Done()

    async def announce(self, address: str) -> Welcomed:
        """Tell the master who and where this pool is; repeat until one answers.

        Raise IdentityError when this folder belongs to another cluster or is a copy of a live pool's.
        """
        while True:
            identity = self._store.identity
            usage = await self._runtime.run_blocking(self._store.usage)
            request = Announce(
                pool_id=identity.pool_id,
                cluster_id=identity.cluster_id,
                boot_id=identity.boot_id,
                previous_boot_id=identity.previous_boot_id,
                name=self._settings.name,
                machine=self._settings.machine,
                zone=self._settings.zone,
                address=address,
                capacity=usage.capacity,
                free=usage.free,
                shards=usage.shards,
                read_only=bool(self._store.read_only),
                trouble=self._look_for_trouble(),
            )
            try:
                welcomed = await self._master.call(request, timeout_s=_MASTER_S)
            except IdentityError:
                raise
            except DroppexError as error:
                log.warning("no master yet: %s", error)
                await trio.sleep(_PAUSE_S)
                continue
            await self._runtime.run_blocking(self._store.join, welcomed.cluster_id)
            self._losses.number = self._rebuilder.number = welcomed.number
            self._rebuilder.incarnation = welcomed.incarnation
            self._reconciler.announced(welcomed.number, welcomed.ruling)
            log.info("announced number=%d master=%s", welcomed.number, self._master.address)
            return welcomed

    async def keep_alive(self, address: str, welcomed: Welcomed) -> None:
        """Send heartbeats for ever."""
        while True:
            await trio.sleep(welcomed.heartbeat_ms / 1000)
            try:
                usage = await self._runtime.run_blocking(self._store.usage)
                request = Heartbeat(
                    number=welcomed.number,
                    boot_id=self._boot_id,
                    capacity=usage.capacity,
                    free=usage.free,
                    shards=usage.shards,
                    read_only=bool(self._store.read_only),
                    reconciled=self._reconciler.reconciled,
                    quarantined=self._reconciler.quarantined,
                    scrub=self.scrubber.report(usage.shards),
                    trouble=self._look_for_trouble(),
                    compared=self._reconciler.compared,
                )
                heard = await self._master.call(request, timeout_s=_MASTER_S)
            except (IdentityError, NotFound) as error:
                log.warning("the master does not know this pool: %s; announcing it again", error)
                welcomed = await self.announce(address)
                continue
            except DroppexError as error:
                log.warning("heartbeat to the master failed: %s", error)
                continue
            self._reconciler.heard(review=heard.review, ruling=heard.ruling)
            self._rebuilder.heard(work=heard.work)

    def _look_for_trouble(self) -> str:
        """Return why the store takes no more writes; log it the first time."""
        trouble = self._store.read_only
        if trouble != self._trouble:
            self._trouble = trouble
            log.error("this pool takes no more writes: %s", trouble)
        return trouble[:MAX_TROUBLE]

    async def reconcile(self) -> None:
        """Compare what is held with the master's records, for ever."""
        await self._reconciler.run()

    async def rebuild(self) -> None:
        """Rebuild lost shards, for ever."""
        await self._rebuilder.run()

    # -- housekeeping --------------------------------------------------------------------------

    async def run_small_writer(self) -> None:
        """Commit small shards, for ever."""
        await self._small.run()

    async def reap(self) -> None:
        """Give up shards whose writers have gone, for ever."""
        idle_s = self._settings.idle_s
        while True:
            await trio.sleep(idle_s / 4)
            await self._streams.reap(idle_s)


async def serve_pool(
    *,
    transport: Transport,
    address: str,
    store: ShardStore,
    controllers: Sequence[str],
    runtime: Runtime,
    settings: PoolSettings,
    find: Finding | None = None,
    journal: JournalFolder | None = None,
    allowed: AllowList | None = None,
    keep_allowed: Keep | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a pool on an open store until cancelled. Started, with its address, once a master knows it.

    Transport and store are the caller's; the caller closes the store when this has returned. With `journal`
    it keeps the catalogue's log there when a master asks for it. `allowed` is the transport's list of who is
    let in, which follows the catalogue's and is written down with `keep_allowed`.
    Raise IdentityError when the store belongs to another cluster.
    """
    terms = Terms()
    async with stopping_in_order() as serving, open_connections(transport, terms=terms) as connections:
        look = None if find is None else lambda: find(terms.current, store.identity.cluster_id)
        master = MasterLink(connections, controllers, runtime, look)
        admission = Admission(allowed or AllowList(), partial(master.call, timeout_s=_MASTER_S), keep_allowed)
        pool = _Pool(store, master, connections, runtime, settings, terms, journal, admission)
        async with trio.open_nursery() as helpers:
            helpers.start_soon(pool.run_small_writer)
            helpers.start_soon(pool.reap)
            if allowed is not None:
                helpers.start_soon(admission.run)
            if pool.journal is not None:
                helpers.start_soon(pool.journal.run)
            with serving:
                async with trio.open_nursery() as front:
                    listener = await front.start(_serve, transport, address, pool.service(), terms)
                    known_as = settings.advertise or listener.address
                    welcomed = await pool.announce(known_as)
                    front.start_soon(pool.keep_alive, known_as, welcomed)
                    front.start_soon(pool.reconcile)
                    front.start_soon(pool.rebuild)
                    front.start_soon(pool.scrubber.run)
                    task_status.started(listener.address)
            helpers.cancel_scope.cancel()


async def _serve(
    transport: Transport, address: str, service: Service, terms: Terms, task_status: trio.TaskStatus[Any]
) -> None:
    await serve(
        transport, address, service, terms=terms, limits=Limits(drain_s=_DRAIN_S), task_status=task_status
    )
