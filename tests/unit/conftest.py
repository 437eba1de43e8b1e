"""A stage for roles and their parts: a simulated network under trio's mock clock."""

import random
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from droppexd.model import Role
from droppexd.runtime import Runtime
from droppexd.wire.memory import MemoryNetwork
from droppexd.wire.rpc import Limits, Service, Terms, open_connections, serve


class MockedClock:
    def now(self):
        return trio.current_time()

    def wall_ms(self):
        return 1_700_000_000_000 + int(trio.current_time() * 1000)


class SeededEntropy:
    def __init__(self, seed):
        self._random = random.Random(seed)

    def token(self, size_bytes):
        return self._random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self._random.uniform(low, high)


async def run_inline(function, *args):
    await trio.lowlevel.checkpoint()
    return function(*args)


class Stage:
    """Processes on one simulated network; all end with the story."""

    def __init__(self, nursery):
        self.nursery = nursery
        entropy = SeededEntropy(1)
        self.runtime = Runtime(clock=MockedClock(), entropy=entropy, run_blocking=run_inline)
        self.network = MemoryNetwork(entropy)

    async def serve(self, name, handlers, *, role=Role.POOL, admissions=None, limits=None):
        """Start a process that answers, and return its address."""
        return await self.nursery.start(
            partial(self._serve, name, role, Service(handlers, admissions or {}), limits)
        )

    async def _serve(self, name, role, service, limits, *, task_status):
        async with self.network.transport(name, role) as transport, trio.open_nursery() as nursery:
            listener = await nursery.start(
                partial(serve, limits=limits or Limits(), terms=Terms()),
                transport,
                "tcp://127.0.0.1:0",
                service,
            )
            task_status.started(listener.address)

    async def connections(self, name, role=Role.APP):
        """Start a process that asks, and return its connections."""
        return await self.nursery.start(self._connections, name, role)

    async def _connections(self, name, role, *, task_status):
        async with (
            self.network.transport(name, role) as transport,
            open_connections(transport, terms=Terms()) as connections,
        ):
            task_status.started(connections)
            await trio.sleep_forever()

    async def transport(self, name, role):
        """Start a process, and return its transport."""
        return await self.nursery.start(self._transport, name, role)

    async def _transport(self, name, role, *, task_status):
        async with self.network.transport(name, role) as transport:
            task_status.started(transport)
            await trio.sleep_forever()


@pytest.fixture(scope="session")
def play():
    """Run a story, `async def story(stage)`, to its end; time jumps whenever all tasks wait."""

    def run(story):
        async def main():
            async with trio.open_nursery() as nursery:
                await story(Stage(nursery))
                nursery.cancel_scope.cancel()

        trio.run(main, clock=MockClock(autojump_threshold=0), strict_exception_groups=True)

    return run
