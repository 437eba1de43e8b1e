"""The part of the benchmark about encrypted links: transfers, draining a pool, and balancing.

Run by `bench.py --secure`. The floor has the same processes over CURVE sockets with as many threads of
libzmq. That of draining and balancing is a plain copy: one process that asks a pool of the floor for pieces
and writes them to a file, which it flushes in the end.
"""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import zmq
from bench_processes import MB, process

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

    def take_turns(self, file: Path) -> None:
        """Measure both once."""
        chunks = file.stat().st_size // CHUNK
        for name, measure in (
            ("floor put", lambda: self.floor.run("put", file, chunks)),
            ("put", lambda: self.cluster.run("put", paths=[str(file)])),
            ("floor get", lambda: self.floor.run("get", self.out / "floor", chunks)),
            ("get", lambda: self.cluster.run("get", paths=[str(self.out / file.name)])),
        ):
            self.seconds.setdefault(name, []).append(measure())
        self.floor.run("drop")
        self.cluster.run("remove", paths=[str(file)])
        self.cluster.wait_until_dropped(self._empty)

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


def plain_copy(folder: Path, file: Path, rounds: int) -> float:
    """Return the speed of a plain copy of what one pool has, in MB/s."""
    from bench import Floor

    environment = floor_environment(1)
    with ExitStack() as stack:
        floor = Floor(stack, folder / "copy-floor", environment)
        floor.run("put", file, file.stat().st_size // CHUNK)
        command = [str(HERE / "bench_floor.py"), "copier", floor.ports[1], str(folder)]
        copier = stack.enter_context(process(*command, env={**os.environ, **environment}))
        pieces = file.stat().st_size // CHUNK
        seconds = []
        for _ in range(rounds):
            copier.stdin.write(f"{pieces}\n")
            copier.stdin.flush()
            seconds.append(float(copier.stdout.readline()))
    return pieces * PIECE / MB / median(seconds)


def growing_and_shrinking(table: "Table", folder: Path, file: Path, rounds: int) -> None:
    """Drain one of seven pools, and have another join six."""
    from bench import Cluster

    floor = plain_copy(folder, file, rounds)
    place = folder / "drain"
    place.mkdir()
    keys = (str(place / "dev" / "keys" / "client-client.key"), "1")
    with ExitStack() as stack:
        cluster = Cluster(stack, place, DRAIN_POOLS - 1, "--secure", keys=keys)
        for number in range(FILES):
            named = folder / f"whole-{number}"
            named.symlink_to(file)
            cluster.run("put", paths=[str(named)])
    with ExitStack() as stack:
        cluster = Cluster(stack, place, DRAIN_POOLS, "--secure", keys=keys)
        began = time.monotonic()
        cluster.run("wait_for_balance", pool=f"pool-{DRAIN_POOLS}")
        seconds = time.monotonic() - began
        moved = held_by(cluster, f"pool-{DRAIN_POOLS}")
        table.add(f"balancing after a pool joined {DRAIN_POOLS - 1}", moved / MB / seconds, "MB/s", floor)
        held = held_by(cluster, "pool-1")
        seconds = cluster.run("drain", pool="pool-1")
        table.add(f"draining 1 of {DRAIN_POOLS} pools", held / MB / seconds, "MB/s", floor)


def held_by(cluster: "Cluster", name: str) -> int:
    """Return the bytes of the large shards of a pool."""
    entry = next(entry for entry in cluster.processes if entry["name"] == name)
    return sum(file.stat().st_size for file in (Path(entry["data"]) / "large").glob("*/*"))


def run(folder: Path, size: int, rounds: int) -> "Table":
    """Measure everything about encrypted links; `size` in MiB."""
    from bench import Table, make_file

    table = Table()
    file = folder / "whole"
    make_file(file, size * MIB)
    transfers(table, folder, file, rounds)
    growing_and_shrinking(table, folder, file, rounds)
    return table
