"""An app asks all whom it works with how they are, on behalf of a client, which reaches the app alone."""

from collections.abc import Sequence

from droppexd.errors import DroppexError, PeerError
from droppexd.model import Membership, Role
from droppexd.roles.app_session import Registration
from droppexd.roles.master import NOWHERE, MasterLink
from droppexd.runtime import Clock
from droppexd.wire.examining import Acquaintance, examine_peers
from droppexd.wire.group_messages import ExaminePeers, PeersExamined
from droppexd.wire.messages import GetStatus
from droppexd.wire.rpc import Answer, Call, Terms, open_connections
from droppexd.wire.transport import Frame, Transport

_MASTER_S = 2.0
"""For so long the master is asked which apps there are; it is of those that are examined."""

MOST_PEERS = 4096


class Examiner:
    """Answers how the peers of an app are."""

    def __init__(
        self, transport: Transport, registration: Registration, master: MasterLink, clock: Clock
    ) -> None:
        self._transport = transport
        self._registration = registration
        self._master = master
        self._clock = clock

    async def examine_peers(self, _call: Call, _request: ExaminePeers, _body: Sequence[Frame]) -> Answer:
        """Ask controllers, apps and pools, on connections of its own: transfers wait on the others."""
        peers = [*self._controllers(), *await self._apps(), *self._pools()][:MOST_PEERS]
        async with open_connections(self._transport, terms=Terms()) as connections:
            return PeersExamined(peers=tuple(await examine_peers(connections, self._clock, peers)))

    def _controllers(self) -> list[Acquaintance]:
        known = [address for address in self._master.known if address != NOWHERE]
        return [Acquaintance(Role.CONTROLLER, "", address) for address in known]

    async def _apps(self) -> list[Acquaintance]:
        try:
            status = await self._master.call(GetStatus(), timeout_s=_MASTER_S)
        except DroppexError:
            return []  # Why not, the controllers tell.
        return [Acquaintance(Role.APP, "", address) for address in status.apps]

    def _pools(self) -> list[Acquaintance]:
        try:
            pools = self._registration.view.map.pools
        except PeerError:
            return []
        return [
            Acquaintance(Role.POOL, pool.name, pool.address)
            for pool in pools
            if pool.membership != Membership.REMOVED
        ]
