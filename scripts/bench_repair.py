"""The part of the benchmark about repair: what a cluster of seven pools does after it has lost one.

Run by `bench.py --repair`. The lost bytes are those of the dead pool's large shards. The floor of repair is
what the bare processes of the floor would take for as many: k reads of them and one write, at the speeds that
were measured in the same run.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from bench import Client, Cluster, Table

MIB = 1024 * 1024
MB = 1_000_000
K = 4
REPLACE_AFTER = "12s"
"""Until a dead pool is out; not counted."""


class Loss:
    """One pool that is killed, and what the others make of it. `watcher` is a client that only looks."""

    def __init__(self, cluster: "Cluster", watcher: "Client") -> None:
        self._cluster = cluster
        self._watcher = watcher
        self._entry = next(entry for entry in reversed(cluster.processes) if entry["role"] == "pool")
        large = Path(self._entry["data"]) / "large"
        files = [file for folder in large.iterdir() for file in folder.iterdir()]
        self.size = sum(file.stat().st_size for file in files)
        pools = {pool["name"]: pool for pool in cluster.droppex("--json", "pools")}
        self.shards = pools[self._entry["name"]]["shards"]

    def kill(self) -> None:
        """Kill the pool and return once the master counts its shards as missing."""
        os.kill(self._entry["pid"], signal.SIGKILL)
        self._cluster.processes.remove(self._entry)
        self._watcher.run("wait_for_losses")

    def wait(self) -> float:
        """Return the seconds until nothing is missing any more."""
        return self._watcher.run("wait_for_repair")


class Traffic:
    """A client that does one thing over and over in a thread of its own, and how often."""

    def __init__(self, work: Callable[[], float]) -> None:
        self._work = work
        self._over = threading.Event()
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._go_on)

    def _go_on(self) -> None:
        while not self._over.is_set():
            self.seconds.append(self._work())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def repair_large(
    table: "Table", cluster: "Cluster", watcher: "Client", files: list[Path], put_rate: float, get_rate: float
) -> None:
    """Lose a pool with large shards, with nobody else about; rates are those of the floor, in MB/s."""
    cluster.run("put", paths=[str(path) for path in files])
    loss = Loss(cluster, watcher)
    loss.kill()
    seconds = loss.wait()
    floor_s = K * loss.size / MB / get_rate + loss.size / MB / put_rate
    stored = sum(path.stat().st_size for path in files) // MIB
    table.add(
        f"repair 1 of 7 pools, {stored} MiB stored, alone",
        loss.size / MB / seconds,
        "MB/s",
        loss.size / MB / floor_s,
    )


def repair_beside_clients(
    table: "Table", cluster: "Cluster", watcher: "Client", file: Path, verb: str, out: Path
) -> None:
    """Lose a pool while a client puts or gets over and over; the floor is the client's speed without that."""
    path = str(file if verb == "put" else out)
    size = file.stat().st_size / MB
    work = lambda: cluster.run(verb, paths=[path])  # noqa: E731  A name would say no more.
    work()
    alone = [work() for _ in range(3)]
    loss = Loss(cluster, watcher)
    loss.kill()
    with Traffic(work) as traffic:
        seconds = loss.wait()
    meanwhile = sorted(traffic.seconds)[len(traffic.seconds) // 2]
    table.add(
        f"{verb} {file.stat().st_size // MIB} MiB during repair (floor: without)",
        size / meanwhile,
        "MB/s",
        size / sorted(alone)[1],
    )
    table.add(f"repair beside that {verb}", loss.size / MB / seconds, "MB/s")


def repair_small(table: "Table", cluster: "Cluster", watcher: "Client", count: int) -> None:
    """Lose a pool with shards of small files alone."""
    cluster.run("put_small", count=count, size=4096, concurrency=16)
    loss = Loss(cluster, watcher)
    loss.kill()
    seconds = loss.wait()
    table.add(f"repair of small shards, {loss.shards} lost", loss.shards / seconds, "shards/s")
