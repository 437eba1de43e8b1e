"""The client of the benchmark: does what the JSON lines of its standard input say, and answers with seconds.

Run by `bench.py`: python bench_client.py APP_ADDRESS [KEY_FILE] [IO_THREADS]
"""

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from droppexd.allocator import tune_allocator
from droppexd.client import Client, open_client
from droppexd.daemon import system_runtime
from droppexd.wire.keys import load_keys
from droppexd.wire.messages import ANYTHING
from droppexd.wire.zeromq import open_zeromq_transport


async def side_by_side(work: Callable[[int], Awaitable[None]], count: int, concurrency: int) -> None:
    """Do `work(0)` to `work(count - 1)`, so many at once."""
    numbers = iter(range(count))

    async def one() -> None:
        for number in numbers:
            await work(number)

    async with trio.open_nursery() as nursery:
        for _ in range(concurrency):
            nursery.start_soon(one)


class Bench:
    """The operations, by name."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._rounds = 0

    async def put(self, paths: list[str]) -> None:
        """Put files, all at once, each under its file name."""

        async def one(number: int) -> None:
            path = Path(paths[number])
            with path.open("rb", buffering=0) as source:
                await self._client.put_file(
                    f"bench/{path.name}", source, size=path.stat().st_size, condition=ANYTHING
                )

        await side_by_side(one, len(paths), len(paths))

    async def get(self, paths: list[str]) -> None:
        """Get files, all at once, each from the name of its file."""

        async def one(number: int) -> None:
            path = Path(paths[number])
            with path.open("wb", buffering=0) as target:
                await self._client.get_file(f"bench/{path.name}", target)

        await side_by_side(one, len(paths), len(paths))

    async def remove(self, paths: list[str]) -> None:
        """Remove files."""
        for path in paths:
            await self._client.remove(f"bench/{Path(path).name}")

    async def put_small(self, count: int, size: int, concurrency: int) -> None:
        """Put small files, under new names: replacing would measure the garbage of the round before."""
        content = os.urandom(size)
        self._rounds += 1

        async def one(number: int) -> None:
            await self._client.put_bytes(f"small/{self._rounds}/{number:06d}", content, condition=ANYTHING)

        await side_by_side(one, count, concurrency)

    async def get_small(self, count: int, concurrency: int) -> None:
        """Get small files."""

        async def one(number: int) -> None:
            await self._client.get_bytes(f"small/{self._rounds}/{number:06d}")

        await side_by_side(one, count, concurrency)

    async def make_names(self, count: int, concurrency: int) -> None:
        """Put empty files: names and nothing else."""

        async def one(number: int) -> None:
            await self._client.put_bytes(f"names/{number:06d}", b"", condition=ANYTHING)

        await side_by_side(one, count, concurrency)

    async def list_names(self, count: int) -> None:
        """List all names of a folder."""
        listed = [entry async for entry in self._client.list("names/")]
        if len(listed) != count:
            raise SystemExit(f"{len(listed)} names are listed, not {count}")

    async def wait_for_losses(self) -> None:
        """Return once shards count as missing."""
        while not (await self._client.status()).status.repair.left:
            await trio.sleep(0.05)

    async def wait_for_repair(self) -> None:
        """Return once nothing is missing any more."""
        while (await self._client.status()).status.repair.left:
            await trio.sleep(0.05)

    async def drain(self, pool: str) -> None:
        """Empty a pool."""
        told = await self._client.drain_pool(pool)
        while told.shards:
            await trio.sleep(0.05)
            told = await self._client.drain_pool(pool, ask=True)

    async def undo_drain(self, pool: str) -> None:
        """Take a pool back that was drained."""
        await self._client.drain_pool(pool, undo=True)

    async def wait_for_balance(self, pool: str) -> None:
        """Return once all shards are where placement wants them, with this pool."""
        while True:
            status = (await self._client.status()).status
            if (
                status.repair.balanced
                and not status.repair.left
                and any(one.name == pool and one.writable for one in status.pools)
            ):
                return
            await trio.sleep(0.05)

    async def scrub(self) -> None:
        """Have every pool read and verify all that it holds."""
        started = await self._client.watch_scrubs(start=True)
        numbers = {scrub.pool: scrub.progress.current.number for scrub in started}
        while numbers:
            await trio.sleep(0.01)
            for scrub in await self._client.watch_scrubs():
                last = scrub.progress.last
                if last is not None and last.number == numbers.get(scrub.pool):
                    if last.lost or last.unreadable or last.trouble:
                        raise SystemExit(f"the scrub of {scrub.name} did not find all sound")
                    del numbers[scrub.pool]


async def main(address: str, key: str = "", io_threads: str = "1") -> None:
    """Serve the benchmark until the end of standard input."""
    runtime = system_runtime()
    keys = load_keys(Path(key)) if key else None
    async with (
        open_zeromq_transport(keys=keys, io_threads=int(io_threads)) as transport,
        open_client(address, transport, runtime) as client,
    ):
        bench = Bench(client)
        async for line in trio.wrap_file(sys.stdin):
            request = json.loads(line)
            operation = getattr(bench, request.pop("do"))
            started = time.perf_counter()
            await operation(**request)
            print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    tune_allocator()
    trio.run(main, *sys.argv[1:])
