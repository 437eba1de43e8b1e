"""`scripts/simulate`, as far as it is more than the simulator."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
CHILDREN_ARE_LISTED = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists()
PATIENCE_S = 60.0


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def is_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def eventually(what) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not CHILDREN_ARE_LISTED, reason="the system does not list children")
def test_workers_end_with_the_process_that_started_them():
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    command = [sys.executable, str(TOP / "scripts" / "simulate.py"), "--jobs", "2", "--seeds", "100000"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        assert run.stderr is not None
        try:
            run.stderr.readline()  # How far it has come: the workers have begun.
            workers = {pid for pid in children(run.pid) if is_worker(pid)}
            assert len(workers) == 2
        finally:
            run.send_signal(signal.SIGKILL)
        eventually(lambda: not any(map(is_worker, workers)))
