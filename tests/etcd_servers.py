"""Real etcd servers on loopback, started and ended by the tests."""

import json
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

START_S = 30.0


def require_etcd():
    """Skip a test where there is no etcd."""
    if shutil.which("etcd") is None:
        pytest.skip("needs etcd: install Debian's etcd-server")


class Member:
    """One etcd server."""

    def __init__(self, name, folder, client, peer, tls=None):
        self.name = name
        self.folder = folder
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{client}"
        self.tls = tls
        self.peer = f"http://127.0.0.1:{peer}"
        self._process = None

    @property
    def running(self):
        return self._process is not None and self._process.poll() is None

    def spawn(self, members, options):
        log = (self.folder.parent / f"{self.name}.log").open("ab")
        command = ["etcd", "--name", self.name, "--data-dir", str(self.folder)]
        command += ["--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint]
        command += ["--listen-peer-urls", self.peer, "--initial-advertise-peer-urls", self.peer]
        command += ["--initial-cluster", ",".join(f"{one.name}={one.peer}" for one in members)]
        command += ["--heartbeat-interval", "50", "--election-timeout", "500", *options]
        if self.tls:
            cert, key = self.tls
            command += [
                "--cert-file",
                cert,
                "--key-file",
                key,
                "--trusted-ca-file",
                cert,
                "--client-cert-auth",
            ]
        with log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def healthy(self):
        context = None
        if self.tls:
            context = ssl.create_default_context(cafile=self.tls[0])
            context.load_cert_chain(*self.tls)
        try:
            with urllib.request.urlopen(f"{self.endpoint}/health", timeout=2, context=context) as answer:
                return json.load(answer).get("health") == "true"
        except (OSError, ValueError, urllib.error.URLError):
            return False

    def kill(self):
        if self.running:
            self._process.kill()
            self._process.wait()

    def stop(self):
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self._process.send_signal(signal.SIGCONT)


class Etcd:
    """Some members of one etcd cluster."""

    def __init__(self, folder: Path, count=3, options=(), tls=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.options = options
        self.tls = tls
        self.members = []
        self._count = count

    @property
    def endpoints(self):
        return tuple(member.endpoint for member in self.members)

    def start(self):
        """Start all members that do not run, and wait until each serves."""
        if not self.members:
            # Others may take a port between its choice and its use: then all are chosen anew.
            for attempt in range(5):
                ports = iter(_free_ports(2 * self._count))
                home = self.folder / str(attempt)
                home.mkdir()
                self.members = [
                    Member(f"etcd-{number}", home / str(number), next(ports), next(ports), self.tls)
                    for number in range(self._count)
                ]
                if self._start():
                    return
                self.kill()
            pytest.fail(f"etcd does not start:\n{self.logs()[-3000:]}")
        assert self._start(), self.logs()[-3000:]

    def _start(self):
        for member in self.members:
            if not member.running:
                member.spawn(self.members, self.options)
        deadline = time.monotonic() + START_S
        while not all(member.healthy() for member in self.members):
            if time.monotonic() > deadline or not all(member.running for member in self.members):
                return False
            time.sleep(0.05)
        return True

    def logs(self):
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("*/*.log")))

    def leader(self):
        """Return the member that leads."""
        for member in self.members:
            request = urllib.request.Request(f"{member.endpoint}/v3/maintenance/status", data=b"{}")
            with urllib.request.urlopen(request, timeout=5) as answer:
                status = json.load(answer)
            if status["leader"] == status["header"]["member_id"]:
                return member
        return self.members[0]

    def kill(self):
        for member in self.members:
            member.kill()


def _free_ports(count):
    sockets = []
    for _ in range(count):
        one = socket.socket()
        one.bind(("127.0.0.1", 0))
        sockets.append(one)
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wipe(endpoint):
    """Delete all keys."""
    everything = {"key": "AA==", "range_end": "AA=="}
    request = urllib.request.Request(
        f"{endpoint}/v3/kv/deleterange", data=json.dumps(everything).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()
