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
        if len(group.exceptions) > 1:
            raise
        lone = group.exceptions[0]
    if lone is not None:
        try:
            raise lone
        finally:
            lone = None  # A frame that its own exception refers to would be a cycle.
