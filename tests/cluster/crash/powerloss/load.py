"""A short mixed load on a real cluster whose first pool and controller run under strace."""

import sys
import time
from pathlib import Path

import trio

from droppexd.errors import NotEnoughShards, PeerError
from droppexd.wire.messages import ANYTHING
from powerloss.recording import record
from powerloss.strace import ended, read_trace, strace_command

RECORDED = Path(__file__).with_name("recorded.py")
TRACED = ("controller", "pool-1")

KIB = 1024
PATIENCE_S = 60.0


class Tracing:
    """Gives each start of a process its own trace."""

    def __init__(self, folder):
        self._folder = folder
        self._outputs = {name: [] for name in TRACED}

    def notes(self, name):
        return self._folder / f"{name}.notes"

    def trace_next_start(self, process):
        outputs = self._outputs[process.name]
        outputs.append(self._folder / f"{process.name}.{len(outputs)}.strace")
        process.command = [
            *strace_command(outputs[-1]),
            *(sys.executable, str(RECORDED), str(self.notes(process.name))),
        ]

    def recording(self, root, wait_until):
        """Read everything, once strace has written it; the processes have ended."""
        for output in (output for outputs in self._outputs.values() for output in outputs):
            wait_until(lambda output=output: ended(output), f"{output} does not end")
        traces = {name: [read_trace(output) for output in some] for name, some in self._outputs.items()}
        return record(traces, root, self.notes)


class Load:
    """What a client does, and which names stand for which content when it has ended."""

    def __init__(self, cluster, content, wait_until):
        self._cluster = cluster
        self._content = content
        self._wait_until = wait_until
        self._seed = 0
        self.files = {}
        self.receipts = []
        """(moment of the receipt, name, version), by the clock that strace uses."""

    def _bytes(self, size):
        self._seed += 1
        return self._content(size, self._seed)

    async def put(self, client, name, size):
        data = self._bytes(size)
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    receipt = await client.put_bytes(name, data, condition=ANYTHING)
                    break
                except (NotEnoughShards, PeerError):
                    await trio.sleep(0.1)  # The app's map is some seconds old, or a busy machine was slow.
        self.receipts.append((time.time_ns(), name, str(receipt.version)))
        self.files[name] = data

    async def remove(self, client, name):
        await client.remove(name)
        del self.files[name]

    async def first(self, client):
        """Small and large files side by side, overwritten, renamed, removed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._large, client)
            for worker in range(3):
                nursery.start_soon(self._small, client, worker)
        await client.rename("large/1", "large/renamed")
        self.files["large/renamed"] = self.files.pop("large/1")
        await self.remove(client, "large/renamed")
        await self.remove(client, "large/3")
        for number in range(0, 30, 2):
            await self.remove(client, f"small/{number % 3}-{number // 3}")

    async def _large(self, client):
        for number, size in enumerate((150, 300, 200, 4100, 260)):
            await self.put(client, f"large/{number}", size * KIB + 17)
        await self.put(client, "large/0", 180 * KIB)

    async def _small(self, client, worker):
        for number in range(10):
            await self.put(client, f"small/{worker}-{number}", (1 + 7 * number % 40) * KIB + number)

    async def second(self, client):
        """Some more, after everything was killed and started again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.put, client, "large/after", 220 * KIB)
            for number in range(8):
                nursery.start_soon(self.put, client, f"after/{number}", 3 * KIB + number)
        await self.remove(client, "large/2")
        await self.remove(client, "after/3")

    def wait_for_the_drops(self):
        self._wait_until(lambda: not self._cluster.status().garbage, "the garbage stays on record")

    def check(self):
        """Everything reads as it was put: what is recorded is a run in which nothing went wrong."""

        async def read(client):
            for name, data in self.files.items():
                assert await client.get_bytes(name) == data
            assert sorted([entry.name async for entry in client.list(recursive=True)]) == sorted(self.files)

        self._cluster.run(read)


def record_run(cluster_with, content, wait_until, folder):
    """Run the load and return the recording, the load and the folder of the cluster, all processes ended.

    Between its two parts everything that is traced is killed and started again.
    """
    tracing = Tracing(folder)

    def prepare(cluster):
        for process in traced(cluster):
            tracing.trace_next_start(process)

    with cluster_with(prepare) as cluster:
        load = Load(cluster, content, wait_until)
        cluster.run(load.first)
        load.wait_for_the_drops()
        for process in traced(cluster):
            process.kill()
            tracing.trace_next_start(process)
            process.start()
        cluster.wait_until_up()
        cluster.run(load.second)
        load.wait_for_the_drops()
        load.check()
        for process in reversed(traced(cluster)):
            assert process.terminate() == 0
        recording = tracing.recording(cluster.folder, wait_until)
        return recording, load, cluster.folder


def traced(cluster):
    return [process for process in cluster.processes if process.name in TRACED]
