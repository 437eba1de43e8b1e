"""Keep an open transfer alive while its other end pauses: a slow pipe, a reader that stopped to look."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from droppexd.background import open_background
from droppexd.errors import DroppexError, InvalidRequest
from droppexd.wire.messages import KeepStream
from droppexd.wire.rpc import Connections

KEEP_S = 20.0
"""Well below what the app waits before it gives a silent transfer up."""


@asynccontextmanager
async def kept_alive(connections: Connections, address: str, request: KeepStream) -> AsyncIterator[None]:
    """Tell the app now and then that a transfer goes on, as long as the block lasts."""
    async with open_background() as nursery:
        nursery.start_soon(_keep, connections, address, request)
        yield


async def _keep(connections: Connections, address: str, request: KeepStream) -> None:
    while True:
        await trio.sleep(KEEP_S)
        try:
            await connections.call(address, request, timeout_s=KEEP_S)
        except InvalidRequest:
            return  # The transfer is over, and whoever works on it hears so from the app.
        except DroppexError:
            continue  # The app is busy, or gone: then whoever works on the transfer hears so.
