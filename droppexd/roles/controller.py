"""The controller: a thin shell around the catalogue, the pool table and the leases of apps.

It takes part in a group, and is the master of the catalogue, under a term of its own, whenever the group
gives it the mandate; otherwise it stands by. When the engine fails or a later master appears, all that this
master knew goes with it: whoever is the master next, and be it this controller, begins from the catalogue.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from droppexd.background import open_background
from droppexd.catalog.catalogue import Catalogue, open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.group import Group, Mandate
from droppexd.errors import (
    CatalogError,
    CatalogFull,
    Conflict,
    DroppexError,
    IdentityError,
    InvalidRequest,
    NotMaster,
    PeerBusy,
    SessionClosed,
)
from droppexd.model import MAX_CONTROLLERS, ClusterStatus, OperationId, normal_name, normal_prefix
from droppexd.roles.controller_care import Care
from droppexd.roles.controller_front import Front, Mastership
from droppexd.roles.controller_journals import JournalPools
from droppexd.roles.controller_members import MemberDesk, follow_members
from droppexd.roles.controller_orphans import OrphanRulings
from droppexd.roles.controller_peers import Peers, Publish
from droppexd.roles.controller_pools import PoolTable
from droppexd.roles.controller_restored import RestoreWatch
from droppexd.roles.controller_uploads import UploadDesk
from droppexd.roles.controller_views import describe, warnings
from droppexd.runtime import Runtime
from droppexd.wire.group_messages import JoinController, ListControllers, RemoveController
from droppexd.wire.keys import TransportKeys
from droppexd.wire.member_messages import Enroll, MakeToken, RevokeMember
from droppexd.wire.messages import (
    Adopt,
    Announce,
    Changed,
    CloseSession,
    Commit,
    Committed,
    Condition,
    ConfirmDropped,
    Describe,
    Done,
    DropOrphans,
    Find,
    Found,
    GarbagePage,
    GetStatus,
    Heard,
    Heartbeat,
    KeepSession,
    List,
    Listed,
    ListGarbage,
    Lookup,
    OpenSession,
    Reconcile,
    Remove,
    Rename,
    ReplacePool,
    ReportLost,
    Request,
    Review,
    SessionKept,
    SessionOpened,
    ShardsStored,
    Status,
    TakeWork,
    Verdicts,
    Welcomed,
)
from droppexd.wire.pool_messages import DrainPool, RemovePool
from droppexd.wire.relayout_messages import SwapExtent
from droppexd.wire.rpc import (
    Answer,
    Call,
    Connections,
    Handler,
    Limits,
    Respond,
    Terms,
    open_connections,
    serve,
)
from droppexd.wire.transport import Frame, Listener, Transport
from droppexd.wire.upload_messages import (
    CommitUpload,
    DropUpload,
    ExtendUpload,
    FindUpload,
    ListUploads,
    TakeUpload,
)

log = logging.getLogger("droppex.controller")

_DRAIN_S = 2.0
"""Seconds that running requests get at the end; a commit's flush takes milliseconds."""

STANDBY_S = 2.0
"""A controller that is not the master after so long says that it is ready, as a standby."""

_PAUSE_S = (0.2, 1.0)
"""Before a controller that was or nearly was the master campaigns again, and between two looks for one."""

_FAILED_S = 2.0
"""More, after its catalogue failed."""

_JOIN_S = 10.0

_MOST_APPS = 256
"""Addresses that a Status takes."""

KINDS: tuple[type[Request[Any]], ...] = (
    Adopt,
    Announce,
    CloseSession,
    Commit,
    CommitUpload,
    ConfirmDropped,
    Describe,
    DrainPool,
    DropOrphans,
    DropUpload,
    Enroll,
    ExtendUpload,
    Find,
    FindUpload,
    GetStatus,
    Heartbeat,
    JoinController,
    KeepSession,
    List,
    ListControllers,
    ListGarbage,
    ListUploads,
    Lookup,
    MakeToken,
    OpenSession,
    Reconcile,
    Remove,
    RemoveController,
    RemovePool,
    Rename,
    ReplacePool,
    ReportLost,
    Review,
    RevokeMember,
    ShardsStored,
    SwapExtent,
    TakeUpload,
    TakeWork,
)
"""What the master answers, and a standby with NotMaster."""

Body = Sequence[Frame]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """What an operator decides about a controller. Times in seconds."""

    name: str
    advertise: str = ""
    """The address that others are told; empty: the one that was bound."""
    cluster_id: bytes = b""
    """Of the cluster that is begun with this controller, or was; empty: any."""
    machine: str = ""
    """What is lost together with this controller: pools on it keep no journal."""
    heartbeat_s: float = 2.0
    down_after_s: float = 10.0
    replace_after_s: float = 600.0
    """A pool that was down for so long is out: its shards count as missing and are rebuilt."""
    session_lease_s: float = 60.0
    delete_grace_s: float = 60.0
    uploads_kept_s: float = 7 * 86400.0
    """For so long an interrupted upload can be gone on with."""
    housekeeping_s: float = 5.0
    """Between two looks for expired sessions, floors to write down and outcomes to forget."""


class _Controller:
    """The handlers, and the tasks that keep house."""

    def __init__(
        self,
        catalogue: Catalogue,
        front: Front,
        connections: Connections,
        terms: Terms,
        runtime: Runtime,
        settings: ControllerSettings,
        group: Group,
        mandate: Mandate,
        publish: Publish | None = None,
        keys: TransportKeys | None = None,
    ) -> None:
        self._mandate = mandate
        self._journals = JournalPools(settings.machine)
        self._catalogue = catalogue
        self._front = front
        self._terms = terms
        self._clock = runtime.clock
        self._settings = settings
        self._started = runtime.clock.now()
        self._shortage = ""
        self._pool_records = trio.Lock()
        """Held while the record of a pool is judged and written."""
        self._pools = PoolTable(
            catalogue.pools,
            cluster_id=catalogue.cluster_id,
            incarnation=catalogue.incarnation,
            term=catalogue.term,
            heartbeat_s=settings.heartbeat_s,
            down_after_s=settings.down_after_s,
            replace_after_s=settings.replace_after_s,
            began=self._started,
        )
        self.peers = Peers(
            catalogue=catalogue,
            front=front,
            connections=connections,
            clock=runtime.clock,
            check_term=self._check_term,
            publish=publish,
            group=group,
        )
        self.care = Care(
            catalogue, self._pools, self._pool_records, runtime.clock, self._check_term, self.peers.tell
        )
        self.care.pools_changed()
        self._uploads = UploadDesk(catalogue, runtime.clock, settings.uploads_kept_s, self._check_term)
        self._orphans = OrphanRulings(catalogue, self.care.repair, self._check_term)
        self.restore = RestoreWatch(catalogue, self._pools, connections, settings.replace_after_s)
        self.members = MemberDesk(
            catalogue, keys, runtime.clock, self._check_term, lambda: self.peers.addresses, self.peers.tell
        )
        # A new master has not heard from anyone: every open session gets a whole lease.
        self._leases = {
            number: self._started + settings.session_lease_s
            for number, session in catalogue.sessions.items()
            if not session.closed
        }

    def mastership(self) -> Mastership:
        """Return the handlers by kind of request."""
        return Mastership(
            mandate=self._mandate,
            cluster_id=self._catalogue.cluster_id,
            term=self._catalogue.term,
            handlers={
                Announce: self.announce,
                Heartbeat: self.heartbeat,
                ListGarbage: self.list_garbage,
                Review: self.review,
                ConfirmDropped: self.confirm_dropped,
                OpenSession: self.open_session,
                KeepSession: self.keep_session,
                CloseSession: self.close_session,
                Commit: self.commit,
                Lookup: self.lookup,
                List: self.list_names,
                Find: self.find_names,
                Describe: self.describe,
                Remove: self.remove,
                Rename: self.rename,
                SwapExtent: self.swap_extent,
                GetStatus: self.get_status,
                **self.care.handlers(),
                **self._orphans.handlers(),
                **self._uploads.handlers(),
                **self.peers.handlers(),
                **self.members.handlers(),
            },
            quick={Lookup: self.lookup_now},
            failed=self._catalogue.failed,
        )

    def _check_term(self) -> None:
        if self._terms.current > self._catalogue.term:
            raise NotMaster(
                f"this controller was the master of term {self._catalogue.term}; there is a later one"
            )

    # -- pools ---------------------------------------------------------------------------------

    async def announce(self, _call: Call, request: Announce, _body: Body) -> Answer:
        """Take in a pool that started.

        NotFound from a heartbeat asks for this; an IdentityError from here is final, a PeerError is not.
        """
        self._check_term()
        async with self._pool_records:
            record = self._pools.judge(request, self._clock.now(), self._clock.wall_ms())
            if record != self._catalogue.pools.get(record.number):
                record = await self._catalogue.save_pool(record)
            self._pools.enter(record, request, self._clock.now())
            self.care.pools_changed()
            self.care.repair.look_afresh()
        log.info("pool announced number=%d name=%s address=%s", record.number, record.name, record.address)
        return Welcomed(
            number=record.number,
            cluster_id=self._catalogue.cluster_id,
            incarnation=self._catalogue.incarnation,
            term=self._catalogue.term,
            heartbeat_ms=int(self._settings.heartbeat_s * 1000),
            ruling=self._catalogue.ruling,
        )

    async def heartbeat(self, _call: Call, request: Heartbeat, _body: Body) -> Answer:
        """Note that a pool lives; tell it when there is something to drop."""
        self._check_term()
        record = self._pools.heartbeat(request, self._clock.now())
        if record is not None:
            async with self._pool_records:
                if self._pools.known(record.number).boot_id == record.boot_id:
                    self._pools.checked(await self._catalogue.save_pool(record))
        repair = self.care.repair
        review = repair.has_left_over(request.number) or await self._catalogue.has_garbage(request.number)
        work = repair.has_work(request.number)
        return Heard(review=review, term=self._catalogue.term, work=work, ruling=self._catalogue.ruling)

    async def list_garbage(self, _call: Call, request: ListGarbage, _body: Body) -> Answer:
        """Tell a pool which extents it should look at: first those whose shards were moved away from it."""
        self._check_term()
        self._pools.known(request.number)
        if request.after is None and (
            moved := self.care.repair.take_left_over(request.number, request.limit)
        ):
            return GarbagePage(extents=tuple(moved))
        return GarbagePage(
            extents=tuple(await self._catalogue.garbage(request.number, request.after, request.limit))
        )

    async def review(self, _call: Call, request: Review, _body: Body) -> Answer:
        """Tell a pool which of its shards are dead."""
        self._check_term()
        self._pools.known(request.number)
        drop = await self._catalogue.review(request.number, request.holdings)
        return Verdicts(drop=tuple(drop), term=self._catalogue.term)

    async def confirm_dropped(self, _call: Call, request: ConfirmDropped, _body: Body) -> Answer:
        """Note what a pool has dropped."""
        self._check_term()
        self._pools.known(request.number)
        await self._catalogue.confirm_dropped(request.number, request.extents)
        return Done()

    # -- sessions ------------------------------------------------------------------------------

    async def open_session(self, _call: Call, request: OpenSession, _body: Body) -> Answer:
        """Register an app."""
        self._check_term()
        number = await self._catalogue.open_session(request.address, request.boot_id)
        self._leases[number] = self._clock.now() + self._settings.session_lease_s
        log.info("session opened number=%x app=%s", number, request.address)
        return SessionOpened(
            session=number, lease_ms=int(self._settings.session_lease_s * 1000), map=self._pools.map()
        )

    async def keep_session(self, _call: Call, request: KeepSession, _body: Body) -> Answer:
        """Renew an app's lease; hand it the map when it has another one.

        A new master, which counts pools as down until it hears of them, leaves apps the map that they have.
        """
        self._check_term()
        if request.session not in self._leases:
            raise SessionClosed(f"session {request.session:x} is closed; open another")
        self._leases[request.session] = self._clock.now() + self._settings.session_lease_s
        with suppress(CatalogFull):  # It counts all the same, and is made durable later.
            await self._catalogue.raise_floor(request.session, request.floor)
        fresh = request.map_version == self._pools.version or not self._pools.settled(self._clock.now())
        return SessionKept(map=None if fresh else self._pools.map())

    async def close_session(self, _call: Call, request: CloseSession, _body: Body) -> Answer:
        """End an app's session."""
        self._check_term()
        await self._end_session(request.session, "closed")
        return Done()

    async def _end_session(self, session: int, how: str) -> None:
        lease = self._leases.pop(session, None)
        try:
            await self._catalogue.close_session(session)
        except CatalogFull:
            if lease is not None:
                self._leases[session] = lease  # It is to be ended yet.
            raise
        log.info("session %s number=%x", how, session)

    # -- names ---------------------------------------------------------------------------------

    async def commit(self, _call: Call, request: Commit, _body: Body) -> Answer:
        """Make an uploaded version visible."""
        self._check_term()
        receipt = await self._catalogue.commit(
            request.operation,
            normal_name(request.name),
            _expected(request.condition),
            request.version,
            request.extents,
            request.note,
        )
        return Committed(receipt=receipt)

    async def lookup(self, _call: Call, request: Lookup, _body: Body) -> Answer:
        """Tell what a name points at, or what a version is."""
        self._check_term()
        name = normal_name(request.name)
        if request.version is None:
            version, extents = await self._catalogue.lookup(name)
        else:
            version, extents = await self._catalogue.lookup_version(request.version)
        return Found(name=name, version=version, extents=extents)

    def lookup_now(self, _call: Call, request: Lookup, _body: Body, respond: Respond) -> bool:
        """Answer a look-up that takes no waiting, which is nearly every one."""
        self._check_term()
        if request.version is not None:
            return False
        name = normal_name(request.name)
        found = self._catalogue.lookup_now(name)
        if found is None:
            return False
        respond(Found(name=name, version=found.version, extents=found.extents))
        return True

    async def list_names(self, _call: Call, request: List, _body: Body) -> Answer:
        """List a page of names."""
        self._check_term()
        prefix = normal_prefix(request.prefix)
        entries, following = await self._catalogue.list_names(
            prefix, request.after, request.limit, recursive=request.recursive
        )
        return Listed(entries=entries, next=following)

    async def find_names(self, _call: Call, request: Find, _body: Body) -> Answer:
        """List a page of the names that match a glob."""
        self._check_term()
        entries, following = await self._catalogue.find_names(request.pattern, request.after, request.limit)
        return Listed(entries=entries, next=following)

    async def describe(self, _call: Call, request: Describe, _body: Body) -> Answer:
        """Describe one file."""
        self._check_term()
        name = normal_name(request.name)
        version, extents = await self._catalogue.lookup(name)
        pools = {pool.number: pool for pool in self._pools.infos()}
        return describe(name, version, extents, pools)

    async def remove(self, _call: Call, request: Remove, _body: Body) -> Answer:
        """Remove a name."""
        self._check_term()
        version = await self._catalogue.remove(
            _required(request.operation), normal_name(request.name), _expected(request.condition)
        )
        return Changed(version=version)

    async def rename(self, _call: Call, request: Rename, _body: Body) -> Answer:
        """Give a file another name, or one more."""
        self._check_term()
        version = await self._catalogue.rename(
            _required(request.operation),
            normal_name(request.source),
            normal_name(request.target),
            _expected(request.condition),
            keep=request.keep,
        )
        return Changed(version=version)

    async def swap_extent(self, _call: Call, request: SwapExtent, _body: Body) -> Answer:
        """Put an extent of another layout into the place of one with the same content."""
        self._check_term()
        await self._catalogue.swap_extent(
            request.operation, request.version, request.place, request.old, request.new
        )
        return Done()

    # -- the cluster ---------------------------------------------------------------------------

    async def get_status(self, _call: Call, _request: GetStatus, _body: Body) -> Answer:
        """Tell how the cluster is."""
        self._check_term()
        unreadable = self._pools.unreadable()
        repair = self.care.repair.status()
        survival = await self._catalogue.survival(unreadable)
        pools = self._pools.infos()
        totals, sessions = self._catalogue.totals, self._catalogue.sessions
        started_s = self._clock.now() - self._started
        return Status(
            status=ClusterStatus(
                cluster_id=self._catalogue.cluster_id,
                term=self._catalogue.term,
                files=totals.files,
                size=totals.size,
                extents=totals.extents,
                garbage=totals.garbage,
                survival=survival,
                pools=pools,
                controllers=self.peers.addresses[:MAX_CONTROLLERS],
                sessions=len(self._leases),
                warnings=(
                    *self._front.health_warnings(),
                    *warnings(
                        pools,
                        survival,
                        repair=repair,
                        quarantined=self._pools.quarantined(),
                        started_s=started_s,
                        down_after_s=self._settings.down_after_s,
                        restored_ms=self._catalogue.restored_ms,
                        adopted=self.restore.adopted if self._catalogue.rebuilt_from is not None else None,
                        uncompared=self.restore.waits_for(),
                        awaited=self.restore.awaited(),
                    ),
                ),
                empty_files=totals.empty_files,
                machine_survival=await self._catalogue.machine_survival(unreadable),
                repair=repair,
                quarantined=self._pools.quarantined(),
            ),
            apps=tuple(sorted({sessions[number].address for number in self._leases})[:_MOST_APPS]),
        )

    # -- housekeeping --------------------------------------------------------------------------

    def choose_journals(self) -> None:
        """Say which pools keep the journal, as they are now."""
        pools = self._pools.infos()
        self._mandate.keep_journals(self._journals.choose(pools), self._journals.most(pools))

    async def watch_pools(self) -> None:
        """Mark silent pools down, and choose those that keep the journal, for ever."""
        while True:
            await trio.sleep(self._settings.heartbeat_s / 2)
            self.choose_journals()
            for record in self._pools.expire(self._clock.now()):
                log.warning(
                    "pool down number=%d name=%s address=%s", record.number, record.name, record.address
                )
                self.care.repair.pool_is_gone(record.number)
            self.care.give_up_pools()

    async def keep_house(self) -> None:
        """Close expired sessions, write floors down, forget outcomes, for ever.

        Raise NotMaster when a later term was seen, and NotMaster or CatalogError when the catalogue takes no
        more changes.
        """
        while True:
            await trio.sleep(self._settings.housekeeping_s)
            self._check_term()
            self._catalogue.check()
            self._note_shortage()
            with suppress(CatalogFull):  # What could not be done now is done the next time.
                await self._tidy()

    async def _tidy(self) -> None:
        now = self._clock.now()
        for number in [number for number, until in self._leases.items() if until < now]:
            await self._end_session(number, "expired")
        await self._catalogue.save_floors()
        await self._catalogue.forget_outcomes()
        await self._uploads.expire()

    def _note_shortage(self) -> None:
        """Log once that room is short, and that it is no more."""
        shortage = self._catalogue.shortage
        if shortage != self._shortage:
            self._shortage = shortage
            log.warning("%s", shortage or "the disk of the catalogue has room again")


def why_it_ended(error: Exception) -> NotMaster | CatalogError | None:
    """Return why a controller is the master no more; None when there is anything else among the reasons.

    Where the engine fails, several tasks may meet it at the same moment, and come out as a group.
    """
    if isinstance(error, NotMaster | CatalogError):
        return error
    if not isinstance(error, ExceptionGroup):
        return None
    reasons = [why_it_ended(one) for one in error.exceptions]
    return None if None in reasons else reasons[0]


def _expected(condition: Condition) -> Expected:
    return Expected(absent=condition.absent, version=condition.version)


def _required(operation: OperationId | None) -> OperationId:
    if operation is None:
        raise InvalidRequest("a change without an operation id: clients ask an app, and the app asks here")
    return operation


async def serve_controller(
    *,
    transport: Transport,
    address: str,
    group: Group,
    runtime: Runtime,
    settings: ControllerSettings,
    cluster_id: bytes = b"",
    publish: Publish | None = None,
    keys: TransportKeys | None = None,
    terms: Terms | None = None,
    handlers: Mapping[type[Request[Any]], Handler] | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Be a controller until cancelled: the master whenever the group says so, otherwise a standby.

    Started with the bound address: when it is the master, or has waited for that for STANDBY_S. Transport and
    group are the caller's; the caller closes the engine when this has returned. A controller that is alone
    ends with CatalogError when its catalogue cannot be read or written, and with NotMaster when another took
    over; one of several stands by then, and so does each that has no room on its disk to begin a term.
    IdentityError is raised when the catalogue is not of the cluster `cluster_id`, where that is given. `keys`
    are those of the transport, whose list of who is let in follows the catalogue. `handlers` are what the
    group answers to others, and `terms` are shared with it.
    """
    terms = Terms() if terms is None else terms
    started = trio.Event()
    async with open_connections(transport, terms=terms) as connections, open_background() as nursery:
        controller = _OneOfGroup(
            connections, group, terms, runtime, settings, started, publish, keys, handlers or {}
        )
        controller.front.cluster_id = cluster_id
        listener: Listener = await nursery.start(
            partial(
                serve,
                transport,
                address,
                controller.front.service(),
                terms=terms,
                limits=Limits(drain_s=_DRAIN_S),
            )
        )
        controller.front.address = settings.advertise or listener.address
        nursery.start_soon(controller.run)
        nursery.start_soon(controller.stay_known)
        nursery.start_soon(follow_members, group, keys, lambda: controller.front.leading)
        with trio.move_on_after(math.inf if group.alone else STANDBY_S):
            await started.wait()
        if not started.is_set():
            log.info("stands by at %s master=%s", listener.address, group.master or "-")
        task_status.started(listener.address)
        await trio.sleep_forever()


class _OneOfGroup:
    """A controller over all its times as master and standby."""

    def __init__(
        self,
        connections: Connections,
        group: Group,
        terms: Terms,
        runtime: Runtime,
        settings: ControllerSettings,
        started: trio.Event,
        publish: Publish | None,
        keys: TransportKeys | None,
        handlers: Mapping[type[Request[Any]], Handler],
    ) -> None:
        self._publish = publish
        self._keys = keys
        self._connections = connections
        self._group = group
        self._terms = terms
        self._runtime = runtime
        self._settings = settings
        self._started = started
        self._boot_id = boot_id = runtime.entropy.token(16)
        self.front = Front(
            group=group,
            name=settings.name,
            boot_id=boot_id,
            kinds=KINDS,
            quick=(Lookup,),
            terms=terms,
            clock=runtime.clock,
            handlers=handlers,
            allowed=None if keys is None else keys.allowed,
        )

    async def stay_known(self) -> None:
        """While this is a standby, tell each master that it sees who and where it is, for ever.

        Raise IdentityError or Conflict when a master cannot have this controller beside it.
        """
        known_to = ""
        while True:
            await trio.sleep(self._runtime.entropy.uniform(*_PAUSE_S))
            master = self.front.master
            if master in ("", known_to, self.front.address):
                continue
            request = JoinController(
                name=self._settings.name,
                address=self.front.address,
                boot_id=self._boot_id,
                cluster_id=self.front.cluster_id,
            )
            try:
                joined, _ = await self._connections.call(master, request, timeout_s=_JOIN_S)
            except (IdentityError, Conflict):
                raise
            except DroppexError as error:
                level = logging.INFO if isinstance(error, PeerBusy) else logging.WARNING
                log.log(level, "the master at %s does not know this controller yet: %s", master, error)
                continue
            known_to = master
            self.front.cluster_id = joined.cluster_id
            log.info("standby of %s term=%d pools=%d", master, joined.term, joined.pools)

    async def run(self) -> None:
        """Campaign, be the master, stand by, for ever."""
        while True:
            try:
                async with self._group.campaign(self.front.address) as mandate:
                    await self._lead(mandate)
                log.warning("no longer the master; standing by")
            except (NotMaster, CatalogError, ExceptionGroup) as error:
                reason = why_it_ended(error)
                waits = isinstance(reason, CatalogFull)  # Room comes back while this runs.
                if reason is None or (self._group.alone and not waits):
                    raise
                log.warning("not the master now: %s", reason)
                if isinstance(reason, CatalogError):
                    await trio.sleep(_FAILED_S)
            await trio.sleep(self._runtime.entropy.uniform(*_PAUSE_S))

    async def _lead(self, mandate: Mandate) -> None:
        """Be the master until the mandate is lost."""
        settings, grace_s = self._settings, self._settings.delete_grace_s
        async with open_catalogue(
            mandate.engine,
            self._runtime,
            delete_grace_s=grace_s,
            cluster_id=self.front.cluster_id,
            begins_with=settings.cluster_id,
            above_term=mandate.above_term,
        ) as catalogue:
            self._terms.observe(catalogue.term)
            controller = _Controller(
                catalogue,
                self.front,
                self._connections,
                self._terms,
                self._runtime,
                settings,
                self._group,
                mandate,
                self._publish,
                self._keys,
            )
            try:
                await controller.peers.enter(settings.name)
                await controller.members.begin()
                async with open_background() as nursery:
                    nursery.start_soon(controller.watch_pools)
                    nursery.start_soon(controller.keep_house)
                    nursery.start_soon(controller.care.record_losses)
                    nursery.start_soon(controller.restore.run)
                    nursery.start_soon(controller.care.repair.run)
                    nursery.start_soon(controller.care.tell_of_work)
                    controller.choose_journals()
                    self.front.leads(controller.mastership())
                    nursery.start_soon(controller.peers.run)
                    if self._keys is not None:
                        nursery.start_soon(controller.members.run)
                    log.info("master of term %d at %s", catalogue.term, self.front.address)
                    self._started.set()
                    await mandate.lost()
            finally:
                self.front.stands_by()
                catalogue.depose()
