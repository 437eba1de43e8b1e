"""Clusters of real processes, started role by role from one droppex.toml, as an operator starts them."""

import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from droppexd.client import open_client
from droppexd.daemon import system_runtime
from droppexd.errors import DroppexError
from droppexd.model import PoolState
from droppexd.wire.keys import load_keys
from droppexd.wire.zeromq import open_zeromq_transport
from tests.cluster.clocks import Clocks

ROOT = Path(__file__).parents[2]
ANY_PORT = "tcp://127.0.0.1:0"
DROPPEXD = (sys.executable, "-m", "droppexd")
DROPPEX = (sys.executable, "-m", "droppexd.cli.client")

PATIENCE_S = 150.0
"""Only a bound: a machine that is busy with other tests is slow."""


def pytest_collection_modifyitems(config, items):
    """Leave out what takes many minutes, unless it is asked for by its mark."""
    if "full_size" not in config.getoption("-m"):
        left_out = [item for item in items if item.get_closest_marker("full_size")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def clean_environment(home):
    """Return this environment without a user's own settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DROPPEX", "XDG_"))}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT)}


def wait_for(condition, what, patience_s=PATIENCE_S):
    """Return what `condition` returns once that is true; `what` is not so, or a function that tells."""
    deadline = time.monotonic() + patience_s
    while not (result := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.05)
    return result


def seeded_bytes(size, seed=1):
    return random.Random(seed).randbytes(size)


def run_droppex(folder, *arguments, code, command=DROPPEX):
    """Run `droppex`, or another command, as a user types it; check its exit code (None: any) and that it showed no traceback."""
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=clean_environment(folder),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert code in (None, done.returncode), (arguments, done.returncode, done.stdout, done.stderr)
    return done


class Process:
    """One `droppexd --role ...`, which can be ended and started again at the same address."""

    def __init__(self, folder, name, roles, options, command=DROPPEXD):
        self.folder = folder
        self.config = folder / "droppex.toml"
        self.command = command
        self.name = name
        self.roles = roles
        self.options = options
        self.log = folder / f"{name}.log"
        self.data = folder / name
        self.addresses = {}
        self._process = None
        self._reports = None

    @property
    def address(self):
        (address,) = self.addresses.values()
        return address

    @property
    def pid(self):
        return self._process.pid

    @property
    def running(self):
        return self._process is not None and self._process.poll() is None

    def spawn(self):
        """Start the process; `wait_until_ready` must follow."""
        reader, writer = os.pipe()
        command = [*self.command, "--config", str(self.config), *self.arguments()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--report-fd", str(writer), "--die-with-parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(self.folder),
                pass_fds=[writer],
            )
        os.close(writer)
        self._reports = reader

    def arguments(self):
        """Return what the process is told besides the name of its configuration."""
        listen = [
            part for role in self.roles for part in (f"--{role}-listen", self.addresses.get(role, ANY_PORT))
        ]
        roles = [part for role in self.roles for part in ("--role", role)]
        return [*roles, "--name", self.name, "--data", str(self.data), *listen, *self.options]

    def wait_until_ready(self):
        reports = b""
        with os.fdopen(self._reports, "rb", buffering=0) as pipe:
            while reports.count(b"\n") < len(self.roles):
                assert select.select([pipe], [], [], PATIENCE_S)[0], f"{self.name} does not get ready"
                part = pipe.read(4096)
                assert part, f"{self.name} did not start:\n{self.log.read_text()}"
                reports += part
        for line in reports.splitlines():
            ready = json.loads(line)
            self.addresses[ready["role"]] = ready["address"]

    def start(self):
        self.spawn()
        self.wait_until_ready()

    def kill(self):
        self._process.kill()
        self._process.wait()

    def terminate(self):
        """Send SIGTERM and return the exit code."""
        self._process.terminate()
        return self._process.wait(PATIENCE_S)

    def wait(self):
        """Return the exit code of a process that ends by itself."""
        return self._process.wait(PATIENCE_S)

    def restart(self):
        self.kill()
        self.start()

    def stop(self):
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self._process.send_signal(signal.SIGCONT)

    def memory_mib(self, figure="VmRSS"):
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{figure}:"):
                return int(line.split()[1]) // 1024
        pytest.fail(f"{self.name} tells no {figure}")

    def unfinished(self):
        """Return the shards that are on their way into this pool."""
        return list((self.data / "incoming").iterdir())

    def shard_file(self, extent, index):
        """Return the file of a large shard of this pool."""
        session, counter = (int(part, 16) for part in str(extent).split("-"))
        (file,) = (self.data / "large").glob(f"*/{session:012x}{counter:012x}-{index:02x}")
        return file


class Cluster:
    """A controller or several, pools and an app, each a process of its own."""

    def __init__(self, folder, pools, settings, keys, controllers=1):
        self.folder = folder
        self.keys = keys
        self._settings = settings
        self.controller = self._process("controller", "controller")
        others = [self._process(f"controller-{n}", "controller") for n in range(2, controllers + 1)]
        self.controller_processes = [self.controller, *others]
        self.app = self._process("app", "app")
        self.more_apps = []
        self.pools = [self._process(f"pool-{number}", "pool") for number in range(1, pools + 1)]

    @property
    def processes(self):
        return [*self.controller_processes, *self.pools, self.app, *self.more_apps]

    def _process(self, name, role):
        options = ["--key", str(self.key(f"{role}-{name}"))] if self.keys else []
        return Process(self.folder, name, [role], options)

    def key(self, member):
        return self.keys / f"{member}.key"

    def pool(self, name):
        return next(pool for pool in self.pools if pool.name == name)

    def write_config(self):
        """Write droppex.toml, and client.toml once the app has an address."""
        sections = {section: dict(keys) for section, keys in self._settings.items()}
        top = {}
        if self.controller.addresses:
            known = [one.address for one in self.controller_processes if one.addresses]
            top["controllers"] = known
        if self.keys:
            files = {"cluster": str(self.keys / "cluster.key"), "members": str(self.keys / "members.toml")}
            sections["keys"] = files
        lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
        for section, keys in sections.items():
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        (self.folder / "droppex.toml").write_text("\n".join(lines))
        client = [f"app = {json.dumps(self.app.address)}"] if self.app.addresses else []
        client += [f"key = {json.dumps(str(self.key('client-person')))}"] if self.keys else []
        (self.folder / "client.toml").write_text("\n".join(client))

    def start(self):
        self.write_config()
        for controller in self.controller_processes:
            if controller is not self.controller and "endpoints" not in self._settings.get("catalog", {}):
                controller.options += ["--master", self.controller.address]
            controller.start()
        self.write_config()
        for pool in self.pools:
            pool.spawn()
        for pool in self.pools:
            pool.wait_until_ready()
        self.app.start()
        self.write_config()

    def join_controller(self, name, address):
        """Start one more controller, which knows the address of another and nothing else."""
        joining = self.folder / f"{name}-alone"
        joining.mkdir()
        (joining / "droppex.toml").touch()
        process = Process(joining, name, ["controller"], ["--master", address])
        self.controller_processes.append(process)
        process.start()
        return process

    def add_app(self, name):
        """Start one more app."""
        app = self._process(name, "app")
        self.more_apps.append(app)
        app.start()
        return app

    def end(self):
        for process in self.processes:
            if process.running:
                process.kill()

    def check_logs(self):
        """No role has met a bug."""
        for process in self.processes:
            said = process.log.read_text() if process.log.exists() else ""
            assert "Traceback" not in said, said
            assert "level=critical" not in said, said

    # -- as a client ---------------------------------------------------------------------------

    def run(self, scenario, key="client-person"):
        """Run an async function with a client of the app."""

        async def main():
            keys = load_keys(self.key(key)) if self.keys else None
            with trio.fail_after(2 * PATIENCE_S):
                async with (
                    open_zeromq_transport(keys=keys) as transport,
                    open_client(self.app.addresses["app"], transport, system_runtime()) as client,
                ):
                    return await scenario(client)

        return trio.run(main)

    def put(self, name, data, **options):
        async def put(client):
            return await client.put_file(name, io.BytesIO(data), size=len(data), **options)

        return self.run(put)

    def get(self, name, start=0, length=None):
        return self.run(lambda client: client.get_bytes(name, start=start, length=length))

    def remove(self, name):
        return self.run(lambda client: client.remove(name))

    def promote(self, process, **options):
        return self.run(lambda client: client.promote(process.address, **options))

    def controllers(self):
        return self.run(lambda client: client.controllers())

    def describe(self, name):
        return self.run(lambda client: client.describe(name))

    def status(self):
        return self.run(lambda client: client.status()).status

    def names(self):
        async def names(client):
            return [entry.name async for entry in client.list(recursive=True)]

        return self.run(names)

    def survives(self, name):
        """Return how many more pools this file may lose, as the receipt said."""
        return self.describe(name).survives_pools

    def holders(self, name):
        """Return the processes that hold the shards of a file's first extent, by shard index."""
        (extent, *_) = self.describe(name).extents
        return [self.pool(shard.name) for shard in extent.shards]

    def shard_files(self, name):
        """Return the files of the large shards of a file's first extent, by shard index."""
        (extent, *_) = self.describe(name).extents
        return [self.pool(shard.name).shard_file(extent.id, shard.index) for shard in extent.shards]

    def wait_until_up(self):
        """Wait until the controller has heard of every pool that runs."""
        running = {pool.name for pool in self.pools if pool.running}

        def all_up():
            try:
                pools = self.status().pools
            except DroppexError:
                return False
            return running == {pool.name for pool in pools if pool.state == PoolState.UP}

        wait_for(all_up, f"not exactly {sorted(running)} are up")

    def droppex(self, *arguments, code=0):
        """Run a command of `droppex` in the folder of the cluster."""
        return run_droppex(self.folder, "--config", str(self.folder / "client.toml"), *arguments, code=code)

    def start_droppex(self, *arguments):
        """Start a command whose standard input is ours."""
        return subprocess.Popen(
            [*DROPPEX, "--config", str(self.folder / "client.toml"), *arguments],
            env=clean_environment(self.folder),
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@contextmanager
def running_cluster(folder, pools, settings, keys, prepare=None, controllers=1):
    cluster = Cluster(folder, pools, settings, keys, controllers)
    if prepare is not None:
        prepare(cluster)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()
    cluster.check_logs()


@pytest.fixture
def clocks(tmp_path):
    """Wall clocks that are shifted, for processes that are to have one."""
    clocks = Clocks(tmp_path / "clocks")
    yield clocks
    clocks.clean_up()


@pytest.fixture(scope="session")
def new_cluster(tmp_path_factory):
    """Make a cluster for a `with` block; `prepare` sees it before any of its processes is started."""

    def make(*, pools, keys=None, folder=None, prepare=None, controllers=1, **settings):
        settings.setdefault("pool", {}).setdefault("reserve", "16 MiB")
        folder = folder or tmp_path_factory.mktemp("cluster")
        return running_cluster(folder, pools, settings, keys, prepare, controllers)

    return make


@pytest.fixture
def droppexd(tmp_path):
    """Run `droppexd` to its end and return what it did (code None: any); it must fail without a traceback."""

    def run(*arguments, code):
        return run_droppex(tmp_path, *arguments, code=code, command=DROPPEXD)

    return run


@pytest.fixture
def new_process(tmp_path):
    """Make a process with several roles; all are killed in the end."""
    made = []

    def make(name, roles, *options):
        (tmp_path / "droppex.toml").touch()
        made.append(Process(tmp_path, name, roles, options))
        return made[-1]

    yield make
    for process in made:
        if process.running:
            process.kill()


@pytest.fixture
def no_leftovers(tmp_path_factory):
    """Delete the shards of clusters that have ended: some tests store gigabytes."""
    yield
    for shards in tmp_path_factory.getbasetemp().glob("cluster*/pool-*/large"):
        shutil.rmtree(shards, ignore_errors=True)


@pytest.fixture(scope="session")
def wait_until():
    return wait_for


@pytest.fixture(scope="session")
def content():
    """Return bytes that look like no others."""
    return seeded_bytes


@pytest.fixture
def droppex_command(tmp_path):
    """Run `droppex` in a folder of its own."""

    def run(*arguments, code=0):
        return run_droppex(tmp_path, *arguments, code=code)

    return run
