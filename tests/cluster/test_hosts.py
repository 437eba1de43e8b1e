"""Clusters on machines with a network between them: as people set them up, and as cables and switches fail."""

import json
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster.conftest import ROOT, wait_for
from tests.cluster.hosts import Host, Network, hosts

pytestmark = pytest.mark.slow

QUICK = {"heartbeat": "500ms", "down_after": "3s"}
UNREACHABLE = 6


class Machines(NamedTuple):
    """A cluster of five: the controller is on the first, the app on the second, and each has a pool."""

    network: Network
    members: tuple[Host, ...]
    spare: tuple[Host, ...]
    """Two machines that are no part of it yet."""


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Five machines that joined by tokens. Each test leaves the links as it found them."""
    with hosts(tmp_path_factory.mktemp("hosts"), 7) as (network, machines):
        first, second, *others = members = tuple(machines[:5])
        begin(first, "--role", "pool")
        join(first.token("--role", "app", "--role", "pool", "--role", "client"), second)
        join(first.token("--role", "pool", "--role", "client", "--uses", "3"), *others)
        yield Machines(network, members, tuple(machines[5:]))


@pytest.fixture(autouse=True)
def at_rest(request):
    """Begin and end each test on the five with a sound cluster."""
    if "five" not in request.fixturenames:
        yield
        return
    machines = request.getfixturevalue("five")
    wait_until_whole(machines.members[1])
    yield
    machines.network.restore(*machines.network.numbers)


def begin(host, *arguments):
    host.droppexd("init", *arguments)
    host.configure("controller", **QUICK)
    host.configure("pool", reserve="16 MiB")
    host.start(*host.roles())


def join(token, *machines):
    """Have machines join one after the other, and start what they have joined for, all at once."""
    for host in machines:
        host.droppexd("join", token)
        if "pool" in host.roles():
            host.configure("pool", reserve="16 MiB")
    for host in machines:
        host.spawn(*host.roles())
    for host in machines:
        host.wait_until_ready()


def status(host):
    return json.loads(host.droppex("status", "--json").stdout)


def states(host):
    return {pool["name"]: pool["state"] for pool in status(host)["pools"]}


def wait_until_whole(host):
    """Wait until nothing is missing, nothing is on its way, and nobody is needed."""
    said = []

    def whole():
        done = host.droppex("status", "--check", "--json", code=None)
        said[:] = [done.stdout, done.stderr]
        if done.returncode:
            return False
        repair = json.loads(done.stdout)["repair"]
        return repair["balanced"] and not (repair["left"] or repair["moving"])

    wait_for(whole, lambda: f"the cluster does not heal: {said}")


def put(host, name, data, **options):
    """Store bytes from this host; return what the command did."""
    local = host.home / name.replace("/", "-")
    local.write_bytes(data)
    return host.droppex("put", "--json", local, name, **options)


def get(host, name):
    """Fetch a file to this host and return its bytes."""
    local = host.home / f"got-{name.replace('/', '-')}"
    host.droppex("get", "--force", name, local)
    return local.read_bytes()


def get_folder(host, folder):
    """Fetch all files below a folder to this host and return their bytes by name."""
    local = host.home / f"got-{folder}"
    host.droppex("get", "-r", folder, local)
    return {
        f"{folder}/{file.relative_to(local)}": file.read_bytes()
        for file in local.rglob("*")
        if file.is_file()
    }


def check_stored(host, folder, stored):
    """Check that what was acknowledged is there; what was refused may be there as well."""
    found = get_folder(host, folder)
    assert stored.keys() <= found.keys()
    for name, data in stored.items():
        assert found[name] == data, name


class Repeated:
    """A thread that does something again and again; `rounds` counts."""

    def __init__(self, act):
        self.rounds = 0
        self._act = act
        self._over = threading.Event()
        self._failure = None
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            while not self._over.is_set():
                self._act(self.rounds)
                self.rounds += 1
        except (AssertionError, subprocess.TimeoutExpired) as error:
            self._failure = error

    def wait_for_more(self, count):
        """Wait until it was done so many times from now on."""
        wanted = self.rounds + count + 1  # One is under way.
        wait_for(lambda: self._failure or self.rounds >= wanted, "it does not go on")
        self.check()

    def check(self):
        if self._failure is not None:
            raise self._failure

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


class Writer(Repeated):
    """A person who stores file after file and keeps in mind which the cluster took."""

    def __init__(self, host, folder, content):
        super().__init__(self._store)
        self.taken = {}
        self.refused = []
        self._host = host
        self._folder = folder
        self._content = content

    def _store(self, number):
        name, data = f"{self._folder}/{number}", self._content(400_000 + number, number)
        done = put(self._host, name, data, code=None)
        if done.returncode == 0:
            self.taken[name] = data
        else:
            self.refused.append(done)


def test_five_machines_that_joined_by_token_store_and_read_each_others_files(five, content):
    _, second, third, fourth, fifth = five.members
    stored = {
        "docs/readme": (ROOT / "README.md").read_bytes(),
        "docs/empty": b"",
        "docs/large": content(9_000_000),
        "docs/program": Path("/proc/self/exe").read_bytes(),
    }
    for host, (name, data) in zip((second, third, fourth, fifth), stored.items(), strict=True):
        put(host, name, data)
    for host in (third, fifth):
        assert get_folder(host, "docs") == stored
    members = json.loads(third.droppex("members", "--json").stdout)["members"]
    assert {(member["role"], member["name"]) for member in members} == {
        ("controller", "host-1"),
        ("app", "host-2"),
        *(("client", host.name) for host in five.members),
        *(("pool", host.name) for host in five.members),
    }
    assert "all is well" in fourth.droppex("status", "--check").stdout
    assert {pool["machine"]: pool["address"] for pool in status(fifth)["pools"]} == {
        host.name: f"tcp://{host.address}:7702" for host in five.members
    }
    described = json.loads(second.droppex("stat", "--json", "docs/large").stdout)
    assert described["survives_machines"] == 2
    for extent in described["extents"]:
        assert {shard["machine"] for shard in extent["shards"]} == {host.name for host in five.members}


def test_files_are_stored_and_read_while_a_link_is_cut_and_their_shards_come_back(five, content):
    network, (_, second, third, fourth, fifth), _ = five
    kept = content(9_000_000)
    put(third, "cut/kept", kept)

    def read(_):
        assert get(third, "cut/kept") == kept

    with Writer(fifth, "cut", content) as writer, Repeated(read) as reader:
        writer.wait_for_more(1)
        network.cut(fourth.number)
        for person in (writer, reader):
            person.wait_for_more(1)
        wait_for(lambda: states(second)["host-4"] == "down", "nobody misses host-4")
        network.restore(fourth.number)
    reader.check()
    writer.check()
    assert len(writer.taken) > 2, writer.refused
    wait_until_whole(second)
    check_stored(fourth, "cut", {**writer.taken, "cut/kept": kept})
    stored = json.loads(second.droppex("stat", "--json", *writer.taken).stdout)
    assert {(one["layout"], one["survives_machines"]) for one in stored} == {("3+2", 2)}


def test_a_file_is_whole_over_links_that_are_slow_and_lose_packets(five, content):
    network, (_, _, third, _, fifth), _ = five
    if not network.endures_loss:
        pytest.skip("needs TCP's BBR: CUBIC makes 1.4 Mbit/s of such links, and pools count as stalled")
    data = content(20_000_000)
    with network.bad_links(delay_ms=50, loss_percent=1):
        put(third, "slow/file", data)
        assert get(fifth, "slow/file") == data
    assert get(third, "slow/file") == data


def test_without_its_controller_the_cluster_says_so_and_all_who_wait_go_on_when_it_is_back(five, content):
    network, (first, second, third, fourth, fifth), _ = five
    kept = content(3_000_000)
    put(fourth, "alone/kept", kept)

    def read(_):
        done = fourth.droppex("get", "--force", "alone/kept", "kept", code=None)
        if done.returncode == 0:
            assert (fourth.home / "kept").read_bytes() == kept
        else:  # All of this has taken longer than a master is waited for.
            assert "no master answers" in done.stderr

    with Writer(third, "alone", content) as writer, Repeated(read) as reader:
        writer.wait_for_more(1)
        network.cut(first.number)
        said = fifth.droppex("controllers", code=UNREACHABLE)
        assert "there is no master: no controller serves reads or writes now" in said.stdout
        network.restore(first.number)
        for person in (writer, reader):
            person.wait_for_more(1)
    reader.check()
    writer.check()
    for done in writer.refused:
        assert "no master answers" in done.stderr
    wait_until_whole(second)
    check_stored(fifth, "alone", {**writer.taken, "alone/kept": kept})


def roles_of_controllers(host):
    said = host.droppex("controllers", "--json", code=None).stdout
    return {one["name"]: one["role"] for one in json.loads(said)["controllers"]}


def test_another_controller_takes_over_from_a_master_that_is_cut_off_and_that_follows_when_it_is_back(
    five, content
):
    """The last on the five: it leaves them with three controllers."""
    network, (first, second, third, *_), (sixth, seventh) = five
    join(first.token("--role", "controller", "--uses", "2"), sixth, seventh)
    wait_for(
        lambda: roles_of_controllers(third) == {"host-1": "master", "host-6": "standby", "host-7": "standby"},
        "not all controllers are known",
    )
    with Writer(third, "master", content) as writer:
        writer.wait_for_more(1)
        network.cut(first.number)
        third.droppex("controllers", "promote", "host-6")
        writer.wait_for_more(1)
        network.restore(first.number)
    writer.check()
    assert len(writer.taken) > 2, writer.refused
    wait_for(
        lambda: roles_of_controllers(third) == {"host-1": "standby", "host-6": "master", "host-7": "standby"},
        "the former master does not follow",
    )
    wait_until_whole(second)
    check_stored(third, "master", writer.taken)


def test_a_cluster_from_nothing_to_a_machine_that_was_taken_away(tmp_path, content):
    """What the README and its pages on a first cluster, and on machines that come and go, tell to type."""
    with hosts(tmp_path, 5) as (_, (first, second, third, fourth, laptop)):
        first.droppexd("init")
        first.start("controller", "app", "pool")
        token = first.token("--uses", "2")
        for host in (second, third):
            host.droppexd("join", token)
            host.start("pool")
        (first.home / "photos.tar").write_bytes(content(3_000_000))
        wait_for(  # An app uses a new pool within two seconds.
            lambda: (
                "2+1, survives the loss of 1 pool or 1 machine"
                in first.droppex("put", "--force", "photos.tar", "archive/").stdout
            ),
            "the app does not use the new pools",
        )

        laptop.droppexd("join", first.token("--role", "client"))
        laptop.droppex("get", "archive/photos.tar")
        assert (laptop.home / "photos.tar").read_bytes() == content(3_000_000)

        refused = first.droppex("pools", "drain", "host-3", code=4)
        assert "without 'host-3' there are 2: add a pool" in refused.stderr
        fourth.droppexd("join", first.token())
        fourth.start("pool")
        second_role = fourth.droppexd("join", first.token("--role", "controller"), code=2)
        assert "not for controller: nothing was changed" in second_role.stderr
        drained = first.droppex("pools", "drain", "host-3").stdout
        assert "`droppex pools remove host-3` takes it out" in drained
        first.droppex("pools", "remove", "host-3")
        third.services["pool"].wait()
        first.droppex("members", "revoke", "host-3")
        again = third.droppexd("join", first.token()).stdout
        assert "nothing was changed. To join anew move it and keys/ away" in again
        assert "host-3" not in states(first)
        assert "host-3" not in first.droppex("members").stdout
        wait_until_whole(first)
        laptop.droppex("get", "--force", "archive/photos.tar")
        assert (laptop.home / "photos.tar").read_bytes() == content(3_000_000)
