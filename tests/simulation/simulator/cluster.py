"""The processes of a run, on one network and many disks: started, killed and started again."""

import enum
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from droppexd.catalog.group import Group, Mandate, SoleGroup
from droppexd.catalog.keys import CLUSTER, version_key
from droppexd.catalog.keys import CONTROLLERS as MEMBERS
from droppexd.catalog.promises import SimulatedPromises
from droppexd.catalog.records import unpack_fields
from droppexd.catalog.replica import LogRow
from droppexd.catalog.simulated import SimulatedDisk as CatalogueDisk
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.catalog.simulated_group import ELECTION, SharedStore, SimulatedGroup, StoreLink
from droppexd.errors import DroppexError
from droppexd.model import Role
from droppexd.roles.app import AppSettings, serve_app
from droppexd.roles.controller import ControllerSettings, serve_controller
from droppexd.roles.followers import FollowersGroup, FollowersSettings, open_followers_group
from droppexd.roles.pool import PoolSettings, serve_pool
from droppexd.roles.pool_journal import JournalFolder
from droppexd.roles.pool_scrub import ScrubSettings
from droppexd.runtime import Runtime
from droppexd.store.simulated import SimulatedStore
from droppexd.wire.codec import decode
from droppexd.wire.memory import MemoryNetwork
from droppexd.wire.messages import Committed, Reconciled, Verdicts
from droppexd.wire.rpc import Terms, open_connections
from droppexd.wire.transport import Frame, Listener, Peer, Transport
from tests.simulation.simulator.checks.copies import Agreed
from tests.simulation.simulator.checks.terms import WrittenBy
from tests.simulation.simulator.plan import Shape
from tests.simulation.simulator.surroundings import BlockingWork, ProcessClock, SeededEntropy, runtime_of
from tests.simulation.simulator.trace import Trace
from tests.simulation.simulator.world import LIFE, Life, WatchedDisk, World

log = logging.getLogger("droppex.simulator")

CONTROLLERS = {f"controller-{number}": f"tcp://127.0.0.1:{7700 + number}" for number in (1, 2, 3)}
"""Of a cluster with one, another runs only when a fault has it take over, and stands on the same engine."""
APPS = {f"app-{number}": f"tcp://127.0.0.1:{7800 + number}" for number in (1, 2)}

UPLOADS_KEPT_S = 20.0
"""Those that nobody goes on with are given up while a run lasts."""

NO_CRASH = "no-crash"
JOURNALED = "acknowledged-is-journaled"

SYNC = 1
"""So many standbys confirm, of controllers that have copies."""

_RETIRE_TRIES = 20
_RESTART_S = 3.0
"""A process that ended with an error is started again after so long, as a service manager does."""
_FLUSH_S = (0.0003, 0.002)


@dataclass
class Process:
    """One start of a process."""

    name: str
    runtime: Runtime
    clock: ProcessClock
    work: BlockingWork
    disk: WatchedDisk | None = None
    store: SimulatedStore | None = None
    link: StoreLink | None = None
    """To the store that several controllers share."""
    copy: SimulatedEngine | None = None
    """Of a controller that has a copy of the catalogue."""
    followers: FollowersGroup | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ready: bool = False
    killed: bool = False
    life: Life = field(default_factory=Life)


class Shortage(enum.Enum):
    """How full a catalogue's disk is."""

    DELETES_ONLY = enum.auto()
    """What is left of the ballast is for changes that give room."""
    NOTHING = enum.auto()


CATALOGUE = "catalogue"
"""What stands for its disk where controllers share one."""


def _have_room(engine: SimulatedEngine, shortage: Shortage | None) -> None:
    engine.shortage = "" if shortage is None else "the simulated disk is full: nothing is added"
    engine.full = shortage is Shortage.NOTHING


class Cluster:
    """One controller at least, apps, pools; what they stand on, and what is done to them."""

    def __init__(self, nursery: trio.Nursery, seed: int, shape: Shape, world: World, trace: Trace) -> None:
        self.shape = shape
        self.world = world
        self.trace = trace
        self.network = MemoryNetwork(
            SeededEntropy(f"{seed} network"),
            delay_s=shape.delay_s,
            silence_s=shape.silence_s,
            trace=self._delivered,
        )
        self.processes: dict[str, Process] = {}
        self.wanted: dict[str, None] = {}
        """The processes that shall run."""
        self.engine: SimulatedEngine | None = None
        self.agreed: Agreed | None = None
        """The copies of controllers that have one each."""
        self.promises: dict[str, SimulatedPromises] = {}
        self.journals: dict[str, tuple[CatalogueDisk, SimulatedPromises]] = {}
        """What pools keep of the catalogue, by the name of their disk."""
        self.shared: SharedStore | None = None
        """What several controllers stand on; it outlives them all."""
        self.shortages: dict[str, Shortage] = {}
        """Controllers whose disks are full; of those that share a catalogue, which they find so: `CATALOGUE`."""
        self.catalogue_latency_s = 0.0
        self.verdict_latency_s = 0.0
        """From a controller's look at many records to its answer; other answers are not late."""
        self.disk_of: dict[str, WatchedDisk] = {}
        """Which disk is in which pool's machine: they can be swapped."""
        self.latency_s: dict[str, float] = {}
        self.wall_offset_ms: dict[str, int] = {}
        self.replace_pool: Callable[[int, bool], Awaitable[None]]
        """How an operator replaces a pool; set by the simulation, whose clients come after the cluster."""
        self.drain_pool: Callable[..., Awaitable[bool]]
        self.remove_pool: Callable[[int], Awaitable[bool]]
        self.deciding = 0
        """Operators who are about to be heard."""
        self.promote: Callable[[str], Awaitable[None]]
        """How an operator promotes a controller; set by the simulation as well."""
        self.replacing: set[int] = set()
        """The pools that an operator is about to replace."""
        self._nursery = nursery
        self._seed = seed
        self._starts = 0
        self._flush_entropy = SeededEntropy(f"{seed} flush")
        if shape.copies:
            self.agreed = Agreed(world, self.controllers, SYNC)
            self.promises = {name: SimulatedPromises() for name in self.controllers}
        self.absent = set(shape.pools[len(shape.pools) - shape.later :])
        """The pools that are no part of the cluster yet."""
        for name, capacity in zip(shape.pools, shape.capacities, strict=True):
            self.disk_of[name] = world.disks[name] = WatchedDisk(name, capacity, world)

    @property
    def apps(self) -> tuple[str, ...]:
        """The names of the apps of this cluster."""
        return tuple(APPS)[: self.shape.apps]

    def start_all(self) -> None:
        """Start what is not running, apart from pools that are lost and a second controller of one."""
        if self.shape.controllers > 1:
            for name in self.controllers:
                self.start(name)
        elif not any(name in self.wanted for name in CONTROLLERS):
            self.start("controller-1")
        for name in self.shape.pools:
            self.start(name)
        for name in self.apps:
            self.start(name)

    @property
    def controllers(self) -> tuple[str, ...]:
        """The names of the controllers of a cluster that has several; of another, those that may take over."""
        return tuple(CONTROLLERS)[: max(2, self.shape.controllers)]

    def running(self, name: str) -> bool:
        """Whether a process runs, be it paused or cut off."""
        return name in self.processes

    def acting(self, name: str) -> str:
        """Return the name itself, or for the first controller the one that is the master in its stead."""
        if name not in CONTROLLERS:
            return name
        if self.shape.controllers > 1:
            return (self._master() or name) if name == next(iter(CONTROLLERS)) else name
        return next((other for other in CONTROLLERS if other in self.wanted), name)

    def _master(self) -> str:
        """Return the controller that has the mandate; empty when nobody has."""
        if self.agreed is not None:
            leading = [
                one for one in self.processes.values() if one.followers is not None and one.followers.leads
            ]
            return max(leading, key=lambda one: one.followers.leads).name if leading else ""
        entry = self.world.catalogue.entries.get(ELECTION)
        address = entry.value.decode() if entry is not None else ""
        return next((name for name, there in CONTROLLERS.items() if there == address), "")

    def start(self, name: str) -> None:
        """Start a process, unless it runs, or is a pool without a disk, or no part of the cluster yet."""
        if name in self.absent or (name in self.disk_of and self.disk_of[name].lost):
            return
        self.wanted[name] = None
        if name in self.processes:
            return
        self._starts += 1
        runtime, clock, work = runtime_of(f"{self._seed} {name} {self._starts}")
        process = self.processes[name] = Process(name, runtime, clock, work)
        clock.wall_offset_ms = self.wall_offset_ms.get(name, 0)
        work.latency_s = self.latency_s.get(name, 0.0)
        self.trace.say(f"{name} starts")
        self._nursery.start_soon(self._run, process)

    def kill(self, name: str, *, written: int = 0) -> None:
        """End a process as SIGKILL and a power failure do: at once, and without a word.

        Of the catalogue's transactions that wait, the first `written` reach the disk.
        """
        self.wanted.pop(name, None)
        process = self.processes.pop(name, None)
        if process is None:
            return
        self.trace.say(f"{name} is killed")
        process.killed = True
        self._end(process, written=written)

    def _end(self, process: Process, *, written: int = 0) -> None:
        process.life.over = True
        self.network.kill(process.name)
        if process.store is not None:
            process.store.crash()
        if process.link is not None:
            process.link.dead = True
        elif process.copy is not None:
            process.copy.crash(written=written if process.name in CONTROLLERS else 0)
        elif process.name in CONTROLLERS and not any(name in self.processes for name in CONTROLLERS):
            self._crash_engine(written)
        process.scope.cancel()

    def _crash_engine(self, written: int) -> None:
        if self.engine is not None:
            self.engine.crash(written=written)
            self.engine = None

    async def _run(self, process: Process) -> None:
        name = process.name
        if process.killed:
            return  # In the moment in which it was to start: another start may have its place by now.
        LIFE.set(process.life)
        failure: DroppexError | None = None
        try:
            with process.scope:
                async with self.network.transport(name, self._role(name)) as transport:
                    await self._serve(process, transport)
        except* DroppexError as errors:
            failure = errors.exceptions[0]
        except* Exception as errors:
            if not process.killed:
                self.world.report(NO_CRASH, f"{name} ended with a bug: {errors.exceptions!r}")
                log.exception("%s ended with a bug", name)
        if process.killed:
            return
        if self.processes.get(name) is process:
            del self.processes[name]
            self._end(process)
        self.trace.say(f"{name} ended: {failure}")
        await trio.sleep(_RESTART_S)
        if name in self.wanted:
            self.start(name)

    def _role(self, name: str) -> Role:
        if name in CONTROLLERS:
            return Role.CONTROLLER
        return Role.APP if name in APPS else Role.POOL

    async def _serve(self, process: Process, transport) -> None:
        def ready(address: str) -> None:
            process.ready = True
            self.trace.say(f"{process.name} is ready at {address}")

        status = _Started(ready)
        if process.name in CONTROLLERS:
            await self._serve_controller(process, transport, status)
        elif process.name in APPS:
            await self._serve_app(process, transport, status)
        else:
            await self._serve_pool(process, transport, status)

    async def _serve_controller(self, process: Process, transport, status) -> None:
        if self.agreed is None:
            await self._serve_in_group(process, transport, status, self._group_of(process))
            return
        name = process.name
        copy = process.copy = self._engine_on(self.agreed.disks[name], process.runtime, name)
        terms = Terms()
        async with open_connections(transport, terms=Terms()) as connections:
            settings = FollowersSettings(
                name=name,
                sync=SYNC,
                cluster_id=await self._cluster_id(name),
                controllers=tuple(at for other, at in CONTROLLERS.items() if other != name),
                journal=self.shape.journal,
            )
            group = process.followers = FollowersGroup(
                copy, self.promises[name], self._keep_lost, connections, process.runtime, terms, settings
            )
            async with open_followers_group(group):
                await self._serve_in_group(
                    process, transport, status, group, terms=terms, handlers=group.handlers()
                )

    async def _cluster_id(self, name: str) -> bytes:
        """Return the id of the cluster that a controller is of, which the first one begins."""
        if name == next(iter(CONTROLLERS)):
            return b""
        first = next(iter(self.agreed.disks.values()))
        while CLUSTER not in first.entries:
            await trio.sleep(0.1)
        return unpack_fields(first.entries[CLUSTER].value, "cluster")[0]

    async def _keep_lost(self, _term: int, rows: Sequence[LogRow]) -> str:
        self.world.happened["operations set aside"] += len(rows)
        return "the trace"

    async def _serve_in_group(self, process: Process, transport, status, group: Group, **more) -> None:
        shape = self.shape
        await serve_controller(
            transport=_LateVerdicts(transport, self),
            address=CONTROLLERS[process.name],
            group=group,
            runtime=process.runtime,
            settings=ControllerSettings(
                name=process.name,
                heartbeat_s=shape.heartbeat_s,
                down_after_s=shape.down_after_s,
                replace_after_s=shape.replace_after_s,
                session_lease_s=shape.session_lease_s,
                delete_grace_s=shape.delete_grace_s,
                uploads_kept_s=UPLOADS_KEPT_S,
                housekeeping_s=shape.housekeeping_s,
            ),
            task_status=status,
            **more,
        )

    def _group_of(self, process: Process) -> Group:
        if self.shape.controllers == 1:
            if self.engine is None or self.engine.failure:
                self._crash_engine(0)
                self.engine = self._engine_on(self.world.catalogue, process.runtime)
            return SoleGroup(WrittenBy(process.name, self.engine, self.world))
        if self.shared is None:
            runtime, _, _ = runtime_of(f"{self._seed} store")
            engine = self._engine_on(self.world.catalogue, runtime)
            self.shared = SharedStore(engine, lease_s=self.shape.lease_s)
        process.link = StoreLink(self.shared)
        process.link.delay_s = lambda: self._flush_entropy.uniform(*self.shape.delay_s)
        return _WatchedGroup(process, self.world)

    def _engine_on(self, disk: CatalogueDisk, runtime: Runtime, name: str = CATALOGUE) -> SimulatedEngine:
        engine = SimulatedEngine(runtime, disk, flush=self._flush)
        _have_room(engine, self.shortages.get(name))
        return engine

    def fill_disk(self, controller: str, shortage: Shortage | None) -> None:
        """Leave the disk of a controller's catalogue no room, or make room again with None."""
        if self.agreed is None:
            name, engine = CATALOGUE, self.engine if self.shared is None else self.shared.engine
        else:
            process = self.processes.get(controller)
            name, engine = controller, process.copy if process is not None else None
        if shortage is None:
            self.shortages.pop(name, None)
        else:
            self.shortages[name] = shortage
        if engine is not None:
            _have_room(engine, shortage)

    async def _flush(self) -> None:
        await trio.sleep(self.catalogue_latency_s + self._flush_entropy.uniform(*_FLUSH_S))

    async def _serve_app(self, process: Process, transport, status) -> None:
        shape = self.shape
        await serve_app(
            transport=transport,
            address=APPS[process.name],
            controllers=[CONTROLLERS[name] for name in self.controllers],
            runtime=process.runtime,
            settings=AppSettings(
                name=process.name,
                buffer_bytes=shape.buffer_chunks * shape.chunk_size * 3 // 2,
                chunk_size=shape.chunk_size,
                idle_s=shape.idle_s,
            ),
            task_status=status,
        )

    async def _serve_pool(self, process: Process, transport, status) -> None:
        name = process.name.removesuffix("-clone")
        disk = process.disk = process.disk or self.disk_of[name]
        disk.on_access = process.work.on_access
        process.store = SimulatedStore(disk, entropy=process.runtime.entropy)
        machine = self.shape.machines[self.shape.pools.index(name)]
        await serve_pool(
            transport=transport,
            address="tcp://127.0.0.1:0",
            store=process.store,
            controllers=[CONTROLLERS[name] for name in self.controllers],
            runtime=process.runtime,
            journal=self._journal_of(process) if self.agreed is not None else None,
            settings=PoolSettings(
                name=process.name,
                machine=machine,
                review_s=self.shape.review_s,
                idle_s=self.shape.idle_s,
                scrub=ScrubSettings(every_s=self.shape.scrub_every_s),
            ),
            task_status=status,
        )

    def _journal_of(self, process: Process) -> JournalFolder:
        """Return where a pool keeps the catalogue's log: on its disk, with which it goes."""
        disk, promises = self.journals.setdefault(process.disk.name, (CatalogueDisk(), SimulatedPromises()))

        @asynccontextmanager
        async def opened() -> AsyncIterator[tuple[SimulatedEngine, SimulatedPromises]]:
            process.copy = SimulatedEngine(process.runtime, disk, flush=self._flush)
            yield process.copy, promises

        return JournalFolder(opened, disk.revision > 0, self._keep_lost)

    def _delivered(self, when: float, source: str, target: str, frames: Sequence[Frame]) -> None:
        """Note a delivery; a receipt that reaches an app is for what a pool has in its journal."""
        self.trace.delivered(when, source, target, frames)
        if not self.shape.journal or source not in CONTROLLERS or target not in APPS:
            return
        message = decode(frames).message
        if isinstance(message, Committed) and not self._journaled(version_key(message.receipt.version)):
            self.world.report(JOURNALED, f"no journal has version {message.receipt.version}")

    def _journaled(self, key: bytes) -> bool:
        """Whether a pool has written down a record under this key, whatever became of the pool since."""
        return any(
            key in disk.entries or any(entry.key == key for entry in disk.log)
            for disk, _ in self.journals.values()
        )

    def start_soon(self, function, *arguments) -> None:
        """Have something happen beside the processes."""
        self._nursery.start_soon(function, *arguments)

    # -- what faults do besides --------------------------------------------------------------------

    def start_clone(self, name: str) -> str:
        """Start a second pool on a copy of a pool's disk, and return its name."""
        original = self.disk_of[name]
        copy = WatchedDisk(f"{name}-clone", original.capacity, World())
        copy.pool_id = original.pool_id
        copy.restore(original.snapshot())
        clone = f"{name}-clone"
        runtime, clock, work = runtime_of(f"{self._seed} {clone}")
        process = self.processes[clone] = Process(clone, runtime, clock, work, disk=copy)
        self._nursery.start_soon(self._run, process)
        return clone

    def insert_disk(self, name: str) -> None:
        """Put an empty disk into a pool's machine, in the place of the one that is there."""
        old = self.disk_of[name]
        new = WatchedDisk(f"the new disk of {name}", old.bought_capacity, self.world)
        self.disk_of[name] = self.world.disks[new.name] = new

    def replace(self, pool: int, *, force: bool) -> None:
        """Have an operator replace a pool, who tries until it is done."""
        self.replacing.add(pool)
        self._nursery.start_soon(self._replace, pool, force)

    async def _replace(self, pool: int, force: bool) -> None:
        await self.replace_pool(pool, force)
        self.replacing.discard(pool)
        self.trace.say(f"pool {pool} is replaced")
        self.world.happened["pool replaced"] += 1

    def drain(self, pool: int, name: str, *, force: bool) -> None:
        """Have an operator drain a pool, who tries until that is heard."""
        self._nursery.start_soon(self._drain, pool, force)

    async def _drain(self, pool: int, force: bool) -> None:
        self.deciding += 1
        if await self.drain_pool(pool, force=force):
            self.trace.say(f"pool {pool} is drained")
            self.world.happened["pool drained"] += 1
        self.deciding -= 1

    def undo_drain(self, pool: int) -> None:
        """Have an operator use a pool again that was drained."""
        self._nursery.start_soon(self._undo_drain, pool)

    async def _undo_drain(self, pool: int) -> None:
        self.deciding += 1
        if await self.drain_pool(pool, undo=True):
            self.trace.say(f"pool {pool} is used again")
        self.deciding -= 1

    def retire(self, pool: int, name: str) -> None:
        """Have an operator take a drained pool out as soon as it is empty, and its disk away."""
        self._nursery.start_soon(self._retire, pool, name)

    async def _retire(self, pool: int, name: str) -> None:
        disk = self.disk_of[name]
        for _ in range(_RETIRE_TRIES):
            if self.disk_of[name] is not disk or disk.lost:
                return
            if await self.remove_pool(pool):
                self.kill(name)
                self.wanted.pop(name, None)
                disk.lost = True
                self.trace.say(f"pool {pool} is taken out")
                self.world.happened["pool removed"] += 1
                return
            await trio.sleep(1.0)

    @property
    def has_master(self) -> bool:
        """Whether a controller that runs and is heard by its standbys is the master."""
        return any(
            one.followers is not None and one.followers.leads and not one.followers.health.failure
            for one in self.processes.values()
        )

    def all_follow(self) -> bool:
        """Whether all controllers that have copies are known to the master and have what it has."""
        if self.agreed is None:
            return True
        known = sum(key.startswith(MEMBERS) for key in self.world.catalogue.entries)
        return known == len(self.agreed.disks) and not self.agreed.difference()

    def set_latency(self, name: str, latency_s: float) -> None:
        """Make a process's disk slow, now and after a restart; 0 ends that."""
        self.latency_s[name] = latency_s
        if name in self.processes:
            self.processes[name].work.latency_s = latency_s

    def set_wall_clock(self, name: str, offset_ms: int) -> None:
        """Let a process's wall clock be wrong by so much."""
        self.wall_offset_ms[name] = offset_ms
        if name in self.processes:
            self.processes[name].clock.wall_offset_ms = offset_ms


class _WatchedGroup(SimulatedGroup):
    """A group of which it is watched what each master writes."""

    def __init__(self, process: Process, world: World) -> None:
        super().__init__(process.link, process.runtime)
        self._process = process
        self._world = world

    @asynccontextmanager
    async def campaign(self, address: str) -> AsyncIterator[Mandate]:
        async with super().campaign(address) as mandate:
            mandate.engine = WrittenBy(self._process.name, mandate.engine, self._world)
            self._world.happened["mandate"] += 1
            yield mandate


class _LateVerdicts:
    """A controller's transport, on which the answers to long questions may be late."""

    def __init__(self, transport: Transport, cluster: Cluster) -> None:
        self._transport = transport
        self._cluster = cluster
        self.connect = transport.connect

    def listen(self, address: str, receive) -> "_LateListener":
        return _LateListener(self._transport.listen(address, receive), self._cluster)


class _LateListener:
    """A listener that sends some answers later than others."""

    def __init__(self, listener: Listener, cluster: Cluster) -> None:
        self._listener = listener
        self._cluster = cluster
        self._closed = False
        self.address = listener.address

    def send(self, peer: Peer, frames: Sequence[Frame]) -> None:
        latency_s = self._cluster.verdict_latency_s
        if latency_s and isinstance(decode(frames).message, Reconciled | Verdicts):
            self._cluster.start_soon(self._send_later, latency_s, peer, frames)
        else:
            self._listener.send(peer, frames)

    async def _send_later(self, latency_s: float, peer: Peer, frames: Sequence[Frame]) -> None:
        await trio.sleep(latency_s)
        if not self._closed:
            self._listener.send(peer, frames)

    def close(self) -> None:
        self._closed = True
        self._listener.close()


class _Started:
    """Stands for trio's task status: a process is started by nobody who waits."""

    def __init__(self, ready) -> None:
        self._ready = ready

    def started(self, value=None) -> None:
        self._ready(value)
