"""Asking controllers how they are: what the master and the apps both do."""

from collections.abc import Sequence

import trio

from droppexd.errors import DroppexError
from droppexd.model import ControllerInfo, ControllerRole
from droppexd.wire.group_messages import ControllerState, DescribeController
from droppexd.wire.rpc import Connections

ASK_S = 2.0
"""A controller that does not answer in this time counts as unreachable."""


async def describe_controllers(
    connections: Connections, addresses: Sequence[str]
) -> list[ControllerState | None]:
    """Return what each of these controllers says of itself; None of those that do not answer."""
    states: list[ControllerState | None] = [None] * len(addresses)

    async def describe(index: int, address: str) -> None:
        try:
            states[index], _ = await connections.call(address, DescribeController(), timeout_s=ASK_S)
        except DroppexError:
            states[index] = None

    async with trio.open_nursery() as nursery:
        for index, address in enumerate(addresses):
            nursery.start_soon(describe, index, address)
    return states


def unreachable(name: str, address: str) -> ControllerInfo:
    """Return what is known of a controller that does not answer."""
    return ControllerInfo(name=name, address=address, role=ControllerRole.UNREACHABLE.value)
