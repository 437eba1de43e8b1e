"""A small cluster in one process for stories by hand; `simulator` has the one for random histories.

One seed gives one trace: all that is random is drawn from it, and trio's own shuffling of tasks too.
"""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from droppexd.catalog.group import SoleGroup
from droppexd.catalog.keys import CLUSTER
from droppexd.catalog.promises import SimulatedPromises
from droppexd.catalog.records import unpack_fields
from droppexd.catalog.replica import LogRow
from droppexd.catalog.simulated import SimulatedDisk as CatalogDisk
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.catalog.simulated_group import SharedStore, SimulatedGroup, StoreLink
from droppexd.client import Client, open_client
from droppexd.errors import IdentityError
from droppexd.model import Role
from droppexd.roles.app import AppSettings, serve_app
from droppexd.roles.controller import ControllerSettings, serve_controller
from droppexd.roles.followers import FollowersGroup, FollowersSettings, open_followers_group
from droppexd.roles.pool import PoolSettings, serve_pool
from droppexd.roles.pool_journal import JournalFolder
from droppexd.store.simulated import SimulatedDisk, SimulatedStore
from droppexd.wire.keys import AllowList, KeyPair, TransportKeys
from droppexd.wire.memory import MemoryNetwork
from droppexd.wire.rpc import Terms, open_connections
from tests.simulation.simulator.surroundings import run_mocked, runtime_of

CHUNK_SIZE = 16 * 1024
LEASE_S = 10.0


@dataclass
class Member:
    """A process of the cluster and the scope that ends it."""

    name: str
    scope: trio.CancelScope
    address: str = ""
    ended: trio.Event = field(default_factory=trio.Event)


class Copy:
    """What a controller has on its disk, where each has a copy of the catalogue."""

    def __init__(self, *, begins: bool) -> None:
        self.begins = begins
        self.disk = CatalogDisk()
        self.promises = SimulatedPromises()
        self.lost: list[tuple[int, LogRow]] = []
        self.engine: SimulatedEngine | None = None
        self.group: FollowersGroup | None = None
        self.keep_revisions = 100_000

    async def keep_lost(self, term: int, rows: Sequence[LogRow]) -> str:
        """Keep what only this controller had written down."""
        self.lost += [(term, row) for row in rows]
        return "the test"


class Cluster:
    """Controller, app and pools, and what is done to them."""

    def __init__(self, nursery: trio.Nursery, seed: int) -> None:
        self._nursery = nursery
        self.runtime, _, _ = runtime_of(seed)
        self.entropy = self.runtime.entropy
        self.trace = hashlib.blake2b()
        self.deliveries = 0
        self.network = MemoryNetwork(self.entropy, trace=self._note)
        self.catalog_disk = CatalogDisk()
        self.disks: dict[str, SimulatedDisk] = {}
        self.stores: dict[str, SimulatedStore] = {}
        self.members: dict[str, Member] = {}
        self.shared: SharedStore | None = None
        self.links: dict[str, StoreLink] = {}
        self.copies: dict[str, Copy] = {}
        self.journals: dict[str, Copy] = {}
        self.with_keys = False
        self.allowed: dict[str, AllowList] = {}
        """Whom each process lets in by now."""
        """What pools keep of the catalogue."""
        self.journal = 1
        self.machines: dict[str, str] = {}
        """Of pools, where that is not all the same."""
        self.controllers: list[str] = []
        self._clients = 0

    def _note(self, when, source, target, frames) -> None:
        self.deliveries += 1
        self.trace.update(f"{when!r} {source} {target} ".encode())
        for frame in frames:
            self.trace.update(frame)

    async def start(self, pools: int, *, grace_s: float = 5.0, replace_after_s: float = 600.0) -> None:
        await self.start_controller(grace_s=grace_s, replace_after_s=replace_after_s)
        for number in range(1, pools + 1):
            await self.start_pool(f"pool-{number}")
        await self.start_app()

    def keys_of(self, name: str) -> TransportKeys | None:
        """Return the keys of a controller that starts, where the cluster has keys; the network knows none."""
        allowed = self.allowed_of(name)
        if allowed is None:
            return None
        own = KeyPair(name.encode().ljust(40, b"-"), b"s" * 40)
        return TransportKeys(own=own, cluster_public=b"c" * 40, cluster_secret=b"C" * 40, allowed=allowed)

    def allowed_of(self, name: str) -> AllowList | None:
        """Return the empty list with which a process starts, where the cluster has keys."""
        if self.with_keys:
            self.allowed[name] = AllowList()
        return self.allowed.get(name)

    async def _start(self, name: str, role: Role, body) -> Member:
        member = Member(name, trio.CancelScope())

        async def run(task_status) -> None:
            with member.scope:
                async with self.network.transport(name, role) as transport:
                    await body(transport, task_status)
            member.ended.set()

        member.address = await self._nursery.start(run)
        self.members[name] = member
        return member

    async def start_controller(self, *, grace_s: float = 5.0, replace_after_s: float = 600.0) -> None:
        settings = ControllerSettings(
            name="controller", delete_grace_s=grace_s, replace_after_s=replace_after_s
        )

        async def body(transport, task_status) -> None:
            engine = SimulatedEngine(self.runtime, self.catalog_disk)
            self.catalog_disk = engine.disk
            await serve_controller(
                transport=transport,
                address="tcp://127.0.0.1:7700",
                group=SoleGroup(engine),
                runtime=self.runtime,
                settings=settings,
                keys=self.keys_of("controller"),
                task_status=task_status,
            )

        member = await self._start("controller", Role.CONTROLLER, body)
        self.controllers = [member.address]

    async def start_shared(self, controllers: int, pools: int) -> None:
        """Start several controllers on one store, with pools and an app."""
        self.shared = SharedStore(SimulatedEngine(self.runtime, self.catalog_disk), lease_s=LEASE_S)
        for number in range(1, controllers + 1):
            await self.start_shared_controller(f"controller-{number}")
        for number in range(1, pools + 1):
            await self.start_pool(f"pool-{number}")
        await self.start_app()

    async def start_shared_controller(self, name: str, *, known: bool = True) -> None:
        """Start one of several controllers; pools and apps that start later know it when it is `known`."""
        settings = ControllerSettings(name=name, delete_grace_s=5.0)
        link = self.links[name] = StoreLink(self.shared)
        link.delay_s = lambda: self.entropy.uniform(0.0005, 0.003)

        async def body(transport, task_status) -> None:
            await serve_controller(
                transport=transport,
                address=f"tcp://127.0.0.1:{7710 + int(name[-1])}",
                group=SimulatedGroup(link, self.runtime),
                runtime=self.runtime,
                settings=settings,
                keys=self.keys_of(name),
                task_status=task_status,
            )

        member = await self._start(name, Role.CONTROLLER, body)
        if known:
            self.controllers.append(member.address)

    async def start_followers(self, controllers: int, pools: int, *, sync: int = 1) -> None:
        """Start controllers that each have a copy of the catalogue, the first as the master."""
        for number in range(1, controllers + 1):
            await self.start_follower(f"controller-{number}", sync=sync)
        for number in range(1, pools + 1):
            await self.start_pool(f"pool-{number}")
        await self.start_app()

    async def start_follower(self, name: str, *, sync: int = 1, known: bool = True) -> None:
        """Start one of them. The first begins the cluster; the others join those that were started before."""
        copy = self.copies.get(name)
        if copy is None:
            copy = self.copies[name] = Copy(begins=not self.copies)
        address = f"tcp://127.0.0.1:{7710 + int(name[-1])}"

        async def body(transport, task_status) -> None:
            engine = SimulatedEngine(self.runtime, copy.disk, keep_revisions=copy.keep_revisions)
            copy.disk, copy.engine = engine.disk, engine
            terms = Terms()
            async with open_connections(transport, terms=Terms()) as connections:
                copy.group = FollowersGroup(
                    engine,
                    copy.promises,
                    copy.keep_lost,
                    connections,
                    self.runtime,
                    terms,
                    FollowersSettings(
                        name=name,
                        sync=sync,
                        cluster_id=b"" if copy.begins else self.cluster_id(),
                        controllers=tuple(other for other in self.controllers if other != address),
                        journal=self.journal,
                    ),
                )
                async with open_followers_group(copy.group) as group:
                    await serve_controller(
                        transport=transport,
                        address=address,
                        group=group,
                        runtime=self.runtime,
                        settings=ControllerSettings(name=name, delete_grace_s=5.0),
                        keys=self.keys_of(name),
                        cluster_id=group.cluster_id,
                        terms=terms,
                        handlers=group.handlers(),
                        task_status=task_status,
                    )

        member = await self._start(name, Role.CONTROLLER, body)
        if known and member.address not in self.controllers:
            self.controllers.append(member.address)

    def cluster_id(self) -> bytes:
        """Return the id that the copies of the catalogue have."""
        disks = [copy.disk for copy in self.copies.values() if copy.disk.revision]
        (found,) = {unpack_fields(disk.entries[CLUSTER].value, "cluster")[0] for disk in disks}
        return found

    async def start_pool(self, name: str) -> None:
        disk = self.disks.setdefault(name, SimulatedDisk())
        store = self.stores[name] = SimulatedStore(disk, entropy=self.entropy)

        async def body(transport, task_status) -> None:
            await serve_pool(
                transport=transport,
                address="tcp://127.0.0.1:0",
                store=store,
                controllers=list(self.controllers),
                runtime=self.runtime,
                journal=self._journal_of(name),
                settings=PoolSettings(name=name, machine=self.machines.get(name, "one")),
                allowed=self.allowed_of(name),
                task_status=task_status,
            )

        await self._start(name, Role.POOL, body)

    def _journal_of(self, name: str) -> JournalFolder:
        journal = self.journals.setdefault(name, Copy(begins=False))

        @asynccontextmanager
        async def opened():
            journal.engine = SimulatedEngine(self.runtime, journal.disk)
            journal.disk = journal.engine.disk
            yield journal.engine, journal.promises

        return JournalFolder(opened, journal.disk.revision > 0, journal.keep_lost)

    async def refused_pool(self, name: str) -> str:
        """Start a pool that the master must refuse, and return why."""
        refusal = ""

        async def start(task_status) -> None:
            nonlocal refusal
            store = SimulatedStore(self.disks[name], entropy=self.entropy)
            try:
                async with self.network.transport(name, Role.POOL) as transport:
                    await serve_pool(
                        transport=transport,
                        address="tcp://127.0.0.1:0",
                        store=store,
                        controllers=list(self.controllers),
                        runtime=self.runtime,
                        settings=PoolSettings(name=name, machine="one"),
                    )
            except* IdentityError as group:
                error: BaseException = group
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                refusal = str(error)
            finally:
                store.close()
            task_status.started()

        await self._nursery.start(start)
        return refusal

    async def start_app(self) -> None:
        async def body(transport, task_status) -> None:
            await serve_app(
                transport=transport,
                address="tcp://127.0.0.1:7701",
                controllers=list(self.controllers),
                runtime=self.runtime,
                settings=AppSettings(name="app", chunk_size=CHUNK_SIZE),
                allowed=self.allowed_of("app"),
                task_status=task_status,
            )

        await self._start("app", Role.APP, body)

    async def kill(self, name: str) -> None:
        """End a process as SIGKILL does: its peers are told by the network, it says nothing."""
        self.network.kill(name)
        if name in self.stores:
            self.stores[name].crash()
        if name in self.links:
            self.links[name].dead = True
        for copy in (self.copies.get(name), self.journals.get(name)):
            if copy is not None and copy.engine is not None:
                copy.disk = copy.engine.crash()
        self.members[name].scope.cancel()
        await self.members[name].ended.wait()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        self._clients += 1
        async with (
            self.network.transport(f"client-{self._clients}", Role.CLIENT) as transport,
            open_client(self.members["app"].address, transport, self.runtime) as client,
        ):
            yield client


Story = Callable[[Cluster], Awaitable[None]]


@pytest.fixture
def simulate():
    """Run a story on a cluster under the mock clock; return a digest of everything that was delivered."""

    def run(story: Story, *, seed: int) -> str:
        digest = ""

        async def main() -> None:
            nonlocal digest
            async with trio.open_nursery() as nursery:
                cluster = Cluster(nursery, seed)
                await story(cluster)
                digest = cluster.trace.hexdigest()
                nursery.cancel_scope.cancel()

        run_mocked(main, seed=seed)
        return digest

    return run
