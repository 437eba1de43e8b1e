"""What an app tells of the controllers: as the master sees them, or as they are while there is no master."""

from collections.abc import Sequence
from dataclasses import replace

from droppexd.errors import CatalogError, NotMaster, PeerError
from droppexd.roles.controllers import describe_controllers, unreachable
from droppexd.roles.master import MasterLink
from droppexd.wire.group_messages import ControllersListed, ListControllers
from droppexd.wire.messages import List, Listed
from droppexd.wire.replication_messages import Promote
from droppexd.wire.rpc import Answer, Call, Connections
from droppexd.wire.transport import Frame

_MASTER_S = 5.0

_PROMOTE_S = 300.0
"""A controller that is promoted may have much to take over first."""


class ControllerList:
    """Answers which controllers there are."""

    def __init__(self, connections: Connections, master: MasterLink) -> None:
        self._connections = connections
        self._master = master

    async def list_controllers(self, _call: Call, request: ListControllers, _body: Sequence[Frame]) -> Answer:
        """Ask the master; when none answers, ask each controller that this app knows of."""
        try:
            answer: ControllersListed = await self._master.call(request, timeout_s=_MASTER_S)
        except (PeerError, NotMaster, CatalogError):
            return await self._ask_each()
        return answer

    async def list_names(self, request: List) -> Listed:
        """Ask the master; when none answers, any controller for what it knows."""
        try:
            return await self._master.call(request, timeout_s=_MASTER_S)
        except (PeerError, NotMaster, CatalogError) as error:
            failure = error
        for address in self._master.known:
            try:
                listed, _ = await self._connections.call(
                    address, replace(request, stale_ok=True), timeout_s=_MASTER_S
                )
            except (PeerError, NotMaster, CatalogError):
                continue
            return listed
        raise failure

    async def promote(self, _call: Call, request: Promote, _body: Sequence[Frame]) -> Answer:
        """Pass it on to the controller that is to become the master."""
        promoted, _ = await self._connections.call(request.address, request, timeout_s=_PROMOTE_S)
        return promoted

    async def _ask_each(self) -> ControllersListed:
        addresses = self._master.known
        states = await describe_controllers(self._connections, addresses)
        found = [
            unreachable("", address) if state is None else state.info
            for address, state in zip(addresses, states, strict=True)
        ]
        return ControllersListed(master="", controllers=tuple(found))
