"""Real sockets over a link that carries little."""

import math
from functools import partial

import pytest
import trio

from droppexd.model import CHUNK_SIZE
from droppexd.wire.zeromq import open_zeromq_transport

PART = 32 * 1024
EVERY_S = 0.1
"""2.6 Mbit/s: what some homes can send. A chunk is on its way for 13 s."""


async def carry(source, target, pause_s):
    """Take what comes at once, as the way to a slow link does, and hand it on slowly."""
    send, receive = trio.open_memory_channel(math.inf)

    async def take():
        async with send:
            async for part in source:
                send.send_nowait(part)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        async for part in receive:
            for start in range(0, len(part), PART):
                await target.send_all(part[start : start + PART])
                await trio.sleep(pause_s)


async def slow_link(port, stream):
    """Carry what a client sends to the server slowly, and the answers at once."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as server, trio.open_nursery() as nursery:
        nursery.start_soon(carry, server, stream, 0)
        await carry(stream, server, EVERY_S)
        nursery.cancel_scope.cancel()


@pytest.mark.slow
def test_a_connection_outlives_a_chunk_that_takes_a_slow_link_a_while():
    got, lost, lost_before = [], [], []

    async def main():
        async with open_zeromq_transport() as transport, trio.open_nursery() as nursery:
            arrived = trio.Event()

            def on_message(peer, frames):
                got.append([bytes(frame) for frame in frames])
                arrived.set()

            listener = transport.listen("tcp://127.0.0.1:0", on_message)
            server_port = int(listener.address.rpartition(":")[2])
            (entrance,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, partial(slow_link, server_port), [entrance])
            address = f"tcp://127.0.0.1:{entrance.socket.getsockname()[1]}"

            def on_lost(*_):
                lost.append(True)
                arrived.set()

            channel = transport.connect(address, lambda *_: None, on_lost)
            await channel.ready()
            assert channel.send([bytes(CHUNK_SIZE)])
            with trio.fail_after(60):
                await arrived.wait()
            lost_before.extend(lost)  # The connection ends with the link, too.
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert not lost_before
    assert got == [[bytes(CHUNK_SIZE)]]
