"""What the master does for the other controllers, and for all that must know who the master is.

Controllers that join get a permanent record, and learn all that a standby needs. Whenever a master begins and
whenever the controllers change, every pool, app and controller is told the master and the controllers:
a new master need not wait to be found.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import trio

from droppexd.catalog.catalogue import Catalogue
from droppexd.catalog.group import Group
from droppexd.errors import Conflict, DroppexError, IdentityError, NotFound, PeerBusy
from droppexd.model import MAX_CONTROLLERS, ControllerInfo, ControllerRecord, Membership
from droppexd.roles.controller_front import Front
from droppexd.roles.controllers import describe_controllers, unreachable
from droppexd.runtime import Clock
from droppexd.wire.group_messages import (
    ControllersListed,
    ControllerState,
    JoinController,
    Joined,
    ListControllers,
    RemoveController,
    TellMaster,
)
from droppexd.wire.messages import Done, Request
from droppexd.wire.rpc import Answer, Call, Connections, Handler
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.controller")

TELL_S = 5.0
_TELL_AT_ONCE = 16
_AT_LEAST_S = 60.0
"""So often is told who did not hear: it may know of no controller that lives, and wait for a word."""

_AGAIN_S = 10.0
"""Those that could not be told are told once more after so long. Pools and apps look for a master themselves;
standbys ask nobody."""

Body = Sequence[Frame]

Publish = Callable[[bytes, int, Sequence[str]], Awaitable[bool]]
"""Makes known elsewhere, for a cluster's id and a term, who the master is and which controllers there are.
Returns False when it must be tried again."""


class Peers:
    """The controllers of the cluster, as their master sees them."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        front: Front,
        connections: Connections,
        clock: Clock,
        check_term: Callable[[], None],
        group: Group,
        publish: Publish | None = None,
    ) -> None:
        self._group = group
        self._publish = publish
        self._catalogue = catalogue
        self._front = front
        self._connections = connections
        self._clock = clock
        self._check_term = check_term
        self._joining = trio.Lock()
        self._news = trio.Event()

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return the handlers by kind of request."""
        return {
            JoinController: self.join,
            ListControllers: self.list_controllers,
            RemoveController: self.remove,
        }

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the controllers are, the master first."""
        own = self._front.address
        others = sorted({record.address for record in self._catalogue.controllers.values()} - {own})
        return (own, *others)

    # -- coming and going ----------------------------------------------------------------------

    async def enter(self, name: str) -> None:
        """Write down the name and address of the master itself, and forget what it was called before."""
        async with self._joining:
            await self._save(name, self._front.address)
            for former in self._group.former_names & self._catalogue.controllers.keys():
                await self._catalogue.forget_controller(former)

    async def _save(self, name: str, address: str) -> None:
        known = self._catalogue.controllers.get(name)
        if known is not None and known.address == address:
            return
        joined_ms = known.joined_ms if known is not None else self._clock.wall_ms()
        await self._catalogue.save_controller(
            ControllerRecord(name=name, address=address, joined_ms=joined_ms)
        )
        self._tell_news()

    async def join(self, _call: Call, request: JoinController, _body: Body) -> Answer:
        """Take in a controller that started.

        Raise IdentityError when it belongs to another cluster or has the address of the master, Conflict
        when another controller that lives has its name or its address, and PeerBusy while it lacks too much.
        """
        self._check_term()
        if request.cluster_id and request.cluster_id != self._catalogue.cluster_id:
            raise IdentityError(
                "this controller's folder belongs to another cluster; give it another folder with --data"
            )
        if request.address == self._front.address:
            raise IdentityError(
                f"{request.address} is this master itself; --master names another controller than the one "
                "that is started"
            )
        async with self._joining:
            await self._refuse_double(request)
            if not self._group.admits(request.name, request.address):
                raise PeerBusy(f"the controller {request.name} copies the catalogue first")
            await self._save(request.name, request.address)
        log.info("controller joined name=%s address=%s", request.name, request.address)
        catalogue = self._catalogue
        return Joined(
            cluster_id=catalogue.cluster_id,
            incarnation=catalogue.incarnation,
            term=catalogue.term,
            controllers=self.addresses,
            pools=len(catalogue.pools),
        )

    async def _refuse_double(self, request: JoinController) -> None:
        for record in list(self._catalogue.controllers.values()):
            same_name, same_place = record.name == request.name, record.address == request.address
            if same_name == same_place:
                continue
            (state,) = await describe_controllers(self._connections, [record.address])
            if state is None or state.boot_id == request.boot_id or state.cluster_id not in (
                b"", self._catalogue.cluster_id
            ):  # fmt: skip
                continue
            if same_name:
                raise Conflict(
                    f"there is a controller {record.name} already, at {record.address}; give this one "
                    "another name with --name"
                )
            raise Conflict(f"the controller {record.name} answers at {record.address}; bind another address")

    async def remove(self, _call: Call, request: RemoveController, _body: Body) -> Answer:
        """Forget a controller. Raise NotFound, and Conflict while it answers or is needed."""
        self._check_term()
        async with self._joining:
            record = self._catalogue.controllers.get(request.name)
            if record is None:
                names = ", ".join(sorted(self._catalogue.controllers))
                raise NotFound(f"there is no controller {request.name!r}; there are {names}")
            (state,) = await describe_controllers(self._connections, [record.address])
            if state is not None and state.info.name == record.name:
                raise Conflict(
                    f"the controller {record.name} answers at {record.address}; stop it, then remove it"
                )
            if request.force:
                self._group.vouch_gone(record.name)
            elif self._group.needs(record.name):
                raise Conflict(
                    f"without the controller {record.name} too few are left to confirm its answers "
                    "(catalog.sync): start another first; or, if it never comes back, --force"
                )
            await self._catalogue.forget_controller(record.name)
            self._tell_news()
        log.info("controller removed name=%s address=%s", record.name, record.address)
        return Done()

    # -- how they are --------------------------------------------------------------------------

    async def list_controllers(self, _call: Call, _request: ListControllers, _body: Body) -> Answer:
        """Tell which controllers there are, and how each says that it is."""
        self._check_term()
        own = self._front.info()
        others = [
            record
            for record in self._catalogue.controllers.values()
            if record.name != own.name and record.address != own.address
        ]
        others.sort(key=lambda record: record.name)
        states = await describe_controllers(self._connections, [record.address for record in others])
        found = [own]
        for record, state in zip(others, states, strict=True):
            found.append(self._info(record, state, own.revision))
        return ControllersListed(master=own.address, controllers=tuple(found))

    def _info(self, record: ControllerRecord, state: ControllerState | None, newest: int) -> ControllerInfo:
        if state is None or state.info.name != record.name:
            return unreachable(record.name, record.address)
        return replace(state.info, address=record.address, lag=max(0, newest - state.info.revision))

    # -- telling everybody ---------------------------------------------------------------------

    async def run(self) -> None:
        """Tell everybody the master and the controllers, now and after each change, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_always)
            # Apart: what it writes to may be slow, and nobody is to wait for it.
            if self._publish is not None:
                nursery.start_soon(self._publish_always, self._publish)

    async def _tell_always(self) -> None:
        while True:
            news = self._news
            late = await self.tell(self._master_told())
            pause_s = _AGAIN_S
            while late and not news.is_set():
                with trio.move_on_after(pause_s):
                    await news.wait()
                    break
                late = await self.tell(self._master_told(), late)
                pause_s = min(2 * pause_s, _AT_LEAST_S)
            await news.wait()

    async def _publish_always(self, publish: Publish) -> None:
        while True:
            news = self._news
            done = await publish(self._catalogue.cluster_id, self._catalogue.term, self.addresses)
            with trio.move_on_after(float("inf") if done else _AGAIN_S):
                await news.wait()

    def _tell_news(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def _everybody(self) -> list[str]:
        catalogue = self._catalogue
        found = [address for address in self.addresses if address != self._front.address]
        found += [pool.address for pool in catalogue.pools.values() if pool.membership != Membership.REMOVED]
        found += [session.address for session in catalogue.sessions.values() if not session.closed]
        return list(dict.fromkeys(found))

    def _master_told(self) -> TellMaster:
        return TellMaster(
            cluster_id=self._catalogue.cluster_id,
            address=self._front.address,
            controllers=self.addresses[:MAX_CONTROLLERS],
        )

    async def tell(self, request: Request[Any], addresses: Sequence[str] | None = None) -> list[str]:
        """Tell these something, without addresses everybody; return those that could not be told."""
        missed: list[str] = []
        room = trio.CapacityLimiter(_TELL_AT_ONCE)

        async def tell(address: str) -> None:
            async with room:
                try:
                    await self._connections.call(address, request, timeout_s=TELL_S)
                except DroppexError as error:
                    log.debug("%s was not told %s: %s", address, type(request).__name__, error)
                    missed.append(address)

        async with trio.open_nursery() as nursery:
            for address in self._everybody() if addresses is None else addresses:
                nursery.start_soon(tell, address)
        return missed
