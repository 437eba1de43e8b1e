"""Real sockets: whatever a stranger or a broken peer sends, the server stays up and serves the others."""

import random
import socket
import struct
from contextlib import asynccontextmanager, suppress

import msgpack
import pytest
import trio
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from droppexd.errors import ConfigError, KeyRefused, NotAuthorised, PeerError, PeerTimeout, VersionMismatch
from droppexd.model import MEMBER_ROLES, Role
from droppexd.wire.codec import decode, encode
from droppexd.wire.keys import AllowList, Member, TransportKeys, generate_keypair
from droppexd.wire.messages import KINDS, CloseSession, Done, Ping, Pong
from droppexd.wire.rpc import Limits, Service, Terms, open_connections, serve
from droppexd.wire.transport import MAX_FRAME_BYTES, MAX_FRAMES
from droppexd.wire.zeromq import open_zeromq_transport

ANY_PORT = "tcp://127.0.0.1:0"
PONG = Pong(role="pool", name="a", boot_id=b"")

GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
"""A ZMTP 3.0 handshake by hand: https://rfc.zeromq.org/spec/23/ ."""

RAW = [
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    random.Random(1).randbytes(4096),
    b"\xff" * 4096,
    GREETING[:11],
    GREETING,
    GREETING.replace(b"NULL", b"GOOD"),
    GREETING + b"\x04\xff" + bytes(100),
    GREETING + READY[:8],
    GREETING + READY.replace(b"DEALER", b"ROUTER"),
    GREETING + READY + b"\x00",
    GREETING + READY + b"\x00\x05abc",
    GREETING + READY + b"\x01\x05hello",
    GREETING + READY + b"\x02" + struct.pack(">Q", MAX_FRAME_BYTES + 1) + bytes(1000),
    GREETING + READY + b"\x02" + struct.pack(">Q", 2**63 - 1),
    GREETING + READY + b"\x02" + struct.pack(">Q", 2**64 - 1) + bytes(1000),
    GREETING + READY + b"\x02" + struct.pack(">Q", MAX_FRAME_BYTES) + bytes(1000),
    GREETING + READY + b"\x78\x05hello" * 10,
    GREETING + READY + b"\x00\x05hello" * 1000,
]


@pytest.fixture
def run():
    def run_scenario(scenario):
        async def main():
            with trio.fail_after(60):
                await scenario()

        trio.run(main)

    return run_scenario


@asynccontextmanager
async def serving(keys=None, limits=None):
    """Serve Ping and CloseSession, and give the address."""

    async def pong(call, request, body):
        return PONG

    async def done(call, request, body):
        return Done()

    async def start(task_status):
        await serve(
            transport,
            ANY_PORT,
            Service({Ping: pong, CloseSession: done}),
            terms=Terms(),
            limits=limits,
            task_status=task_status,
        )

    async with open_zeromq_transport(keys=keys) as transport, trio.open_nursery() as nursery:
        yield (await nursery.start(start)).address
        nursery.cancel_scope.cancel()


async def ask(address, keys=None, request=None, timeout_s=10.0):
    async with (
        open_zeromq_transport(keys=keys) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        reply, _ = await connections.call(address, request or Ping(), timeout_s=timeout_s)
        return reply


@asynccontextmanager
async def raw_dealer(address):
    """A peer that sends what it likes, in the manner of ZeroMQ."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(address)
        yield dealer


async def receive(dealer):
    while not dealer.poll(0):
        await trio.sleep(0.002)
    return dealer.recv_multipart()


async def speak_tcp(address, data):
    """Send bytes to a port; return what comes back until the other side is quiet or gone."""
    port = int(address.rpartition(":")[2])
    with trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM) as stream:
        await stream.connect(("127.0.0.1", port))
        heard = b""
        try:
            await stream.send(data)
            with trio.move_on_after(0.05):
                while chunk := await stream.recv(4096):
                    heard += chunk
        except OSError:
            return heard
        return heard


def test_garbage_on_the_port_harms_nobody(run):
    async def scenario():
        async with serving() as address:
            for data in RAW:
                await speak_tcp(address, data)
                assert await ask(address) == PONG

    run(scenario)


def test_many_strangers_that_say_nothing_harm_nobody(run):
    async def scenario():
        async with serving() as address:
            port = int(address.rpartition(":")[2])
            strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
            try:
                assert await ask(address) == PONG
            finally:
                for stranger in strangers:
                    stranger.close()
            assert await ask(address) == PONG

    run(scenario)


def test_a_frame_above_the_limit_costs_its_sender_the_connection(run):
    async def scenario():
        async with serving() as address, raw_dealer(address) as dealer:
            dealer.send_multipart([b"h", bytes(MAX_FRAME_BYTES + 1)])
            dealer.send_multipart([b"h", bytes(MAX_FRAME_BYTES + 1)])
            assert await ask(address) == PONG

    run(scenario)


def test_a_message_of_too_many_frames_is_dropped(run, caplog):
    async def scenario():
        async with serving() as address, raw_dealer(address) as dealer:
            good = encode(Ping(), 5, 0, 1000)
            dealer.send_multipart([*good, *[b"x"] * MAX_FRAMES])
            dealer.send_multipart([*good, *[b"x" * 1000] * 20_000])
            dealer.send_multipart(encode(Ping(), 6, 0, 1000))
            assert decode(await receive(dealer)).request_id == 6
            assert "20001 frames" in caplog.text

    run(scenario)


def test_bad_messages_are_answered_by_name_where_there_is_an_id(run):
    async def scenario():
        async with serving() as address, raw_dealer(address) as dealer:
            dealer.send(b"")
            dealer.send(b"\xc1\xc1")
            for header in ([9, 3, 41, 0, 1000, []], [1, 999, 42, 0, 1000, []], [1, 3, 43, 0, 1000, None]):
                dealer.send(msgpack.packb(header))
            dealer.send_multipart(encode(Done(), 44, 0, 0))
            dealer.send_multipart(encode(Ping(), 45, 0, 1000))
            answers = [decode(await receive(dealer)) for _ in range(5)]
            assert [answer.request_id for answer in answers] == [41, 42, 43, 44, 45]
            assert isinstance(answers[0].message.error(), VersionMismatch)
            assert "999" in answers[1].message.text
            assert "Ping" in answers[2].message.text
            assert "no request" in answers[3].message.text
            assert answers[4].message == PONG

    run(scenario)


def test_random_messages_harm_nobody(run):
    plain = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.text(max_size=20)
        | st.binary(max_size=20),
        lambda inner: st.lists(inner, max_size=6),
        max_leaves=15,
    )
    headers = st.one_of(
        st.binary(max_size=300),
        plain.map(msgpack.packb),
        st.tuples(
            st.sampled_from([1, 1, 1, 2]),
            st.sampled_from(sorted(KINDS)),
            st.integers(0, 99),
            st.just(0),
            st.just(50),
            plain,
        ).map(msgpack.packb),
    )
    messages = st.lists(st.lists(headers, min_size=1, max_size=4), min_size=1, max_size=10)

    async def scenario():
        async with serving() as address, raw_dealer(address) as dealer:
            marker = 10_000

            @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(messages)
            def send_garbage(batch):
                for frames in batch:
                    dealer.send_multipart(frames)

            for _ in range(2):
                send_garbage()
                marker += 1
                dealer.send_multipart(encode(Ping(), marker, 0, 5000))
                while (answer := decode(await receive(dealer))).request_id != marker:
                    pass
                assert answer.message == PONG

    run(scenario)


def test_a_flood_is_refused_and_the_others_are_served(run):
    async def scenario():
        async with serving(limits=Limits(outstanding_per_peer=4)) as address, raw_dealer(address) as dealer:
            for number in range(2000):
                dealer.send_multipart(encode(Ping(), number, 0, 5000))
            assert await ask(address) == PONG
            answers = [decode(await receive(dealer)) for _ in range(300)]
            assert {type(answer.message).__name__ for answer in answers} <= {"Pong", "Failed"}

    run(scenario)


def test_a_peer_that_vanishes_in_the_middle_of_a_message_harms_nobody(run):
    async def scenario():
        async with serving() as address:
            header = encode(Ping(), 1, 0, 1000)[0]
            whole = (
                b"\x01" + bytes([len(header)]) + header + b"\x02" + struct.pack(">Q", 2**20) + bytes(2**16)
            )
            for end in range(0, len(whole), 7001):
                await speak_tcp(address, GREETING + READY + whole[:end])
            assert await ask(address) == PONG

    run(scenario)


# -- keys ------------------------------------------------------------------------------------------


class Ring:
    """The keys of a small cluster."""

    def __init__(self):
        self.cluster = generate_keypair()
        self.pairs = {role: generate_keypair() for role in MEMBER_ROLES}
        members = {self.pairs[role].public: Member(role, f"{role}-1") for role in MEMBER_ROLES}
        self.server = TransportKeys(
            own=self.pairs[Role.CONTROLLER],
            cluster_public=self.cluster.public,
            cluster_secret=self.cluster.secret,
            allowed=AllowList(members),
        )

    def of(self, role):
        return TransportKeys(own=self.pairs[role], cluster_public=self.cluster.public)


def test_members_are_served_and_known_by_role_and_name(run):
    ring = Ring()
    seen = []

    async def scenario():
        async def pong(call, request, body):
            seen.append(call.peer[1:])
            return PONG

        async with open_zeromq_transport(keys=ring.server) as transport, trio.open_nursery() as nursery:
            listener = await nursery.start(
                lambda task_status: serve(
                    transport, ANY_PORT, Service({Ping: pong}), terms=Terms(), task_status=task_status
                )
            )
            for role in MEMBER_ROLES:
                assert await ask(listener.address, ring.of(role)) == PONG
            nursery.cancel_scope.cancel()
        assert seen == [(role, f"{role}-1") for role in MEMBER_ROLES]

    run(scenario)


def test_a_key_of_the_wrong_role_is_refused(run):
    ring = Ring()

    async def scenario():
        async with serving(ring.server) as address:
            for role in (Role.CLIENT, Role.POOL, Role.CONTROLLER):
                with pytest.raises(NotAuthorised, match=f"role {role} may not send CloseSession"):
                    await ask(address, ring.of(role), CloseSession(session=1))
            assert await ask(address, ring.of(Role.APP), CloseSession(session=1)) == Done()

    run(scenario)


def test_a_stranger_who_knows_the_servers_key_gets_nothing(run):
    ring = Ring()
    stranger = TransportKeys(own=generate_keypair(), cluster_public=ring.cluster.public)

    async def scenario():
        async with serving(ring.server) as address:
            with pytest.raises(KeyRefused, match="does not let this key in"):
                await ask(address, stranger)
            assert await ask(address, ring.of(Role.APP)) == PONG

    run(scenario)


def test_a_server_without_the_clusters_secret_is_not_believed(run):
    ring, other = Ring(), Ring()

    async def scenario():
        async with serving(other.server) as address:
            with pytest.raises(PeerError):
                await ask(address, ring.of(Role.APP), timeout_s=0.5)

    run(scenario)


def test_a_peer_without_keys_gets_nothing_from_a_server_with_keys(run):
    ring = Ring()

    async def scenario():
        async with serving(ring.server) as address, raw_dealer(address) as dealer:
            with pytest.raises(PeerError):
                await ask(address, timeout_s=0.5)
            with suppress(zmq.Again):  # After a handshake that failed ZeroMQ itself has nowhere to send it.
                dealer.send_multipart(encode(Ping(), 1, 0, 1000), zmq.NOBLOCK)
            for data in RAW:
                assert b"READY" not in await speak_tcp(address, data)
            assert await ask(address, ring.of(Role.APP)) == PONG
            assert not dealer.poll(0)

    run(scenario)


def test_a_peer_with_keys_does_not_trust_a_server_without(run):
    ring = Ring()

    async def scenario():
        async with serving() as address:
            with pytest.raises(PeerError):
                await ask(address, ring.of(Role.APP), timeout_s=0.5)

    run(scenario)


def test_without_keys_only_loopback_is_listened_on_and_reached(run):
    async def scenario():
        async with open_zeromq_transport() as transport:
            for address in ("tcp://0.0.0.0:0", "tcp://*:0", "tcp://10.1.2.3:7400", "tcp://example.org:1"):
                with pytest.raises(ConfigError, match="needs the cluster's keys"):
                    transport.listen(address, lambda peer, frames: None)
                with pytest.raises(PeerError, match="needs keys"):
                    transport.connect(address, lambda frames: None, lambda: None)
        async with open_zeromq_transport(keys=Ring().of(Role.APP)) as transport:
            with pytest.raises(ConfigError, match="cluster's keys"):
                transport.listen(ANY_PORT, lambda peer, frames: None)

    run(scenario)


def test_addresses_of_ipv6_are_listened_on_and_reached(run):
    """Written as IPv6, 127.0.0.1 needs the sockets of IPv6, and no machine that has it."""

    async def scenario():
        ring = Ring()
        keys = ring.of(Role.APP)
        async with serving(ring.server) as address:
            port = address.rpartition(":")[2]
            assert await ask(f"tcp://[::ffff:127.0.0.1]:{port}", keys) == PONG
            assert await ask(f"tcp://127.0.0.1:{port}", keys) == PONG
        async with open_zeromq_transport(keys=ring.server) as transport:
            listener = transport.listen("tcp://[::ffff:127.0.0.1]:0", lambda peer, frames: None)
            assert listener.address.startswith("tcp://[::ffff:127.0.0.1]:")

    run(scenario)


def test_an_address_that_is_none_is_refused(run):
    async def scenario():
        async with open_zeromq_transport() as transport:
            for address in ("", "127.0.0.1", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "tcp://127.0.0.1:x"):
                with pytest.raises((PeerError, ConfigError)):
                    transport.listen(address, lambda peer, frames: None)
                with pytest.raises(PeerError):
                    transport.connect(address, lambda frames: None, lambda: None)

    run(scenario)


def test_a_listener_that_accepts_and_says_nothing_times_out(run):
    async def scenario():
        with (
            socket.create_server(("127.0.0.1", 0)) as silent,
            pytest.raises(PeerTimeout, match="not reachable"),
        ):
            await ask(f"tcp://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)

    run(scenario)
