"""Write a catalogue with a record of every kind into one file: a sample of what this release writes."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import trio

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.engine import Operation
from droppexd.catalog.keys import SYNC
from droppexd.catalog.records import pack_fields
from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.model import (
    MISSING,
    ControllerRecord,
    Extent,
    ExtentId,
    Layout,
    OperationId,
    PoolRecord,
    Version,
    VersionId,
)
from droppexd.runtime import Runtime

POOLS = 4


class Clock:
    """A time that is always the same."""

    def now(self) -> float:
        return trio.current_time()

    def wall_ms(self) -> int:
        return 1_700_000_000_000


class Entropy:
    """Randomness that is always the same."""

    def __init__(self) -> None:
        self._random = random.Random(1)

    def token(self, size_bytes: int) -> bytes:
        return self._random.randbytes(size_bytes)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


async def write(path: Path) -> None:
    """Make the catalogue."""
    runtime = Runtime(clock=Clock(), entropy=Entropy(), run_blocking=trio.to_thread.run_sync)
    async with open_sqlite_engine(path, runtime) as engine, open_catalogue(engine, runtime) as catalogue:
        for number in range(1, POOLS + 1):
            await catalogue.save_pool(
                PoolRecord(
                    number=0,
                    pool_id=bytes([number]) * 16,
                    name=f"pool-{number}",
                    machine=f"machine-{number}",
                    zone="cellar" if number == 1 else "",
                    address=f"tcp://10.0.0.{number}:7702",
                    boot_id=bytes([number]) * 16,
                    joined_ms=1_700_000_000_000,
                    checking=number == 4,
                )
            )
        await catalogue.save_controller(
            ControllerRecord(name="north", address="tcp://10.0.0.9:7700", joined_ms=1_700_000_000_000)
        )
        gone = await catalogue.open_session("tcp://10.0.0.8:7701", bytes(16))
        session = await catalogue.open_session("tcp://10.0.0.9:7701", b"\x01" * 16)
        counter = iter(range(1, 1000))

        def operation() -> OperationId:
            return OperationId(session, next(counter))

        async def put(name: str, extents: int, pools: tuple[int, ...], size: int = 1000) -> None:
            made = [
                Extent(
                    id=ExtentId(session, next(counter)),
                    layout=Layout(1, 2),
                    size=size,
                    chunk_size=4 * 1024 * 1024,
                    pools=pools,
                )
                for _ in range(extents)
            ]
            version = Version(
                id=VersionId(session, next(counter)),
                size=size * extents,
                blake3=bytes(range(32)),
                extents=tuple(extent.id for extent in made),
                created_ms=1_600_000_000_000,
                metadata=(("mode", "644"), ("mtime", "1600000000")),
            )
            await catalogue.commit(operation(), name, Expected(), version, made, "a note")

        await put("docs/small", 1, (1, 2, 3))
        await put("docs/grüße", 1, (2, 3, 4))
        await put("docs/large", 3, (1, 2, 4))
        await put("docs/degraded", 1, (1, 2, MISSING))
        await put("docs/empty", 0, ())
        await put("docs/removed", 1, (1, 3, 4))
        await catalogue.rename(operation(), "docs/small", "docs/again", Expected(absent=True), keep=True)
        await catalogue.remove(operation(), "docs/removed", Expected())
        await catalogue.raise_floor(session, 5)
        await catalogue.save_floors()
        await catalogue.close_session(gone)
        pool = catalogue.pools[3]
        await catalogue.save_pool(replace(pool, membership="draining"))


async def begin_again(path: Path) -> None:
    """Begin another term, as a master whose answers one standby confirms."""
    runtime = Runtime(clock=Clock(), entropy=Entropy(), run_blocking=trio.to_thread.run_sync)
    async with open_sqlite_engine(path, runtime) as engine, open_catalogue(engine, runtime):
        await engine.txn((), [Operation(SYNC, pack_fields((1,)))])


if __name__ == "__main__":
    trio.run(write, Path(sys.argv[1]))
    trio.run(begin_again, Path(sys.argv[1]))
