"""The part of the benchmark about the catalogue: how large it is, and what it costs with many files.

Run by `bench.py --catalog`. The files are small ones on six pools, committed by eight apps at once through
the code that a put goes through inside the controller; names come in no order, as they do from people. Each
figure is of the catalogue alone, in a process of its own: no message is sent. The floor of commits is one
thread that writes the same rows with bare SQLite, as many transactions to a flush as the engine had.
"""

import itertools
import json
import os
import random
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import trio

from droppexd.catalog.catalogue import Catalogue, open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.engine import Engine, Operation
from droppexd.catalog.etcd_group import EtcdSettings, open_etcd_group
from droppexd.catalog.sqlite import CATALOGUE_FILE, open_sqlite_engine
from droppexd.daemon import system_runtime
from droppexd.model import (
    CHUNK_SIZE,
    Extent,
    ExtentId,
    Layout,
    OperationId,
    PoolInfo,
    PoolRecord,
    Version,
    VersionId,
)
from droppexd.placement import Placement, choose_layout, small_layout
from droppexd.roles.catching_up import Catching, Source
from droppexd.wire.replication_messages import ReadEntries, ReadLog
from droppexd.wire.rpc import Service, Terms, open_connections, serve
from droppexd.wire.zeromq import open_zeromq_transport

if TYPE_CHECKING:
    from bench import Table

FEW = 10_000
POOLS = 6
APPS = 8
CONCURRENCY = 64
COMMITS = 20_000
ETCD_COMMITS = 10_000
KEYS_A_COMMIT = 4
FOLDERS = 1000
LOOKUPS = 20_000
PAGES = 200
PAGE = 1000
AT_ONCE = 512
DISK_BYTES = 1500
"""For each file, with the log and what is being written."""
COUNTERS = 3
"""Ids of one put: its version, its extent, its commit."""


def name_of(number: int) -> str:
    """Return the name of a file: neighbours by number are in different folders."""
    folder, place = number % FOLDERS, number // FOLDERS
    return f"photos/{2000 + folder // 50}/{folder % 50:02}-summer/IMG_{place:06}.jpg"


class Uploads:
    """Commits of one app after another, with ids of its own session."""

    def __init__(self, session: int, layout: Layout, placement: Placement, seed: int) -> None:
        self.session = session
        self.counter = 1
        self._layout = layout
        self._placement = placement
        self._random = random.Random(seed)

    def make(self, number: int) -> tuple[OperationId, str, Version, Extent]:
        """Return what a commit of a file is made of."""
        first, self.counter = self.counter, self.counter + COUNTERS
        extent_id = ExtentId(self.session, first + 1)
        size = self._random.randrange(1, 100_000)
        extent = Extent(
            id=extent_id,
            layout=self._layout,
            size=size,
            chunk_size=CHUNK_SIZE,
            pools=self._placement.choose(extent_id, self._layout, lambda _: True),
        )
        version = Version(
            id=VersionId(self.session, first),
            size=size,
            blake3=self._random.randbytes(32),
            extents=(extent_id,),
            created_ms=1_700_000_000_000 + number,
            metadata=(("mtime", str(1_600_000_000 + number)), ("mode", "644")),
        )
        return OperationId(self.session, first + 2), name_of(number), version, extent

    async def commit(self, catalogue: Catalogue, number: int) -> None:
        """Commit one file."""
        operation, name, version, extent = self.make(number)
        await catalogue.commit(operation, name, Expected(absent=True), version, (extent,))


async def begin(catalogue: Catalogue) -> list[Uploads]:
    """Let pools join and apps open sessions."""
    for index in range(len(catalogue.pools), POOLS):
        await catalogue.save_pool(
            PoolRecord(
                number=0,
                pool_id=bytes([index]) * 16,
                name=f"pool-{index}",
                machine=f"machine-{index}",
                zone="",
                address=f"tcp://127.0.0.1:{index + 1}",
            )
        )
    infos = [
        PoolInfo(
            number=pool.number, pool_id=pool.pool_id, name=pool.name, machine=pool.machine, zone="",
            address=pool.address, state="up", membership=pool.membership, capacity=1, free=1,
        )
        for pool in catalogue.pools.values()
    ]  # fmt: skip
    layout, placement = small_layout(choose_layout(infos, None)), Placement(infos)
    return [
        Uploads(await catalogue.open_session(f"tcp://127.0.0.1:{app + 1}", bytes(16)), layout, placement, app)
        for app in range(APPS)
    ]


async def fill(folder: Path, start: int, count: int) -> dict[str, Any]:
    """Commit files, as many at once as a batch takes."""
    runtime = system_runtime()
    async with (
        open_sqlite_engine(folder / CATALOGUE_FILE, runtime) as engine,
        open_catalogue(engine, runtime) as catalogue,
    ):
        apps = await begin(catalogue)
        numbers = list(range(start, start + count))
        random.Random(start).shuffle(numbers)
        waiting = iter(numbers)
        took = 0.0
        while some := list(itertools.islice(waiting, AT_ONCE)):
            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for index, number in enumerate(some):
                    nursery.start_soon(apps[index % APPS].commit, catalogue, number)
            took += time.perf_counter() - began
            for app in apps:
                await catalogue.raise_floor(app.session, app.counter)
            await catalogue.forget_outcomes()
        for app in apps:
            await catalogue.close_session(app.session)
        await catalogue.forget_outcomes()
    return {"commits_per_s": count / took}


async def commits(folder: Path, start: int) -> dict[str, Any]:
    """Commit at a concurrency of CONCURRENCY, each flushed before the next of its task."""
    runtime = system_runtime()
    async with open_sqlite_engine(folder / CATALOGUE_FILE, runtime) as engine:
        return await _commits_in(engine, start, COMMITS)


async def _commits_in(engine: Engine, start: int, count: int) -> dict[str, Any]:
    runtime = system_runtime()
    async with open_catalogue(engine, runtime) as catalogue:
        apps = await begin(catalogue)
        numbers = iter(range(start, start + count))

        async def one_after_another(app: Uploads) -> None:
            for number in numbers:
                await app.commit(catalogue, number)

        before, began = engine.revision, time.perf_counter()
        async with trio.open_nursery() as nursery:
            for task in range(CONCURRENCY):
                nursery.start_soon(one_after_another, apps[task % APPS])
        took, transactions = time.perf_counter() - began, engine.revision - before
        lookups = [await _timed(lambda n=n: catalogue.lookup(name_of(n))) for n in range(start, start + 500)]
        for app in apps:
            await catalogue.close_session(app.session)
        await catalogue.forget_outcomes()
    return {
        "commits_per_s": count / took,
        "commits_per_flush": count / transactions,
        "lookup_ms": 1000 * median(lookups),
    }


async def etcd_commits(endpoints: str) -> dict[str, Any]:
    """Commit into etcd; the floor is bare transactions of as many keys by the same client, one by one."""
    runtime = system_runtime()
    settings = EtcdSettings(tuple(endpoints.split(",")))
    async with open_etcd_group(settings, runtime) as group, group.campaign("bench") as mandate:
        engine = mandate.engine
        figures = await _commits_in(engine, 0, ETCD_COMMITS)
        some = await engine.range(b"", b"\xff", 1000)
        keys = round(figures["commits_per_flush"] * KEYS_A_COMMIT)
        rounds, began = 50, time.perf_counter()
        for number in range(rounds):
            values = [some[(number + index) % len(some)].value for index in range(keys)]
            then = [Operation(b"zz/%d/%d" % (number, index), value) for index, value in enumerate(values)]
            await engine.txn([], then)
        took = time.perf_counter() - began
        figures["floor"] = rounds * figures["commits_per_flush"] / took
    return figures


@contextmanager
def etcd(folder: Path) -> Iterator[str]:
    """Run three members of etcd on loopback, and yield where they are."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    peers = ",".join(f"etcd-{n}=http://127.0.0.1:{ports[3 + n]}" for n in range(3))
    with ExitStack() as stack:
        for n in range(3):
            client, peer = f"http://127.0.0.1:{ports[n]}", f"http://127.0.0.1:{ports[3 + n]}"
            command = ["etcd", "--name", f"etcd-{n}", "--data-dir", str(folder / f"etcd-{n}")]
            command += ["--listen-client-urls", client, "--advertise-client-urls", client]
            command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
            command += ["--initial-cluster", peers, "--log-level", "error"]
            member = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(member.wait)
            stack.callback(member.kill)
        yield ",".join(f"http://127.0.0.1:{port}" for port in ports[:3])


def bare_commits(folder: Path, per_flush: float) -> dict[str, Any]:
    """Write the rows of as many commits with bare SQLite."""
    rows = sqlite3.connect(folder / CATALOGUE_FILE)
    log = rows.execute("SELECT operations FROM log ORDER BY revision DESC LIMIT 1").fetchone()[0]
    rows.close()
    path = folder / "bare.sqlite"
    bare = sqlite3.connect(path, isolation_level=None)
    bare.execute("PRAGMA journal_mode = WAL")
    bare.execute("PRAGMA synchronous = FULL")
    bare.execute("CREATE TABLE kv (key BLOB PRIMARY KEY, value BLOB, revision INTEGER) WITHOUT ROWID")
    bare.execute("CREATE TABLE log (revision INTEGER PRIMARY KEY, time_ms INTEGER, operations BLOB)")
    group = max(1, round(per_flush))
    value, shuffled = bytes(70), random.Random(1)
    began = time.perf_counter()
    for start in range(0, COMMITS, group):
        bare.execute("BEGIN IMMEDIATE")
        puts = [
            (kind + shuffled.randbytes(12 if kind != b"n/" else 36), value, start)
            for _ in range(min(group, COMMITS - start))
            for kind in (b"n/", b"v/", b"e/", b"o/")
        ]
        bare.executemany("INSERT OR REPLACE INTO kv VALUES (?, ?, ?)", puts)
        bare.execute("INSERT INTO log VALUES (?, 0, ?)", (start + 1, log[: 400 * group]))
        bare.execute("COMMIT")
    took = time.perf_counter() - began
    bare.close()
    path.unlink()
    return {"commits_per_s": COMMITS / took}


async def serve_log(folder: Path) -> None:
    """Let another process take over from this catalogue, until nobody holds standard input open."""
    runtime = system_runtime()
    async with (
        open_sqlite_engine(folder / CATALOGUE_FILE, runtime) as engine,
        open_zeromq_transport() as transport,
        trio.open_nursery() as nursery,
    ):
        source = Source(engine)
        handlers = {ReadLog: source.read_log, ReadEntries: source.read_entries}
        listener = await nursery.start(
            partial(serve, transport, "tcp://127.0.0.1:0", Service(handlers), terms=Terms())
        )
        print(listener.address, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def follow(folder: Path) -> dict[str, Any]:
    """Take over the whole log of a catalogue in another process, then everything, as a follower does."""
    runtime = system_runtime()
    command = [sys.executable, __file__, "serve_log", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leader:
        address = leader.stdout.readline().strip() if leader.stdout else ""
        async with (
            open_sqlite_engine(folder / "follower.sqlite", runtime) as engine,
            open_zeromq_transport() as transport,
            open_connections(transport, terms=Terms()) as connections,
        ):
            catching = Catching(engine, connections, b"")
            began = time.perf_counter()
            followed = await catching.take_log(address)
            log_s = time.perf_counter() - began
            operations = len(await engine.log(0, 2**40)) if followed is None else 0
            began = time.perf_counter()
            await catching.take_everything(address)
            copy_s = time.perf_counter() - began
            entries = sum(1 for _ in sqlite3.connect(folder / "follower.sqlite").execute("SELECT 1 FROM kv"))
        leader.communicate()
    return {"operations_per_s": operations / log_s, "entries_per_s": entries / copy_s}


async def read(folder: Path, count: int) -> dict[str, Any]:
    """Open a catalogue as a controller that starts does, and read in it."""
    runtime = system_runtime()
    began = time.perf_counter()
    async with (
        open_sqlite_engine(folder / CATALOGUE_FILE, runtime) as engine,
        open_catalogue(engine, runtime) as catalogue,
    ):
        opened_s = time.perf_counter() - began
        chosen = random.Random(3)
        names = [name_of(chosen.randrange(count)) for _ in range(LOOKUPS)]
        lookups = [await _timed(lambda name=name: catalogue.lookup(name)) for name in names]
        flat = [
            await _timed(lambda name=name: catalogue.list_names("", name, PAGE, recursive=True))
            for name in names[:PAGES]
        ]
        # One folder below the top: each entry of the page is a whole sub-folder that is skipped.
        folders = [
            await _timed(lambda: catalogue.list_names("photos/2007/", "", PAGE, recursive=False))
            for _ in range(PAGES)
        ]
        total = await _timed(lambda: catalogue.survival(()))
    return {
        "opened_ms": 1000 * opened_s,
        "lookup_us": 1e6 * median(lookups),
        "lookup_p99_us": 1e6 * sorted(lookups)[len(lookups) * 99 // 100],
        "page_ms": 1000 * median(flat),
        "page_p99_ms": 1000 * sorted(flat)[len(flat) * 99 // 100],
        "folder_ms": 1000 * median(folders),
        "survival_ms": 1000 * total,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


async def _timed(question: Callable[[], Any]) -> float:
    began = time.perf_counter()
    await question()
    return time.perf_counter() - began


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of the tables on disk: the present, and the log."""
    connection = sqlite3.connect(folder / CATALOGUE_FILE)
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    tables = dict(connection.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name"))
    connection.close()
    return {"kv": tables["kv"], "log": tables["log"], "free": free * page_size, "file": pages * page_size}


STEPS: dict[str, Callable[..., Any]] = {
    "fill": lambda folder, start, count: trio.run(fill, folder, int(start), int(count)),
    "commits": lambda folder, start: trio.run(commits, folder, int(start)),
    "etcd": lambda _folder, endpoints: trio.run(etcd_commits, endpoints),
    "bare": lambda folder, per_flush: bare_commits(folder, float(per_flush)),
    "serve_log": lambda folder: trio.run(serve_log, folder),
    "follow": lambda folder: trio.run(follow, folder),
    "read": lambda folder, count: trio.run(read, folder, int(count)),
}


def step(name: str, folder: Path, *arguments: object) -> dict[str, float]:
    """Take a step in a process of its own and return its figures."""
    command = [sys.executable, __file__, name, str(folder), *map(str, arguments)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(told.stdout)
    return figures


def drop_caches(folder: Path) -> None:
    """Have the system forget what it has read of the catalogue, as after a restart of the machine."""
    with (folder / CATALOGUE_FILE).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_caches(folder: Path) -> None:
    """Have the system read all of the catalogue, as a controller that has run for a while has."""
    with (folder / CATALOGUE_FILE).open("rb") as file:
        while file.read(16 * 1024 * 1024):
            pass


def run(data: Path, files: int, table: "Table") -> None:
    """Measure, and print."""
    with tempfile.TemporaryDirectory(dir=data, prefix="droppex-catalog-") as name:
        folder = Path(name)
        step("fill", folder, 0, FEW)
        begun = step("commits", folder, 100 * FOLDERS * 100_000)
        floor = step("bare", folder, begun["commits_per_flush"])
        table.add(
            f"commits, {CONCURRENCY} at once, flushed", begun["commits_per_s"], "/s", floor["commits_per_s"]
        )
        table.add("commits in one flush", begun["commits_per_flush"], "")
        if shutil.which("etcd") is None:
            print("etcd is not installed: nothing is measured of it")
        else:
            with etcd(folder) as endpoints:
                inside = step("etcd", folder, endpoints)
            what = f"commits, {CONCURRENCY} at once, three members of etcd"
            table.add(what, inside["commits_per_s"], "/s", inside["floor"])
            table.add("a look-up in etcd", inside["lookup_ms"], "ms")
        following = step("follow", folder)
        table.add("a follower catches up, operations", following["operations_per_s"], "/s")
        table.add("a follower copies everything, entries", following["entries_per_s"], "/s")
        few = step("read", folder, FEW)
        filled = step("fill", folder, FEW, files - FEW)
        table.add(f"commits, {AT_ONCE} at once, {files:,} files", filled["commits_per_s"], "/s")
        space = sizes(folder)
        table.add("bytes a file, without the log", space["kv"] / files, "B")
        table.add("the log", space["log"] / 1e6, "MB")
        table.add("free pages", space["free"] / 1e6, "MB")
        drop_caches(folder)
        many = step("read", folder, files)
        fill_caches(folder)
        warm = step("read", folder, files)
        for key, what, unit in (
            ("lookup_us", "a look-up", "us"),
            ("lookup_p99_us", "a look-up, 99 of 100", "us"),
            ("page_ms", f"a page of {PAGE} names", "ms"),
            ("page_p99_ms", f"a page of {PAGE} names, 99 of 100", "ms"),
            ("folder_ms", "a folder of 50 sub-folders", "ms"),
            ("survival_ms", "what all files survive", "ms"),
            ("opened_ms", "start of the catalogue", "ms"),
        ):
            table.add(f"{what}, {FEW:,} files", few[key], unit)
            table.add(f"{what}, {files:,} files, from the page cache", warm[key], unit)
            table.add(f"{what}, {files:,} files, from the disk", many[key], unit)
        table.add(f"memory, {files:,} files", many["memory"] / 1e6, "MB")


if __name__ == "__main__":
    print(json.dumps(STEPS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])))
