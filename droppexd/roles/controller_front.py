"""What a controller answers, master or not: one listener whose answers change with what it is.

A request that only the master may answer gets NotMaster from a standby, with the master's address where that
is known. Pools, apps and clients of theirs go there by themselves.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from droppexd.catalog.group import Group, Mandate, Stale
from droppexd.catalog.listing import list_names
from droppexd.errors import (
    CatalogError,
    DroppexError,
    IdentityError,
    InvalidRequest,
    LocalProtocolError,
    NotMaster,
)
from droppexd.model import ControllerInfo, ControllerRole, Role, normal_prefix
from droppexd.roles.admission import page_of
from droppexd.runtime import Clock
from droppexd.wire.examining import pong
from droppexd.wire.group_messages import (
    ControllerState,
    DescribeController,
    DescribeGroup,
    GroupDescribed,
    TellMaster,
)
from droppexd.wire.keys import AllowList
from droppexd.wire.member_messages import ListMembers, TellMembers
from droppexd.wire.messages import (
    Adopt,
    Commit,
    Done,
    List,
    Listed,
    Ping,
    Remove,
    Rename,
    ReplacePool,
    Request,
)
from droppexd.wire.pool_messages import RemovePool
from droppexd.wire.relayout_messages import SwapExtent
from droppexd.wire.replication_messages import Promote
from droppexd.wire.rpc import Answer, Call, Handler, QuickHandler, Respond, Service, Terms
from droppexd.wire.transport import Frame
from droppexd.wire.upload_messages import CommitUpload

log = logging.getLogger("droppex.controller")

_CALLERS = frozenset((Role.APP, Role.POOL, Role.CONTROLLER, Role.JOINER))
"""A client talks to apps: an app makes the operation ids, under which outcomes are remembered. Who has a join
token may ask for nothing but to join."""

_MAX_TEXT = 400

_CHANGES = (Commit, CommitUpload, Remove, Rename, SwapExtent, Adopt, ReplacePool, RemovePool)
"""What changes names or what they stand for, or gives a pool up: what is told of these outlasts the loss of a
controller's disk."""

Body = Sequence[Frame]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mastership:
    """What the front needs of a controller while that is the master."""

    cluster_id: bytes
    term: int
    handlers: Mapping[type[Request[Any]], Handler]
    quick: Mapping[type[Request[Any]], QuickHandler]
    failed: Callable[[], bool]
    """Whether the catalogue takes no more changes."""
    mandate: Mandate


class Front:
    """The service of a controller, from its start to its end."""

    def __init__(
        self,
        *,
        group: Group,
        name: str,
        boot_id: bytes,
        kinds: Sequence[type[Request[Any]]],
        quick: Sequence[type[Request[Any]]],
        terms: Terms,
        clock: Clock,
        handlers: Mapping[type[Request[Any]], Handler] | None = None,
        allowed: AllowList | None = None,
    ) -> None:
        self._allowed = AllowList() if allowed is None else allowed
        self._handlers = dict(handlers or {})
        self.address = ""
        """How others reach this controller."""
        self.cluster_id = b""
        self._group = group
        self._name = name
        self._boot_id = boot_id
        self._kinds = tuple(kinds)
        self._quick_kinds = tuple(quick)
        self._terms = terms
        self._clock = clock
        self._mastership: Mastership | None = None

    def service(self) -> Service:
        """Return the handlers by kind of request."""
        own: dict[type[Request[Any]], Handler] = {
            Ping: self.ping,
            DescribeController: self.describe,
            DescribeGroup: self.describe_group,
            TellMaster: self.tell_master,
            Promote: self.promote,
            ListMembers: self.list_members,
            TellMembers: self.tell_members,
            **self._handlers,
        }
        return Service(
            {**dict.fromkeys(self._kinds, self.pass_on), **own},
            quick=dict.fromkeys(self._quick_kinds, self.pass_on_now),
            callers=_CALLERS,
        )

    # -- what it is ----------------------------------------------------------------------------

    def leads(self, mastership: Mastership) -> None:
        """Answer as the master from now on."""
        if set(mastership.handlers) != set(self._kinds):
            raise LocalProtocolError("the master does not answer just what a standby refuses")
        self._mastership = mastership
        self.cluster_id = mastership.cluster_id

    def stands_by(self) -> None:
        """Answer as a standby from now on."""
        self._mastership = None

    @property
    def leading(self) -> bool:
        """Whether this is the master."""
        return self._mastership is not None

    @property
    def master(self) -> str:
        """The address of the master, as far as this controller knows; empty: nobody."""
        if self._mastership is not None:
            return self.address
        known = self._group.master
        return "" if known == self.address else known

    def _not_master(self) -> NotMaster:
        master = self.master
        if master:
            return NotMaster(f"the controller {self._name} stands by; the master is at {master}", master)
        why = "".join(f" ({warning})" for warning in self._group.health.warnings[:1])
        return NotMaster(f"the controller {self._name} stands by, and knows of no master{why}")

    # -- handlers ------------------------------------------------------------------------------

    async def pass_on(self, call: Call, request: Request[Any], body: Body) -> Answer:
        """Let the master answer, if this is it.

        The answer, a refusal as well, leaves when it is known to hold whoever is the master next.
        """
        try:
            return await self._answered(call, request, body)
        except NotMaster:
            if not isinstance(request, List) or not request.stale_ok:
                raise
            stale = self._group.stale()
            if stale is None:
                raise
            return await self._list_stale(request, stale)

    async def _list_stale(self, request: List, stale: Stale) -> Answer:
        prefix = normal_prefix(request.prefix)
        entries, following = await list_names(
            stale, prefix, request.after, request.limit, recursive=request.recursive
        )
        age_s = stale.age_s()
        age_ms = None if math.isinf(age_s) else int(age_s * 1000)
        return Listed(entries=entries, next=following, told_by=self._name, age_ms=age_ms)

    async def _answered(self, call: Call, request: Request[Any], body: Body) -> Answer:
        mastership = self._mastership
        if mastership is None:
            raise self._not_master()
        try:
            answer = await mastership.handlers[type(request)](call, request, body)
        except CatalogError as error:
            raise self._judged(mastership, error) from error
        except NotMaster:
            raise
        except DroppexError:
            await mastership.mandate.confirm(changed=False)
            raise
        await mastership.mandate.confirm(changed=isinstance(request, _CHANGES))
        return answer

    def pass_on_now(self, call: Call, request: Request[Any], body: Body, respond: Respond) -> bool:
        """Let the master answer at once, if this is it."""
        mastership = self._mastership
        if mastership is None:
            raise self._not_master()
        if not mastership.mandate.immediate:
            return False
        quick = mastership.quick.get(type(request))
        try:
            return quick is not None and quick(call, request, body, respond)
        except CatalogError as error:
            raise self._judged(mastership, error) from error

    def _judged(self, mastership: Mastership, error: CatalogError) -> DroppexError:
        """Return what to answer: where another controller can go on, it is to be asked.

        Whether a change was carried out is unknown then. Who repeats it names the same operation, and the
        next master remembers its outcome.
        """
        if self._group.alone or not mastership.failed():
            return error
        return NotMaster(f"this controller's catalogue failed: {error}")

    async def ping(self, _call: Call, _request: Ping, _body: Body) -> Answer:
        """Say who this is."""
        term = self._mastership.term if self._mastership else self._terms.current
        return pong(Role.CONTROLLER, self._name, self._boot_id, self._clock, term)

    async def describe(self, _call: Call, _request: DescribeController, _body: Body) -> Answer:
        """Say how this controller is."""
        return ControllerState(info=self.info(), boot_id=self._boot_id, cluster_id=self.cluster_id)

    async def describe_group(self, _call: Call, _request: DescribeGroup, _body: Body) -> Answer:
        """Say what a controller must know to take part."""
        return GroupDescribed(
            cluster_id=self.cluster_id,
            engine=self._group.kind,
            endpoints=tuple(self._group.endpoints),
            prefix=self._group.prefix,
            master=self.master,
        )

    async def list_members(self, _call: Call, request: ListMembers, _body: Body) -> Answer:
        """Say whom this controller lets in."""
        return page_of(self._allowed, request)

    async def tell_members(self, _call: Call, _request: TellMembers, _body: Body) -> Answer:
        """Hear that there are others; a standby sees that in the catalogue."""
        return Done()

    async def promote(self, _call: Call, _request: Promote, _body: Body) -> Answer:
        """Raise InvalidRequest: where the group has nothing to say to this, it elects the master itself."""
        raise InvalidRequest(
            f"with {self._group.kind} another controller takes over by itself, and none is promoted by hand"
        )

    def info(self) -> ControllerInfo:
        """Return how this controller is."""
        health = self._group.health
        return ControllerInfo(
            name=self._name,
            address=self.address,
            role=(ControllerRole.MASTER if self._mastership else ControllerRole.STANDBY).value,
            term=self._mastership.term if self._mastership else self._terms.current,
            revision=self._group.revision,
            engine=self._group.kind,
            master=self.master,
            failure=health.failure[:_MAX_TEXT],
            warnings=tuple(warning[:_MAX_TEXT] for warning in health.warnings[:16]),
        )

    def health_warnings(self) -> tuple[str, ...]:
        """Return what is wrong with the engine, for people, a line each."""
        health = self._group.health
        told = (health.failure, *health.warnings) if health.failure else health.warnings
        return tuple(warning[:_MAX_TEXT] for warning in told[:16])

    async def tell_master(self, _call: Call, request: TellMaster, _body: Body) -> Answer:
        """Hear of a master, whose term came with the message; who it is, the group says.

        Raise IdentityError when it is another cluster's.
        """
        if self.cluster_id and request.cluster_id != self.cluster_id:
            raise IdentityError("this controller belongs to another cluster")
        return Done()
