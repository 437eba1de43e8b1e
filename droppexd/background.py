"""A nursery for the tasks that stand behind an object, as transports and connections have them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_background() -> AsyncIterator[trio.Nursery]:
    """Open a nursery whose tasks end with the block, and whose lone exception is raised as it is.

    A plain nursery wraps what its block raises into a group, and callers of the object could no longer
    catch it by its class.
    """
    lone: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # What failed while all was being cancelled from outside is still what failed: a group that only
        # the cancellation makes one would reach the caller as a group of one.
        _, failures = group.split(trio.Cancelled)
        told = failures or group
        if len(told.exceptions) > 1:
            raise
        lone = told.exceptions[0]
    if lone is not None:
        try:
            raise lone
        finally:
            lone = None  # A frame that its own exception refers to would be a cycle.


@asynccontextmanager
async def stopping_in_order() -> AsyncIterator[trio.CancelScope]:
    """Shield a block from being cancelled from outside, and yield the scope that is cancelled in its stead.

    What runs in that scope ends first; the block then goes on, to end the rest in order and in bounded time.
    """
    first = trio.CancelScope()

    async def pass_on() -> None:
        try:
            await trio.sleep_forever()
        finally:
            first.cancel()

    async with open_background() as nursery:
        nursery.start_soon(pass_on)
        with trio.CancelScope(shield=True):
            yield first
