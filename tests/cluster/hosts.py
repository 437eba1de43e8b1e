"""Several machines on one: each has a network namespace with an address, and a host name, /etc, /var/lib and HOME.

Every interface, the bridge between them included, is in a namespace of ours. So nothing of the system's own network
is touched, each test process may use the same addresses, and with the namespaces all of it is gone.
"""

import functools
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.conftest import DROPPEX, DROPPEXD, Process, run_droppex

SUBNET = "10.77.0"
ETC = Path("/etc/droppex")
PEOPLE = "root:x:0:0:root:/root:/bin/sh\n"
"""The users of a host. Those of the system are no part of the test."""

ENTER = """
echo "$1" >/proc/sys/kernel/hostname
mount --bind "$2/etc" /etc
mount --bind "$2/lib" /var/lib
shift 2
exec "$@"
"""
"""What a command on a host begins with. `ip netns exec` has given it mounts of its own, `unshare` a host name."""

SLOW_SWITCH = Path(__file__).with_name("slow_switch.py")


class SystemRefuses(Exception):
    """The system does not let a host be made, or says that something failed."""


def system(*command):
    """Run a command of the system and return what it printed. Raise SystemRefuses."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SystemRefuses(f"{shlex.join(command)}: {said[-1]}")
    return done.stdout


@functools.cache
def why_no_hosts():
    """Return why no hosts can be made here, in one line, or "" where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"needs {' and '.join(missing)}: install Debian's iproute2"
    try:
        with network(1) as probe, tempfile.TemporaryDirectory() as folder:
            system(*Host(Path(folder), 1, probe.namespace(1)).command("true"))
    except SystemRefuses as error:
        return f"no hosts can be made here: {error}"
    return ""


class Network:
    """A bridge, and hosts with a link to it each. Host N is at 10.77.0.N; names are of this process alone."""

    def __init__(self, count):
        self._name = f"droppex-test-{os.getpid()}-{secrets.token_hex(3)}"
        self.numbers = range(1, count + 1)
        self.endures_loss = True
        """Whether TCP on all hosts keeps its speed when some packets are lost: BBR does, CUBIC and Reno do not."""

    @property
    def hub(self):
        """The namespace of the bridge."""
        return f"{self._name}-hub"

    def namespace(self, number):
        return f"{self._name}-host-{number}"

    def make(self):
        system("ip", "netns", "add", self.hub)
        self._in_hub("link", "add", "bridge", "type", "bridge")
        self._in_hub("address", "add", f"{SUBNET}.254/24", "dev", "bridge")
        self._in_hub("link", "set", "bridge", "up")
        for number in self.numbers:
            self._add_host(number)

    def _add_host(self, number):
        name = self.namespace(number)
        system("ip", "netns", "add", name)
        port = f"port-{number}"
        self._in_hub("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._in_hub("link", "set", port, "master", "bridge", "up")
        system("ip", "-n", name, "address", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
        system("ip", "-n", name, "link", "set", "lo", "up")
        system("ip", "-n", name, "link", "set", "eth0", "up")
        # As at home: `droppexd init` finds the address of a machine on its way to the world.
        system("ip", "-n", name, "route", "add", "default", "via", f"{SUBNET}.254")

        self.endures_loss &= self._use_bbr(name)

    def _use_bbr(self, namespace):
        write = "echo bbr 2>/dev/null >/proc/sys/net/ipv4/tcp_congestion_control"
        try:
            system("ip", "netns", "exec", namespace, "sh", "-c", write)
        except SystemRefuses:
            return False
        return True

    def _in_hub(self, *arguments):
        return system("ip", "-n", self.hub, *arguments)

    def cut(self, *numbers):
        """Pull the cables of these hosts: what is on its way is lost, and nobody is told."""
        for number in numbers:
            self._in_hub("link", "set", f"port-{number}", "down")

    def restore(self, *numbers):
        for number in numbers:
            self._in_hub("link", "set", f"port-{number}", "up")

    @contextmanager
    def bad_links(self, delay_ms, loss_percent):
        """Have packets arrive late, and some never, in each direction of each link, for a `with` block."""
        if not self._has_netem():
            with self._slow_switch(delay_ms, loss_percent):
                yield
            return
        for number in self.numbers:
            self._netem("add", f"port-{number}", "delay", f"{delay_ms}ms", "loss", f"{loss_percent}%")
        yield
        for number in self.numbers:
            self._netem("del", f"port-{number}")

    def _netem(self, verb, port, *settings):
        system("tc", "-n", self.hub, "qdisc", verb, "dev", port, "root", "netem", *settings)

    def _has_netem(self):
        """Return whether the kernel has a netem; a small one may not."""
        try:
            self._netem("add", "bridge")
        except SystemRefuses:
            return False
        self._netem("del", "bridge")
        return True

    @contextmanager
    def _slow_switch(self, delay_ms, loss_percent):
        """Put a program in the place of the bridge."""
        ports = [f"port-{number}" for number in self.numbers]
        for port in ports:
            self._in_hub("link", "set", port, "nomaster")
        program = [sys.executable, str(SLOW_SWITCH), str(delay_ms), str(loss_percent), *ports]
        command = ["ip", "netns", "exec", self.hub, *program]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as switch:
            assert switch.stdout.readline(), "the slow switch does not start"
            yield
            switch.stdin.close()
        for port in ports:
            self._in_hub("link", "set", port, "master", "bridge")

    def unmake(self):
        """Remove all of it, and what was left running on the hosts."""
        for name in _namespaces(self._name):
            for pid in system("ip", "netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            system("ip", "netns", "delete", name)


def _namespaces(begin):
    return [line.split()[0] for line in system("ip", "netns", "list").splitlines() if line.startswith(begin)]


def remove_left_overs():
    """Remove the namespaces of test processes that were killed."""
    for name in _namespaces("droppex-test-"):
        maker = re.match(r"droppex-test-(\d+)-", name)
        if maker and not Path("/proc", maker[1]).exists():
            system("ip", "netns", "delete", name)


@contextmanager
def network(count):
    """Make a network of hosts for a `with` block. Raise SystemRefuses."""
    remove_left_overs()
    made = Network(count)
    try:
        made.make()
        yield made
    finally:
        made.unmake()


class Host:
    """A machine as people have it: commands are typed there, and roles run as its services."""

    def __init__(self, folder, number, namespace):
        self.name = f"host-{number}"
        self.number = number
        self.address = f"{SUBNET}.{number}"
        self._namespace = namespace
        self._folder = folder / self.name
        self.home = self._folder / "home"
        self.services = {}
        self._config = self._folder / "etc" / "droppex" / "droppex.toml"
        for part in (self.home, self._folder / "etc", self._folder / "lib"):
            part.mkdir(parents=True)
        (self._folder / "etc" / "passwd").write_text(PEOPLE)

    def command(self, *arguments):
        """Return the command that runs this one here."""
        enter = ["ip", "netns", "exec", self._namespace, "unshare", "--uts", "sh", "-ec", ENTER, "sh"]
        return [*enter, self.name, str(self._folder), *arguments]

    def droppex(self, *arguments, code=0):
        return run_droppex(self.home, *arguments, code=code, command=self.command(*DROPPEX))

    def droppexd(self, *arguments, code=0):
        return run_droppex(self.home, *arguments, code=code, command=self.command(*DROPPEXD))

    def token(self, *arguments):
        return self.droppexd("join-token", *arguments).stdout.strip()

    def configure(self, section, **settings):
        """Write settings into droppex.toml, as an editor does."""
        lines = "".join(f'{key} = "{value}"\n' for key, value in settings.items())
        text = self._config.read_text()
        assert f"[{section}]\n" in text, text
        self._config.write_text(text.replace(f"[{section}]\n", f"[{section}]\n{lines}"))

    def roles(self):
        """Return the roles that it has joined for."""
        return tomllib.loads(self._config.read_text())["roles"] if self._config.exists() else []

    def spawn(self, *roles):
        """Start roles; `wait_until_ready` must follow."""
        for role in roles:
            self.services[role] = Service(self, role)
            self.services[role].spawn()

    def wait_until_ready(self):
        for service in self.services.values():
            service.wait_until_ready()

    def start(self, *roles):
        """Start roles as services, as systemd does, which waits until they are ready."""
        self.spawn(*roles)
        self.wait_until_ready()

    def end(self):
        for service in self.services.values():
            if service.running:
                service.kill()

    def check_logs(self):
        """No role has met a bug."""
        for service in self.services.values():
            said = service.log.read_text()
            assert "Traceback" not in said, said
            assert "level=critical" not in said, said


class Service(Process):
    """A role with the configuration of its host: what the unit `droppexd@ROLE` runs."""

    def __init__(self, host, role):
        super().__init__(host.home, role, [role], [], command=host.command(*DROPPEXD))
        self.config = ETC / "droppex.toml"

    def arguments(self):
        return ["--role", *self.roles]


@contextmanager
def hosts(folder, count):
    """Yield a network and its hosts; skip the test where there can be none."""
    if reason := why_no_hosts():
        pytest.skip(reason)
    with network(count) as made:
        machines = [Host(folder, number, made.namespace(number)) for number in made.numbers]
        try:
            yield made, machines
        finally:
            for machine in machines:
                machine.end()
        for machine in machines:
            machine.check_logs()
