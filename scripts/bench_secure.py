"""The part of the benchmark about encrypted links: transfers, draining a pool, and balancing.

Run by `bench.py --secure`. The floor has the same processes over CURVE sockets with as many threads of
libzmq. That of draining and balancing is a plain copy: one process that asks a pool of the floor for pieces
and writes them to a new file, which it flushes in the end.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import zmq
from bench_processes import MB, process, usage_of

if TYPE_CHECKING:
    from bench import Cluster, Table

MIB = 1024 * 1024
CHUNK = 4 * MIB
PIECE = CHUNK // 4
THREADS = (1, 2, 4)
DRAIN_POOLS = 7
FILES = 4
"""As many times the large file is stored then."""
HERE = Path(__file__).resolve().parent


def floor_environment(threads: int) -> dict[str, str]:
    """Return what has the floor encrypt."""
    _, secret = zmq.curve_keypair()
    return {"DROPPEX_FLOOR_CURVE": secret.decode(), "DROPPEX_FLOOR_THREADS": str(threads)}


class Pair:
    """A cluster and a floor with so many threads, and what they took."""

    def __init__(self, stack: ExitStack, folder: Path, threads: int) -> None:
        from bench import POOLS, Cluster, Floor

        self.threads = threads
        folder.mkdir()
        key = str(folder / "dev" / "keys" / "client-client.key")
        self.floor: Floor = Floor(stack, folder / "floor", floor_environment(threads))
        self.cluster: Cluster = Cluster(
            stack, folder, POOLS, "--secure", "--io-threads", str(threads), keys=(key, str(threads))
        )
        self.out = folder / "out"
        self.out.mkdir()
        self._empty = self.cluster.on_disk()
        self.seconds: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def take_turns(self, file: Path) -> None:
        """Measure both once."""
        chunks = file.stat().st_size // CHUNK
        for name, measure in (
            ("floor put", lambda: self.floor.run("put", file, chunks)),
            ("put", lambda: self._run("put", file)),
            ("floor get", lambda: self.floor.run("get", self.out / "floor", chunks)),
            ("get", lambda: self._run("get", self.out / file.name)),
        ):
            self.seconds.setdefault(name, []).append(measure())
        self.floor.run("drop")
        self.cluster.run("remove", paths=[str(file)])
        self.cluster.wait_until_dropped(self._empty)

    def _run(self, verb: str, path: Path) -> float:
        before = sum(self.cluster.cpu().values())
        seconds: float = self.cluster.run(verb, paths=[str(path)])
        self.cpu.setdefault(verb, []).append(sum(self.cluster.cpu().values()) - before)
        return seconds

    def rate(self, name: str, size: int) -> float:
        """Return the median speed in MB/s."""
        return size / MB / median(self.seconds[name])


def transfers(table: "Table", folder: Path, file: Path, rounds: int) -> None:
    """Put and get with one thread and with several, taking turns."""
    size = file.stat().st_size
    with ExitStack() as stack:
        pairs = [Pair(stack, folder / f"threads-{threads}", threads) for threads in THREADS]
        for _ in range(rounds):
            for pair in pairs:
                pair.take_turns(file)
        for verb in ("put", "get"):
            for pair in pairs:
                name = f"{verb} {size // MIB} MiB encrypted, {pair.threads} threads"
                table.add(name, pair.rate(verb, size), "MB/s", pair.rate(f"floor {verb}", size))
                table.add(f"{name}: CPU", median(pair.cpu[verb]), "s")
        for pair in pairs:
            peak = usage_of(pair.cluster.app["pid"])[1]
            table.add(f"memory of the app, {pair.threads} threads", peak, "MB")


class Copier:
    """A plain copy: one process that reads what one pool of a floor has and writes it to a new file."""

    def __init__(self, stack: ExitStack, folder: Path, file: Path) -> None:
        from bench import Floor

        environment = floor_environment(1)
        floor = Floor(stack, folder / "copy-floor", environment)
        self._pieces = file.stat().st_size // CHUNK
        floor.run("put", file, self._pieces)
        command = [str(HERE / "bench_floor.py"), "copier", floor.ports[1], str(folder)]
        self._process = stack.enter_context(process(*command, env={**os.environ, **environment}))

    def run(self) -> float:
        """Copy once; return the speed in MB/s."""
        self._process.stdin.write(f"{self._pieces}\n")
        self._process.stdin.flush()
        return self._pieces * PIECE / MB / float(self._process.stdout.readline())


def growing_and_shrinking(table: "Table", folder: Path, file: Path, rounds: int) -> None:
    """Have a pool join six; then drain it, and have it join again empty, over and over.

    Plain copies take turns with that.
    """
    from bench import Cluster

    last = f"pool-{DRAIN_POOLS}"
    keys = (str(folder / "dev" / "keys" / "client-client.key"), "1")
    rates: dict[str, list[float]] = {"copy": [], "balance": [], "drain": []}
    cpu: dict[str, list[float]] = {"balance": [], "drain": []}
    with ExitStack() as stack:
        cluster = Cluster(stack, folder, DRAIN_POOLS - 1, "--secure", keys=keys)
        for number in range(FILES):
            named = folder / f"whole-{number}"
            named.symlink_to(file)
            cluster.run("put", paths=[str(named)])
    with ExitStack() as stack:
        copier = Copier(stack, folder, file)
        cluster = Cluster(stack, folder, DRAIN_POOLS, "--secure", keys=keys)

        def measure(what: str, operation: Callable[[], float]) -> None:
            """Do it after a copy; what was moved is what the pool has before or after.

            Not before all pools have dropped what was moved away, or they would have it still.
            """
            wait_until_dropped(cluster, FILES * file.stat().st_size * 6 // 4)
            moving = FILES * file.stat().st_size * 6 // 4 // DRAIN_POOLS
            touch_memory(folder, moving)
            rates["copy"].append(copier.run())
            touch_memory(folder, moving)
            held, used = held_by(cluster, last), sum(cluster.cpu().values())
            seconds = operation()
            moved = max(held, held_by(cluster, last))
            rates[what].append(moved / MB / seconds)
            cpu[what].append((sum(cluster.cpu().values()) - used) * 1000 / (moved / MB))

        def balance() -> float:
            began = time.monotonic()
            cluster.run("undo_drain", pool=last)
            cluster.run("wait_for_balance", pool=last)
            return time.monotonic() - began

        cluster.run("wait_for_balance", pool=last)
        for _ in range(rounds):
            measure("drain", lambda: cluster.run("drain", pool=last))
            measure("balance", balance)
    floor = median(rates["copy"])
    table.add(f"balancing after a pool joined {DRAIN_POOLS - 1}", median(rates["balance"]), "MB/s", floor)
    table.add(f"draining 1 of {DRAIN_POOLS} pools", median(rates["drain"]), "MB/s", floor)
    table.add("balancing: CPU of all", median(cpu["balance"]), "s/GB")
    table.add("draining: CPU of all", median(cpu["drain"]), "s/GB")


def held_by(cluster: "Cluster", name: str) -> int:
    """Return the bytes of the large shards of a pool."""
    entry = next(entry for entry in cluster.processes if entry["name"] == name)
    return sum(file.stat().st_size for file in (Path(entry["data"]) / "large").glob("*/*"))


def touch_memory(folder: Path, size: int) -> None:
    """Have the kernel use so much memory and free it.

    What has been free for seconds goes back from a virtual machine to its host, and its next touch is slow:
    then it would be the host that is measured.
    """
    path = folder / "touched"
    block = bytes(MIB)
    with path.open("wb") as target:
        for _ in range(size // MIB):
            target.write(block)
    path.unlink()


def wait_until_dropped(cluster: "Cluster", stored: int) -> None:
    """Wait until the pools hold each shard once."""
    deadline = time.monotonic() + 60
    while sum(held_by(cluster, f"pool-{number + 1}") for number in range(DRAIN_POOLS)) > stored + MIB:
        if time.monotonic() > deadline:
            raise SystemExit("shards that were moved have not left the disks within a minute")
        time.sleep(0.1)


def run(folder: Path, size: int, rounds: int) -> "Table":
    """Measure everything about encrypted links; `size` in MiB."""
    from bench import Table, make_file

    table = Table()
    file = folder / "whole"
    make_file(file, size * MIB)
    for part in (transfers, growing_and_shrinking):
        place = folder / part.__name__
        place.mkdir()
        part(table, place, file, rounds)
        shutil.rmtree(place)
    return table
