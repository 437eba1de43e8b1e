"""Every role is restarted in turn, as an upgrade does it, while clients are at work: none of them sees an error."""

import io
import random
import subprocess
import threading

import pytest
import trio

from droppexd.cli.render import problems
from droppexd.client import Patience, open_client
from droppexd.daemon import system_runtime
from droppexd.errors import DroppexError
from droppexd.wire.messages import ANYTHING
from droppexd.wire.zeromq import open_zeromq_transport
from tests.cluster.conftest import PATIENCE_S, run_droppex, wait_for

POOLS = 5
SIZES = (0, 30, 5_000, 300_000, 9_000_000)
CLIENTS_PER_APP = 2
MOST_FILES = 12


class Worker:
    """A client with a folder of its own, so that it knows what each answer must be."""

    def __init__(self, name, address, seed):
        self.name = name
        self.files = {}
        """What it has put and not removed, by name."""
        self.errors = []
        self.done = 0
        self._address = address
        self._draw = random.Random(seed)
        self._number = 0

    async def work(self, is_over):
        async with (
            open_zeromq_transport() as transport,
            open_client(
                self._address, transport, system_runtime(), patience=Patience(total_s=PATIENCE_S)
            ) as client,
        ):
            while not is_over():
                verb = self._draw.choice([self._put, self._put, self._replace, self._get, self._get, self._list,
                                          self._remove, self._rename])  # fmt: skip
                try:
                    await verb(client)
                except (DroppexError, AssertionError) as error:
                    self.errors.append(f"{self.name} {verb.__name__}: {error!r}")
                self.done += 1
                await trio.sleep(self._draw.uniform(0, 0.1))

    def _new_name(self):
        self._number += 1
        return f"{self.name}/{self._number}"

    def _content(self):
        return self._draw.randbytes(self._draw.choice(SIZES))

    def _any(self):
        return self._draw.choice(sorted(self.files)) if self.files else None

    async def _put(self, client):
        if len(self.files) < MOST_FILES:
            name, data = self._new_name(), self._content()
            await client.put_bytes(name, data)
            self.files[name] = data

    async def _replace(self, client):
        if name := self._any():
            data = self._content()
            await client.put_file(name, io.BytesIO(data), size=len(data), condition=ANYTHING)
            self.files[name] = data

    async def _get(self, client):
        if name := self._any():
            assert await client.get_bytes(name) == self.files[name], name

    async def _list(self, client):
        listed = [entry.name async for entry in client.list(f"{self.name}/", recursive=True)]
        assert listed == sorted(self.files), "a listing is wrong"

    async def _remove(self, client):
        if len(self.files) > MOST_FILES // 2:
            name = self._any()
            await client.remove(name)
            del self.files[name]

    async def _rename(self, client):
        if name := self._any():
            target = self._new_name()
            await client.rename(name, target)
            self.files[target] = self.files.pop(name)


class Person:
    """Types `droppex` commands, one after the other."""

    name = "person"

    def __init__(self, folder, address):
        self.files = {}
        self.errors = []
        self.done = 0
        self._folder = folder
        self._config = folder / "person.toml"
        self._config.write_text(f'app = "{address}"\npatience = "{PATIENCE_S:.0f}s"\n')

    def work(self, is_over):
        while not is_over():
            data = f"{self.done} ".encode() * 50_000
            (self._folder / "typed").write_bytes(data)
            for command in (["put", "typed", "person/a"], ["ls", "person/"], ["get", "person/a", "got", "-f"],
                            ["mv", "person/a", "person/b"], ["rm", "person/b"]):  # fmt: skip
                try:
                    run_droppex(self._folder, "--config", str(self._config), *command, code=0)
                    assert command[0] != "get" or (self._folder / "got").read_bytes() == data
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    self.errors.append(f"{command}: {error}")
            self.done += 1


class Load:
    """All who work."""

    def __init__(self, cluster):
        apps = [cluster.app, *cluster.more_apps]
        self.workers = [
            Worker(f"{app.name}-{number}", app.address, seed=f"{app.name}-{number}")
            for app in apps
            for number in range(CLIENTS_PER_APP)
        ]
        self._person = Person(cluster.folder, cluster.app.address)
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=trio.run, args=[self._work]),
            threading.Thread(target=self._person.work, args=[self._over.is_set]),
        ]

    @property
    def everybody(self):
        return [*self.workers, self._person]

    @property
    def errors(self):
        return [error for one in self.everybody for error in one.errors]

    async def _work(self):
        async with trio.open_nursery() as nursery:
            for worker in self.workers:
                nursery.start_soon(worker.work, self._over.is_set)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()

    def go_on(self):
        """Wait until everybody has done something that was begun from now on."""
        before = [one.done for one in self.everybody]
        wait_for(
            lambda: all(one.done >= was + 2 for one, was in zip(self.everybody, before, strict=True)),
            lambda: (
                f"nothing is done any more: {before}, {[one.done for one in self.everybody]}, {self.errors}"
            ),
        )
        assert self.errors == []


def restless(cluster):
    """Return why the next machine must wait, as an operator reads it in `droppex status`; nothing when calm."""
    try:
        status = cluster.status()
        controllers = cluster.controllers().controllers
    except DroppexError as error:
        return [str(error)]
    repair = status.repair
    found = list(problems(status))
    found += ["shards are missing or on their way"] * bool(repair.left or repair.running or repair.moving)
    found += [f"{one.name} is {one.role}" for one in controllers if one.lag or one.role == "unreachable"]
    found += ["a controller is missing"] * (len(controllers) < len(cluster.controller_processes))
    found += ["a pool is missing"] * (len(status.pools) < POOLS)
    return found


def wait_until_calm(cluster):
    wait_for(lambda: not restless(cluster), lambda: f"the cluster does not get calm: {restless(cluster)}")


def in_upgrade_order(cluster):
    """Return all processes: standbys, the master, pools, apps."""
    roles = {one.name: one.role for one in cluster.controllers().controllers}
    controllers = sorted(cluster.controller_processes, key=lambda one: roles[one.name] == "master")
    assert [roles[one.name] for one in controllers] == ["standby", "standby", "master"]
    return [*controllers, *cluster.pools, cluster.app, *cluster.more_apps]


@pytest.mark.slow
def test_every_role_restarts_in_turn_under_load_and_no_client_sees_an_error(new_cluster):
    controller = {"heartbeat": "500ms", "down_after": "3s", "delete_grace": "5s"}
    with new_cluster(pools=POOLS, controllers=3, catalog={"sync": 1}, controller=controller) as cluster:
        cluster.add_app("app-2")
        wait_until_calm(cluster)
        with Load(cluster) as load:
            load.go_on()
            for process in in_upgrade_order(cluster):
                assert process.terminate() == 0, process.name
                process.start()
                load.go_on()
                wait_until_calm(cluster)
        assert load.errors == []
        check(cluster, load)


def check(cluster, load):
    """All that was put is there, byte for byte, with all of its shards, and nothing else is."""
    wait_until_calm(cluster)
    expected = {name: data for worker in load.workers for name, data in worker.files.items()}
    assert cluster.names() == sorted(expected)
    for name, data in expected.items():
        assert cluster.get(name) == data, name
        assert cluster.survives(name) in ((2,) if data else (None,)), name
    cluster.droppex("verify")
