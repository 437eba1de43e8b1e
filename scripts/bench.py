"""The benchmark: a dev cluster of its own and, beside it in the same run, the floor over bare ZeroMQ.

Each figure is the median of several rounds, and floor and figure take turns within a round, so that the
machine's mood strikes both. Nothing here fails for being slow: it prints what it measured.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import bench_catalog
import bench_reconcile
import bench_repair
import bench_secure
from bench_processes import MB, process, reset_peak, usage_of

HERE = Path(__file__).resolve().parent
MIB = 1024 * 1024
CHUNK = 4 * MIB
POOLS = 6


class Row(NamedTuple):
    """One line of the table."""

    name: str
    value: float
    unit: str
    floor: float | None


class Table:
    """The rows so far; each is printed when it is known."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, name: str, value: float, unit: str, floor: float | None = None) -> None:
        """Take and print a row."""
        self.rows.append(Row(name, value, unit, floor))
        beside = "" if floor is None else f"{floor:12,.1f}{100 * value / floor:7.0f}%"
        print(f"{name:<44}{value:12,.1f} {unit:<8}{beside}", flush=True)

    def write(self, path: str) -> None:
        """Write all rows as JSON."""
        Path(path).write_text(json.dumps({"rows": [row._asdict() for row in self.rows]}, indent=2) + "\n")


class Floor:
    """The process tree of bare ZeroMQ."""

    def __init__(self, stack: ExitStack, folder: Path, environment: dict[str, str] | None = None) -> None:
        script = str(HERE / "bench_floor.py")
        env = {**os.environ, **(environment or {})}
        self.ports = ports = []
        for arguments in (["controller"], *(["pool", str(folder / f"floor-{n}")] for n in range(POOLS))):
            if len(arguments) > 1:
                Path(arguments[1]).mkdir(parents=True)
            child = stack.enter_context(process(script, *arguments, env=env))
            ports.append(child.stdout.readline().strip())
        app = stack.enter_context(process(script, "app", *ports, env=env))
        self._client = stack.enter_context(process(script, "client", app.stdout.readline().strip(), env=env))

    def run(self, verb: str, path: Path | str = "-", count: int = 0, concurrency: int = 1) -> float:
        """Do one thing and return the seconds it took."""
        self._client.stdin.write(f"{verb} {path} {count} {concurrency}\n")
        self._client.stdin.flush()
        return float(self._client.stdout.readline())


class Client:
    """A process that uses the client library and does one thing after another."""

    def __init__(self, stack: ExitStack, address: str, *keys: str) -> None:
        self._process = stack.enter_context(process(str(HERE / "bench_client.py"), address, *keys))
        self.pid = self._process.pid

    def run(self, do: str, **arguments: Any) -> float:
        """Do one thing and return the seconds it took."""
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the client of the benchmark ended in {do!r}")
        return float(json.loads(answer)["seconds"])


class Cluster:
    """A dev cluster and one client process that uses the client library."""

    def __init__(
        self, stack: ExitStack, folder: Path, pools: int = POOLS, *options: str, keys: Sequence[str] = ()
    ) -> None:
        """Start it; `keys` are the client's key file and number of threads, where links are encrypted."""
        report = folder / "dev" / "dev.json"
        report.unlink(missing_ok=True)  # Of an earlier cluster in this folder.
        command = ["-m", "droppexd", "dev", "--pools", str(pools), "--data", str(folder / "dev")]
        self._dev = stack.enter_context(process(*command, "--delete-grace", "1s", *options))
        while not report.exists():
            if self._dev.poll() is not None:
                raise SystemExit("the dev cluster did not start")
            time.sleep(0.05)
        self.processes = json.loads(report.read_text())["processes"]
        self.app = next(entry for entry in self.processes if entry["role"] == "app")
        self._client = Client(stack, self.app["address"], *keys)
        self.client_pid = self._client.pid
        self.run = self._client.run

    def pids(self) -> dict[str, list[int]]:
        """Return the processes by role, the client among them."""
        found: dict[str, list[int]] = {"client": [self.client_pid]}
        for entry in self.processes:
            found.setdefault(entry["role"], []).append(entry["pid"])
        return found

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds so far by role."""
        return {role: sum(usage_of(pid)[0] for pid in pids) for role, pids in self.pids().items()}

    def wait_until_dropped(self, before: int) -> None:
        """Wait until deleted shards have left the disks, so that rounds do not add up."""
        deadline = time.monotonic() + 60
        while self.on_disk() > before + 64 * MIB:
            if time.monotonic() > deadline:
                raise SystemExit("deleted shards have not left the disks within a minute")
            time.sleep(0.1)

    def on_disk(self) -> int:
        """Return the bytes in the pools' folders."""
        total = 0
        for entry in self.processes:
            if entry["role"] == "pool":
                for folder, _, files in os.walk(entry["data"]):
                    for name in files:
                        with suppress(FileNotFoundError):  # It may be dropped between the two looks.
                            total += (Path(folder) / name).stat().st_size
        return total

    def shards(self) -> int:
        """Return how many shards all pools hold, by their own word."""
        told = self.droppex("--json", "pools")
        return sum(pool["shards"] for pool in told)

    def droppex(self, *arguments: str) -> Any:
        """Run a command and return its document."""
        command = [sys.executable, "-m", "droppexd.cli.client", "--app", self.app["address"], *arguments]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(out.stdout)

    def kill_data_pools(self, name: str, count: int) -> None:
        """Kill pools that hold data shards of a file."""
        shards = self.droppex("--json", "stat", name)["extents"][0]["shards"]
        names = [shard["name"] for shard in sorted(shards, key=lambda shard: shard["index"])][:count]
        for entry in self.processes:
            if entry["role"] == "pool" and entry["name"] in names:
                os.kill(entry["pid"], signal.SIGKILL)
        self.processes = [entry for entry in self.processes if entry["name"] not in names]


def make_file(path: Path, size: int) -> None:
    """Write a file of random bytes, without taking for ever."""
    block = os.urandom(MIB)
    with path.open("wb") as target:
        for number in range(size // MIB):
            target.write(number.to_bytes(8) + block[8:])


class Bench:
    """The measurements."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._table = Table()
        self._floor = Floor(stack, folder)
        self._cluster = Cluster(stack, folder)

    def run(self) -> Table:
        """Measure everything."""
        heading = f"{'':<44}{'median':>12} {'':<8}{'floor':>12}{'':>7}"
        print(f"{heading}\n{'-' * len(heading)}")
        self.codec()
        self.idle()
        self.large()
        self.scrub()
        self.small()
        self.scrub_small()
        self.names()
        self.memory()
        self.degraded()
        return self._table

    def rounds(self, *pairs: tuple[str, Callable[[], float]]) -> dict[str, float]:
        """Take turns with all of them, and return the median of each."""
        taken: dict[str, list[float]] = {name: [] for name, _ in pairs}
        for _ in range(self._options.rounds):
            for name, measure in pairs:
                taken[name].append(measure())
        return {name: median(values) for name, values in taken.items()}

    def codec(self) -> None:
        """Compare coding a chunk with bare ISA-L."""
        script = str(HERE / "bench_codec.py")
        with process(script) as child:
            for line in child.stdout:
                row = json.loads(line)
                self._table.add(row["name"], row["value"], row["unit"], row["floor"])

    def idle(self) -> None:
        """Memory of roles that have nothing to do."""
        for role in ("controller", "app", "pool"):
            pids = self._cluster.pids()[role]
            status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
            kib = [int(text.partition("VmRSS:")[2].split()[0]) for text in status]
            self._table.add(f"idle {role}: memory", max(kib) * 1024 / MB, "MB")

    def large(self) -> None:
        """Put and get 1 GiB, as one file and as four at once."""
        size = self._options.size * MIB
        whole = self._folder / "whole"
        make_file(whole, size)
        parts = [self._folder / f"part-{n}" for n in range(4)]
        for part in parts:
            make_file(part, size // 4)
        out = self._folder / "out"
        out.mkdir()
        cluster, floor = self._cluster, self._floor
        empty = cluster.on_disk()
        cpu: dict[str, dict[str, float]] = {}

        stored: list[Path] = []

        def clear() -> None:
            """Drop what the round before stored, right before the next needs the room.

            Memory that lies free for seconds goes back from a virtual machine to its host, and its next
            touch is slow; so files are also overwritten, and not removed.
            """
            if stored:
                cluster.run("remove", paths=[str(path) for path in stored])
                cluster.wait_until_dropped(empty)
                stored.clear()

        def measured(what: str, do: str, paths: list[Path]) -> Callable[[], float]:
            def measure() -> float:
                if do == "put":
                    clear()
                    stored.extend(paths)
                before = cluster.cpu()
                seconds = cluster.run(do, paths=[str(path) for path in paths])
                after = cluster.cpu()
                cpu[what] = {role: after[role] - before[role] for role in after}
                return seconds

            return measure

        def floor_put() -> float:
            floor.run("drop")
            return floor.run("put", whole, size // CHUNK)

        def floor_get() -> float:
            return floor.run("get", out / "floor", size // CHUNK)

        got = [out / part.name for part in parts]
        seconds = self.rounds(
            ("floor put", floor_put),
            ("put", measured("put", "put", [whole])),
            ("floor get", floor_get),
            ("get", measured("get", "get", [out / whole.name])),
            ("put 4", measured("put 4", "put", parts)),
            ("get 4", measured("get 4", "get", got)),
        )
        clear()
        floor.run("drop")
        rate = {name: size / MB / value for name, value in seconds.items()}
        label = f"{self._options.size} MiB"
        quarter = f"4 x {self._options.size // 4} MiB at once"
        self._table.add(f"put {label}", rate["put"], "MB/s", rate["floor put"])
        self._table.add(f"get {label}", rate["get"], "MB/s", rate["floor get"])
        self._table.add(f"put {quarter}", rate["put 4"], "MB/s", rate["floor put"])
        self._table.add(f"get {quarter}", rate["get 4"], "MB/s", rate["floor get"])
        for what in ("put", "get"):
            for role, value in cpu[what].items():
                self._table.add(f"{what} {label}: CPU of {role}", value, "s")
        self._healthy = rate["get"]

    def small(self) -> None:
        """Put and get many files of 4 KiB."""
        count = self._options.small
        for concurrency in (1, 16):
            seconds = self.rounds(
                ("floor put", lambda n=concurrency: self._floor.run("sput", "-", count, n)),
                (
                    "put",
                    lambda n=concurrency: self._cluster.run(
                        "put_small", count=count, size=4096, concurrency=n
                    ),
                ),
                ("floor get", lambda n=concurrency: self._floor.run("sget", "-", count, n)),
                ("get", lambda n=concurrency: self._cluster.run("get_small", count=count, concurrency=n)),
            )
            for verb in ("put", "get"):
                self._table.add(
                    f"{verb} {count} x 4 KiB, {concurrency} at once",
                    count / seconds[verb],
                    "files/s",
                    count / seconds[f"floor {verb}"],
                )

    def scrub(self) -> None:
        """Have all pools verify what they hold: a large file, from the page cache, and nothing else."""
        size = self._options.size * MIB
        self._cluster.run("put", paths=[str(self._folder / "whole")])
        seconds = self.rounds(("scrub", lambda: self._cluster.run("scrub")))
        shards = size * 6 // 4
        self._table.add(f"scrub of {POOLS} pools together", shards / MB / seconds["scrub"], "MB/s")
        self._cluster.run("remove", paths=[str(self._folder / "whole")])

    def scrub_small(self) -> None:
        """Have all pools verify small shards: those of the last small files, and of those before them."""
        held = self._cluster.shards()
        seconds = self.rounds(("scrub", lambda: self._cluster.run("scrub")))
        self._table.add("scrub of small shards", held / seconds["scrub"], "shards/s")

    def names(self) -> None:
        """List many names."""
        count = self._options.names
        self._cluster.run("make_names", count=count, concurrency=16)
        seconds = self.rounds(("ls", lambda: self._cluster.run("list_names", count=count)))
        self._table.add(f"ls of {count} names", seconds["ls"] * 1000, "ms")

    def degraded(self) -> None:
        """Get the large file with two pools dead that hold data shards of it."""
        size = self._options.size * MIB
        whole, out = self._folder / "whole", self._folder / "out" / "whole"
        self._cluster.run("put", paths=[str(whole)])
        self._cluster.kill_data_pools("bench/whole", 2)
        seconds = self.rounds(("get", lambda: self._cluster.run("get", paths=[str(out)])))
        rate = size / MB / seconds["get"]
        self._table.add(
            f"get {self._options.size} MiB, 2 of {POOLS} pools dead (floor: healthy)",
            rate,
            "MB/s",
            self._healthy,
        )

    def memory(self) -> None:
        """Peak memory with eight transfers at once, and of everything before."""
        parts = []
        for number in range(8):
            part = self._folder / f"eighth-{number}"
            make_file(part, self._options.size * MIB // 8)
            parts.append(str(part))
        reset_peak(self._cluster.app["pid"])
        self._cluster.run("put", paths=parts)
        outs = [str(self._folder / "out" / Path(part).name) for part in parts]
        self._cluster.run("get", paths=outs)
        self._table.add(
            "8 transfers at once: peak memory of app", usage_of(self._cluster.app["pid"])[1], "MB"
        )
        for role, pids in self._cluster.pids().items():
            if role != "app":
                self._table.add(f"peak memory of {role}", max(usage_of(pid)[1] for pid in pids), "MB")


class RepairBench:
    """The measurements of repair: each loss is that of a cluster of its own."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._table = Table()

    def run(self) -> Table:
        """Measure everything."""
        files = [self._folder / f"part-{number}" for number in range(4)]
        for file in files:
            make_file(file, self._options.size * MIB)
        put_rate, get_rate = self._floor(files[0])
        with self._cluster("large") as (cluster, watcher):
            bench_repair.repair_large(self._table, cluster, watcher, files, put_rate, get_rate)
        for verb in ("put", "get"):
            with self._cluster(verb) as (cluster, watcher):
                cluster.run("put", paths=[str(path) for path in files])
                out = self._folder / "out" / files[0].name
                bench_repair.repair_beside_clients(self._table, cluster, watcher, files[0], verb, out)
        with self._cluster("small") as (cluster, watcher):
            bench_repair.repair_small(self._table, cluster, watcher, self._options.repair_small)
        return self.run_reconcile()

    def run_reconcile(self) -> Table:
        """Measure the comparison of what a pool holds with the records, and nothing else."""
        folder = self._folder / "reconcile"
        folder.mkdir()
        with ExitStack() as stack:
            Cluster(stack, folder, bench_reconcile.POOLS)
        held = bench_reconcile.fill(folder / "dev", self._options.shards)
        with ExitStack() as stack:
            cluster = Cluster(stack, folder, bench_reconcile.POOLS)
            bench_reconcile.measure(self._table, stack, cluster, folder / "dev", held)
        return self._table

    @contextmanager
    def _cluster(self, name: str) -> Iterator[tuple[Cluster, Client]]:
        folder = self._folder / name
        folder.mkdir()
        (self._folder / "out").mkdir(exist_ok=True)
        try:
            with ExitStack() as stack:
                cluster = Cluster(stack, folder, 7, "--replace-after", bench_repair.REPLACE_AFTER)
                yield cluster, Client(stack, cluster.app["address"])
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _floor(self, file: Path) -> tuple[float, float]:
        """Return the speeds of the bare processes in MB/s: put and get."""
        size = file.stat().st_size
        rates: dict[str, list[float]] = {"put": [], "get": []}
        with ExitStack() as stack:
            floor = Floor(stack, self._folder)
            for _ in range(self._options.rounds):
                floor.run("drop")
                rates["put"].append(size / MB / floor.run("put", file, size // CHUNK))
                rates["get"].append(size / MB / floor.run("get", self._folder / "floor", size // CHUNK))
            floor.run("drop")
        return median(rates["put"]), median(rates["get"])


def run_catalog(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Measure the catalogue."""
    needed = options.files * bench_catalog.DISK_BYTES
    if shutil.disk_usage(options.data).free < needed:
        parser.error(f"{options.data} has less than {needed // MIB} MiB free; choose another --data")
    table = Table()
    bench_catalog.run(options.data, options.files, table)
    if options.json:
        table.write(options.json)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Measure droppex against a floor of bare ZeroMQ.")
    memory = Path("/dev/shm")
    parser.add_argument(
        "--data",
        type=Path,
        default=memory if memory.is_dir() else Path(tempfile.gettempdir()),
        help="where the cluster, the floor and the files are put (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each figure (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="MiB of the large file (default: %(default)s)")
    parser.add_argument("--small", type=int, default=2000, help="small files (default: %(default)s)")
    parser.add_argument("--names", type=int, default=10_000, help="names to list (default: %(default)s)")
    parser.add_argument(
        "--secure",
        action="store_true",
        help="measure encrypted links, how many threads they want, draining and balancing, and nothing else",
    )
    parser.add_argument("--repair", action="store_true", help="measure repair, and nothing else")
    parser.add_argument(
        "--repair-small",
        type=int,
        default=20_000,
        metavar="N",
        help="small files for that (default: %(default)s)",
    )
    parser.add_argument(
        "--reconcile",
        action="store_true",
        help="measure only the comparison of what a pool holds with the records, which is part of --repair",
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=100_000,
        metavar="N",
        help="shards of a pool for that; 1000000 take some minutes to make (default: %(default)s)",
    )
    parser.add_argument("--catalog", action="store_true", help="measure the catalogue, and nothing else")
    parser.add_argument(
        "--files",
        type=int,
        default=1_000_000,
        metavar="N",
        help="files for that; 10000000 take half an hour to make (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.catalog:
        run_catalog(options, parser)
        return
    needed = 0 if options.reconcile else (14 if options.repair else 7) * options.size * MIB
    if options.repair or options.reconcile:
        needed = max(needed, options.shards * bench_reconcile.DISK_BYTES)
    if shutil.disk_usage(options.data).free < needed:
        parser.error(
            f"{options.data} has less than {needed // MIB} MiB free; choose another --data, or less to do"
        )
    folder = Path(tempfile.mkdtemp(prefix="droppex-bench-", dir=options.data))
    try:
        if options.secure:
            table = bench_secure.run(folder, options.size, options.rounds)
        elif options.reconcile:
            table = RepairBench(options, folder).run_reconcile()
        elif options.repair:
            table = RepairBench(options, folder).run()
        else:
            with ExitStack() as stack:
                table = Bench(options, stack, folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        table.write(options.json)


if __name__ == "__main__":
    main()
