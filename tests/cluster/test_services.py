"""droppex under systemd: what a service tells of itself, the units, and their installation."""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import PATIENCE_S, ROOT, clean_environment

UNITS = ROOT / "systemd"
MOST_EXPOSURE = 20
"""Tenths, as `systemd-analyze security` counts; 20 is the limit of what it calls OK."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze of systemd"
)


@pytest.fixture
def hear(tmp_path):
    """The notify socket of a service manager; returns lines as they come."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(PATIENCE_S)

        def heard():
            return listener.recv(4096).decode().splitlines()

        def drain():
            told = []
            while select.select([listener], [], [], 0)[0]:
                told.append(listener.recv(4096))
            return told

        heard.path, heard.drain = path, drain
        yield heard


def started(tmp_path, hear, *arguments):
    environment = clean_environment(tmp_path) | {"NOTIFY_SOCKET": str(hear.path), "WATCHDOG_USEC": "600000"}
    with (tmp_path / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "droppexd", *map(str, arguments)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=log,
        )


def until(hear, wanted):
    """Return the lines up to and with one."""
    seen = []
    while wanted not in seen:
        seen += hear()
    return seen


def test_a_service_is_ready_when_all_its_roles_are_and_tells_its_end(tmp_path, hear):
    process = started(
        tmp_path, hear, "--role", "controller", "--role", "pool", "--data", tmp_path / "data",
        "--controller-listen", "tcp://127.0.0.1:0", "--pool-listen", "tcp://127.0.0.1:0",
    )  # fmt: skip
    try:
        before = until(hear, "READY=1")
        assert "STATUS=starting: controller, pool" in before
        status = next(line for line in before if line.startswith("STATUS=controller at "))
        assert ", pool at tcp://127.0.0.1:" in status
        until(hear, "WATCHDOG=1")
        process.terminate()
        until(hear, "STOPPING=1")
        assert process.wait(PATIENCE_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_process_that_hangs_feeds_no_watchdog(tmp_path, hear):
    process = started(
        tmp_path, hear, "--role", "controller", "--data", tmp_path / "data",
        "--controller-listen", "tcp://127.0.0.1:0",
    )  # fmt: skip
    try:
        until(hear, "READY=1")
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        hear.drain()  # What was told before.
        time.sleep(1.0)
        assert hear.drain() == []
        process.send_signal(signal.SIGCONT)
        until(hear, "WATCHDOG=1")
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def units(tmp_path):
    """The units as installed, with a command that is there."""
    folder = tmp_path / "units"
    shutil.copytree(UNITS, folder)
    template = folder / "droppexd@.service"
    text = template.read_text()
    assert "ExecStart=/usr/local/bin/droppexd " in text
    template.write_text(text.replace("/usr/local/bin/droppexd", sys.executable))
    for role in ("controller", "app", "pool"):
        shutil.copy(template, folder / f"droppexd@{role}.service")
    return folder


def analyze(units, *arguments):
    return subprocess.run(
        ["systemd-analyze", *arguments],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{units}:", "SYSTEMD_COLORS": "0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@needs_systemd
def test_the_units_verify(units):
    names = ["droppexd@controller.service", "droppexd@app.service", "droppexd@pool.service", "droppex.target"]
    done = analyze(units, "verify", *(units / name for name in names))
    about = [line for line in done.stderr.splitlines() if "droppex" in line]
    assert (done.returncode, about) == (0, [])
    template = units / "droppexd@pool.service"
    template.write_text(template.read_text().replace("Restart=on-failure", "Restart=now-and-then"))
    assert "now-and-then" in analyze(units, "verify", template).stderr  # It does look.


@needs_systemd
def test_the_units_are_confined(units):
    for role in ("controller", "app", "pool"):
        unit = units / f"droppexd@{role}.service"
        done = analyze(units, "security", "--offline=true", f"--threshold={MOST_EXPOSURE}", unit)
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
def test_the_installation_puts_commands_and_units_in_place(tmp_path):
    place = tmp_path / "place"
    for _ in range(2):  # The second time is an upgrade.
        done = subprocess.run(
            [ROOT / "scripts" / "install", "--root", place],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    installed = place / "etc" / "systemd" / "system"
    for unit in UNITS.rglob("*"):
        if unit.is_file() and unit.suffix != ".sysusers":
            assert (installed / unit.relative_to(UNITS)).read_bytes() == unit.read_bytes()
    assert (place / "usr/local/bin/droppexd").readlink() == Path("/opt/droppex/current/bin/droppexd")
    python = place / "opt/droppex/current/bin/python"
    version = subprocess.run(
        [python, place / "opt/droppex/current/bin/droppexd", "--version"], capture_output=True, check=True
    )
    assert version.stdout.strip() == b"0.1.0"
    assert (place / "opt/droppex/former/bin/droppexd").exists()
    assert (place / "opt/droppex/current/bin/droppexd").read_text().startswith("#!/opt/droppex/current/bin/")
