"""Recordings of real processes, made under strace."""

import subprocess
import sys
from pathlib import Path

import pytest
from powerloss.load import record_run
from powerloss.recording import record
from powerloss.strace import ended, read_trace, strace_command, why_not_traceable

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def traceable(tmp_path_factory):
    """Skip, and say why, where processes cannot be traced."""
    reason = why_not_traceable(tmp_path_factory.mktemp("probe"))
    if reason:
        pytest.skip(f"no power is cut: {reason}")


@pytest.fixture
def record_scripts(traceable, tmp_path, wait_until):
    """Run one script after another under strace; return what they asked of the disk below a folder.

    `lying` is what lies in the folder already.
    """

    def run(folder, name, *scripts, lying=None):
        runs = []
        for number, script in enumerate(scripts):
            output = tmp_path / f"{number}.strace"
            command = [*strace_command(output), sys.executable, *map(str, script)]
            subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True)
            wait_until(lambda output=output: ended(output), f"{output} does not end")
            runs.append(read_trace(output))
        return record({name: runs}, folder, lambda _: tmp_path / "notes", lying)

    return run


@pytest.fixture(scope="module")
def recorded_run(traceable, new_cluster, content, wait_until, tmp_path_factory):
    """A short mixed load on a real cluster: its recording, the load, and the folder it left."""

    def cluster_with(prepare):
        # strace stops the processes again and again: none is down for being slow.
        controller = {"heartbeat": "300ms", "down_after": "30s", "delete_grace": "300ms"}
        return new_cluster(pools=2, controller=controller, prepare=prepare)

    return record_run(cluster_with, content, wait_until, tmp_path_factory.mktemp("traces"))
