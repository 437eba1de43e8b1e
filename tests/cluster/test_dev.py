"""`droppexd dev` as real processes: it starts, tells, stops, and leaves nobody behind."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import trio

from droppexd.wire.messages import GetStatus
from droppexd.wire.rpc import Terms, open_connections
from droppexd.wire.zeromq import open_zeromq_transport

PATIENCE_S = 90.0
"""Only a bound: a machine that is busy with other tests is slow."""


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def is_running(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


class Dev:
    """A dev cluster under test."""

    def __init__(self, folder, pools):
        self.folder = folder
        self.output = folder.with_suffix(".out")
        (folder / "dev.json").unlink(missing_ok=True)
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "droppexd", "dev", "--pools", str(pools), "--data", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        wait_until(self._answers, "the cluster never answered")
        self.processes = json.loads((folder / "dev.json").read_text())["processes"]
        self.pids = [process["pid"] for process in self.processes]

    def _answers(self):
        assert self.process.poll() is None, self.output.read_text()
        return (self.folder / "dev.json").exists()

    def process_of(self, name):
        return next(process for process in self.processes if process["name"] == name)

    def status(self):
        async def ask():
            async with (
                open_zeromq_transport() as transport,
                open_connections(transport, terms=Terms()) as connections,
            ):
                reply, _ = await connections.call(
                    self.process_of("app")["address"], GetStatus(), timeout_s=PATIENCE_S
                )
                return reply.status

        return trio.run(ask)

    def end(self):
        """End everything, whatever the test has left."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.pids:
            wait_until(lambda pid=pid: not is_running(pid), "a child outlives its parent")


@pytest.fixture
def dev(tmp_path):
    clusters = []

    def start(pools=2, folder=tmp_path / "dev"):
        clusters.append(Dev(folder, pools))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.end()


def test_a_cluster_tells_who_is_who_and_stops_when_told(dev):
    cluster = dev()
    roles = [(process["role"], process["name"]) for process in cluster.processes]
    assert roles == [("controller", "controller"), ("app", "app"), ("pool", "pool-1"), ("pool", "pool-2")]
    assert all(set(process) == {"role", "name", "pid", "address", "data"} for process in cluster.processes)
    assert all(map(is_running, cluster.pids))
    client = tomllib.loads((cluster.folder / "client.toml").read_text())
    assert client == {"app": cluster.process_of("app")["address"]}
    said = cluster.output.read_text()
    assert all(process["address"] in said and str(process["pid"]) in said for process in cluster.processes)
    assert [(pool.name, pool.state) for pool in cluster.status().pools] == [
        (pool.name, "up") for pool in cluster.status().pools
    ]

    cluster.process.terminate()
    assert cluster.process.wait(PATIENCE_S) == 0
    assert not any(map(is_running, cluster.pids))


def test_the_same_folder_again_goes_on_with_the_same_cluster(dev):
    cluster = dev()
    before = cluster.status()
    cluster.process.send_signal(signal.SIGINT)
    cluster.process.wait(PATIENCE_S)
    after = dev().status()
    assert after.cluster_id == before.cluster_id
    assert {(pool.number, pool.pool_id) for pool in after.pools} == {
        (pool.number, pool.pool_id) for pool in before.pools
    }


def test_no_child_outlives_a_cluster_that_is_killed_not_even_one_that_is_stopped(dev):
    cluster = dev()
    os.kill(cluster.process_of("pool-1")["pid"], signal.SIGSTOP)
    cluster.process.kill()
    cluster.process.wait()
    for pid in cluster.pids:
        wait_until(lambda pid=pid: not is_running(pid), "a child outlives its parent")


def test_a_dead_and_a_stopped_process_do_not_keep_the_cluster_from_stopping(dev):
    cluster = dev()
    victim = cluster.process_of("pool-1")["pid"]
    os.kill(victim, signal.SIGKILL)
    line = f"pool-1 (pid {victim}) has ended: killed by SIGKILL"
    wait_until(lambda: line in cluster.output.read_text(), "nothing was said of the dead pool")
    others = [pid for pid in cluster.pids if pid != victim]
    assert all(map(is_running, others))

    os.kill(cluster.process_of("pool-2")["pid"], signal.SIGSTOP)
    cluster.process.terminate()
    assert cluster.process.wait(PATIENCE_S) == 0
    assert not any(map(is_running, cluster.pids))


def test_a_second_cluster_in_the_same_folder_is_refused(dev):
    cluster = dev(pools=1)
    second = subprocess.run(
        [sys.executable, "-m", "droppexd", "dev", "--data", str(cluster.folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 1
    assert "running in" in second.stderr
    assert "Traceback" not in second.stderr
    assert (cluster.folder / "dev.json").exists()


def test_a_cluster_that_cannot_start_says_why_and_leaves_nobody_behind(tmp_path):
    folder = tmp_path / "dev"
    (folder / "pool-1").mkdir(parents=True)
    (folder / "pool-1" / "letter.txt").write_text("dear")
    done = subprocess.run(
        [sys.executable, "-m", "droppexd", "dev", "--pools", "1", "--data", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pool-1 did not start" in done.stderr
    assert "not empty" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "dev.json").exists()
