"""Fill a stopped dev cluster with small files, some ten times faster than puts do.

Through the code that a put goes through, without the messages between: the catalogue judges and commits each
file, each pool's store takes its shards, in the placement that an app would choose. What is left is what puts
would have left, with ids of a session that has ended. Prints how many shards each pool has then, as JSON.
Run by `bench_reconcile.py`: python bench_fill.py FOLDER COUNT
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import trio
from blake3 import blake3

from droppexd.catalog.catalogue import Catalogue, open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.coding import encode_chunk
from droppexd.daemon import SystemEntropy, system_runtime
from droppexd.model import (
    CHUNK_SIZE,
    Extent,
    ExtentId,
    Layout,
    OperationId,
    PoolInfo,
    ShardHeader,
    Version,
    VersionId,
)
from droppexd.placement import Placement, choose_layout, small_layout
from droppexd.store.disk import open_disk_store

T = TypeVar("T")

CATALOGUE = Path("controller") / "catalogue.sqlite"
COUNTERS = 3
"""Ids of one put: its version, its extent, its commit."""
BATCH = 512


class Scene(NamedTuple):
    """What each process must know to make the same files."""

    session: int
    incarnation: bytes
    pools: tuple[PoolInfo, ...]
    count: int
    layout: Layout


class File(NamedTuple):
    """One small file, and where its shards are."""

    name: str
    content: bytes
    version: VersionId
    operation: OperationId
    extent: Extent


def batched(items: Iterable[T]) -> Iterator[list[T]]:
    """Cut into lists of BATCH."""
    rest = iter(items)
    while some := list(islice(rest, BATCH)):
        yield some


def name_of(number: int) -> str:
    """Return the name of a file of the filling."""
    return f"filled/{number // 1000:05}/{number:08}"


def content_of(number: int) -> bytes:
    """Return the content of a file: short, for nobody reads it who compares."""
    return f"content of file {number} of many".encode()


def files_of(scene: Scene) -> Iterator[File]:
    """Make the files, always the same for a scene."""
    placement = Placement(scene.pools)
    for number in range(scene.count):
        first = 1 + number * COUNTERS
        extent_id = ExtentId(scene.session, first + 1)
        content = content_of(number)
        yield File(
            name=name_of(number),
            content=content,
            version=VersionId(scene.session, first),
            operation=OperationId(scene.session, first + 2),
            extent=Extent(
                id=extent_id,
                layout=scene.layout,
                size=len(content),
                chunk_size=CHUNK_SIZE,
                pools=placement.choose(extent_id, scene.layout, lambda _: True),
            ),
        )


async def begin(folder: Path, count: int) -> Scene:
    """Open a session for the files, as an app would."""
    runtime = system_runtime()
    async with (
        open_sqlite_engine(folder / CATALOGUE, runtime) as engine,
        open_catalogue(engine, runtime) as catalogue,
    ):
        session = await catalogue.open_session("tcp://127.0.0.1:1", bytes(16))
        pools = tuple(
            PoolInfo(
                number=pool.number,
                pool_id=pool.pool_id,
                name=pool.name,
                machine=pool.machine,
                zone=pool.zone,
                address=pool.address,
                state="up",
                membership=pool.membership,
                capacity=1,
                free=1,
            )
            for pool in catalogue.pools.values()
        )
        layout = small_layout(choose_layout(pools, None))
        return Scene(session, catalogue.incarnation, pools, count, layout)


async def _commit(catalogue: Catalogue, file: File) -> None:
    version = Version(
        id=file.version,
        size=len(file.content),
        blake3=blake3(file.content).digest(),
        extents=(file.extent.id,),
    )
    await catalogue.commit(file.operation, file.name, Expected(absent=True), version, (file.extent,))


def fill_catalogue(folder: Path, scene: Scene) -> None:
    """Commit all files, and end their session."""
    trio.run(_commit_all, folder, scene)


async def _commit_all(folder: Path, scene: Scene) -> None:
    runtime = system_runtime()
    async with (
        open_sqlite_engine(folder / CATALOGUE, runtime) as engine,
        open_catalogue(engine, runtime) as catalogue,
    ):
        for some in batched(files_of(scene)):
            async with trio.open_nursery() as nursery:
                for file in some:
                    nursery.start_soon(_commit, catalogue, file)
            await catalogue.raise_floor(scene.session, some[-1].operation.counter + 1)
            await catalogue.forget_outcomes()
        await catalogue.close_session(scene.session)
        await catalogue.forget_outcomes()


class Filled(NamedTuple):
    """A pool's folder with its shards, and the start of it that took them."""

    pool: PoolInfo
    boot_id: bytes
    shards: int


def fill_pool(folder: Path, scene: Scene, pool: PoolInfo) -> Filled:
    """Store a pool's shards of all files."""
    store = open_disk_store(folder / pool.name, entropy=SystemEntropy())
    stored = 0
    try:
        shards = (shard for file in files_of(scene) for shard in _shards(scene, file, pool.number))
        for some in batched(shards):
            for outcome in store.put_small(some):
                if isinstance(outcome, Exception):
                    raise outcome
            stored += len(some)
        return Filled(pool, store.identity.boot_id, stored)
    finally:
        store.close()


def _shards(scene: Scene, file: File, pool: int) -> Iterator[tuple[ShardHeader, bytes]]:
    extent = file.extent
    if pool not in extent.pools:
        return
    index = extent.pools.index(pool)
    encoded = encode_chunk(extent.id, extent.layout, 0, file.content)
    header = ShardHeader(
        incarnation=scene.incarnation,
        extent=extent.id,
        index=index,
        layout=extent.layout,
        size=extent.size,
        chunk_size=extent.chunk_size,
        checksums=(encoded.checksums[index],),
        version=file.version,
        name=file.name,
    )
    yield header, bytes(encoded.pieces[index])


async def announce(folder: Path, pools: Iterable[Filled]) -> None:
    """Record the starts that took the shards, as if they had announced themselves.

    The next start of a pool would else be taken for one of an older copy of its folder.
    """
    runtime = system_runtime()
    async with (
        open_sqlite_engine(folder / CATALOGUE, runtime) as engine,
        open_catalogue(engine, runtime) as catalogue,
    ):
        for pool, boot_id, _ in pools:
            await catalogue.save_pool(replace(catalogue.pools[pool.number], boot_id=boot_id))


def main(folder: Path, count: int) -> None:
    """Fill all, side by side."""
    scene = trio.run(begin, folder, count)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=fresh) as workers:
        catalogue = workers.submit(fill_catalogue, folder, scene)
        stores = [workers.submit(fill_pool, folder, scene, pool) for pool in scene.pools]
        catalogue.result()
        filled = [store.result() for store in stores]
    trio.run(announce, folder, filled)
    print(json.dumps({pool.name: shards for pool, _, shards in filled}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
