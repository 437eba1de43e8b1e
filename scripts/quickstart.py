"""The story of the quickstart, told with real processes: run by scripts/quickstart."""

import argparse
import contextlib
import filecmp
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POOLS = 6
KILLED = 2
DEFAULT_SIZE = 100_000_000
START_S = 90.0


class Failed(Exception):
    """Something went wrong: one line for the person who watches."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Host a file on six pools, lose two of them, get it back.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: 100 MB that it makes")
    parser.add_argument("--keep", action="store_true", help="leave the cluster running")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of the cluster")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        with contextlib.ExitStack() as stack:
            tell(options, stack)
    except Failed as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit("quickstart: interrupted")


def tell(options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="droppex-quickstart-")))
    if options.data is not None:
        folder = options.data.absolute()
    elif options.keep:
        folder = Path(tempfile.mkdtemp(prefix="droppex-kept-"))
    else:
        folder = scratch / "cluster"
    file = options.file or make_file(scratch)
    if not file.is_file():
        raise Failed(f"{file} is not a file")
    size = file.stat().st_size

    with step(f"start a cluster: controller, app, {POOLS} pools"):
        dev = start_cluster(folder, keep=options.keep)
        if not options.keep:
            stack.callback(stop_cluster, dev)
        wait_for_cluster(dev, folder)
    for process in processes(folder):
        print(f"     {process['name']:<11} pid {process['pid']:<7} {process['address']}")

    name = f"quickstart/{file.name}"
    with step(f"put {file} ({size / 1e6:.1f} MB)", size):
        (receipt,) = droppex(folder, "put", "--force", "--", str(file), name)
    print(f"     stored as {receipt['layout'] or 'nothing but a name'}, BLAKE3 {receipt['blake3']}")

    extents = droppex(folder, "stat", "--", name)["extents"]
    victims = show_shards(extents)
    with step(f"kill {' and '.join(victims) or 'no pool: an empty file has no shards'}"):
        kill(folder, victims)

    got = scratch / "got"
    with step("get the file back without them", size):
        fetched = droppex(folder, "get", "--", name, str(got))
    if not filecmp.cmp(file, got, shallow=False):
        raise Failed(f"{got} differs from {file}")
    print("     byte for byte the same")
    rebuilt = fetched["rebuilt_chunks"]
    if rebuilt:
        print(f"     chunks that had to be rebuilt from the shards that are left: {rebuilt}")
    elif extents:
        raise Failed("no chunk had to be rebuilt: the pools that were killed were not missed")

    if options.keep:
        print_how_to_go_on(dev, folder)
        return
    with step("stop the cluster"):
        stop_cluster(dev)


# -- steps -----------------------------------------------------------------------------------------

steps = 0


@contextlib.contextmanager
def step(text: str, size: int | None = None) -> Iterator[None]:
    """Say what happens, how long it took, and how fast it was."""
    global steps  # noqa: PLW0603
    steps += 1
    print(f"{steps}. {text} ...", flush=True)
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    speed = (
        f", {size / seconds / 1e6:.0f} MB/s, the start of the command included"
        if size and size >= 1_000_000
        else ""
    )
    print(f"     {seconds:.2f} s{speed}", flush=True)


def make_file(scratch: Path) -> Path:
    file = scratch / "hundred-megabytes"
    with file.open("wb") as out:
        for _ in range(DEFAULT_SIZE // 1_000_000):
            out.write(os.urandom(1_000_000))
    return file


def start_cluster(folder: Path, *, keep: bool) -> "subprocess.Popen[bytes]":
    """Start `droppexd dev`; it ends with us, unless it is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dev.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "droppexd", "dev", "--pools", str(POOLS), "--data", str(folder)]
    if not keep:
        command += ["--die-with-parent", str(os.getpid())]
    with (folder / "dev.log").open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def wait_for_cluster(dev: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while not (folder / "dev.json").exists():
        if dev.poll() is not None or time.monotonic() > deadline:
            said = (folder / "dev.log").read_text(errors="replace").strip().splitlines()
            stop_cluster(dev)
            raise Failed(f"the cluster did not start: {said[-1] if said else 'it said nothing'}")
        time.sleep(0.05)


def stop_cluster(dev: "subprocess.Popen[bytes]") -> None:
    if dev.poll() is None:
        dev.terminate()
        dev.wait()


def processes(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "dev.json").read_text())["processes"])


def droppex(folder: Path, *arguments: str) -> Any:
    """Run the client as a user would, and return the document that it prints."""
    command = [Path(sys.executable).with_name("droppex"), "--config", folder / "client.toml", "--json"]
    done = subprocess.run(
        [*command, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
    )
    if done.returncode != 0:
        raise Failed(f"`droppex {arguments[0]}` failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def show_shards(extents: list[dict[str, Any]]) -> list[str]:
    """Print where the shards are; return the pools that hold the most, data shards first."""
    held: Counter[str] = Counter()
    print("     where the shards are (D data, P parity):")
    for extent in extents:
        k = int(extent["layout"].partition("+")[0])
        places = []
        for shard in sorted(extent["shards"], key=lambda shard: shard["index"]):
            kind = "D" if shard["index"] < k else "P"
            places.append(f"{kind}{shard['index']} {shard['name'] or 'missing'}")
            if shard["name"]:
                held[shard["name"]] += 1000 if kind == "D" else 1
        print(f"       extent {extent['id']} ({extent['layout']}): {', '.join(places)}")
    return sorted(pool for pool, _ in held.most_common(KILLED))


def kill(folder: Path, names: list[str]) -> None:
    for process in processes(folder):
        if process["name"] in names:
            os.kill(process["pid"], signal.SIGKILL)


def print_how_to_go_on(dev: "subprocess.Popen[bytes]", folder: Path) -> None:
    client = Path(sys.executable).with_name("droppex")
    print(f"\nThe cluster goes on in {folder}. Use it:")
    print(f"  {client} --config {folder / 'client.toml'} status")
    print(f"Stop it:\n  kill {dev.pid}")


if __name__ == "__main__":
    main()
