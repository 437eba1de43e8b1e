"""How a controller that starts finds out from another what it must know to take part."""

import logging
from collections.abc import Sequence

import trio

from droppexd.errors import ConfigError, DroppexError, NotAuthorised, RemoteProtocolError
from droppexd.model import Role
from droppexd.roles.master import Find
from droppexd.wire.group_messages import DescribeGroup, GroupDescribed
from droppexd.wire.messages import Ping
from droppexd.wire.rpc import Connections

log = logging.getLogger("droppex.controller")

_ASK_S = 5.0
_PAUSE_S = 1.0
_FIND_EVERY = 2
"""Rounds in vain between two looks at other sources: a bucket may be far away."""

_SAY_EVERY = 10
"""Rounds in vain between two lines in the log."""


async def ask_group(
    connections: Connections, addresses: Sequence[str], find: Find | None = None
) -> GroupDescribed:
    """Return what the first of these controllers says that knows its cluster; ask until one does.

    `find` is asked for more of them now and then.

    Raise ConfigError when one of the addresses is no controller's, and NotAuthorised.
    """
    rounds = 0
    found: tuple[str, ...] = ()
    while True:
        failure = "they know of no cluster yet"
        for address in dict.fromkeys((*addresses, *found)):
            try:
                described, _ = await connections.call(address, DescribeGroup(), timeout_s=_ASK_S)
            except NotAuthorised:
                raise
            except RemoteProtocolError:
                await _refuse_others(connections, address)
                raise
            except DroppexError as error:
                failure = str(error)
                continue
            if described.cluster_id:
                return described
        if rounds % _SAY_EVERY == 0:
            log.warning("no controller to join yet at %s: %s", ", ".join(addresses), failure)
        rounds += 1
        await trio.sleep(_PAUSE_S)
        if find is not None and rounds % _FIND_EVERY == 1:
            found = await find()


async def _refuse_others(connections: Connections, address: str) -> None:
    """Raise ConfigError when this is the address of a pool or an app."""
    pong, _ = await connections.call(address, Ping(), timeout_s=_ASK_S)
    if pong.role != Role.CONTROLLER:
        raise ConfigError(
            [f"{address} is the {pong.role} {pong.name}, not a controller: --master names one of those"]
        )
