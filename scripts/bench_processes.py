"""Processes of the benchmark: started, measured and ended."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MB = 1_000_000
TICKS = os.sysconf("SC_CLK_TCK")


def usage_of(pid: int) -> tuple[float, float]:
    """Return CPU seconds so far and peak memory in MB of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return (int(fields[11]) + int(fields[12])) / TICKS, peak_kib * 1024 / MB


def reset_peak(pid: int) -> None:
    """Let the peak memory of a process begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@contextmanager
def process(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a child that ends with the block."""
    child = subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdin.close()
        child.stdout.close()
