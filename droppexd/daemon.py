"""The composition root: real clock, entropy, threads, signals and sockets, and the roles asked for.

Everything that is not decided by the configuration is decided here, and only here.
"""

import functools
import logging
import os
import random
import resource
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, TypeVarTuple

import trio

from droppexd.config import Config
from droppexd.errors import CatalogError, ConfigError, KeyRefused, PeerError, StoreError
from droppexd.folders import make_folder
from droppexd.model import MAX_CONTROLLERS, Role
from droppexd.runtime import Runtime
from droppexd.service_manager import ServiceManager

if TYPE_CHECKING:
    from droppexd.catalog.group import Group
    from droppexd.catalog.membership import Membership
    from droppexd.finding import Bucket, Finder
    from droppexd.roles.controller_peers import Publish
    from droppexd.roles.pool_journal import JournalFolder
    from droppexd.roles.rebuilding import Rebuilt
    from droppexd.store.ballast import Ballast
    from droppexd.wire.keys import AllowList, KeyPair, TransportKeys
    from droppexd.wire.member_messages import Enrolled
    from droppexd.wire.messages import Request
    from droppexd.wire.rpc import Connections, Handler, Terms
    from droppexd.wire.tokens import Token
    from droppexd.wire.transport import Transport

log = logging.getLogger("droppex.daemon")

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

JOURNAL_FOLDER = "journal"
"""Its name in a pool's folder."""

_JOURNAL_CACHE_KIB = 2048
"""It is written to and hardly ever read."""

_CATALOGUE_BALLAST_BYTES = 16 * 1024 * 1024
_CATALOGUE_BALLAST_SHARE = 64
"""At most this part of a controller's disk."""

SHUTDOWN_S = 10.0
"""From the signal to the end of the process. A role's requests get less than that to finish."""

CONNECT_S = 5.0
JOIN_S = 30.0
"""For so long a master is looked for to make a token, or a member."""

FIRST_LIST_S = 30.0
"""For so long a controller that joins waits for the list of who may connect."""

_WORKER_THREADS = 16
"""Blocking calls at once: enough for a disk's queue and a few codings; more only wait for each other."""

_START_ORDER = (Role.CONTROLLER, Role.POOL, Role.APP)
"""Pools and apps ask for the controller, and nobody asks for an app. Roles stop the other way round."""


class SystemClock:
    """The clock of this machine, within trio."""

    def now(self) -> float:
        """Return seconds since an unspecified moment."""
        return trio.current_time()

    def wall_ms(self) -> int:
        """Return milliseconds since 1970."""
        return time.time_ns() // 1_000_000


class SystemEntropy:
    """Randomness of the operating system."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def token(self, size_bytes: int) -> bytes:
        """Return that many unpredictable bytes."""
        return secrets.token_bytes(size_bytes)

    def uniform(self, low: float, high: float) -> float:
        """Return a number between the two."""
        return self._random.uniform(low, high)


class WorkerThreads:
    """Blocking work in a bounded number of threads."""

    def __init__(self, most: int = _WORKER_THREADS) -> None:
        self._limiter = trio.CapacityLimiter(most)

    def __call__(self, function: Callable[[*Ts], T], *args: *Ts) -> Awaitable[T]:
        """Return what the function returns. A call that has begun is waited for, cancelled or not."""
        return trio.to_thread.run_sync(function, *args, limiter=self._limiter)


class ThreadsLeftBehind:
    """Blocking work on what may hang for ever, as a share of the network does.

    A call that is cancelled is left to itself. The next one waits until it is over, so that what hangs costs
    one thread, and what was written first is not written last.
    """

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)

    def __call__(self, function: Callable[[*Ts], T], *args: *Ts) -> Awaitable[T]:
        """Return what the function returns."""
        return trio.to_thread.run_sync(function, *args, abandon_on_cancel=True, limiter=self._limiter)


def thread_waits() -> int:
    """Return how often this thread has given up its processor to wait for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def system_runtime() -> Runtime:
    """Return the real clock, entropy and threads; must be called within trio."""
    entropy, run_blocking = SystemEntropy(), WorkerThreads()
    if not hasattr(resource, "RUSAGE_THREAD"):  # It is Linux that counts for each thread.
        return Runtime(clock=SystemClock(), entropy=entropy, run_blocking=run_blocking)
    return Runtime(clock=SystemClock(), entropy=entropy, run_blocking=run_blocking, waits=thread_waits)


class Ready(NamedTuple):
    """What a role says of itself once it serves."""

    role: Role
    name: str
    address: str
    data: str


async def run_roles(
    config: Config, report: Callable[[Ready], None], manager: ServiceManager | None = None
) -> None:
    """Run the roles until SIGTERM or SIGINT, then stop them in order, within SHUTDOWN_S.

    `report` hears of each role when it serves, and the service manager when all do. What goes wrong in a role
    comes out as it is, or in a group.
    """
    manager = manager or ServiceManager()
    serving: list[str] = []

    def tell(ready: Ready) -> None:
        report(ready)
        serving.append(f"{ready.role} at {ready.address}")
        if len(serving) == len(config.roles):
            manager.ready(", ".join(serving))

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            process = _Process(config, _load_keys(config), tell)
            manager.status(f"starting: {', '.join(config.roles)}")
            nursery.start_soon(manager.watch)
            nursery.start_soon(process.run)
            nursery.start_soon(_stop_at_signal, signals, process, nursery.cancel_scope, manager)


async def _stop_at_signal(
    signals: AsyncIterator[int], process: "_Process", everything: trio.CancelScope, manager: ServiceManager
) -> None:
    name = signal.Signals(await anext(signals)).name
    manager.stopping()
    log.info("stopping signal=%s", name)
    with _deadline(SHUTDOWN_S):
        await process.stop()
        everything.cancel()
    log.info("stopped")


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """End the process when the block takes longer: from a thread, for an event loop that hangs as well."""

    def give_up() -> None:
        log.error("not stopped after %g s: ending anyway", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Started:
    """Tells that a role serves: what `serve_...` gets as its task status."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self.event = trio.Event()

    def started(self, value: str = "") -> None:
        """Take the address that the role is bound to."""
        self._report(value)
        self.event.set()


class _Running:
    """A role of this process."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


class _Opened(NamedTuple):
    """The group of a controller, and what came with it."""

    group: "Group"
    cluster_id: bytes
    """Which cluster it is of; empty when that is still to be begun."""
    handlers: "Mapping[type[Request[Any]], Handler]"
    """What the group answers to other controllers."""


class _Process:
    """The roles of this process, and the order in which they start and stop."""

    def __init__(
        self, config: Config, keys: "Mapping[Role, TransportKeys]", report: Callable[[Ready], None]
    ) -> None:
        self._config = config
        self._keys = keys
        self._report = report
        self._runtime = system_runtime()
        self._controllers: tuple[str, ...] = config.controllers
        self._starting = trio.CancelScope()
        self._running: dict[Role, _Running] = {}

    async def run(self) -> None:
        """Run the roles. The controller serves before the others ask for it, and the app knows the pool."""
        async with trio.open_nursery() as nursery:
            with self._starting:
                for role in _START_ORDER:
                    if role in self._config.roles:
                        running = self._running[role] = _Running()
                        started = _Started(functools.partial(self._serves, role))
                        nursery.start_soon(self._run_role, role, running, started)
                        if role != Role.APP:
                            await started.event.wait()

    async def stop(self) -> None:
        """Stop the roles one after another, each with what it has under way."""
        self._starting.cancel()
        for running in reversed(self._running.values()):
            running.scope.cancel()
            await running.ended.wait()

    def _serves(self, role: Role, address: str) -> None:
        config = self._config
        data = "" if role == Role.APP else str(config.folder(role).absolute())
        log.info("%s ready name=%s address=%s data=%s", role, config.name, address, data or "-")
        if role == Role.CONTROLLER and (self._config.master or not self._controllers):
            self._controllers = (*self._controllers, address)
        self._report(Ready(role, config.name, address, data))

    async def _run_role(self, role: Role, running: _Running, started: _Started) -> None:
        from droppexd.wire.zeromq import open_zeromq_transport

        serve = {Role.CONTROLLER: self._controller, Role.POOL: self._pool, Role.APP: self._app}[role]
        try:
            # A transport for each role: a key proves one role only. It works until its role has ended.
            async with open_zeromq_transport(
                keys=self._keys.get(role), io_threads=self._config.io_threads
            ) as transport:
                with running.scope:
                    await serve(transport, started)
        finally:
            running.ended.set()

    async def _controller(self, transport: "Transport", started: _Started) -> None:
        from droppexd.roles.controller import ControllerSettings, serve_controller
        from droppexd.wire.rpc import Terms

        config = self._config
        folder = await self._runtime.run_blocking(_make_folder, config.folder(Role.CONTROLLER))
        await self._remember_members(Role.CONTROLLER, folder)
        membership = await self._membership(transport, folder)
        terms = Terms()
        async with self._open_group(transport, terms, folder, membership) as opened:
            await serve_controller(
                transport=transport,
                address=config.controller_listen,
                group=opened.group,
                runtime=self._runtime,
                cluster_id=opened.cluster_id,
                terms=terms,
                handlers=opened.handlers,
                publish=self._publisher(),
                keys=self._keys.get(Role.CONTROLLER),
                settings=ControllerSettings(
                    name=config.name,
                    cluster_id=bytes.fromhex(config.cluster),
                    advertise=config.controller_advertise,
                    machine=config.machine,
                    heartbeat_s=config.controller_heartbeat,
                    down_after_s=config.controller_down_after,
                    replace_after_s=config.controller_replace_after,
                    delete_grace_s=config.controller_delete_grace,
                    uploads_kept_s=config.controller_uploads_kept,
                    session_lease_s=config.controller_session_lease,
                ),
                task_status=started,
            )

    def _bucket(self) -> "Bucket | None":
        """Return the document that says where the controllers are; None where there is none."""
        from droppexd.bucket import read_signing_key
        from droppexd.finding import Bucket

        config = self._config
        if not config.bucket:
            return None
        public, secret = bytes.fromhex(config.bucket_key), b""
        if Role.CONTROLLER in config.roles and config.bucket_signing_key:
            secret = read_signing_key(Path(config.bucket_signing_key), public)
        return Bucket(config.bucket, public, ThreadsLeftBehind(), secret)

    def _publisher(self) -> "Publish | None":
        from droppexd.bucket import Whereabouts

        bucket = self._bucket()
        if bucket is None:
            return None

        async def publish(cluster_id: bytes, term: int, controllers: Sequence[str]) -> bool:
            now_ms = self._runtime.clock.wall_ms()
            some = tuple(controllers[:MAX_CONTROLLERS])
            return await bucket.publish(Whereabouts(cluster_id, term, controllers[0], some, now_ms))

        return publish

    def _finder(self) -> "Finder":
        from droppexd.finding import Finder

        return Finder(self._controllers, self._bucket())

    async def _membership(self, transport: "Transport", folder: Path) -> "Membership | None":
        """Return which cluster this controller is one of several of; None when it is alone or begins one."""
        from droppexd.catalog.membership import Membership, read_membership, write_membership
        from droppexd.catalog.sqlite import CATALOGUE_FILE
        from droppexd.roles.joining import ask_group
        from droppexd.wire.rpc import Terms, open_connections

        known = await self._runtime.run_blocking(read_membership, folder)
        if known is not None or not self._config.master:
            return known
        if (folder / CATALOGUE_FILE).exists():
            return None  # Of the same cluster or of another: the group sees to that.
        async with open_connections(transport, terms=Terms()) as connections:
            find = functools.partial(self._finder().find, 0)
            described = await ask_group(connections, self._config.master, find)
            await self._learn_members(connections, folder)
        joined = Membership(
            cluster_id=described.cluster_id,
            engine=described.engine,
            endpoints=described.endpoints,
            prefix=described.prefix,
            controllers=self._config.master,
        )
        await self._runtime.run_blocking(write_membership, folder, joined)
        return joined

    async def _remember_members(self, role: Role, folder: Path) -> None:
        """Let in whom this data folder names, until a master is heard."""
        from droppexd.roles.admission import read_members_into

        keys = self._keys.get(role)
        if keys is not None:
            await self._runtime.run_blocking(read_members_into, folder, keys.allowed)

    async def _learn_members(self, connections: "Connections", folder: Path) -> None:
        """Let in whom the controllers let in that this one joins: they will connect to it."""
        from droppexd.roles.admission import fetch, write_members
        from droppexd.roles.master import MasterLink

        keys = self._keys.get(Role.CONTROLLER)
        if keys is not None:
            master = MasterLink(connections, self._config.master, self._runtime)
            await fetch(keys.allowed, functools.partial(master.call, timeout_s=FIRST_LIST_S))
            await self._runtime.run_blocking(write_members, folder, keys.allowed)

    @asynccontextmanager
    async def _open_group(
        self, transport: "Transport", terms: "Terms", folder: Path, membership: "Membership | None"
    ) -> "AsyncIterator[_Opened]":
        """Open the engine of a controller, and its group. What the configuration says of etcd counts."""
        from droppexd.catalog.lost_operations import LostFiles
        from droppexd.catalog.promises import FilePromises
        from droppexd.catalog.sqlite import CATALOGUE_FILE, open_sqlite_engine
        from droppexd.roles.followers import FollowersGroup, FollowersSettings, open_followers_group
        from droppexd.wire.rpc import Terms, open_connections

        config, runtime = self._config, self._runtime
        if config.catalog_engine == "etcd" or (membership is not None and membership.engine == "etcd"):
            async with _open_etcd_group(config, membership, runtime) as etcd:
                yield _Opened(etcd, membership.cluster_id if membership else b"", {})
            return
        ballast = await runtime.run_blocking(_catalogue_ballast, folder)
        async with (
            open_connections(transport, terms=Terms()) as connections,
            open_sqlite_engine(folder / CATALOGUE_FILE, runtime, ballast=ballast) as engine,
        ):
            settings = FollowersSettings(
                name=config.name,
                sync=config.catalog_sync,
                cluster_id=membership.cluster_id if membership else b"",
                controllers=config.master or (membership.controllers if membership else ()),
                journal=config.catalog_journal,
            )
            group = FollowersGroup(
                engine,
                FilePromises(folder, runtime.run_blocking),
                LostFiles(folder, runtime.run_blocking),
                connections,
                runtime,
                terms,
                settings,
                functools.partial(self._finder().find, 0),
            )
            async with open_followers_group(group):
                yield _Opened(group, group.cluster_id, group.handlers())

    async def _pool(self, transport: "Transport", started: _Started) -> None:
        from droppexd.allocator import tune_allocator
        from droppexd.roles.pool import PoolSettings, serve_pool
        from droppexd.roles.pool_scrub import ScrubSettings
        from droppexd.store.disk import open_disk_store, usual_reserve

        tune_allocator()
        config = self._config
        run_blocking = self._runtime.run_blocking
        folder = await run_blocking(_make_folder, config.folder(Role.POOL))
        reserve_bytes = config.pool_reserve
        if reserve_bytes is None:
            reserve_bytes = await run_blocking(usual_reserve, folder)
        store = await run_blocking(
            lambda: open_disk_store(folder, entropy=self._runtime.entropy, reserve_bytes=reserve_bytes)
        )
        await self._remember_members(Role.POOL, folder)
        keys = self._keys.get(Role.POOL)
        try:
            await serve_pool(
                transport=transport,
                address=config.pool_listen,
                store=store,
                controllers=self._controllers,
                runtime=self._runtime,
                find=self._finder().find,
                journal=_journal_folder(folder, self._runtime),
                allowed=None if keys is None else keys.allowed,
                keep_allowed=functools.partial(_keep_members, folder, self._runtime),
                settings=PoolSettings(
                    name=config.name,
                    machine=config.machine,
                    zone=config.zone,
                    advertise=config.pool_advertise,
                    idle_s=config.pool_idle,
                    scrub=ScrubSettings(
                        every_s=config.pool_scrub_every, limit_bytes_s=config.pool_scrub_limit
                    ),
                    repair_bytes_per_s=config.pool_repair_limit,
                ),
                task_status=started,
            )
        finally:
            with trio.CancelScope(shield=True):
                await run_blocking(store.close)

    async def _app(self, transport: "Transport", started: _Started) -> None:
        from droppexd.allocator import tune_allocator
        from droppexd.roles.app import AppSettings, serve_app

        tune_allocator()
        config, keys = self._config, self._keys.get(Role.APP)
        await serve_app(
            transport=transport,
            address=config.app_listen,
            controllers=self._controllers,
            runtime=self._runtime,
            find=self._finder().find,
            settings=AppSettings(
                name=config.name,
                layout=config.layout,
                buffer_bytes=config.app_buffer,
                advertise=config.app_advertise,
                idle_s=config.app_idle,
            ),
            allowed=None if keys is None else keys.allowed,
            task_status=started,
        )


async def rebuild_catalogue(path: Path, addresses: tuple[str, ...], config: Config | None) -> "Rebuilt":
    """Make a catalogue anew from the journals of pools, with the keys of a controller where there are any.

    Raise what `roles.rebuilding.rebuild` raises.
    """
    from droppexd.roles.rebuilding import rebuild
    from droppexd.wire.zeromq import open_zeromq_transport

    keys = _load_keys(config) if config is not None else {}
    async with open_zeromq_transport(keys=keys.get(Role.CONTROLLER)) as transport:
        return await rebuild(path, addresses, transport, system_runtime())


async def enroll(token: "Token", name: str, pairs: "Mapping[Role, KeyPair]") -> "Enrolled":
    """Have the public keys of a machine made members', on the strength of a join token.

    Raise PeerError when no controller lets the token in, NotAuthorised, and Conflict.
    """
    from droppexd.roles.master import MasterLink
    from droppexd.wire.keys import TransportKeys, keypair_of
    from droppexd.wire.member_messages import Enroll, NewKey
    from droppexd.wire.rpc import Terms, open_connections
    from droppexd.wire.zeromq import open_zeromq_transport

    keys = TransportKeys(own=keypair_of(token.secret), cluster_public=token.cluster_public)
    request = Enroll(
        name=name, keys=tuple(NewKey(role.value, pair.public) for role, pair in sorted(pairs.items()))
    )
    async with (
        open_zeromq_transport(keys=keys) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        await _require_admission(connections, token.controllers)
        master = MasterLink(connections, token.controllers, system_runtime())
        return await master.call(request, timeout_s=JOIN_S)


async def _require_admission(connections: "Connections", addresses: Sequence[str]) -> None:
    """Return when one of these lets this process in; raise what they say when none does."""
    failures: list[PeerError] = []
    for address in addresses:
        try:
            await connections.connect(address, timeout_s=CONNECT_S)
        except PeerError as error:
            failures.append(error)
        else:
            return
    raise next((one for one in failures if isinstance(one, KeyRefused)), failures[0])


async def make_token(
    config: Config, roles: Sequence[Role], *, uses: int, ttl_s: float
) -> "tuple[Token, int]":
    """Make a join token with the key of a controller; return it, and when it expires, in ms since 1970.

    Raise ConfigError when the configuration has no such key, and what asking a master raises.
    """
    from droppexd.roles.master import MasterLink
    from droppexd.wire.keys import generate_keypair
    from droppexd.wire.member_messages import MakeToken
    from droppexd.wire.rpc import Terms, open_connections
    from droppexd.wire.tokens import Token
    from droppexd.wire.zeromq import open_zeromq_transport

    keys = _load_keys(config).get(Role.CONTROLLER)
    if keys is None:
        raise ConfigError(
            ["join tokens are made with the key of a controller: do it on a controller's machine"]
        )
    addresses = (config.controller_advertise or config.controller_listen, *config.controllers)
    pair = generate_keypair()
    async with (
        open_zeromq_transport(keys=keys) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        master = MasterLink(connections, tuple(dict.fromkeys(addresses)), system_runtime())
        request = MakeToken(
            public=pair.public,
            roles=tuple(role.value for role in roles),
            uses=uses,
            ttl_ms=int(ttl_s * 1000),
        )
        made = await master.call(request, timeout_s=JOIN_S)
    token = Token(
        secret=pair.secret,
        cluster_public=keys.cluster_public,
        controllers=made.controllers,
        roles=request.roles,
    )
    return token, made.expires_ms


async def _keep_members(folder: Path, runtime: Runtime, allowed: "AllowList") -> None:
    """Write down whom a pool lets in."""
    from droppexd.roles.admission import write_members

    await runtime.run_blocking(write_members, folder, allowed)


def _catalogue_ballast(folder: Path) -> "Ballast":
    """Return what keeps room for deletes on a controller's disk. Blocking."""
    from droppexd.store.ballast import Ballast

    try:
        return Ballast(folder, _CATALOGUE_BALLAST_BYTES, share=_CATALOGUE_BALLAST_SHARE)
    except OSError as error:
        raise CatalogError(f"cannot look at the disk of {folder}: {error.strerror}") from error


def _journal_folder(pool: Path, runtime: Runtime) -> "JournalFolder":
    """Return where a pool keeps the catalogue's log, in a folder of its own below its data."""
    from droppexd.catalog.lost_operations import LostFiles
    from droppexd.catalog.promises import FilePromises, Promises
    from droppexd.catalog.replica import Replica
    from droppexd.catalog.sqlite import CATALOGUE_FILE, open_sqlite_engine
    from droppexd.roles.pool_journal import JournalFolder

    folder = pool / JOURNAL_FOLDER

    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[Replica, Promises]]:
        path = folder / CATALOGUE_FILE
        async with open_sqlite_engine(path, runtime, cache_kib=_JOURNAL_CACHE_KIB) as engine:
            yield engine, FilePromises(folder, runtime.run_blocking)

    return JournalFolder(opened, (folder / CATALOGUE_FILE).exists(), LostFiles(folder, runtime.run_blocking))


@asynccontextmanager
async def _open_etcd_group(
    config: Config, membership: "Membership | None", runtime: Runtime
) -> "AsyncIterator[Group]":
    from droppexd.catalog.etcd_client import tls_context
    from droppexd.catalog.etcd_group import EtcdSettings, open_etcd_group

    own = config.catalog_engine == "etcd" or membership is None
    settings = EtcdSettings(
        endpoints=config.catalog_endpoints if own or membership is None else membership.endpoints,
        prefix=config.catalog_etcd_prefix if own or membership is None else membership.prefix,
        lease_s=round(config.catalog_etcd_lease),
        quota_bytes=config.catalog_etcd_quota,
    )
    secure = any(endpoint.startswith("https:") for endpoint in settings.endpoints)
    files = config.catalog_etcd_ca, config.catalog_etcd_cert, config.catalog_etcd_key
    async with open_etcd_group(settings, runtime, tls_context(*files) if secure else None) as group:
        yield group


def _make_folder(folder: Path) -> Path:
    try:
        make_folder(folder)
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def _load_keys(config: Config) -> "dict[Role, TransportKeys]":
    """Return the keys of each role of this process; none when there are none."""
    from droppexd.wire.keys import load_keys, read_member_key

    if not config.keys_own:
        return {}
    keys: dict[Role, TransportKeys] = {}
    problems: list[str] = []
    for own in map(Path, config.keys_own):
        try:
            role = read_member_key(own).member.role
            members = Path(config.keys_members) if config.keys_members else None
            keys[role] = load_keys(own, cluster=Path(config.keys_cluster), members=members)
        except ConfigError as error:
            problems.extend(error.problems)
    problems.extend(
        f"none of the keys is one of a {role}: make one with `droppexd keygen {role} NAME`"
        for role in config.roles
        if not problems and role not in keys
    )
    if problems:
        raise ConfigError(problems)
    return keys
