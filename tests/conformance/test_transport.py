"""One suite for every transport: real sockets on loopback, and the simulated network."""

import random
from collections import Counter
from contextlib import asynccontextmanager

import pytest
import trio
import zmq
from trio.testing import MockClock, wait_all_tasks_blocked

from droppexd.errors import LocalProtocolError, PeerError
from droppexd.wire.memory import MemoryNetwork
from droppexd.wire.messages import Ping, Pong
from droppexd.wire.rpc import Service, Terms, open_connections, serve
from droppexd.wire.transport import MAX_FRAME_BYTES, MAX_FRAMES
from droppexd.wire.zeromq import open_zeromq_transport

ANY_PORT = "tcp://127.0.0.1:0"


class SeededEntropy:
    def __init__(self, seed):
        self._random = random.Random(seed)

    def token(self, size_bytes):
        return self._random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self._random.uniform(low, high)


class RealWorld:
    clock = None

    def transport(self, name):
        return open_zeromq_transport()

    @asynccontextmanager
    async def stalled_listener(self):
        """A bound address that accepts connections and takes nothing."""
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.rcvhwm = 1
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            yield f"tcp://127.0.0.1:{port}", lambda: None


class SimulatedWorld:
    def __init__(self):
        self.clock = MockClock(autojump_threshold=0)
        self.network = MemoryNetwork(SeededEntropy(7))

    def transport(self, name):
        return self.network.transport(name)

    @asynccontextmanager
    async def stalled_listener(self):
        async with self.network.transport("stalled") as transport:
            listener = transport.listen(ANY_PORT, lambda peer, frames: None)
            yield listener.address, lambda: self.network.pause("stalled")


@pytest.fixture(params=[RealWorld, SimulatedWorld], ids=["zeromq", "memory"])
def run(request):
    def run_scenario(scenario):
        world = request.param()

        async def main():
            with trio.fail_after(60):
                await scenario(world)

        trio.run(main, clock=world.clock)

    return run_scenario


class Inbox:
    """Collects what a callback is given, and lets a test wait for it."""

    def __init__(self):
        self.items = []
        self._came = trio.Event()

    def __call__(self, *item):
        self.items.append(item)
        self._came.set()
        self._came = trio.Event()

    async def wait(self, count):
        while len(self.items) < count:
            await self._came.wait()
        return self.items


async def send_all(channel, messages):
    for frames in messages:
        while not channel.send(frames):
            await channel.ready()


def nothing(*_):
    """A callback that does not care."""


def test_messages_arrive_in_order_and_once(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            heard = Inbox()
            listener = a.listen(ANY_PORT, heard)
            channel = b.connect(listener.address, nothing, nothing)
            await send_all(channel, ([b"%d" % number, b"body"] for number in range(2000)))
            await heard.wait(2000)
            await wait_all_tasks_blocked()
            assert [bytes(frames[0]) for _, frames in heard.items] == [b"%d" % n for n in range(2000)]
            assert {bytes(frames[1]) for _, frames in heard.items} == {b"body"}

    run(scenario)


def test_replies_reach_the_peer_that_asked(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b, world.transport("c") as c:
            listener = None

            def echo(peer, frames):
                assert listener.send(peer, frames)

            listener = a.listen(ANY_PORT, echo)
            boxes = []
            for number, transport in enumerate((b, c, b)):
                box = Inbox()
                channel = transport.connect(listener.address, box, nothing)
                await send_all(channel, [[b"%d" % number, b"%d" % item] for item in range(100)])
                boxes.append(box)
            for number, box in enumerate(boxes):
                await box.wait(100)
                assert [bytes(f[0]) for (f,) in box.items] == [b"%d" % number] * 100
                assert [bytes(f[1]) for (f,) in box.items] == [b"%d" % item for item in range(100)]

    run(scenario)


def test_a_channel_takes_nothing_before_it_is_connected(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            heard = Inbox()
            listener = a.listen(ANY_PORT, heard)
            channel = b.connect(listener.address, nothing, nothing)
            assert not channel.send([b"too early"])
            await channel.ready()
            assert channel.send([b"now"])
            await heard.wait(1)
            assert [bytes(frames[0]) for _, frames in heard.items] == [b"now"]

    run(scenario)


def test_an_address_without_listener_refuses_at_once(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            listener = a.listen(ANY_PORT, nothing)
            listener.close()
            await wait_all_tasks_blocked(0.05)
            lost = Inbox()
            channel = b.connect(listener.address, nothing, lost)
            with pytest.raises(PeerError):
                await channel.ready()
            await lost.wait(1)
            assert not channel.send([b"x"])
            await wait_all_tasks_blocked()
            assert len(lost.items) == 1

    run(scenario)


def test_a_port_in_use_is_told_by_its_address(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            address = a.listen(ANY_PORT, nothing).address
            with pytest.raises(PeerError, match=address):
                b.listen(address, nothing)

    run(scenario)


def test_a_lost_peer_is_told_once_and_what_it_had_sent_comes_first(run):
    async def scenario(world):
        async with world.transport("b") as b:
            log = []
            lost = trio.Event()

            def on_lost():
                log.append("lost")
                lost.set()

            async with world.transport("a") as a:
                heard = Inbox()
                listener = a.listen(ANY_PORT, heard)
                got = Inbox()

                def on_message(frames):
                    log.append(bytes(frames[0]))
                    got(frames)

                channel = b.connect(listener.address, on_message, on_lost)
                await send_all(channel, [[b"hello"]])
                ((peer, _),) = await heard.wait(1)
                assert listener.send(peer, [b"answer"])
                await got.wait(1)
            await lost.wait()
            assert log == [b"answer", "lost"]
            assert not channel.send([b"x"])
            with pytest.raises(PeerError):
                await channel.ready()

    run(scenario)


def test_nothing_is_delivered_late_to_a_listener_that_came_back(run):
    async def scenario(world):
        async with world.transport("b") as b:
            async with world.transport("a") as a:
                address = a.listen(ANY_PORT, nothing).address
                lost = Inbox()
                old = b.connect(address, nothing, lost)
                await old.ready()
            old.send([b"old"])
            await lost.wait(1)
            assert not old.send([b"old"])
            async with world.transport("a") as a:
                heard = Inbox()
                a.listen(address, heard)
                assert not old.send([b"old"])
                new = b.connect(address, nothing, nothing)
                await send_all(new, [[b"new"]])
                await heard.wait(1)
                await wait_all_tasks_blocked(0.05)
                assert [bytes(frames[0]) for _, frames in heard.items] == [b"new"]

    run(scenario)


def test_a_reply_to_a_peer_that_is_gone_is_refused(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            heard = Inbox()
            listener = a.listen(ANY_PORT, heard)
            channel = b.connect(listener.address, nothing, nothing)
            await send_all(channel, [[b"x"]])
            ((peer, _),) = await heard.wait(1)
            channel.close()
            while listener.send(peer, [b"answer"]):
                await trio.sleep(0.01)
            other = b.connect(listener.address, nothing, nothing)
            await send_all(other, [[b"y"]])
            await heard.wait(2)
            assert not listener.send(peer, [b"answer"])

    run(scenario)


def test_a_full_peer_refuses_and_memory_is_bounded(run):
    async def scenario(world):
        async with world.stalled_listener() as (address, stall), world.transport("b") as b:
            channel = b.connect(address, nothing, nothing)
            await channel.ready()
            stall()
            body = bytes(64 * 1024 - 1)
            taken = 0
            while channel.send([b"x", body]):
                taken += 1
                assert taken < 5000
                await trio.sleep(0)
            assert taken >= 100
            with trio.move_on_after(0.05) as scope:
                await channel.ready()
                while channel.send([b"x", body]):
                    pass
                await channel.ready()
            assert scope.cancelled_caught

    run(scenario)


def test_the_largest_frames_and_messages_pass_whole(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            listener = None

            def echo(peer, frames):
                assert listener.send(peer, frames)

            listener = a.listen(ANY_PORT, echo)
            got = Inbox()
            channel = b.connect(listener.address, got, nothing)
            big = random.Random(1).randbytes(MAX_FRAME_BYTES)
            sizes = [0, 1, 255, 256, 64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, 2**20 + 1]
            messages = [
                [b"h", big],
                [b"h", memoryview(big)[1:], bytearray(big[:-1])],
                [b"h"] * MAX_FRAMES,
                [b"h", *(big[:size] for size in sizes)],
                [b"only a header"],
            ]
            await send_all(channel, messages)
            await got.wait(len(messages))
            for (frames,), sent in zip(got.items, messages, strict=True):
                assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in sent]

    run(scenario)


def test_a_message_that_no_peer_would_take_is_our_own_error(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            heard = Inbox()
            listener = a.listen(ANY_PORT, heard)
            channel = b.connect(listener.address, nothing, nothing)
            await channel.ready()
            with pytest.raises(LocalProtocolError):
                channel.send([b"h", bytes(MAX_FRAME_BYTES + 1)])
            with pytest.raises(LocalProtocolError):
                channel.send([b"h"] * (MAX_FRAMES + 1))
            assert channel.send([b"h"])
            await heard.wait(1)

    run(scenario)


def test_received_frames_outlive_the_transport(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            heard = Inbox()
            listener = a.listen(ANY_PORT, heard)
            channel = b.connect(listener.address, nothing, nothing)
            await send_all(channel, [[b"h", b"%d" % n * 100_000] for n in range(8)])
            await heard.wait(8)
        for number, (_, frames) in enumerate(heard.items):
            assert bytes(frames[1]) == b"%d" % number * 100_000

    run(scenario)


def test_many_requesters_on_one_channel_are_all_answered(run):
    """A wrapper that lets a send swallow the reader's edge hangs here at 16 requesters."""

    async def scenario(world):
        async def pong(call, request, body):
            await trio.lowlevel.checkpoint()
            return Pong(role="pool", name="a", boot_id=b"")

        answered = Counter()
        async with (
            world.transport("a") as a,
            world.transport("b") as b,
            open_connections(b, terms=Terms()) as connections,
            trio.open_nursery() as nursery,
        ):
            listener = await nursery.start(
                lambda task_status: serve(
                    a, ANY_PORT, Service({Ping: pong}), terms=Terms(), task_status=task_status
                )
            )

            async def ask(number):
                for _ in range(200):
                    await connections.call(listener.address, Ping(), timeout_s=30)
                    answered[number] += 1

            async with trio.open_nursery() as askers:
                for number in range(64):
                    askers.start_soon(ask, number)
            nursery.cancel_scope.cancel()
        assert answered == dict.fromkeys(range(64), 200)

    run(scenario)


def test_both_sides_sending_at_once_lose_nothing(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            heard, got = Inbox(), Inbox()
            listener = a.listen(ANY_PORT, heard)
            channel = b.connect(listener.address, got, nothing)
            await send_all(channel, [[b"hello"]])
            ((peer, _),) = await heard.wait(1)

            async def answer():
                for number in range(3000):
                    while not listener.send(peer, [b"%d" % number]):
                        await trio.sleep(0.001)
                    if number % 16 == 0:
                        await trio.sleep(0)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                nursery.start_soon(send_all, channel, [[b"%d" % number] for number in range(3000)])
            await heard.wait(3001)
            await got.wait(3000)
            assert [bytes(f[0]) for _, f in heard.items[1:]] == [b"%d" % n for n in range(3000)]
            assert [bytes(f[0]) for (f,) in got.items] == [b"%d" % n for n in range(3000)]

    run(scenario)


def test_closing_is_idempotent_and_final(run):
    async def scenario(world):
        async with world.transport("a") as a, world.transport("b") as b:
            listener = a.listen(ANY_PORT, nothing)
            lost = Inbox()
            channel = b.connect(listener.address, nothing, lost)
            await channel.ready()
            for _ in range(2):
                channel.close()
                listener.close()
            assert not channel.send([b"x"])
            with pytest.raises(PeerError):
                await channel.ready()
            await wait_all_tasks_blocked(0.02)
            assert not lost.items, "closing on purpose is no loss"

    run(scenario)


def test_an_error_in_a_block_comes_out_as_it_is(run):
    async def scenario(world):
        with pytest.raises(PeerError, match="mine"):
            async with world.transport("a"):
                raise PeerError("mine")

    run(scenario)


def test_a_bug_in_a_callback_ends_the_transport(run):
    async def scenario(world):
        def broken(peer, frames):
            raise ZeroDivisionError

        async def send_one():
            async with world.transport("a") as a, world.transport("b") as b:
                listener = a.listen(ANY_PORT, broken)
                channel = b.connect(listener.address, nothing, nothing)
                await send_all(channel, [[b"x"]])
                await trio.sleep_forever()

        with pytest.raises(ZeroDivisionError):
            await send_one()

    run(scenario)
