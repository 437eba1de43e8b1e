"""Many transfers side by side: each is atomic, a failure is told in one line and the others go on."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from droppexd.cli.exits import ExitCode, exit_code, expected_error
from droppexd.cli.render import Output
from droppexd.errors import DroppexError, PeerError

AT_ONCE = 8
"""Files under way at the same time. Small ones cost a round trip each; these overlap."""

LARGE_SIZE = 4 * 1024 * 1024
LARGE_AT_ONCE = 2
"""Of files with several chunks so many at the same time: one keeps the app busy, and each takes memory."""

MOST_UNREACHABLE = AT_ONCE
"""So many failures in a row to reach the cluster end the batch: the rest would fail the same way, slowly."""


class Item(Protocol):
    """One transfer of a batch."""

    @property
    def label(self) -> str:
        """What people are told it is."""
        ...

    @property
    def size(self) -> int | None:
        """Bytes, when known."""
        ...


ItemT = TypeVar("ItemT", bound=Item)


class Batch:
    """What became of the transfers of one command."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._unreachable = 0
        self._codes: list[ExitCode] = []
        self.done = 0

    def succeed(self) -> None:
        """Count a transfer that was done."""
        self.done += 1
        self._unreachable = 0

    def fail(self, error: DroppexError | OSError, label: str) -> None:
        """Count and tell a transfer that failed; raise PeerError when trying on is no use."""
        self._output.error(error, label)
        code = exit_code(error)
        self._codes.append(code)
        self._unreachable = self._unreachable + 1 if code == ExitCode.UNREACHABLE else 0
        if self._unreachable >= MOST_UNREACHABLE:
            raise PeerError(f"gave up after {self._unreachable} failures in a row to reach the cluster")

    @property
    def failed(self) -> int:
        """How many transfers failed."""
        return len(self._codes)

    @property
    def exit_code(self) -> ExitCode:
        """How the command ends: with the code of its only transfer, or 1 when any of several failed."""
        if not self._codes:
            return ExitCode.OK
        if len(self._codes) == 1 and self.done == 0:
            return self._codes[0]
        return ExitCode.FAILURE


async def run_batch(
    items: AsyncIterator[ItemT], work: Callable[[ItemT], Awaitable[None]], output: Output
) -> Batch:
    """Do `work` for each item, several at a time, and return what became of them.

    DroppexError and OSError of one item are told and counted; other errors end the batch.
    """
    batch = Batch(output)
    large = trio.Semaphore(LARGE_AT_ONCE)

    async def attempt(item: ItemT) -> None:
        try:
            if item.size is None or item.size > LARGE_SIZE:
                async with large:
                    await work(item)
            else:
                await work(item)
        except (DroppexError, OSError) as error:
            batch.fail(error, item.label)
        except BaseExceptionGroup as group:
            single = expected_error(group)
            if single is None:
                raise
            batch.fail(single, item.label)
        else:
            batch.succeed()

    async def worker(received: trio.MemoryReceiveChannel[ItemT]) -> None:
        async with received:
            async for item in received:
                await attempt(item)

    send, receive = trio.open_memory_channel[ItemT](0)
    async with trio.open_nursery() as nursery:
        async with receive:
            for _ in range(AT_ONCE):
                nursery.start_soon(worker, receive.clone())
        async with send:
            async for item in items:
                await send.send(item)
    return batch
