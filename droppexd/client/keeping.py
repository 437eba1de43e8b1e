"""Keep an open transfer alive while its other end pauses: a slow pipe, a reader that stopped to look."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from droppexd.background import open_background
from droppexd.errors import DroppexError, StreamGone
from droppexd.wire.messages import KeepStream
from droppexd.wire.rpc import Connections

KEEP_S = 20.0
"""Well below what the app waits before it gives a silent transfer up."""


@asynccontextmanager
async def kept_alive(
    connections: Connections, address: str, current: Callable[[], KeepStream | None]
) -> AsyncIterator[None]:
    """Tell the app now and then that a transfer goes on, as long as the block lasts.

    `current` says which that is; None for one that needs no keeping.
    """
    async with open_background() as nursery:
        nursery.start_soon(_keep, connections, address, current)
        yield


async def _keep(connections: Connections, address: str, current: Callable[[], KeepStream | None]) -> None:
    over: KeepStream | None = None
    while True:
        await trio.sleep(KEEP_S)
        request = current()
        if request is None or request == over:
            continue
        try:
            await connections.call(address, request, timeout_s=KEEP_S)
        except StreamGone:
            over = request  # Whoever works on the transfer hears so from the app, and may begin another.
        except DroppexError:
            continue  # The app is busy, or gone: then whoever works on the transfer hears so.
