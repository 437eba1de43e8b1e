"""The clients of a run: each does its operations one after another and tells the history what it saw."""

import io
import itertools
import math
import random
from collections.abc import Sequence

import trio

from droppexd.client import Client, Download, open_client
from droppexd.errors import Conflict, DroppexError, NotFound
from droppexd.model import Layout, Receipt, Role, VersionId
from droppexd.wire.messages import ABSENT, ANYTHING, Condition
from tests.simulation.simulator.cluster import APPS, CONTROLLERS, Cluster
from tests.simulation.simulator.history import ANY_VERSION, Call
from tests.simulation.simulator.plan import Operation, Verb, When
from tests.simulation.simulator.surroundings import BlockingWork, runtime_of

EXACT = "exact-bytes"
RECORDED = "acknowledged-is-recorded"

_BETWEEN_TRIES_S = 1.0
_WITHOUT_MASTER_S = 4.0

_READS = (Verb.GET, Verb.GET_RANGE, Verb.STAT, Verb.LIST)


def content_of(number: int, size: int) -> bytes:
    """Return what a put writes: other bytes for each."""
    return random.Random(number).randbytes(size)


class Person:
    """One client, its connection to one app, and the versions that it has seen."""

    def __init__(self, number: int, cluster: Cluster, client: Client, work: BlockingWork) -> None:
        self._number = number
        self._cluster = cluster
        self._world = cluster.world
        self._client = client
        self._work = work
        self._seen: dict[str, VersionId] = {}

    async def work(self, operations: Sequence[Operation]) -> None:
        """Do these operations in order."""
        for operation in operations:
            await trio.sleep(operation.pause_s)
            await self.do(operation)

    async def do(self, operation: Operation) -> str:
        """Do one operation, note what came of it in the history, and return the error, if it was one."""
        if operation.verb is Verb.LIST:
            return await self._list(operation)
        if operation.verb is Verb.RELAYOUT:
            return await self._relayout(operation)
        call = Call(client=self._number, verb=operation.verb, name=operation.name, target=operation.target)
        condition = ANYTHING
        if operation.verb not in _READS:
            condition = self._condition(operation, call)
        if operation.verb is Verb.PUT:
            call.version = operation.number
        history = self._world.history
        history.invoke(call)
        error = ""
        try:
            with trio.fail_after(operation.patience_s):
                await self._carry_out(operation, call, condition)
        except Conflict as refusal:
            call.refusal, error = "conflict", str(refusal)
        except NotFound as refusal:
            call.refusal, error = "not-found", str(refusal)
        except (DroppexError, trio.TooSlowError) as failure:
            error = f"{type(failure).__name__}: {failure}"
            self._world.happened[f"{operation.verb} {type(failure).__name__}"] += 1
            if operation.verb in _READS:
                history.calls.remove(call)
            self._cluster.trace.say(f"{operation}: {error}")
            return error
        history.answer(call)
        self._world.happened[f"{operation.verb} {call.refusal or 'done'}"] += 1
        self._cluster.trace.say(f"{operation}: {call.refusal or f'v{call.version}'}")
        return error

    def _condition(self, operation: Operation, call: Call) -> Condition:
        about = operation.target or operation.name
        if operation.when is When.ABSENT and operation.verb is not Verb.REMOVE:
            call.absent = True
            return ABSENT
        seen = self._seen.get(about)
        if operation.when is When.SEEN and seen is not None:
            call.expected = self._put_of(seen)
            return Condition(version=seen)
        return ANYTHING

    def _put_of(self, version: VersionId) -> int | None:
        """Return the put that made a version; a record must have spoken of it on the catalogue's disk."""
        if version not in self._world.recorded:
            self._world.report(RECORDED, f"a client was told of version {version}, which was never written")
        size = self._world.made.get(version)
        return ANY_VERSION if size is None else self._world.put_of(size)

    async def _carry_out(self, operation: Operation, call: Call, condition: Condition) -> None:
        name, client = operation.name, self._client
        match operation.verb:
            case Verb.PUT:
                content = content_of(operation.number, operation.size)
                layout = Layout.parse(operation.layout) if operation.layout else None
                self._work.latency_s = operation.dawdle_s
                if operation.breaks:
                    receipt = await self._put_in_steps(operation, content, condition, layout)
                else:
                    receipt = await client.put_bytes(name, content, condition=condition, layout=layout)
                call.replaced = receipt.replaced
                self._world.made.setdefault(receipt.version, receipt.size)
                self._saw(name, receipt.version, call)
            case Verb.GET | Verb.GET_RANGE:
                await self._get(operation, call)
            case Verb.STAT:
                described = await client.describe(name)
                self._saw(name, described.version, call)
            case Verb.REMOVE:
                version = await client.remove(name, condition=condition)
                call.version = self._put_of(version)
            case Verb.MOVE | Verb.COPY:
                keep = operation.verb is Verb.COPY
                version = await client.rename(name, operation.target, condition=condition, keep=keep)
                self._saw(operation.target, version, call)

    async def _put_in_steps(
        self, operation: Operation, content: bytes, condition: Condition, layout: Layout | None
    ) -> Receipt:
        """Put a file whose source breaks off some times; what was stored until then is gone on with."""
        size, origin = len(content), operation.name.encode()

        def resumed(kept: int) -> None:
            self._world.happened["put resumed"] += 1
            self._cluster.trace.say(f"{operation}: {kept} bytes are kept")

        for part in (*operation.breaks, 1.0):
            source = BreakingSource(content, math.ceil(part * size) if part < 1 else size + 1)
            try:
                return await self._client.put_file(
                    operation.name,
                    source,
                    size=size,
                    condition=condition,
                    layout=layout,
                    origin=origin,
                    on_resume=resumed,
                )
            except BrokenOff:
                continue
        raise AssertionError("the last attempt does not break off")

    def _saw(self, name: str, version: VersionId, call: Call) -> None:
        self._seen[name] = version
        call.version = self._put_of(version)

    async def _get(self, operation: Operation, call: Call) -> None:
        start, length = 0, None
        if operation.verb is Verb.GET_RANGE:
            most = max(self._world.put_of_size, default=0)
            start = int(operation.draw * 997) % (1 + most // 3)
            length = int(operation.draw * most)
        try:
            async with self._client.open_read(operation.name, start=start, length=length) as download:
                content = await self._collect(download, operation.dawdle_s)
        except DroppexError as error:
            if operation.verb is Verb.GET_RANGE and error.code == "invalid-request":
                raise NotEnoughToRead(str(error)) from error
            raise
        self._saw(operation.name, download.info.version, call)
        self._compare(call, content, start, length)

    async def _collect(self, download: Download, dawdle_s: float) -> bytes:
        content = bytearray()
        async for frames in download:
            for frame in frames:
                content += frame
            await trio.sleep(dawdle_s)
        return bytes(content)

    def _compare(self, call: Call, content: bytes, start: int, length: int | None) -> None:
        number = call.version
        size = next((size for size, put in self._world.put_of_size.items() if put == number), 0)
        whole = content_of(number or 0, size)
        end = size if length is None else min(size, start + length)
        if content != whole[start:end]:
            self._world.report(
                EXACT, f"{call} returned {len(content)} bytes that are not those of put {number}"
            )

    async def _list(self, operation: Operation) -> str:
        """List everything: a read of each name of its own, for pages are no snapshot."""
        history = self._world.history
        folder = operation.name.rpartition("/")[0] + "/"
        history.moment += 1
        invoked = history.moment
        try:
            with trio.fail_after(operation.patience_s):
                entries = {entry.name: entry async for entry in self._client.list(folder)}
        except (DroppexError, trio.TooSlowError) as failure:
            self._world.happened[f"{operation.verb} {type(failure).__name__}"] += 1
            return f"{type(failure).__name__}: {failure}"
        self._world.happened[f"{operation.verb} done"] += 1
        history.moment += 1
        for name in self._cluster.names:
            call = Call(client=self._number, verb=Verb.LIST, name=name, invoked=invoked)
            call.returned = history.moment
            if name in entries and entries[name].version is not None:
                self._saw(name, entries[name].version, call)
            history.calls.append(call)
        return ""

    async def _relayout(self, operation: Operation) -> str:
        """Give a file another layout, which no reader and no condition may notice."""
        layout = Layout.parse(operation.layout) if operation.layout else None
        error, outcome = "", "done"
        self._work.latency_s = operation.dawdle_s
        try:
            with trio.fail_after(operation.patience_s):
                told = await self._client.relayout(operation.name, layout=layout)
            if told.changed:
                self._world.happened["file coded anew"] += 1
        except (DroppexError, trio.TooSlowError) as failure:
            outcome = type(failure).__name__
            error = f"{outcome}: {failure}"
        self._world.happened[f"{operation.verb} {outcome}"] += 1
        self._cluster.trace.say(f"{operation}: {error or 'done'}")
        return error

    async def replace_pool(self, pool: int, force: bool) -> None:
        """Replace a pool as an operator does, who tries again until it is done."""
        while True:
            try:
                await self._client.replace_pool(str(pool), force=force)
            except NotFound:
                return  # An answer was lost: it is done.
            except DroppexError as error:
                self._cluster.trace.say(f"pool {pool} is not replaced: {error}")
                await trio.sleep(_BETWEEN_TRIES_S)
            else:
                return

    async def drain_pool(self, pool: int, *, undo: bool = False, force: bool = False) -> bool:
        """Drain a pool as an operator does, who tries again until that is heard; return whether it is drained."""
        while True:
            try:
                await self._client.drain_pool(str(pool), undo=undo, force=force)
            except (Conflict, NotFound) as error:  # Too few others, or it was replaced meanwhile.
                self._cluster.trace.say(f"pool {pool} is not drained: {error}")
                return False
            except DroppexError:
                await trio.sleep(_BETWEEN_TRIES_S)
            else:
                return True

    async def remove_pool(self, pool: int) -> bool:
        """Remove a pool if it is empty; return whether it was."""
        try:
            await self._client.remove_pool(str(pool))
        except DroppexError as error:
            self._cluster.trace.say(f"pool {pool} is not removed: {error}")
            return False
        return True

    async def promote(self, name: str) -> None:
        """Promote a controller, if that can be done now."""
        try:
            await self._client.promote(CONTROLLERS[name])
        except DroppexError as error:
            self._cluster.trace.say(f"{name} is not promoted: {error}")
        else:
            self._cluster.trace.say(f"{name} is promoted")
            self._world.happened["promoted"] += 1

    async def see_to_a_master(self) -> None:
        """Be an operator who promotes a controller when there has been no master for a while, for ever."""
        for turn in itertools.count():
            await trio.sleep(_WITHOUT_MASTER_S)
            if self._cluster.has_master:
                continue
            await trio.sleep(_WITHOUT_MASTER_S)
            running = [name for name in self._cluster.controllers if self._cluster.running(name)]
            if running and not self._cluster.has_master:
                await self.promote(running[turn % len(running)])

    async def status(self):
        """Ask how the cluster is."""
        return (await self._client.status()).status


class BrokenOff(Exception):
    """A source ends before its end."""


class BreakingSource(io.BytesIO):
    """Content that cannot be read beyond some offset."""

    def __init__(self, content: bytes, breaks_at: int) -> None:
        super().__init__(content)
        self._breaks_at = breaks_at

    def read(self, size: int | None = -1, /) -> bytes:
        """Return as many bytes; raise BrokenOff when they lie behind the offset."""
        data = super().read(size)
        if self.tell() >= self._breaks_at:
            raise BrokenOff
        return data


class NotEnoughToRead(DroppexError):
    """A range begins behind the end of the file."""


async def attend(number: int, cluster: Cluster, seed: int, task_status=trio.TASK_STATUS_IGNORED) -> None:
    """Keep one client of the cluster running; started with the Person."""
    name = f"client-{number}"
    runtime, _, work = runtime_of(f"{seed} {name}")
    address = APPS[cluster.apps[number % len(cluster.apps)]]
    async with (
        cluster.network.transport(name, Role.CLIENT) as transport,
        open_client(address, transport, runtime) as client,
    ):
        task_status.started(Person(number, cluster, client, work))
        await trio.sleep_forever()
