"""Requests and replies over the simulated network: what a caller and a server may rely on."""

import random

import msgpack
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from droppexd.errors import (
    LocalProtocolError,
    NotAuthorised,
    NotEnoughShards,
    NotFound,
    NotMaster,
    PeerBusy,
    PeerError,
    PeerTimeout,
    RemoteProtocolError,
    UnknownKind,
    VersionMismatch,
)
from droppexd.model import Role
from droppexd.schema import pack
from droppexd.wire import rpc
from droppexd.wire.codec import decode, encode
from droppexd.wire.memory import MemoryNetwork
from droppexd.wire.messages import (
    PROTOCOL_VERSION,
    CloseSession,
    Done,
    GetClose,
    GetData,
    GetPart,
    Heartbeat,
    Ping,
    Pong,
    PutAbort,
)
from droppexd.wire.rpc import Limits, Service, Terms, open_connections, serve

ANY_PORT = "tcp://127.0.0.1:0"
PONG = Pong(role="pool", name="a", boot_id=b"")


class SeededEntropy:
    def __init__(self, seed):
        self._random = random.Random(seed)

    def token(self, size_bytes):
        return self._random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self._random.uniform(low, high)


class Cluster:
    """One server process `a` and one caller process `b`, on a simulated network."""

    def __init__(self, network, a, b, connections, nursery):
        self.network = network
        self.a = a
        self.b = b
        self.connections = connections
        self.nursery = nursery
        self.terms = Terms()
        self.address = ""

    async def serve(self, handlers, admissions=None, limits=None, callers=frozenset(Role), quick=None):
        service = Service(handlers, admissions or {}, quick or {}, callers=callers)

        async def start(task_status):
            await serve(self.a, ANY_PORT, service, terms=self.terms, limits=limits, task_status=task_status)

        self.address = (await self.nursery.start(start)).address
        return self.address

    async def call(self, request, body=(), timeout_s=5.0):
        return await self.connections.call(self.address, request, body, timeout_s=timeout_s)

    def begin(self, request, body=(), timeout_s=5.0):
        return self.connections.begin(self.address, request, body, timeout_s=timeout_s)

    async def connect(self):
        await self.connections.connect(self.address, timeout_s=5)


def run(scenario, *, role=None, idle_s=60.0):
    async def main():
        network = MemoryNetwork(SeededEntropy(3))
        async with (
            network.transport("a") as a,
            network.transport("b", role) as b,
            open_connections(b, terms=Terms(), idle_s=idle_s) as connections,
            trio.open_nursery() as nursery,
        ):
            await scenario(Cluster(network, a, b, connections, nursery))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def pong(call, request, body):
    return PONG


async def never(call, request, body):
    await trio.sleep_forever()


def test_a_request_gets_its_reply_and_both_bodies_pass():
    async def scenario(cluster):
        async def data(call, request, body):
            assert (call.peer.name, call.ticket, body) == ("b", None, [])
            return GetData(credit=request.part), [b"one", b"two"]

        await cluster.serve({GetPart: data})
        reply, body = await cluster.call(GetPart(stream=1, part=7))
        assert reply == GetData(credit=7)
        assert list(body) == [b"one", b"two"]

    run(scenario)


@pytest.mark.parametrize(
    "error",
    [
        NotFound("no file photos/x"),
        NotEnoughShards("3 of 4", ("shard 1: missing", "shard 2: down")),
        NotMaster("ask the master", "tcp://127.0.0.1:7400"),
    ],
)
def test_an_error_of_the_handler_is_raised_as_the_same_class(error):
    async def scenario(cluster):
        async def fail(call, request, body):
            raise error

        await cluster.serve({Ping: fail})
        with pytest.raises(type(error), match=str(error)) as caught:
            await cluster.call(Ping())
        assert caught.value.details == error.details

    run(scenario)


def test_a_bug_in_a_handler_ends_the_server():
    async def scenario(cluster):
        async def broken(call, request, body):
            raise ZeroDivisionError

        await cluster.serve({Ping: broken})
        with pytest.raises(PeerError):
            await cluster.call(Ping())

    with pytest.raises(ExceptionGroup) as caught:
        run(scenario)
    assert caught.group_contains(ZeroDivisionError)


def test_a_handler_that_answers_with_another_kind_is_a_bug():
    async def scenario(cluster):
        async def wrong(call, request, body):
            return Done()

        await cluster.serve({Ping: wrong})
        with pytest.raises(PeerError):
            await cluster.call(Ping())

    with pytest.raises(ExceptionGroup) as caught:
        run(scenario)
    assert caught.group_contains(LocalProtocolError)


def test_a_reply_too_large_for_any_peer_becomes_an_error():
    async def scenario(cluster):
        async def huge(call, request, body):
            return Pong(role="pool", name="n" * 2_000_000, boot_id=b"")

        await cluster.serve({Ping: huge})
        with pytest.raises(LocalProtocolError, match="Pong"):
            await cluster.call(Ping())

    run(scenario)


def test_a_kind_that_is_not_answered_here_is_named():
    async def scenario(cluster):
        await cluster.serve({})
        with pytest.raises(RemoteProtocolError, match="Ping"):
            await cluster.call(Ping())

    run(scenario)


# -- roles and terms -------------------------------------------------------------------------------


def test_a_role_may_send_only_its_requests():
    async def scenario(cluster):
        async def done(call, request, body):
            return Done()

        await cluster.serve({CloseSession: done, PutAbort: done, Ping: pong})
        with pytest.raises(NotAuthorised, match="CloseSession"):
            await cluster.call(CloseSession(session=1))
        assert (await cluster.call(PutAbort(stream=1)))[0] == Done()
        assert (await cluster.call(Ping()))[0] == PONG

    run(scenario, role=Role.CLIENT)


def test_a_service_may_leave_out_roles_that_the_table_allows():
    async def allowed(cluster):
        await cluster.serve({Ping: pong}, callers=frozenset((Role.APP, Role.POOL)))
        assert (await cluster.call(Ping()))[0] == PONG

    async def refused(cluster):
        await cluster.serve({Ping: pong}, callers=frozenset((Role.APP, Role.POOL)))
        with pytest.raises(NotAuthorised, match="client may not send Ping here"):
            await cluster.call(Ping())

    run(allowed, role=Role.POOL)
    run(allowed, role=None)  # Where there are no keys.
    run(refused, role=Role.CLIENT)


def test_every_role_is_held_to_the_table():
    heartbeat = Heartbeat(number=1, boot_id=bytes(16), capacity=1, free=1, shards=0, read_only=False)
    for role in Role:

        async def scenario(cluster, role=role):
            await cluster.serve({})
            expected = RemoteProtocolError if role is Role.POOL else NotAuthorised
            with pytest.raises(expected):
                await cluster.call(heartbeat)

        run(scenario, role=role)


def test_terms_are_learned_from_both_sides():
    async def scenario(cluster):
        await cluster.serve({Ping: pong})
        cluster.terms.observe(4)
        mine = Terms(9)
        async with open_connections(cluster.b, terms=mine) as connections:
            await connections.call(cluster.address, Ping(), timeout_s=1)
            assert cluster.terms.current == 9
            cluster.terms.observe(12)
            await connections.call(cluster.address, Ping(), timeout_s=1)
            assert mine.current == 12

    run(scenario)


def test_a_client_does_not_move_terms():
    async def scenario(cluster):
        await cluster.serve({Ping: pong})
        async with open_connections(cluster.b, terms=Terms(2**60)) as connections:
            await connections.call(cluster.address, Ping(), timeout_s=1)
        assert cluster.terms.current == 0

    run(scenario, role=Role.CLIENT)


# -- time ------------------------------------------------------------------------------------------


def test_a_request_without_answer_times_out_and_its_handler_is_stopped():
    async def scenario(cluster):
        ended = trio.Event()

        async def slow(call, request, body):
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        await cluster.serve({Ping: slow})
        start = trio.current_time()
        with pytest.raises(PeerTimeout, match=cluster.address):
            await cluster.call(Ping(), timeout_s=3)
        assert trio.current_time() - start == pytest.approx(3)
        await ended.wait()
        assert trio.current_time() - start == pytest.approx(3, abs=0.01)

    run(scenario)


def test_a_silent_peer_loses_its_channel_and_all_that_waits_on_it():
    async def scenario(cluster):
        await cluster.serve({Ping: never})
        await cluster.connect()
        patient = cluster.begin(Ping(), timeout_s=60)
        with pytest.raises(PeerTimeout):
            await cluster.call(Ping(), timeout_s=1)
        assert patient.done
        with pytest.raises(PeerError, match="silent"):
            await patient.answer()
        assert not cluster.connections.connected(cluster.address)
        with pytest.raises(PeerError, match="not connected"):
            cluster.begin(Ping())

    run(scenario)


def test_a_peer_that_answers_others_keeps_its_channel():
    async def scenario(cluster):
        await cluster.serve({Ping: pong, GetClose: never})
        await cluster.connect()
        slow = cluster.begin(GetClose(stream=1), timeout_s=2)
        patient = cluster.begin(GetClose(stream=1), timeout_s=60)
        await cluster.call(Ping())
        with pytest.raises(PeerTimeout):
            await slow.answer()
        assert cluster.connections.connected(cluster.address)
        assert not patient.done
        await cluster.call(Ping())

    run(scenario)


def test_a_late_reply_is_dropped():
    async def scenario(cluster):
        heard = []
        listener = cluster.a.listen(ANY_PORT, lambda peer, frames: heard.append((peer, decode(frames))))
        cluster.address = listener.address
        await cluster.connect()
        first = cluster.begin(Ping(), timeout_s=1)
        second = cluster.begin(Ping(), timeout_s=10)
        await trio.sleep(0.5)
        (peer, one), (_, two) = heard
        listener.send(peer, encode(PONG, two.request_id, 0, 0))
        assert await second.answer() == (PONG, [])
        with pytest.raises(PeerTimeout):
            await first.answer()
        listener.send(peer, encode(PONG, one.request_id, 0, 0))
        listener.send(peer, encode(PONG, 12345, 0, 0))
        await trio.sleep(0.5)
        with pytest.raises(PeerTimeout):
            await first.answer()

    run(scenario)


def test_the_remaining_time_travels_with_the_request():
    async def scenario(cluster):
        heard = []
        listener = cluster.a.listen(ANY_PORT, lambda peer, frames: heard.append(decode(frames)))
        cluster.address = listener.address
        await cluster.connect()
        for timeout_s in (0.0001, 1.5, 1e9):
            cluster.begin(Ping(), timeout_s=timeout_s).abandon()
        await trio.sleep(0.1)
        assert [envelope.remaining_ms for envelope in heard] == [1, 1500, 3_600_000]

    run(scenario)


def test_timers_of_finished_requests_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(rpc, "MOST_STALE_TIMERS", 16)

    async def scenario(cluster):
        await cluster.serve({Ping: pong, GetClose: never})
        await cluster.connect()
        slow = cluster.begin(GetClose(stream=1), timeout_s=30)
        for _ in range(200):
            await cluster.call(Ping(), timeout_s=3600)
        assert len(cluster.connections._timers) <= 40
        with pytest.raises(PeerTimeout):
            await slow.answer()

    run(scenario)


# -- what may be outstanding -----------------------------------------------------------------------


def test_a_peer_with_too_much_outstanding_is_told_so_and_is_let_in_again_later():
    async def scenario(cluster):
        gate = trio.Event()

        async def wait(call, request, body):
            await gate.wait()
            return PONG

        await cluster.serve({Ping: wait}, limits=Limits(outstanding_per_peer=3))
        await cluster.connect()
        inside = [cluster.begin(Ping()) for _ in range(3)]
        with pytest.raises(PeerBusy):
            await cluster.call(Ping())
        gate.set()
        for pending in inside:
            assert (await pending.answer())[0] == PONG
        assert (await cluster.call(Ping()))[0] == PONG

    run(scenario)


def test_all_peers_together_are_bounded_and_one_cannot_shut_out_the_others():
    async def scenario(cluster):
        await cluster.serve({Ping: never}, limits=Limits(outstanding_per_peer=2, outstanding=3))
        await cluster.connect()
        pendings = [cluster.begin(Ping()) for _ in range(2)]
        async with (
            cluster.network.transport("c") as c,
            open_connections(c, terms=Terms()) as others,
        ):
            await others.connect(cluster.address, timeout_s=1)
            third = others.begin(cluster.address, Ping(), timeout_s=1)
            with pytest.raises(PeerBusy):
                await others.call(cluster.address, Ping(), timeout_s=1)
            assert not third.done
        assert not any(pending.done for pending in pendings)

    run(scenario)


def test_a_peer_leaves_nothing_behind_once_it_has_nothing_outstanding():
    async def scenario(cluster):
        server = rpc._Server(Service({Ping: pong}), Terms(), Limits())
        listener = cluster.a.listen(ANY_PORT, server.receive)
        async with trio.open_nursery() as handlers:
            server.start(listener, handlers)
            cluster.address = listener.address
            for _ in range(10):
                await cluster.call(Ping())
                cluster.connections.disconnect(cluster.address)
        assert server._outstanding == 0
        assert not server._outstanding_by_route

    run(scenario)


# -- order and admission ---------------------------------------------------------------------------


def test_admissions_see_requests_in_order_before_any_handler_runs():
    async def scenario(cluster):
        log = []

        def admit(peer, request, body):
            log.append(("admit", request.part))
            return request.part * 10

        async def data(call, request, body):
            log.append(("handle", call.ticket))
            return GetData(credit=1)

        await cluster.serve({GetPart: data}, {GetPart: admit})
        await cluster.connect()
        pendings = [cluster.begin(GetPart(stream=1, part=part)) for part in range(5)]
        for pending in pendings:
            await pending.answer()
        assert [part for what, part in log if what == "admit"] == list(range(5))
        assert sorted(ticket for what, ticket in log if what == "handle") == [0, 10, 20, 30, 40]
        for part in range(5):
            assert log.index(("admit", part)) < log.index(("handle", part * 10))

    run(scenario)


def test_an_admission_may_refuse():
    async def scenario(cluster):
        def refuse(peer, request, body):
            raise NotFound("no such stream")

        await cluster.serve({Ping: pong}, {Ping: refuse})
        with pytest.raises(NotFound, match="stream"):
            await cluster.call(Ping())

    run(scenario)


# -- giving up -------------------------------------------------------------------------------------


def test_cancelling_a_call_abandons_it_and_keeps_the_channel():
    async def scenario(cluster):
        await cluster.serve({GetClose: never, Ping: pong})
        await cluster.connect()
        other = cluster.begin(GetClose(stream=2), timeout_s=50)
        with trio.move_on_after(1) as scope:
            await cluster.call(GetClose(stream=1), timeout_s=30)
        assert scope.cancelled_caught
        await trio.sleep(35)
        assert not other.done
        await cluster.call(Ping())

    run(scenario)


def test_settled_waits_without_taking_or_abandoning():
    async def scenario(cluster):
        gate = trio.Event()

        async def wait(call, request, body):
            await gate.wait()
            return PONG

        await cluster.serve({Ping: wait})
        await cluster.connect()
        pending = cluster.begin(Ping(), timeout_s=50)
        assert not await pending.settled(1)
        gate.set()
        assert await pending.settled(1)
        assert (await pending.answer())[0] == PONG
        with pytest.raises(LocalProtocolError, match="taken"):
            await pending.answer()

    run(scenario)


def test_disconnecting_fails_what_is_outstanding():
    async def scenario(cluster):
        await cluster.serve({Ping: never})
        await cluster.connect()
        pending = cluster.begin(Ping())
        cluster.connections.disconnect(cluster.address)
        with pytest.raises(PeerError, match="disconnected"):
            await pending.answer()
        cluster.connections.disconnect(cluster.address)

    run(scenario)


def test_an_idle_channel_is_closed_and_opened_again_when_needed():
    async def scenario(cluster):
        await cluster.serve({Ping: pong, GetClose: never})
        await cluster.call(Ping())
        await trio.sleep(8)
        await cluster.call(Ping())
        await trio.sleep(8)
        assert cluster.connections.connected(cluster.address)
        pending = cluster.begin(GetClose(stream=1), timeout_s=30)
        await trio.sleep(25)
        assert cluster.connections.connected(cluster.address)
        pending.abandon()
        await trio.sleep(25)
        assert not cluster.connections.connected(cluster.address)
        await cluster.call(Ping())

    run(scenario, idle_s=10)


def test_a_cancelled_server_gives_running_requests_their_time():
    async def scenario(cluster):
        ended = []

        async def slow(call, request, body):
            try:
                await trio.sleep(2 if request.stream else 100)
            finally:
                ended.append(request.stream)
            return Done()

        address = None
        async with trio.open_nursery() as nursery:

            async def start(task_status):
                limits = Limits(drain_s=5)
                await serve(
                    cluster.a,
                    ANY_PORT,
                    Service({GetClose: slow}),
                    terms=Terms(),
                    limits=limits,
                    task_status=task_status,
                )

            address = (await nursery.start(start)).address
            await cluster.connections.connect(address, timeout_s=1)
            short = cluster.connections.begin(address, GetClose(stream=1), timeout_s=90)
            long = cluster.connections.begin(address, GetClose(stream=0), timeout_s=90)
            await trio.sleep(1)
            start_time = trio.current_time()
            nursery.cancel_scope.cancel()

            async def ask_more():
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.5)
                    with pytest.raises(PeerBusy):
                        await cluster.connections.call(address, GetClose(stream=1), timeout_s=1)

            nursery.start_soon(ask_more)
        assert trio.current_time() - start_time == pytest.approx(5)
        assert (await short.answer())[0] == Done()
        with pytest.raises(PeerError, match="lost"):
            await long.answer()
        assert ended == [1, 0]

    run(scenario)


# -- peers that are not there, or misbehave --------------------------------------------------------


def test_an_absent_peer_is_told_by_its_address():
    async def scenario(cluster):
        with pytest.raises(PeerError, match=r"tcp://127\.0\.0\.1:9 is not reachable"):
            await cluster.connections.connect("tcp://127.0.0.1:9", timeout_s=1)
        await cluster.serve({Ping: pong})
        cluster.network.partition("b", "a")
        with pytest.raises(PeerTimeout, match=f"{cluster.address} is not reachable"):
            await cluster.call(Ping(), timeout_s=1)
        cluster.network.heal()
        await cluster.call(Ping(), timeout_s=1)

    run(scenario)


def test_a_killed_peer_fails_what_waits_for_it_at_once():
    async def scenario(cluster):
        await cluster.serve({Ping: never})
        await cluster.connect()
        pending = cluster.begin(Ping(), timeout_s=60)
        await trio.sleep(1)
        start = trio.current_time()
        cluster.network.kill("a")
        with pytest.raises(PeerError, match="lost"):
            await pending.answer()
        assert trio.current_time() - start < 0.1

    run(scenario)


def test_a_full_peer_is_busy_for_begin_and_waited_for_by_call():
    turn = None

    async def one_after_another(call, request, body):
        async with turn:  # Replies have to fit as well: a server drops what its peer does not take.
            await trio.sleep(0.1)
        return PONG

    async def main():
        nonlocal turn
        turn = trio.Lock()
        network = MemoryNetwork(SeededEntropy(3), capacity=4)
        async with (
            network.transport("a") as a,
            network.transport("b") as b,
            open_connections(b, terms=Terms()) as connections,
            trio.open_nursery() as nursery,
        ):
            listener = await nursery.start(
                lambda task_status: serve(
                    a, ANY_PORT, Service({Ping: one_after_another}), terms=Terms(), task_status=task_status
                )
            )
            await connections.connect(listener.address, timeout_s=1)
            pendings = [connections.begin(listener.address, Ping(), timeout_s=5) for _ in range(4)]
            with pytest.raises(PeerBusy):
                connections.begin(listener.address, Ping(), timeout_s=5)
            assert (await connections.call(listener.address, Ping(), timeout_s=5))[0] == PONG
            for pending in pendings:
                await pending.answer()
            network.pause("a")
            for _ in range(4):
                connections.begin(listener.address, Ping(), timeout_s=50).abandon()
            with pytest.raises(PeerTimeout, match="took no more"):
                await connections.call(listener.address, Ping(), timeout_s=1)
            assert not connections.connected(listener.address)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def answer_with(cluster, make_frames):
    listener = None

    def on_message(peer, frames):
        listener.send(peer, make_frames(decode(frames).request_id))

    listener = cluster.a.listen(ANY_PORT, on_message)
    cluster.address = listener.address


def test_a_reply_of_the_wrong_class_breaks_the_protocol():
    async def scenario(cluster):
        answer_with(cluster, lambda request_id: encode(Done(), request_id, 0, 0))
        with pytest.raises(RemoteProtocolError, match="Done is no answer; Pong is"):
            await cluster.call(Ping())

    run(scenario)


def test_a_malformed_reply_fails_its_request_only():
    async def scenario(cluster):
        def make_frames(request_id):
            return [*encode(Done(), request_id, 0, 0), b"a body that Done never has"]

        answer_with(cluster, make_frames)
        with pytest.raises(RemoteProtocolError, match="body"):
            await cluster.call(Ping())
        assert cluster.connections.connected(cluster.address)

    run(scenario)


def test_a_peer_that_answers_garbage_is_disconnected():
    async def scenario(cluster):
        answer_with(cluster, lambda _: [b"\xc1 garbage"])
        with pytest.raises(PeerError, match="breaks the protocol"):
            await cluster.call(Ping())
        assert not cluster.connections.connected(cluster.address)

    run(scenario)


def header(version, kind, request_id, fields=()):
    """Return a message of another release."""
    return [msgpack.packb([version, kind, request_id, 0, 1000, fields])]


async def answer_to(cluster, frames):
    """Send frames as they are, and return what comes back."""
    got = []
    channel = cluster.b.connect(cluster.address, got.append, lambda: None)
    await channel.ready()
    channel.send(frames)
    await trio.sleep(0.1)
    (answer,) = got
    return decode(answer)


def test_a_version_that_is_no_neighbour_is_refused_on_both_sides(caplog):
    async def scenario(cluster):
        await cluster.serve({Ping: pong})
        text = f"protocol versions 9 and {PROTOCOL_VERSION} do not work together"
        reply = await answer_to(cluster, header(9, Ping.kind, 77))
        assert reply.request_id == 77
        with pytest.raises(VersionMismatch, match=text):
            raise reply.message.error()
        (said,) = [record.getMessage() for record in caplog.records if text in record.getMessage()]
        assert said.startswith("a bad request of ")

        answer_with(cluster, lambda request_id: header(9, Pong.kind, request_id, pack(PONG)))
        with pytest.raises(VersionMismatch, match=f"^{cluster.address}: {text}"):
            await cluster.call(Ping())

    run(scenario)


def test_a_newer_neighbour_is_answered_and_told_our_version():
    async def scenario(cluster):
        seen = []

        async def note(call, request, _body):
            seen.append(call.version)
            return PONG

        await cluster.serve({Ping: note})
        reply = await answer_to(cluster, header(PROTOCOL_VERSION + 1, Ping.kind, 78, ["new"]))
        assert (reply.message, reply.version) == (PONG, PROTOCOL_VERSION)
        assert seen == [PROTOCOL_VERSION]

    run(scenario)


def test_a_kind_that_only_a_newer_neighbour_knows_is_refused_by_name():
    async def scenario(cluster):
        await cluster.serve({Ping: pong})
        reply = await answer_to(cluster, header(PROTOCOL_VERSION + 1, 9999, 79))
        newer, ours = PROTOCOL_VERSION + 1, PROTOCOL_VERSION
        with pytest.raises(UnknownKind, match=f"{newer} and its receiver {ours}; upgrade .* speaks {ours}"):
            raise reply.message.error()

    run(scenario)


@pytest.mark.parametrize(("ours", "theirs"), [(5, 4), (4, 5), (5, 5)])
def test_connections_know_what_they_speak(monkeypatch, ours, theirs):
    async def scenario(cluster):
        monkeypatch.setattr("droppexd.wire.codec.PROTOCOL_VERSION", ours)
        answer_with(
            cluster,
            lambda request_id: header(theirs, Pong.kind, request_id, [*pack(PONG), "of later releases"]),
        )
        assert cluster.connections.spoken_with(cluster.address) is None
        assert (await cluster.call(Ping()))[0] == PONG
        assert cluster.connections.spoken_with(cluster.address) == min(ours, theirs)

    run(scenario)


def test_what_is_logged_of_a_misbehaving_peer_is_bounded(caplog):
    async def scenario(cluster):
        await cluster.serve({Ping: pong})
        channel = cluster.b.connect(cluster.address, lambda frames: None, lambda: None)
        for _ in range(300):
            await channel.ready()
            channel.send([b"\xc1"])
        await trio.sleep(1)
        assert len(caplog.records) == rpc.COMPLAINTS_A_WINDOW
        await cluster.call(Ping())

    run(scenario)


def test_connections_end_with_their_block():
    async def scenario(cluster):
        await cluster.serve({Ping: never})
        async with open_connections(cluster.b, terms=Terms()) as connections:
            await connections.connect(cluster.address, timeout_s=1)
            pending = connections.begin(cluster.address, Ping(), timeout_s=5)
        with pytest.raises(PeerError):
            await pending.answer()
        with pytest.raises(PeerError):
            await connections.call(cluster.address, Ping(), timeout_s=1)
        await wait_all_tasks_blocked()

    run(scenario)


def test_a_quick_handler_answers_without_a_task():
    async def scenario(cluster):
        def at_once(call, request, body, respond):
            respond(PONG)
            return True

        await cluster.serve({Ping: never}, quick={Ping: at_once})
        assert (await cluster.call(Ping()))[0] == PONG

    run(scenario)


def test_a_quick_handler_leaves_what_it_does_not_take_and_reports_what_it_raises():
    async def scenario(cluster):
        async def slowly(call, request, body):
            return Done()

        def choosy(call, request, body, respond):
            if request.stream == 0:
                raise NotFound("no such stream")
            return False

        await cluster.serve({GetClose: slowly}, quick={GetClose: choosy})
        assert (await cluster.call(GetClose(stream=1)))[0] == Done()
        with pytest.raises(NotFound, match="no such stream"):
            await cluster.call(GetClose(stream=0))

    run(scenario)


def test_what_a_quick_handler_has_taken_counts_as_outstanding_until_it_is_answered():
    async def scenario(cluster):
        taken = []

        def later(call, request, body, respond):
            taken.append(respond)
            return True

        await cluster.serve({Ping: never}, limits=Limits(outstanding=2), quick={Ping: later})
        await cluster.connect()
        waiting = [cluster.begin(Ping()) for _ in range(2)]
        with pytest.raises(PeerBusy):
            await cluster.call(Ping())
        for respond in taken:
            respond(PONG)
        assert [(await pending.answer())[0] for pending in waiting] == [PONG, PONG]
        with pytest.raises(LocalProtocolError, match="twice"):
            taken[0](PONG)

    run(scenario)


def test_stopping_waits_for_what_a_quick_handler_has_taken():
    async def scenario(cluster):
        taken = []

        def later(call, request, body, respond):
            taken.append(respond)
            return True

        async def answer_in_a_while():
            await trio.sleep(3)
            taken[0](PONG)

        async with trio.open_nursery() as nursery:

            async def start(task_status):
                service = Service({Ping: never}, quick={Ping: later})
                limits = Limits(drain_s=5)
                await serve(
                    cluster.a, ANY_PORT, service, terms=Terms(), limits=limits, task_status=task_status
                )

            address = (await nursery.start(start)).address
            await cluster.connections.connect(address, timeout_s=1)
            pending = cluster.connections.begin(address, Ping(), timeout_s=90)
            await trio.sleep(1)
            cluster.nursery.start_soon(answer_in_a_while)
            began = trio.current_time()
            nursery.cancel_scope.cancel()
        assert 3 <= trio.current_time() - began < 5  # The mock clock's seconds: answered, not given up.
        assert (await pending.answer())[0] == PONG

    run(scenario)
