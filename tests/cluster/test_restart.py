"""Roles that are killed, stopped in order and started again by hand: what was acknowledged is there."""

import itertools
import threading
from contextlib import suppress

import pytest
import trio

from droppexd.client import open_client
from droppexd.daemon import system_runtime
from droppexd.errors import DroppexError, NotEnoughShards
from droppexd.model import CHUNK_SIZE
from droppexd.wire.zeromq import open_zeromq_transport

LARGE = CHUNK_SIZE + 5000


@pytest.fixture(scope="module")
def cluster(new_cluster):
    controller = {"heartbeat": "300ms", "down_after": "2s", "delete_grace": "1s"}
    with new_cluster(pools=4, controller=controller) as running:
        yield running


@pytest.fixture(scope="module")
def acknowledged(cluster, content):
    """What this module has put and got a receipt for, by name."""
    files = {"kept/large": content(LARGE, 1), "kept/small": content(3000, 2), "kept/empty": b""}
    for name, data in files.items():
        cluster.put(name, data)
    return files


@pytest.fixture
def all_is_there(cluster, acknowledged, wait_until):
    """Wait until the cluster answers, and check all that it ever acknowledged, byte for byte."""

    def check():
        cluster.wait_until_up()

        async def read(client):
            for name, data in acknowledged.items():
                assert await client.get_bytes(name) == data
            return True

        def is_read():
            try:
                return cluster.run(read)
            except (DroppexError, ExceptionGroup):
                return False  # The app's map is up to two seconds old.

        wait_until(is_read, "something that was acknowledged cannot be read")

    return check


class Writer(threading.Thread):
    """A client that puts small files one after another, whatever happens, and notes which were acknowledged."""

    def __init__(self, address, acknowledged, prefix, wait_until):
        super().__init__()
        self._wait_until = wait_until
        self._address = address
        self._acknowledged = acknowledged
        self._prefix = prefix
        self._enough = threading.Event()
        self.receipts = 0

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._enough.set()
        self.join()

    def some_more(self):
        """Wait until more is acknowledged, of what is put from now on."""
        enough = self.receipts + 6
        self._wait_until(lambda: self.receipts >= enough, "nothing is acknowledged any more")

    def run(self):
        trio.run(self._put_until_enough)

    async def _put_until_enough(self):
        async with (
            open_zeromq_transport() as transport,
            open_client(self._address, transport, system_runtime(), timeout_s=5.0) as client,
        ):
            for number in itertools.count():
                if self._enough.is_set():
                    return
                name, data = f"{self._prefix}/{number}", f"{self._prefix} {number}".encode() * 50
                with trio.move_on_after(5):
                    try:
                        await client.put_bytes(name, data)
                    except DroppexError:
                        await trio.sleep(0.05)
                    else:
                        self._acknowledged[name] = data
                        self.receipts += 1


@pytest.fixture
def writing(cluster, acknowledged, request, wait_until):
    """Put small files all the time."""
    return Writer(cluster.app.address, acknowledged, request.node.name, wait_until)


@pytest.mark.slow
def test_each_role_killed_in_turn_loses_nothing(cluster, all_is_there, writing):
    with writing:
        for process in (cluster.controller, cluster.app, *cluster.pools[:2]):
            writing.some_more()
            process.kill()
            process.start()
            writing.some_more()
    assert writing.receipts >= 40
    all_is_there()


@pytest.mark.slow
def test_all_killed_at_once_lose_nothing(cluster, acknowledged, all_is_there, writing):
    with writing:
        writing.some_more()
        for process in cluster.processes:
            process.kill()
    cluster.controller.start()
    for pool in cluster.pools:
        pool.spawn()
    for pool in cluster.pools:
        pool.wait_until_ready()
    cluster.app.start()
    all_is_there()
    assert set(cluster.names()) >= set(acknowledged)


@pytest.mark.slow
def test_every_role_stops_in_order_and_in_time_under_load(cluster, all_is_there, writing):
    with writing:
        for process in reversed(cluster.processes):
            writing.some_more()
            assert process.terminate() == 0
            assert "not stopped after" not in process.log.read_text()
            process.start()
    all_is_there()


def test_a_client_goes_on_when_its_app_was_restarted(cluster, acknowledged, wait_until):
    async def use(client):
        assert await client.get_bytes("kept/small") == acknowledged["kept/small"]
        await trio.to_thread.run_sync(cluster.app.kill)
        with pytest.raises(DroppexError):
            await client.get_bytes("kept/small")
        cluster.app.start()  # In the main thread: a child dies with the thread that started it.
        with trio.fail_after(30):
            while True:
                try:
                    assert await client.get_bytes("kept/small") == acknowledged["kept/small"]
                except DroppexError:
                    await trio.sleep(0.05)
                else:
                    break
        await client.put_bytes("kept/after", b"after")
        acknowledged["kept/after"] = b"after"

    cluster.run(use)


def stored_bytes(cluster):
    """Return what the large shards take on the disks of all pools."""
    total = 0
    for pool in cluster.pools:
        for file in (pool.data / "large").glob("*/*"):
            with suppress(FileNotFoundError):
                total += file.stat().st_size
    return total


def test_deleting_frees_the_space_after_the_grace(cluster, content, wait_until):
    cluster.wait_until_up()
    before = stored_bytes(cluster)
    cluster.put("freed/large", content(LARGE, 3))
    assert stored_bytes(cluster) >= before + LARGE * 2
    cluster.remove("freed/large")
    wait_until(lambda: stored_bytes(cluster) == before, "the pools keep what was deleted")
    wait_until(lambda: not cluster.status().garbage, "the garbage stays on record")


def test_a_put_while_two_pools_are_dead_goes_on_with_a_smaller_layout(
    cluster, content, all_is_there, acknowledged
):
    cluster.wait_until_up()
    dead = cluster.pools[:2]
    for pool in dead:
        pool.kill()
    data = content(LARGE, 4)
    try:
        receipt = cluster.put("dead/first", data)
    except NotEnoughShards as error:
        assert all(pool.address in "".join(error.missing) for pool in dead)  # noqa: PT017
        receipt = cluster.put("dead/first", data)
    assert receipt.layout == "1+1"
    assert receipt.survives_pools == 1
    assert "instead of 2+2" in receipt.note
    assert "only 2 pools" in receipt.note
    assert cluster.get("dead/first") == data
    acknowledged["dead/first"] = data

    said = cluster.droppex("put", str(cluster.folder / "droppex.toml"), "dead/small").stdout
    assert "1+2, survives the loss of 1 pool" in said
    for pool in dead:
        pool.start()
    all_is_there()
