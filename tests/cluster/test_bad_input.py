"""Bad input to real processes: a clear error each, no crash, no half-visible file, memory bounded."""

import contextlib
import os
import random
import shutil
import socket
import struct
import subprocess
import sys

import msgpack
import pytest
import trio
import zmq

from droppexd.errors import DroppexError, NotAuthorised, NotFound, PeerError, VersionMismatch
from droppexd.model import CHUNK_SIZE, ExtentId, Layout, VersionId
from droppexd.wire.codec import decode, encode
from droppexd.wire.keys import TransportKeys, generate_keypair, load_keys, read_member_key
from droppexd.wire.messages import (
    ABSENT,
    KINDS,
    PROTOCOL_VERSION,
    Announce,
    Heartbeat,
    Ping,
    Pong,
    PutChunk,
    PutOpen,
    WritePiece,
)
from droppexd.wire.rpc import Terms, open_connections
from droppexd.wire.transport import MAX_FRAME_BYTES, MAX_FRAMES
from droppexd.wire.zeromq import open_zeromq_transport

GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
"""A ZMTP 3.0 handshake by hand: https://rfc.zeromq.org/spec/23/ ."""

MOST_GROWTH_MIB = 64
"""More than what is under way at any moment may take; much less than what was sent."""

LARGE = CHUNK_SIZE + 5000


@pytest.fixture(scope="module")
def cluster(new_cluster):
    """A cluster that forgets silent transfers soon, with memory for five chunks."""
    app = {"idle": "1s", "buffer": "32 MiB"}
    with new_cluster(pools=3, app=app, pool={"idle": "2s"}) as running:
        yield running


@pytest.fixture
def unharmed(cluster, content, request):
    """Check after the test that every process still runs, answers, and has not grown much."""
    before = {process.name: process.memory_mib() for process in cluster.processes}
    yield
    name, data = f"unharmed/{request.node.name}", content(LARGE)
    assert all(process.running for process in cluster.processes)
    cluster.put(name, data)
    assert cluster.get(name) == data
    for process in cluster.processes:
        grown = process.memory_mib("VmHWM") - before[process.name]
        assert grown < MOST_GROWTH_MIB, f"{process.name} grew by {grown} MiB"


def ports_of(cluster):
    """Return the addresses of one process of each role."""
    return [cluster.controller.address, cluster.app.address, cluster.pools[0].address]


def speak_tcp(address, *parts):
    """Send bytes to a port and leave, however the other side takes it."""
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stream, contextlib.suppress(OSError):
        for part in parts:
            stream.sendall(part)
        stream.settimeout(0.02)
        stream.recv(4096)


@contextlib.contextmanager
def raw_dealer(address):
    """A peer that sends what it likes, in the manner of ZeroMQ."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(address)
        yield dealer


def receive(dealer):
    assert dealer.poll(10_000), "no answer"
    return dealer.recv_multipart()


async def ask(address, request, body=(), *, keys=None, timeout_s=10.0):
    async with (
        open_zeromq_transport(keys=keys) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        reply, _ = await connections.call(address, request, body, timeout_s=timeout_s)
        return reply


# -- frames ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unharmed")
def test_garbage_on_every_port(cluster):
    garbage = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        random.Random(1).randbytes(100_000),
        b"\xff" * 4096,
        GREETING.replace(b"NULL", b"GOOD"),
        GREETING + READY.replace(b"DEALER", b"ROUTER"),
        GREETING + READY + b"\x78\x05hello" * 100,
        GREETING + READY + b"\x00\x05hello" * 1000,
    ]
    for address in ports_of(cluster):
        for data in garbage:
            speak_tcp(address, data)


@pytest.mark.usefixtures("unharmed")
def test_random_messages_on_every_port(cluster):
    chance = random.Random(2)
    values = [
        None,
        True,
        -1,
        0,
        2**63,
        2**64 - 1,
        "",
        "x" * 5000,
        b"",
        bytes(16),
        [],
        [[[[]]]],
        ["a", 1],
        0.5,
    ]
    kinds = [*sorted(KINDS), 0, 200, -1, "x"]

    def random_header():
        fields = [chance.choice(values) for _ in range(chance.randrange(12))]
        return msgpack.packb([1, chance.choice(kinds), chance.randrange(1000), 0, 50, fields])

    for address in ports_of(cluster):
        with raw_dealer(address) as dealer:
            for _ in range(1500):
                header = random_header() if chance.random() < 0.8 else chance.randbytes(chance.randrange(300))
                body = [chance.randbytes(chance.randrange(2000)) for _ in range(chance.choice((0, 0, 1, 5)))]
                dealer.send_multipart([header, *body])
            dealer.send_multipart(encode(Ping(), 5000, 0, 5000))
            while (answer := decode(receive(dealer))).request_id != 5000:
                pass
            assert type(answer.message) is Pong


@pytest.mark.usefixtures("unharmed")
def test_oversized_frames_and_messages_on_every_port(cluster):
    huge = bytes(MAX_FRAME_BYTES + 2**20)
    for address in ports_of(cluster):
        for length in (MAX_FRAME_BYTES + 1, 2**40, 2**63 - 1, 2**64 - 1):
            speak_tcp(address, GREETING + READY + b"\x02" + struct.pack(">Q", length), huge[: 2**20])
        for _ in range(10):
            with raw_dealer(address) as dealer:
                dealer.send_multipart([b"h", huge])
        with raw_dealer(address) as dealer:
            dealer.send_multipart([*encode(Ping(), 1, 0, 1000), *[bytes(1000)] * MAX_FRAMES * 100])
            dealer.send_multipart([bytes(2 * 2**20)] * 3)
            dealer.send_multipart(encode(Ping(), 2, 0, 5000))
            while (answer := decode(receive(dealer))).request_id != 2:
                pass
            assert type(answer.message) is Pong


@pytest.mark.usefixtures("unharmed")
def test_truncated_frames_on_every_port(cluster):
    for address in ports_of(cluster):
        header = encode(Ping(), 1, 0, 1000)[0]
        whole = b"\x01" + bytes([len(header)]) + header + b"\x02" + struct.pack(">Q", 2**20) + bytes(2**16)
        for end in (*range(0, 60, 7), 2**16):
            speak_tcp(address, GREETING + READY + whole[:end])
        # Many that announce the largest frame, send a little of it, and stay.
        port = int(address.rpartition(":")[2])
        with contextlib.ExitStack() as strangers:
            for _ in range(30):
                stranger = strangers.enter_context(socket.create_connection(("127.0.0.1", port)))
                stranger.sendall(
                    GREETING + READY + b"\x02" + struct.pack(">Q", MAX_FRAME_BYTES) + bytes(65_000)
                )
            assert type(trio.run(ask, address, Ping())) is Pong


def test_a_wrong_protocol_version_is_named_on_every_port(cluster):
    for address in ports_of(cluster):
        with raw_dealer(address) as dealer:
            dealer.send(msgpack.packb([PROTOCOL_VERSION + 2, Ping.kind, 7, 0, 1000, []]))
            answer = decode(receive(dealer))
            assert answer.request_id == 7
            assert isinstance(answer.message.error(), VersionMismatch)
            assert f"upgrade the side that speaks {PROTOCOL_VERSION}" in answer.message.text


# -- a client that vanishes ------------------------------------------------------------------------


def unfinished(cluster):
    return [file for pool in cluster.pools for file in pool.unfinished()]


@pytest.mark.usefixtures("unharmed")
def test_a_client_that_is_killed_in_the_middle_of_a_put_leaves_nothing(cluster, wait_until, content):
    names = cluster.names()
    with cluster.start_droppex("put", "-", "vanished/file") as put:
        put.stdin.write(content(5 * CHUNK_SIZE))
        put.stdin.flush()
        wait_until(lambda: unfinished(cluster), "nothing arrives at the pools")
        with pytest.raises(NotFound):
            cluster.describe("vanished/file")
        put.kill()
    assert cluster.names() == names
    wait_until(lambda: not unfinished(cluster), "the pools keep what was never finished")
    assert cluster.names() == names
    cluster.put("vanished/file", b"another")


@pytest.mark.usefixtures("unharmed")
def test_clients_that_vanish_give_back_the_memory_that_they_were_promised(cluster, content):
    """Five puts take all the memory that the app has for transfers; the next gets some after they vanished."""

    async def begin_and_vanish():
        opened = await ask(cluster.app.address, PutOpen(name="vanished/other", condition=ABSENT, size=None))
        assert opened.stream

    async def begin_five():
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(begin_and_vanish)

    trio.run(begin_five)
    cluster.put("vanished/then", content(LARGE))
    assert cluster.get("vanished/then") == content(LARGE)
    with pytest.raises(NotFound):
        cluster.get("vanished/other")


@pytest.mark.usefixtures("unharmed")
def test_chunks_out_of_order_or_beyond_the_credit_are_refused(cluster):
    async def misbehave():
        async with (
            open_zeromq_transport() as transport,
            open_connections(transport, terms=Terms()) as connections,
        ):
            address = cluster.app.address
            opened, _ = await connections.call(
                address, PutOpen(name="bad/order", condition=ABSENT, size=None), timeout_s=10
            )
            for sequence in (1, 7):
                with pytest.raises(DroppexError, match="where 0 was due"):
                    await connections.call(
                        address, PutChunk(stream=opened.stream, sequence=sequence), (b"x",), timeout_s=10
                    )
            with pytest.raises(DroppexError, match="no such put"):
                await connections.call(
                    address, PutChunk(stream=opened.stream + 1, sequence=0), (b"x",), timeout_s=10
                )

    trio.run(misbehave)


# -- keys ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(new_cluster, tmp_path_factory):
    """A cluster whose roles know each other by their keys."""
    folder = tmp_path_factory.mktemp("keys")
    members = ["controller controller", "app app", *(f"pool pool-{n}" for n in (1, 2, 3)), "client person"]
    for member in members:
        command = [sys.executable, "-m", "droppexd", "keygen", *member.split(), "--dir", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    with new_cluster(pools=3, keys=folder) as running:
        yield running


def test_a_cluster_with_keys_takes_and_gives_files(keyed, content):
    data = content(LARGE)
    (keyed.folder / "local").write_bytes(data)
    assert "2+1" in keyed.droppex("put", "local", "keyed/file").stdout
    keyed.droppex("get", "keyed/file", "back")
    assert (keyed.folder / "back").read_bytes() == data
    assert keyed.get("keyed/file", 5, 10) == data[5:15]
    keyed.put("keyed/small", b"small")
    assert keyed.get("keyed/small") == b"small"


def piece_request():
    request = WritePiece(
        extent=ExtentId(1, 1),
        index=0,
        layout=Layout(1, 1),
        chunk=0,
        chunk_size=CHUNK_SIZE,
        checksum=bytes(16),
        boot_id=b"",
        incarnation=bytes(16),
        version=VersionId(1, 1),
        last=True,
        size=1,
    )
    return request, (b"x",)


def announce_request():
    return Announce(
        pool_id=bytes(16),
        cluster_id=b"",
        boot_id=bytes(16),
        previous_boot_id=b"",
        name="intruder",
        machine="there",
        zone="",
        address="tcp://127.0.0.1:9",
        capacity=1,
        free=1,
        shards=0,
        read_only=False,
    )


def test_a_key_of_the_wrong_role_is_refused(keyed):
    heartbeat = Heartbeat(number=1, boot_id=bytes(16), capacity=0, free=0, shards=0, read_only=True)
    attempts = [
        ("client-person", keyed.pools[0], *piece_request()),
        ("client-person", keyed.controller, announce_request(), ()),
        ("client-person", keyed.controller, heartbeat, ()),
        ("app-app", keyed.controller, announce_request(), ()),
        ("pool-pool-1", keyed.app, PutOpen(name="keyed/intruder", condition=ABSENT, size=None), ()),
    ]
    for key, process, request, body in attempts:
        keys = load_keys(keyed.key(key))
        with pytest.raises(NotAuthorised, match=f"may not send {type(request).__name__}"):
            trio.run(
                lambda process=process, request=request, body=body, keys=keys: ask(
                    process.address, request, body, keys=keys
                )
            )
    assert {pool.name for pool in keyed.status().pools} == {"pool-1", "pool-2", "pool-3"}


def test_a_stranger_without_a_key_gets_nothing(keyed):
    cluster_public = read_member_key(keyed.key("client-person")).cluster_public
    stranger = TransportKeys(own=generate_keypair(), cluster_public=cluster_public)
    for address in ports_of(keyed):
        for keys in (None, stranger):
            with pytest.raises(PeerError):
                trio.run(lambda address=address, keys=keys: ask(address, Ping(), keys=keys, timeout_s=0.5))
        known = load_keys(keyed.key("app-app"))
        assert type(trio.run(lambda address=address, known=known: ask(address, Ping(), keys=known))) is Pong


def test_a_client_without_the_right_key_is_told_so_in_a_line(keyed):
    (keyed.folder / "stranger.toml").write_text(f'app = "{keyed.app.address}"\npatience = "0s"\n')
    done = keyed.droppex("--config", str(keyed.folder / "stranger.toml"), "ls", code=6)
    assert len(done.stderr.splitlines()) == 1


# -- configuration, ports and folders --------------------------------------------------------------


def test_all_mistakes_of_a_configuration_are_told_at_once(droppexd, tmp_path):
    (tmp_path / "droppex.toml").write_text(
        'colour = "blue"\ncontrollers = ["nowhere"]\n[pool]\nreserve = "much"\nlisten = "tcp://0.0.0.0:1"\n'
    )
    done = droppexd("--config", "droppex.toml", "--role", "pool", "--controller-heartbeat", "never", code=2)
    for mistake in ("colour", "nowhere", "much", "0.0.0.0", "never", "needs a folder"):
        assert mistake in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("role", ["controller", "app", "pool"])
def test_a_port_in_use_is_one_clear_line(cluster, droppexd, tmp_path, role):
    taken = cluster.app.address
    options = () if role == "controller" else ("--controller", cluster.controller.address)
    data = () if role == "app" else ("--data", tmp_path / "data")
    done = droppexd("--role", role, *data, "--listen", taken, *options, "--log-level", "error", code=1)
    (line,) = done.stderr.splitlines()
    assert taken in line
    assert "in use" in line


def test_a_folder_opened_twice_is_refused(cluster, droppexd):
    seed = ("--controller", cluster.controller.address)
    for process, options in ((cluster.pools[0], seed), (cluster.controller, ())):
        (role,) = process.roles
        done = droppexd(
            "--role", role, "--data", process.data, "--listen", "tcp://127.0.0.1:0", *options, code=1
        )
        assert "in use by another" in done.stderr.splitlines()[-1]
        assert str(process.data) in done.stderr
        assert process.running


def test_a_folder_of_another_cluster_or_role_is_refused(cluster, keyed, droppexd, tmp_path):
    seed = ("--controller", cluster.controller.address, "--listen", "tcp://127.0.0.1:0")
    foreign = tmp_path / "foreign"
    shutil.copytree(keyed.pools[0].data, foreign)
    done = droppexd("--role", "pool", "--data", foreign, *seed, code=1)
    assert "belongs to cluster" in done.stderr.splitlines()[-1]

    catalogue = tmp_path / "catalogue"
    shutil.copytree(keyed.controller.data, catalogue)
    done = droppexd("--role", "pool", "--data", catalogue, *seed, code=1)
    assert "not the data folder of a pool" in done.stderr.splitlines()[-1]


def test_a_copy_of_the_folder_of_a_pool_that_runs_is_refused(cluster, droppexd, tmp_path):
    original = cluster.pools[1]
    copy = tmp_path / "copy"
    shutil.copytree(original.data, copy)
    seed = ("--controller", cluster.controller.address, "--listen", "tcp://127.0.0.1:0")
    done = droppexd("--role", "pool", "--data", copy, *seed, code=1)
    assert "has a copy of its data folder" in done.stderr.splitlines()[-1]
    assert original.address in done.stderr
    cluster.wait_until_up()


# -- a full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disks(tmp_path):
    """Three small file systems, for pools."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount the small disks of this test")
    mounted = []
    try:
        for number in (1, 2, 3):
            place = tmp_path / f"pool-{number}"
            place.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this system lets nobody mount a small disk: {done.stderr.strip()}")
            mounted.append(place)
        yield tmp_path
    finally:
        for place in mounted:
            subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_deleting_helps(new_cluster, small_disks, content, wait_until):
    controller = {"heartbeat": "300ms", "down_after": "5s", "delete_grace": "1s"}
    with new_cluster(
        pools=3, folder=small_disks, controller=controller, pool={"reserve": "1 MiB"}
    ) as cluster:
        first = content(4 * CHUNK_SIZE)
        assert cluster.put("full/first", first).layout == "2+1"
        (small_disks / "big").write_bytes(content(12 * CHUNK_SIZE))
        done = cluster.droppex("put", "big", "full/second", code=5)
        assert "disk is full" in done.stderr
        assert cluster.names() == ["full/first"]
        wait_until(lambda: not unfinished(cluster), "what did not fit is still there")
        assert cluster.get("full/first") == first
        assert all(process.running for process in cluster.processes)

        cluster.remove("full/first")
        wait_until(lambda: not cluster.status().garbage, "the space is not given back")

        def fits():
            try:
                return cluster.put("full/third", first)
            except DroppexError:
                return None  # Pools that failed a moment ago get nothing for a while.

        assert wait_until(fits, "nothing can be put after a delete").layout == "2+1"
        assert cluster.get("full/third") == first
