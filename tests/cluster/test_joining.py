"""A cluster that is begun with `init` and grows with `join`: as people do it, with real processes and keys."""

import json
import random
import shutil
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import trio

from droppexd.client import open_client
from droppexd.daemon import system_runtime
from droppexd.errors import NotAuthorised, PeerError
from droppexd.model import PoolState, Role
from droppexd.wire.keys import TransportKeys, load_keys, read_member_key
from droppexd.wire.member_messages import ListMembers, MakeToken
from droppexd.wire.messages import ListGarbage, Ping, WritePiece
from droppexd.wire.rpc import Terms, open_connections
from droppexd.wire.tokens import parse_token
from droppexd.wire.zeromq import open_zeromq_transport
from tests.cluster.conftest import Process, run_droppex

CONTROLLER = {"heartbeat": "300ms", "down_after": "2s", "replace_after": "60s"}


class Host:
    """A machine: a folder, an address of its own on loopback, and the processes that run there."""

    def __init__(self, folder, number, droppexd):
        self.name = f"host-{number}"
        self.folder = folder / self.name
        self.folder.mkdir()
        self.address = f"127.{random.randrange(1, 255)}.{random.randrange(255)}.{number}"
        self.droppexd = droppexd
        self.processes = []

    @property
    def options(self):
        return (
            "--dir", self.folder, "--data", self.folder / "data", "--name", self.name, "--machine", self.name,
            "--address", self.address,
        )  # fmt: skip

    def client(self, *arguments, code=0):
        """Run `droppex` as the person on this machine."""
        config = ("--config", self.folder / "client.toml")
        return run_droppex(self.folder, *config, *arguments, code=code)

    def init(self, *arguments):
        self.droppexd("init", *self.options, *arguments, code=0)
        config = self.folder / "droppex.toml"
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in CONTROLLER.items())
        config.write_text(config.read_text().replace("[controller]\n", f"[controller]\n{lines}\n"))

    def token(self, *arguments):
        """Make a join token on this machine, which has a controller."""
        made = self.droppexd("join-token", "--config", self.folder / "droppex.toml", *arguments, code=0)
        return made.stdout.strip()

    def join(self, token, *arguments, code=0):
        return self.droppexd("join", token, *self.options, *arguments, code=code)

    def start(self, *roles):
        """Start each of these roles as a process of its own, as a service manager does."""
        for role in roles:
            process = Configured(self.folder, f"{self.name}-{role}", role)
            process.start()
            self.processes.append(process)
        return self.processes[-1]


class Configured(Process):
    """A role that has everything from the configuration of its machine."""

    def __init__(self, folder, name, role):
        super().__init__(folder, name, [role], [])
        self.role = role

    def arguments(self):
        return ["--role", self.role]


@contextmanager
def hosts(folder, droppexd, count):
    made = [Host(folder, number, droppexd) for number in range(1, count + 1)]
    try:
        yield made
    finally:
        for host in made:
            for process in host.processes:
                if process.running:
                    process.kill()
    for host in made:
        for process in host.processes:
            said = process.log.read_text()
            assert "Traceback" not in said, said
            assert "level=critical" not in said, said


def state_of(host, name):
    pools = json.loads(host.client("status", "--json").stdout)["pools"]
    return next((pool["state"] for pool in pools if pool["name"] == name), "absent")


def ask(address, keys, request, timeout_s=2.0):
    """Return what is answered to who has these keys."""

    async def main():
        async with (
            open_zeromq_transport(keys=keys) as transport,
            open_connections(transport, terms=Terms()) as connections,
        ):
            return (await connections.call(address, request, timeout_s=timeout_s))[0]

    return trio.run(main)


def keys_of(host, role):
    return load_keys(host.folder / "keys" / f"{role}-{host.name}.key")


@pytest.mark.slow
def test_three_machines_join_and_store_files(tmp_path, droppexd, content, wait_until):
    with hosts(tmp_path, droppexd, 4) as (first, second, third, fourth):
        first.init()
        first.start("controller", "app", "pool")
        token = first.token("--uses", "2")
        for host in (second, third):
            host.join(token)
            host.start("pool")
            assert state_of(first, host.name) == PoolState.UP.value
        file = tmp_path / "file"
        file.write_bytes(content(3_000_000))
        # An app hears of a new pool within two seconds.
        wait_until(
            lambda: "2+1" in first.client("put", "--force", file, "docs/a file").stdout,
            "the app does not use the new pools",
        )
        # Another app and a person of its own, on a machine that learns of the pools by itself.
        fourth.join(first.token("--role", "app", "--role", "client"))
        fourth.start("app")
        fourth.client("get", "docs/a file", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == file.read_bytes()
        members = json.loads(fourth.client("members", "--json").stdout)["members"]
        assert {(member["role"], member["name"]) for member in members} == {
            *((role, "host-1") for role in ("controller", "app", "pool", "client")),
            ("pool", "host-2"), ("pool", "host-3"), ("app", "host-4"), ("client", "host-4"),
        }  # fmt: skip
        # Joining again changes nothing, and neither does beginning again.
        before = {path: path.read_bytes() for path in second.folder.rglob("*.toml")}
        assert "nothing was changed" in second.join(token).stdout
        assert {path: path.read_bytes() for path in second.folder.rglob("*.toml")} == before
        assert "nothing was changed" in droppexd("init", *first.options, code=0).stdout
        for host in (first, second, third, fourth):
            for key in host.folder.rglob("*.key"):
                assert key.stat().st_mode & 0o777 == 0o600, key
                secret = next(line for line in key.read_text().splitlines() if line.startswith("secret"))
                value = secret.split('"')[1]
                for log in tmp_path.rglob("*.log"):
                    assert value not in log.read_text(), log


@pytest.mark.slow
def test_a_token_is_good_once_for_its_roles_and_for_its_time(tmp_path, droppexd):
    with hosts(tmp_path, droppexd, 3) as (first, second, third):
        first.init("--role", "app")
        first.start("controller")
        token = first.token()
        assert "is no role here" in second.join(token, "--role", "controller", code=2).stderr
        second.join(token)
        assert "was used" in third.join(token, code=1).stderr
        assert not (third.folder / "droppex.toml").exists()
        assert not (third.folder / "keys" / "cluster.key").exists()
        short = first.token("--ttl", "1s")
        time.sleep(1.5)
        assert "expired" in third.join(short, code=1).stderr
        assert "damaged" in third.join(token[:-9], code=2).stderr
        assert "no join token" in third.join("tcp://127.0.0.1:1", code=2).stderr
        # Who has a token may ask for nothing else.
        parsed = parse_token(first.token("--uses", "5"))
        from droppexd.wire.keys import keypair_of

        keys = TransportKeys(own=keypair_of(parsed.secret), cluster_public=parsed.cluster_public)
        controller = first.processes[0].address
        for request in (Ping(), ListMembers(), ListGarbage(number=1, after=None, limit=1)):
            with pytest.raises(NotAuthorised):
                ask(controller, keys, request)
        third.join(first.token("--role", "pool"))
        # The key of a pool makes no tokens.
        request = MakeToken(public=b"x" * 40, roles=("pool",), uses=1, ttl_ms=1000)
        with pytest.raises(NotAuthorised):
            ask(controller, keys_of(third, Role.POOL), request)


@pytest.mark.slow
def test_a_revoked_key_gets_nothing_from_anybody(tmp_path, droppexd, content, wait_until):
    with hosts(tmp_path, droppexd, 3) as (first, second, third):
        first.init()
        first.start("controller", "app", "pool")
        second.join(first.token())
        pool = second.start("pool")
        third.join(first.token("--role", "client"))
        file = tmp_path / "file"
        file.write_bytes(content(300_000))
        third.client("put", file, "docs/one")
        addresses = [process.address for process in (*first.processes, pool)]

        held = threading.Event()
        refused = []

        def hold_on():
            """Keep a connection that was made before the key was revoked, and ask on it afterwards."""

            async def main():
                keys = keys_of(third, Role.CLIENT)
                async with (
                    open_zeromq_transport(keys=keys) as transport,
                    open_client(first.processes[1].address, transport, system_runtime()) as client,
                ):
                    assert await client.get_bytes("docs/one") == file.read_bytes()
                    held.set()
                    while "docs/one" in [
                        entry.name for entry in [entry async for entry in client.list("docs/")]
                    ]:
                        await trio.sleep(0.2)

            try:
                trio.run(main)
            except PeerError as error:
                refused.append(error)

        holding = threading.Thread(target=hold_on)
        holding.start()
        assert held.wait(30)
        first.client("members", "revoke", "host-3")
        first.client("members", "revoke", "host-2")
        holding.join(60)
        assert refused, "an old connection still gets answers"
        for role, host in ((Role.CLIENT, third), (Role.POOL, second)):
            for address in addresses[:3]:
                with pytest.raises(PeerError):
                    ask(address, keys_of(host, role), Ping(), timeout_s=1.0)
        wait_until(
            lambda: state_of(first, "host-2") == PoolState.DOWN.value, "the revoked pool is still heard"
        )
        assert first.client("get", "docs/one", tmp_path / "back").returncode == 0
        assert (tmp_path / "back").read_bytes() == file.read_bytes()
        said = json.loads(first.client("members", "--all", "--json").stdout)["members"]
        assert {one["name"] for one in said if one["revoked_ms"]} == {"host-2", "host-3"}
        # Also not after everybody was started again.
        for process in first.processes:
            process.restart()
        with pytest.raises(PeerError):
            ask(addresses[1], keys_of(third, Role.CLIENT), Ping(), timeout_s=1.0)
        # A name that is free again is taken by another key.
        shutil.rmtree(third.folder / "keys")
        (third.folder / "client.toml").unlink()
        third.join(first.token("--role", "client"))
        assert "docs/one" in third.client("ls", "docs/").stdout
        assert (
            "is the master itself"
            in first.client("members", "revoke", "host-1", "--role", "controller", code=2).stderr
        )


@pytest.mark.slow
def test_a_client_key_with_the_verbs_of_a_pool_gets_nothing(tmp_path, droppexd):
    with hosts(tmp_path, droppexd, 1) as (first,):
        first.init()
        first.start("controller", "app", "pool")
        client = load_keys(first.folder / "keys" / "client-host-1.key")
        for process in first.processes:
            for request in (ListGarbage(number=1, after=None, limit=1), ListMembers()):
                if process.role == "app" and isinstance(request, ListMembers):
                    continue
                with pytest.raises((NotAuthorised, PeerError)):
                    ask(process.address, client, request)
        assert read_member_key(first.folder / "keys" / "client-host-1.key").member.role == Role.CLIENT
        assert WritePiece.callers.isdisjoint({Role.CLIENT, Role.JOINER})


@pytest.mark.slow
def test_controllers_join_and_let_everybody_in_when_the_first_is_gone(
    tmp_path, droppexd, content, wait_until
):
    with hosts(tmp_path, droppexd, 3) as (first, second, third):
        first.init()
        first.start("controller", "app", "pool")
        token = first.token("--role", "controller", "--role", "pool", "--uses", "2")
        for host in (second, third):
            host.join(token)
            host.start("controller", "pool")
        file = tmp_path / "file"
        file.write_bytes(content(300_000))
        first.client("put", file, "docs/one")
        wait_until(
            lambda: len(json.loads(first.client("controllers", "--json").stdout)["controllers"]) == 3,
            "not all controllers are known",
        )
        first.processes[0].kill()
        third.processes[1].kill()
        third.processes[1].spawn()  # It knows whom to let in, though there is no master.
        first.client("controllers", "promote", second.processes[0].address)
        third.processes[1].wait_until_ready()
        wait_until(lambda: state_of(first, "host-3") == PoolState.UP.value, "the pool is not back")
        first.client("get", "docs/one", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == file.read_bytes()
        fourth = Host(tmp_path, 4, droppexd)
        fourth.join(second.token())
        process = fourth.start("pool")
        assert state_of(first, "host-4") == PoolState.UP.value
        process.kill()
        # The former master comes back and follows; it lets the fourth machine in as well.
        first.processes[0].start()
        listed = ListMembers()
        keys = keys_of(fourth, Role.POOL)
        wait_until(
            lambda: (
                b"host-4"
                in b" ".join(
                    one.name.encode() for one in ask_or_none(first.processes[0].address, keys, listed)
                )
            ),
            "the former master does not know the new member",
        )


def ask_or_none(address, keys, request):
    try:
        return ask(address, keys, request).members
    except PeerError:
        return ()


class Capture:
    """All that crosses the loopback interface, while the block lasts, to or from certain addresses."""

    def __init__(self, *addresses):
        self._wanted = [socket.inet_aton(address) for address in addresses]
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024 * 1024)
        self._socket.bind(("lo", 0))
        self._socket.settimeout(0.2)
        self._over = False
        self._reader = threading.Thread(target=self._read)
        self.streams = {}
        """Payload of TCP by its two ends, in the order of arrival."""

    def _read(self):
        while not self._over:
            try:
                packet = self._socket.recv(70_000)
            except TimeoutError:
                continue
            ends, protocol = packet[26:34], packet[23]
            if protocol != socket.IPPROTO_TCP or not any(one in (ends[:4], ends[4:]) for one in self._wanted):
                continue
            start = 14 + 4 * (packet[14] & 15)
            ports, data = packet[start : start + 4], packet[start + 4 * (packet[start + 12] >> 4) :]
            self.streams.setdefault(ends + ports, bytearray()).extend(data)

    def __enter__(self):
        self._reader.start()
        return self

    def __exit__(self, *_):
        time.sleep(0.5)
        self._over = True
        self._reader.join()
        self._socket.close()

    def shows(self, text):
        return any(text in stream for stream in self.streams.values())

    @property
    def size(self):
        return sum(map(len, self.streams.values()))


def may_capture():
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)).close()
    except (OSError, AttributeError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not may_capture(), reason="needs the right to capture packets (root, on Linux)")
def test_no_byte_of_a_file_and_no_name_crosses_in_the_clear(tmp_path, droppexd, new_cluster, content):
    name, data = "docs/a-very-private-name", content(1_000_000)
    slices = [data[at : at + 24] for at in range(0, len(data) - 24, 50_000)]
    file = tmp_path / "file"
    file.write_bytes(data)
    # Without keys all of it is seen: the capture works.
    with new_cluster(pools=2) as cluster, Capture("127.0.0.1") as capture:
        cluster.put(name, data)
        assert cluster.get(name) == data
    assert capture.shows(name.encode())
    assert any(map(capture.shows, slices))
    with hosts(tmp_path, droppexd, 2) as (first, second):
        addresses = [host.address for host in (first, second)]
        with Capture(*addresses) as capture:
            first.init()
            first.start("controller", "app", "pool")
            second.join(first.token())
            second.start("pool")
            first.client("put", file, name)
            first.client("get", name, tmp_path / "back")
            first.client("ls", "docs/")
    assert (tmp_path / "back").read_bytes() == data
    assert capture.size > 3 * len(data)
    assert not capture.shows(name.encode())
    assert not capture.shows(b"private-name")
    assert not any(map(capture.shows, slices))
    secrets = [line for key in first.folder.rglob("*.key") for line in key.read_text().splitlines()]
    for line in secrets:
        if line.startswith("secret"):
            assert not capture.shows(line.split('"')[1].encode())
