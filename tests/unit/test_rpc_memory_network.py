"""The simulated network itself: faults, and one trace for one seed."""

import random

import pytest
import trio
from trio.testing import MockClock

from droppexd.errors import PeerError
from droppexd.wire.memory import MemoryNetwork
from droppexd.wire.messages import Ping, Pong
from droppexd.wire.rpc import Service, Terms, open_connections, serve

ANY_PORT = "tcp://127.0.0.1:0"


class SeededEntropy:
    def __init__(self, seed):
        self._random = random.Random(seed)

    def token(self, size_bytes):
        return self._random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self._random.uniform(low, high)


class Pair:
    """A listener in `a`, and a connected channel in `b`."""

    def __init__(self):
        self.network = MemoryNetwork(SeededEntropy(1), silence_s=10)
        self.heard = []
        self.got = []
        self.lost = []


def run(scenario):
    async def main():
        pair = Pair()
        async with pair.network.transport("a") as a, pair.network.transport("b") as b:
            pair.listener = a.listen(ANY_PORT, lambda peer, frames: pair.heard.append((peer, frames[0])))
            pair.channel = b.connect(
                pair.listener.address,
                lambda frames: pair.got.append(frames[0]),
                lambda: pair.lost.append(trio.current_time()),
            )
            await pair.channel.ready()
            pair.channel.send([b"hello"])
            await trio.sleep(0.1)
            ((pair.peer, _),) = pair.heard
            pair.heard.clear()
            await scenario(pair)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def words(heard):
    return [word for _, word in heard]


def test_frames_pass_by_reference():
    async def scenario(pair):
        frame = bytearray(b"the same object")
        pair.channel.send([frame])
        await trio.sleep(1)
        assert pair.heard[0][1] is frame

    run(scenario)


def test_a_short_partition_only_delays():
    async def scenario(pair):
        pair.network.partition("a", "b")
        pair.channel.send([b"1"])
        pair.listener.send(pair.peer, [b"2"])
        await trio.sleep(5)
        assert (pair.heard, pair.got) == ([], [])
        pair.network.heal()
        pair.channel.send([b"3"])
        await trio.sleep(1)
        assert (words(pair.heard), pair.got) == ([b"1", b"3"], [b"2"])
        await trio.sleep(20)
        assert not pair.lost

    run(scenario)


def test_a_long_partition_loses_the_connection_and_what_was_held_back():
    async def scenario(pair):
        start = trio.current_time()
        pair.network.partition("a", "b")
        pair.channel.send([b"1"])
        await trio.sleep(20)
        assert pair.lost == [pytest.approx(start + 10)]
        pair.network.heal()
        await trio.sleep(5)
        assert pair.heard == []
        assert not pair.channel.send([b"2"])
        assert not pair.listener.send(pair.peer, [b"3"])

    run(scenario)


def test_a_one_way_partition_is_noticed_by_both_sides():
    async def scenario(pair):
        pair.network.partition("a", "b", one_way=True)
        pair.channel.send([b"1"])
        await trio.sleep(1)
        assert words(pair.heard) == [b"1"]
        assert pair.listener.send(pair.peer, [b"2"])
        await trio.sleep(20)
        assert pair.got == []
        assert len(pair.lost) == 1
        assert not pair.listener.send(pair.peer, [b"3"])

    run(scenario)


def test_a_paused_process_gets_on_return_what_had_arrived():
    async def scenario(pair):
        pair.network.pause("a")
        pair.channel.send([b"1"])
        await trio.sleep(20)
        assert len(pair.lost) == 1
        assert pair.heard == []
        pair.network.resume("a")
        await trio.sleep(1)
        assert words(pair.heard) == [b"1"]
        assert not pair.listener.send(pair.peer, [b"2"])

    run(scenario)


def test_a_killed_process_says_and_hears_nothing_more_and_can_be_started_again():
    async def scenario(pair):
        pair.channel.send([b"1"])
        pair.network.kill("a")
        await trio.sleep(1)
        assert len(pair.lost) == 1
        assert pair.heard == []
        assert not pair.listener.send(pair.peer, [b"2"])
        async with pair.network.transport("a") as again:
            again.listen(pair.listener.address, lambda peer, frames: None)

    run(scenario)


def test_a_name_runs_once():
    async def scenario(pair):
        with pytest.raises(PeerError, match="a process of the name a is running"):
            async with pair.network.transport("a"):
                pass

    run(scenario)


def trace_of(seed, monkeypatch):
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", random.Random(seed))
    trace = []

    async def main():
        network = MemoryNetwork(
            SeededEntropy(seed),
            trace=lambda at, source, target, frames: trace.append((at, source, target, bytes(frames[0]))),
        )

        async def pong(call, request, body):
            await trio.sleep(0.001)
            return Pong(role="pool", name="a", boot_id=b"")

        async def ask(name, address):
            async with network.transport(name) as own, open_connections(own, terms=Terms()) as connections:
                for _ in range(20):
                    await connections.call(address, Ping(), timeout_s=5)

        async with network.transport("a") as a, trio.open_nursery() as nursery:
            listener = await nursery.start(
                lambda task_status: serve(
                    a, ANY_PORT, Service({Ping: pong}), terms=Terms(), task_status=task_status
                )
            )
            async with trio.open_nursery() as askers:
                for name in "bcdefg":
                    askers.start_soon(ask, name, listener.address)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return trace


def test_one_seed_gives_one_trace(monkeypatch):
    first = trace_of(5, monkeypatch)
    assert len(first) == 240
    assert trace_of(5, monkeypatch) == first
    assert trace_of(6, monkeypatch) != first


def test_one_partition_can_end_while_another_lasts():
    async def scenario(pair):
        pair.network.partition("a", "b")
        pair.network.partition("a", "c")
        pair.network.heal("a", "c")
        pair.channel.send([b"1"])
        await trio.sleep(1)
        assert pair.heard == []
        pair.network.heal("b", "a")
        await trio.sleep(1)
        assert words(pair.heard) == [b"1"]

    run(scenario)


def test_a_cut_connection_loses_what_is_on_its_way_and_both_sides_hear_of_it():
    async def scenario(pair):
        pair.channel.send([b"1"])
        pair.network.cut("a", "b")
        await trio.sleep(1)
        assert (pair.heard, len(pair.lost)) == ([], 1)
        assert not pair.channel.send([b"2"])
        assert not pair.listener.send(pair.peer, [b"3"])

    run(scenario)


def test_a_cut_between_others_changes_nothing():
    async def scenario(pair):
        pair.network.cut("a", "c")
        pair.channel.send([b"1"])
        await trio.sleep(1)
        assert (words(pair.heard), pair.lost) == ([b"1"], [])

    run(scenario)


def test_messages_of_a_slow_process_take_longer_and_keep_their_order():
    async def scenario(pair):
        pair.network.slow("a", 100.0)
        for number in range(10):
            pair.channel.send([str(number).encode()])
        await trio.sleep(0.01)
        assert len(pair.heard) < 10
        await trio.sleep(101)
        assert words(pair.heard) == [str(number).encode() for number in range(10)]
        pair.network.slow("a", 0)
        pair.channel.send([b"fast"])
        await trio.sleep(0.01)
        assert words(pair.heard)[-1] == b"fast"

    run(scenario)
