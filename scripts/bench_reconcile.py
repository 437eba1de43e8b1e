"""The part of the benchmark about comparing: a pool comes back, and holds many small shards.

Run by `bench.py --repair` and, alone, `bench.py --reconcile`. The cluster is filled while it is stopped
(`bench_fill.py`): three pools, each file on two of them, so that the master walks half as many records again
as a pool has shards. Each start of a pool, and each of the controller, causes one comparison of everything;
when it ends is in the log of the pool. The floor is one process that reads the same rows of both databases
once, and does nothing with them.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_fill
from bench_processes import usage_of

if TYPE_CHECKING:
    from bench import Cluster, Table

HERE = Path(__file__).resolve().parent
POOLS, COPIES = 3, 2
POOL = "pool-1"
"""The one that is started again."""
DISK_BYTES = 2048
"""For each shard of a pool, the whole cluster."""
DEADLINE_S = 1800
COMPARED = 'msg="compared with the records"'
ANNOUNCED = "msg=announced"


def fill(dev: Path, shards: int) -> dict[str, int]:
    """Fill a stopped cluster so that each pool has about so many; return how many each has."""
    (dev / "dev.json").unlink()  # Who sees it takes the cluster for started.
    files = shards * POOLS // COPIES
    command = [sys.executable, str(HERE / "bench_fill.py"), str(dev), str(files)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    held: dict[str, int] = json.loads(told.stdout)
    return held


def check(cluster: "Cluster", files: int) -> None:
    """Have some of the files read and verified by `droppex`: they are what puts would have left."""
    for number in (0, 1, files // 3, files // 2, files - 1):
        name = bench_fill.name_of(number)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            cluster.droppex("--json", "get", name, str(out))
            if out.read_bytes() != bench_fill.content_of(number):
                raise SystemExit(f"{name} is not what it was filled with")
        cluster.droppex("--json", "verify", name)
    status = cluster.droppex("--json", "status")
    if status["repair"]["left"] or status["quarantined"] or status["files"] != files:
        raise SystemExit(f"the filled cluster is not whole: {status}")


class Log:
    """The log of a process of the cluster, from byte `start` on."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._from = start

    def at(self, text: str) -> float | None:
        """Return when a line with this text was last written, in seconds since 1970."""
        with self._path.open("rb") as file:
            file.seek(self._from)
            lines = [line for line in file.read().decode().splitlines() if text in line]
        if not lines:
            return None
        stamp = lines[-1].partition("time=")[2].partition(" ")[0]
        return datetime.fromisoformat(stamp).timestamp()


class Scene:
    """A filled dev cluster, of which single processes are started again."""

    def __init__(self, stack: ExitStack, cluster: "Cluster", dev: Path) -> None:
        self._stack = stack
        self._dev = dev
        self._entries = {entry["name"]: dict(entry) for entry in cluster.processes}
        self.pools = [name for name, entry in self._entries.items() if entry["role"] == "pool"]

    def log(self, name: str, *, whole: bool = False) -> Log:
        """Return a process's log from now on, or all of it."""
        path = self._dev / "logs" / f"{name}.log"
        return Log(path, 0 if whole else path.stat().st_size)

    def cpu(self, *names: str) -> float:
        """Return the processor seconds so far of some processes."""
        return sum(usage_of(self._entries[name]["pid"])[0] for name in names)

    def end(self, name: str) -> None:
        """End a process in order."""
        pid = self._entries[name]["pid"]
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists())

    def start(self, name: str) -> None:
        """Start a process again as the dev cluster did, at its old address.

        At another one, a pool would first wait until its last start has surely ended.
        """
        entry = self._entries[name]
        command = [sys.executable, "-m", "droppexd", "--role", entry["role"], "--name", name]
        command += ["--data", entry["data"], "--die-with-parent", str(os.getpid())]
        command += ["--listen", entry["address"]]
        if entry["role"] == "pool":
            command += ["--controller", self._entries["controller"]["address"], "--pool-reserve", "64 MiB"]
        with (self._dev / "logs" / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._stack.callback(end_child, child)
        entry["pid"] = child.pid


def end_child(child: "subprocess.Popen[bytes]") -> None:
    """End a process that was started again."""
    child.terminate()
    try:
        child.wait(15)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def wait_until(holds: Callable[[], Any]) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"this has not come about within {DEADLINE_S} s")
        time.sleep(0.02)


def pool_returns(table: "Table", scene: Scene, shards: int, floor_s: float) -> None:
    """Start one pool again and wait until it has compared."""
    scene.end(POOL)
    log = scene.log(POOL)
    controller = scene.cpu("controller")
    started = time.time()
    scene.start(POOL)
    wait_until(lambda: log.at(COMPARED))
    cpu = scene.cpu(POOL), scene.cpu("controller") - controller
    announced, compared = log.at(ANNOUNCED), log.at(COMPARED)
    label = f"reconcile of {shards} shards"
    table.add(label, shards / (compared - announced), "shards/s", shards / floor_s)
    table.add(f"{label}: from start of pool", compared - started, "s")
    table.add(f"{label}: CPU of pool", cpu[0], "s")
    table.add(f"{label}: CPU of controller", cpu[1], "s")


def controller_returns(table: "Table", scene: Scene, held: dict[str, int]) -> None:
    """Start the controller again and wait until all pools have compared."""
    scene.end("controller")
    logs = [scene.log(name) for name in scene.pools]
    pools = scene.cpu(*scene.pools)
    started = time.time()
    scene.start("controller")
    wait_until(lambda: all(log.at(COMPARED) for log in logs))
    cpu = scene.cpu(*scene.pools) - pools, scene.cpu("controller")
    seconds = max(log.at(COMPARED) for log in logs) - started
    label = f"the same by {len(held)} pools at once"
    table.add(f"{label}, from start of controller", seconds, "s")
    table.add(f"{label}: CPU of pools", cpu[0], "s")
    table.add(f"{label}: CPU of controller", cpu[1], "s")


_ROWS = (
    (Path(POOL) / "index.db", "SELECT key, generation FROM shard ORDER BY key"),
    (bench_fill.CATALOGUE, "SELECT key, value FROM kv WHERE key >= x'652f' AND key < x'6530' ORDER BY key"),
)
"""What a comparison reads: a pool's index, and the records of extents (from `e/` on)."""


def read_once(dev: Path) -> float:
    """Return the seconds that it takes to read what a comparison reads, and nothing else."""
    began = time.perf_counter()
    for path, query in _ROWS:
        with closing(sqlite3.connect(f"{(dev / path).resolve().as_uri()}?mode=ro", uri=True)) as database:
            for _ in database.execute(query):
                pass
    return time.perf_counter() - began


def measure(table: "Table", stack: ExitStack, cluster: "Cluster", dev: Path, held: dict[str, int]) -> None:
    """Measure both returns, of a filled cluster that has just started."""
    scene = Scene(stack, cluster, dev)
    logs = [scene.log(name, whole=True) for name in scene.pools]
    wait_until(lambda: all(log.at(COMPARED) for log in logs))
    check(cluster, sum(held.values()) // COPIES)
    floor_s = read_once(dev)
    pool_returns(table, scene, held[POOL], floor_s)
    controller_returns(table, scene, held)
