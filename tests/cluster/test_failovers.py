"""Clients at work through one failover after another: what they were told is one history, and nothing is lost."""

import functools
import io
import random
import threading
import time
from contextlib import contextmanager

import pytest
import trio

from droppexd.client import open_client
from droppexd.daemon import system_runtime
from droppexd.errors import Conflict, DroppexError, NotFound
from droppexd.wire.messages import ABSENT, ANYTHING
from droppexd.wire.zeromq import open_zeromq_transport
from tests.cluster.conftest import wait_for
from tests.etcd_servers import Etcd, require_etcd
from tests.simulation.simulator.history import Call, History, groups, step
from tests.simulation.simulator.linearizability import unexplained
from tests.simulation.simulator.plan import Verb

LEASE_S = 2
CLIENTS = 4
NAMES = tuple(f"docs/{letter}" for letter in "abcde")
KEPT = "kept"
PUT_SIZES = (30, 5_000, 300_000)


class Workload:
    """Clients that put, get and remove, and write down what they asked and what they were told."""

    def __init__(self, address, seed):
        self._address = address
        self._draw = random.Random(seed)
        self.history = History()
        self.kept = {}
        """Files that are stored once and never changed."""
        self.errors = []
        self.over = False

    async def run(self):
        async with trio.open_nursery() as nursery:
            for number in range(CLIENTS):
                nursery.start_soon(self._client, number)

    async def _client(self, number):
        async with (
            open_zeromq_transport() as transport,
            open_client(self._address, transport, system_runtime()) as client,
        ):
            while not self.over:
                await self._one(client, number)
                await trio.sleep(self._draw.uniform(0, 0.2))

    async def _one(self, client, number):
        draw, history = self._draw, self.history
        what, name = draw.random(), draw.choice(NAMES)
        if what < 0.2:
            await self._keep(client)
            return
        verb = Verb.PUT if what < 0.5 else Verb.REMOVE if what < 0.6 else Verb.GET
        call = Call(client=number, verb=verb, name=name)
        if verb is Verb.PUT:
            call.version, call.absent = history.moment + 1, draw.random() < 0.3
        history.invoke(call)
        try:
            await self._ask(client, call)
        except NotFound:
            call.refusal = "not-found"
        except Conflict:
            call.refusal = "conflict"
        except DroppexError as error:
            self.errors.append(f"{call}: {error}")
            if verb is Verb.GET:
                history.calls.remove(call)
            return
        history.answer(call)

    async def _ask(self, client, call):
        if call.verb is Verb.PUT:
            data = b"%d " % call.version + bytes(self._draw.choice(PUT_SIZES))
            condition = ABSENT if call.absent else ANYTHING
            await client.put_file(call.name, io.BytesIO(data), size=len(data), condition=condition)
        elif call.verb is Verb.REMOVE:
            await client.remove(call.name)
            call.version = -1
        else:
            call.version = int((await client.get_bytes(call.name)).split(b" ")[0])

    async def _keep(self, client):
        name, data = f"{KEPT}/{self.history.moment}-{len(self.kept)}", self._draw.randbytes(1000)
        self.history.moment += 1
        try:
            await client.put_bytes(name, data)
        except DroppexError as error:
            self.errors.append(f"put {name}: {error}")
        else:
            self.kept[name] = data


class Saboteur:
    """Kills or stops the master again and again, and brings it back when another has taken over.

    Where nobody takes over by itself, it has one of the others promoted.
    """

    def __init__(self, cluster, seed, *, promotes):
        self._cluster = cluster
        self._promotes = promotes
        self._draw = random.Random(seed)
        self.pauses = []

    def fail_over(self):
        before = self._master()
        kill = self._draw.random() < 0.6
        began = time.monotonic()
        if kill:
            before.kill()
        else:
            before.stop()
        if self._promotes:
            others = [one for one in self._cluster.controller_processes if one is not before]
            self._promote(self._draw.choice(others), began)
        while (after := self._master()) is None or after is before:
            assert time.monotonic() - began < 60, "nobody takes over"
            time.sleep(0.1)
        self.pauses.append(time.monotonic() - began)
        time.sleep(self._draw.uniform(0.2, 1.5))
        if kill:
            before.start()
        else:
            before.go_on()

    def _promote(self, process, began):
        while True:
            try:
                return self._cluster.promote(process)
            except DroppexError:
                # Whoever came back a moment ago may still be on its way to what the others have.
                if time.monotonic() - began > 30:
                    raise
                time.sleep(0.2)

    def _master(self):
        try:
            listed = self._cluster.controllers()
        except DroppexError:
            return None
        names = [one.name for one in listed.controllers if one.role == "master"]
        return next((one for one in self._cluster.controller_processes if one.name in names), None)


@contextmanager
def engine_of(name, folder):
    """Yield what a cluster on this engine has in its configuration."""
    if name == "sqlite":
        yield {"sync": 1}
        return
    require_etcd()
    etcd = Etcd(folder / "etcd")
    etcd.start()
    try:
        yield {"engine": "etcd", "endpoints": list(etcd.endpoints), "etcd_lease": f"{LEASE_S}s"}
    finally:
        etcd.kill()


def fail_over_and_over(new_cluster, folder, count, engine, seed):
    controller = {"heartbeat": "500ms", "down_after": "3s"}
    with (
        engine_of(engine, folder) as catalog,
        new_cluster(pools=6, controllers=3, catalog=catalog, controller=controller) as cluster,
    ):
        wait_for(lambda: len(cluster.controllers().controllers) == 3, "not all controllers are known")
        workload = Workload(cluster.app.addresses["app"], seed)
        saboteur = Saboteur(cluster, seed, promotes=engine == "sqlite")
        # Processes are started from the main thread: they end with the thread that started them.
        clients = threading.Thread(target=trio.run, args=[workload.run])
        clients.start()
        try:
            time.sleep(2)
            for _ in range(count):
                saboteur.fail_over()
                time.sleep(0.5)
        finally:
            workload.over = True
            clients.join()
        check(cluster, workload)
    answered = sum(call.returned is not None for call in workload.history.calls)
    print(f"{answered} answers and {len(workload.kept)} files kept over {count} failovers, each without a master "
          f"for {min(saboteur.pauses):.1f} to {max(saboteur.pauses):.1f} s")  # fmt: skip
    assert answered > 20 * count


def check(cluster, workload):
    """Clients saw pauses and no errors, and no answer contradicts another or what is there in the end."""
    assert workload.errors == []
    history = workload.history
    there = set(cluster.names())
    for name in NAMES:  # What is there in the end was there when all was over.
        call = history.invoke(Call(client=CLIENTS, verb=Verb.GET, name=name))
        if name in there:
            call.version = int(cluster.get(name).split(b" ")[0])
        else:
            call.refusal = "not-found"
        history.answer(call)
    for names, calls in groups(history.calls):
        wrong = unexplained(calls, (None,) * len(names), functools.partial(step, names))
        assert wrong is None, f"{wrong} is explained by no order of:\n" + "\n".join(map(str, calls))
    for name, data in workload.kept.items():
        assert cluster.get(name) == data, name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["etcd", "sqlite"])
def test_three_failovers_under_load_are_one_history_without_a_loss(new_cluster, tmp_path, engine):
    fail_over_and_over(new_cluster, tmp_path, 3, engine, seed=1)


@pytest.mark.full_size
@pytest.mark.parametrize("engine", ["etcd", "sqlite"])
def test_twenty_failovers_under_load_are_one_history_without_a_loss(new_cluster, tmp_path, engine):
    fail_over_and_over(new_cluster, tmp_path, 20, engine, seed=2)
