"""A cluster of real processes, and `droppex` as a user types it."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def clean_environment(home):
    """Return this environment without a user's own settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DROPPEX", "XDG_"))}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT)}


class Cluster:
    """A running `droppexd dev`."""

    def __init__(self, folder, processes):
        self.folder = folder
        self.processes = processes

    @property
    def client_file(self):
        return self.folder / "client.toml"

    def of_role(self, role):
        return [process for process in self.processes if process["role"] == role]

    @property
    def app(self):
        return self.of_role("app")[0]["address"]

    def kill_pools(self, names):
        for pool in self.of_role("pool"):
            if pool["name"] in names:
                os.kill(pool["pid"], signal.SIGKILL)


@contextmanager
def running_cluster(folder, *options):
    with subprocess.Popen(
        [sys.executable, "-m", "droppexd", "dev", "--data", str(folder), *options],
        env=clean_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if "The cluster answers" in line:
                    break
            else:
                pytest.fail("the dev cluster did not start:\n" + "".join(said))
            described = json.loads((folder / "dev.json").read_text())
            yield Cluster(folder, described["processes"])
        finally:
            process.terminate()
            process.stdout.read()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A cluster for all tests that change nothing but names of their own."""
    with running_cluster(tmp_path_factory.mktemp("cluster") / "data") as running:
        yield running


@pytest.fixture(scope="session")
def start_cluster(tmp_path_factory):
    """Start a cluster that a test may break."""

    def start(*options):
        return running_cluster(tmp_path_factory.mktemp("cluster") / "data", *options)

    return start


class Droppex:
    """Runs `droppex` in a folder of its own against one cluster."""

    def __init__(self, cluster, folder, home):
        self.folder = folder
        self._command = [
            sys.executable,
            "-W",
            "error",
            "-m",
            "droppexd.cli.client",
            "--config",
            str(cluster.client_file),
        ]
        self._environment = clean_environment(home)

    def __call__(self, *arguments, code=0, stdin=b""):
        """Run a command to its end, check its exit code (None: any) and that it showed no traceback."""
        with self.start(*arguments) as process:
            stdout, stderr = process.communicate(stdin, timeout=120)
        result = subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)
        assert b"Traceback" not in stderr, stderr.decode()
        assert code in (None, result.returncode), (arguments, result.returncode, stderr.decode())
        return result

    def json(self, *arguments, code=0):
        """Run a command with --json and return its document."""
        return json.loads(self(*arguments, "--json", code=code).stdout)

    def lines(self, *arguments, code=0):
        """Run a command and return its lines."""
        return self(*arguments, code=code).stdout.decode().splitlines()

    def start(self, *arguments, **streams):
        """Start a command."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(
            [*self._command, *map(os.fspath, arguments)],
            env=self._environment,
            cwd=self.folder,
            **{**pipes, **streams},
        )


@pytest.fixture
def new_droppex(tmp_path):
    """Make a `droppex` for a cluster."""

    def make(cluster):
        for name in ("work", "home"):
            (tmp_path / name).mkdir(exist_ok=True)
        return Droppex(cluster, tmp_path / "work", tmp_path / "home")

    return make


@pytest.fixture
def droppex(cluster, new_droppex):
    """`droppex` against the cluster of all tests."""
    return new_droppex(cluster)


@pytest.fixture
def folder(request):
    """A remote folder for one test alone."""
    return "".join(one if one.isalnum() else "-" for one in request.node.name)
