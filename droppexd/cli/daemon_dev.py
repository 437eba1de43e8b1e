"""`droppexd dev`: a whole cluster as child processes on free ports of this machine."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import trio

import droppexd
from droppexd.cli.daemon_keys import make_key
from droppexd.cli.daemon_table import print_processes
from droppexd.config import OPTIONS, parse_duration, parse_layout, variable_of
from droppexd.errors import ConfigError, DroppexError, IdentityError, PeerError, StoreError
from droppexd.model import PoolState, Role
from droppexd.packed import is_packed
from droppexd.wire.keys import TransportKeys, load_keys

_START_S = 60.0
"""The cluster must answer within this; on an idle machine it takes two or three seconds."""

_STOP_S = 10.0
"""Processes that have not ended by then are killed."""

_STOP_CONTROLLER_AFTER_S = 6.0
"""Until then the app and the pools may still talk to the controller while they stop."""

_POLL_S = 0.1

_POOL_RESERVE = "64 MiB"
"""Pools of a dev cluster share a disk with everything else on the machine, and are only for trying out."""


_DROPPEXD = ["droppexd"] if is_packed() else [sys.executable, "-m", "droppexd"]
"""How a child is called; the one file goes by its name."""


def default_folder(environment: Mapping[str, str]) -> Path:
    """Return where a dev cluster keeps its data unless told otherwise."""
    base = environment.get("XDG_DATA_HOME") or str(Path("~/.local/share").expanduser())
    return Path(base) / "droppex" / "dev"


class DevOptions(NamedTuple):
    """What a dev cluster is told; texts as they were typed, which its processes read."""

    pools: int
    layout: str
    delete_grace: str
    replace_after: str
    log_level: str
    secure: bool = False
    io_threads: int = 1

    def check(self) -> None:
        """Raise ConfigError with all that is wrong."""
        problems = []
        for name, parse, text in (
            ("layout", parse_layout, self.layout),
            ("delete-grace", parse_duration, self.delete_grace),
            ("replace-after", parse_duration, self.replace_after),
        ):
            try:
                parse(text)
            except ValueError as error:
                problems.append(f"--{name}: {error}")
        if problems:
            raise ConfigError(problems)


def run_dev(folder: Path | None, options: DevOptions) -> int:
    """Run a cluster until a signal; return the exit code. Must be called in the main thread."""
    folder = (folder or default_folder(os.environ)).expanduser().absolute()
    options.check()
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror}") from error
    with _locked(folder):
        (folder / "dev.json").unlink(missing_ok=True)
        return trio.run(_run, _Cluster(folder, options))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "dev.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IdentityError(f"a dev cluster is running in {folder}; choose another --data") from None
        yield


async def _run(cluster: "_Cluster") -> int:
    code = 0
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_signal, signals, nursery.cancel_scope)
            try:
                with _start_deadline():
                    await cluster.start()
                    await cluster.wait_until_it_answers()
                cluster.write_files()
                cluster.show()
                code = await cluster.watch()
                nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await cluster.stop()
    return code


async def _cancel_at_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    await anext(signals)
    scope.cancel()


@contextmanager
def _start_deadline() -> Iterator[None]:
    try:
        with trio.fail_after(_START_S):
            yield
    except trio.TooSlowError:
        raise PeerError(f"the cluster does not answer after {_START_S:g} s; see the logs") from None


class _Child:
    """One process of the cluster."""

    def __init__(self, role: Role, name: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.role = role
        self.name = name
        self.process = process
        self.log = log
        self.address = ""
        self.data = ""
        self.told = False

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return self.process.poll() is None

    def end_text(self) -> str:
        """Return how the process ended."""
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def last_words(self) -> str:
        """Return the last line of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "its log is empty"


class _Cluster:
    """The processes of one dev cluster, and the files that describe them."""

    def __init__(self, folder: Path, options: DevOptions) -> None:
        self._folder = folder
        self._options = options
        self._children: list[_Child] = []

    async def start(self) -> None:
        """Start the processes; return when each of them serves.

        The app comes last, so that it knows all pools from its first moment.
        """
        self._make_keys()
        told = ["--controller-delete-grace", self._options.delete_grace]
        told += ["--controller-replace-after", self._options.replace_after]
        controller = await self._start_child(Role.CONTROLLER, "controller", told)
        seeds = ["--controller", controller.address]
        async with trio.open_nursery() as nursery:
            for number in range(1, self._options.pools + 1):
                options = [*seeds, "--pool-reserve", _POOL_RESERVE]
                nursery.start_soon(self._start_child, Role.POOL, f"pool-{number}", options)
        await self._start_child(Role.APP, "app", [*seeds, "--layout", self._options.layout])

    def _make_keys(self) -> None:
        """Make the keys that are not there yet, before any process reads who the members are."""
        if not self._options.secure:
            return
        members = [(Role.CONTROLLER, "controller"), (Role.APP, "app"), (Role.CLIENT, "client")]
        members += [(Role.POOL, f"pool-{number}") for number in range(1, self._options.pools + 1)]
        for role, name in members:
            if not self._key_of(role, name).exists():
                make_key(self._keys, role, name)

    @property
    def _keys(self) -> Path:
        return self._folder / "keys"

    def _key_of(self, role: Role, name: str) -> Path:
        return self._keys / f"{role}-{name}.key"

    def _client_keys(self) -> TransportKeys | None:
        return load_keys(self._key_of(Role.CLIENT, "client")) if self._options.secure else None

    async def _start_child(self, role: Role, name: str, options: Sequence[str]) -> _Child:
        reader, writer = os.pipe()
        async with trio.lowlevel.FdStream(reader) as reports:
            try:
                child = self._spawn(role, name, options, writer)
            finally:
                os.close(writer)
            self._children.append(child)
            report = b""
            async for part in reports:
                report += part
                if report.endswith(b"\n"):
                    break
        if not report.endswith(b"\n"):
            raise PeerError(f"{name} did not start: {child.last_words()}")
        ready = json.loads(report)
        child.address, child.data = ready["address"], ready["data"]
        return child

    def _spawn(self, role: Role, name: str, options: Sequence[str], report_fd: int) -> _Child:
        """Start a process. Not in a thread: a child would be killed when the thread ended."""
        log = self._folder / "logs" / f"{name}.log"
        command = [*_DROPPEXD, "--role", role, "--name", name]
        command += ["--listen", "tcp://127.0.0.1:0", "--report-fd", str(report_fd)]
        command += ["--die-with-parent", str(os.getpid()), "--log-level", self._options.log_level]
        command += ["--io-threads", str(self._options.io_threads)]
        if self._options.secure:
            command += ["--key", str(self._key_of(role, name))]
            command += ["--keys-cluster", str(self._keys / "cluster.key")]
            command += ["--keys-members", str(self._keys / "members.toml")]
        if role != Role.APP:
            command += ["--data", str(self._folder / name)]
        with log.open("wb") as file:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
                [*command, *options],
                executable=sys.executable,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=_child_environment(os.environ),
                pass_fds=[report_fd],
                process_group=0,  # Ctrl-C reaches only this process, which stops the others in order.
            )
        return _Child(role, name, process, log)

    async def wait_until_it_answers(self) -> None:
        """Return once the app says that all pools are up."""
        from droppexd.wire.messages import GetStatus
        from droppexd.wire.rpc import Terms, open_connections
        from droppexd.wire.zeromq import open_zeromq_transport

        wanted = {f"pool-{number}" for number in range(1, self._options.pools + 1)}
        async with (
            open_zeromq_transport(keys=self._client_keys()) as transport,
            open_connections(transport, terms=Terms()) as connections,
        ):
            while True:
                self._raise_if_one_ended()
                try:
                    reply, _ = await connections.call(self._app.address, GetStatus(), timeout_s=5.0)
                except DroppexError as error:
                    print(f"waiting for the cluster: {error}", file=sys.stderr, flush=True)
                else:
                    if wanted <= {pool.name for pool in reply.status.pools if pool.state == PoolState.UP}:
                        return
                await trio.sleep(_POLL_S)

    def _raise_if_one_ended(self) -> None:
        for child in self._children:
            if not child.running:
                raise PeerError(f"{child.name} has ended ({child.end_text()}): {child.last_words()}")

    @property
    def _app(self) -> _Child:
        return next(child for child in self._children if child.role == Role.APP)

    @property
    def _client_file(self) -> Path:
        return self._folder / "client.toml"

    def write_files(self) -> None:
        """Write client.toml, and then dev.json: who sees that one knows that the cluster answers."""
        self._children.sort(key=lambda child: (_SHOWN_ORDER.index(child.role), len(child.name), child.name))
        processes = [
            {
                "role": child.role.value,
                "name": child.name,
                "pid": child.process.pid,
                "address": child.address,
                "data": child.data,
            }
            for child in self._children
        ]
        key = f"key = {json.dumps(str(self._key_of(Role.CLIENT, 'client')))}\n"
        text = f"app = {json.dumps(self._app.address)}\n" + (key if self._options.secure else "")
        _replace(self._client_file, text)
        _replace(self._folder / "dev.json", json.dumps({"processes": processes}, indent=2) + "\n")

    def show(self) -> None:
        """Print who is who, and how to go on."""
        print_processes(
            [
                (child.role.value, child.name, str(child.process.pid), child.address, child.data or "-")
                for child in self._children
            ]
        )
        print(f"\nThe cluster answers. Use it:  droppex --config {self._client_file} put FILE")
        print("Ctrl-C stops it.", flush=True)

    async def watch(self) -> int:
        """Say when a process ends; return when all have."""
        while any(child.running for child in self._children):
            for child in self._children:
                if not child.running and not child.told:
                    child.told = True
                    print(f"{child.name} (pid {child.process.pid}) has ended: {child.end_text()}", flush=True)
            await trio.sleep(_POLL_S)
        print("all processes have ended", flush=True)
        return 1

    async def stop(self) -> None:
        """End all processes: in order, or by force after _STOP_S."""
        others = [child for child in self._children if child.role != Role.CONTROLLER]
        with trio.move_on_after(_STOP_S):
            with trio.move_on_after(_STOP_CONTROLLER_AFTER_S):
                await _end(others)
            await _end(self._children)
        for child in self._children:
            if child.running:
                print(f"{child.name} (pid {child.process.pid}) does not stop: killed", flush=True)
                child.process.kill()
            child.process.wait()


async def _end(children: Sequence[_Child]) -> None:
    for child in children:
        if child.running:
            child.process.terminate()
            child.process.send_signal(signal.SIGCONT)  # One that is stopped would not see the other signal.
    while any(child.running for child in children):  # noqa: ASYNC110 - a process sets no event
        await trio.sleep(_POLL_S / 2)


_SHOWN_ORDER = (Role.CONTROLLER, Role.APP, Role.POOL)


def _child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without options, and such that children run the same code."""
    ours = {variable_of(name) for name in OPTIONS} | {"DROPPEXD_CONFIG"}
    child = {name: value for name, value in environment.items() if name not in ours}
    source = str(Path(droppexd.__file__).parent.parent)
    child["PYTHONPATH"] = os.pathsep.join(filter(None, (source, child.get("PYTHONPATH"))))
    return child


def _replace(file: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or the one before."""
    temporary = file.with_name(file.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
