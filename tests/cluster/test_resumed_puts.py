"""A put of a large file that was interrupted goes on where it stopped, whoever was killed."""

import json
import random
import signal
import time

import pytest

from droppexd.model import CHUNK_SIZE, EXTENT_CHUNKS

SETTINGS = {
    "controller": {"heartbeat": "300ms", "down_after": "2s", "delete_grace": "1s", "session_lease": "3s"}
}
EXTENT = CHUNK_SIZE * EXTENT_CHUNKS

pytestmark = pytest.mark.usefixtures("no_leftovers")


def write_file(path, extents):
    """Write a file of so many extents and a bit."""
    draw = random.Random(7)
    with path.open("wb") as file:
        for _ in range(extents):
            file.write(draw.randbytes(EXTENT // 16) * 16)
        file.write(draw.randbytes(4 * CHUNK_SIZE) * 6 + b"end")
    return path


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("big") / "big", 1)


@pytest.fixture
def cluster(new_cluster):
    with new_cluster(pools=3, **SETTINGS) as running:
        yield running


def uploads(cluster):
    async def uploads(client):
        return [upload async for upload in client.uploads()]

    return cluster.run(uploads)


def interrupt(cluster, wait_until, path, extents, how):
    """Begin a put, which runs for short times, and end it once so many extents are stored."""
    with cluster.start_droppex("put", str(path), "docs/big") as put:

        def stored():
            put.send_signal(signal.SIGCONT)
            time.sleep(0.1)
            put.send_signal(signal.SIGSTOP)
            assert put.poll() is None, "it has come to its end"
            return any(one.extents >= extents for one in uploads(cluster))

        wait_until(stored, "no extent is noted")
        how(put)
        put.send_signal(signal.SIGCONT)


def fetched(cluster):
    target = cluster.folder / "fetched"
    cluster.droppex("get", "docs/big", str(target), "--force")
    return target.read_bytes()


def at_rest(cluster):
    status = cluster.status()
    return not (status.repair.left or status.garbage)


def shards(cluster):
    return sum(pool.shards for pool in cluster.status().pools)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["client", "client in order", "app", "controller and app"])
def test_what_is_stored_is_not_sent_again(cluster, wait_until, big, who):
    def kill(put):
        if who == "client":
            put.kill()
        elif who == "client in order":
            put.send_signal(signal.SIGINT)
        else:
            put.kill()
            cluster.app.kill()
            if who.startswith("controller"):
                cluster.controller.restart()
            cluster.app.start()

    interrupt(cluster, wait_until, big, 1, kill)
    assert "docs/big" not in cluster.names()
    (before,) = json.loads(cluster.droppex("uploads", "--json").stdout)
    assert before["name"] == "docs/big"
    assert before["size"] == big.stat().st_size
    assert before["stored"] >= EXTENT
    done = cluster.droppex("put", str(big), "docs/big")
    assert "going on with an earlier put: " in done.stderr
    described = cluster.describe("docs/big")
    assert str(described.version) == before["upload"]  # What was stored is a part of it.
    assert uploads(cluster) == []
    assert fetched(cluster) == big.read_bytes()
    wait_until(lambda: at_rest(cluster), "no rest")
    if who.startswith("client"):  # Else what the killed app had not noted is found by an hourly look.
        wait_until(lambda: shards(cluster) == 2 * 3, "something is left of the first attempt")


@pytest.mark.slow
def test_only_what_is_the_same_still_is_kept(cluster, wait_until, tmp_path):
    changing = write_file(tmp_path / "changing", 2)
    interrupt(cluster, wait_until, changing, 2, lambda put: put.kill())
    with changing.open("r+b") as file:
        file.seek(EXTENT + 5)
        file.write(b"another")
    done = cluster.droppex("put", str(changing), "docs/big")
    assert "going on with an earlier put: 256.0 MiB are stored already" in done.stderr
    assert fetched(cluster) == changing.read_bytes()

    cluster.remove("docs/big")
    interrupt(cluster, wait_until, changing, 1, lambda put: put.kill())
    with changing.open("r+b") as file:
        file.write(b"another")
    done = cluster.droppex("put", str(changing), "docs/big")
    assert "going on" not in done.stderr
    assert fetched(cluster) == changing.read_bytes()
    assert uploads(cluster) == []
    wait_until(lambda: at_rest(cluster), "no rest")
    wait_until(lambda: shards(cluster) == 3 * 3, "something is left of the first attempt")


@pytest.mark.slow
def test_uploads_are_listed_dropped_and_expire(new_cluster, wait_until, big):
    settings = {**SETTINGS, "controller": {**SETTINGS["controller"], "uploads_kept": "6s"}}
    with new_cluster(pools=3, **settings) as cluster:
        assert "there are no uploads" in cluster.droppex("uploads").stdout
        interrupt(cluster, wait_until, big, 1, lambda put: put.kill())
        if found := uploads(cluster):
            cluster.droppex("uploads", "drop", str(found[0].version), code=None)
        assert "no upload" in cluster.droppex("uploads", "drop", "7-7", code=3).stderr
        wait_until(lambda: at_rest(cluster) and not shards(cluster), "what was dropped is not cleared away")
        interrupt(cluster, wait_until, big, 1, lambda put: put.kill())
        wait_until(lambda: not uploads(cluster), "it does not expire")
        wait_until(lambda: at_rest(cluster) and not shards(cluster), "what expired is not cleared away")


@pytest.mark.slow
def test_pools_may_be_lost_between_two_attempts(new_cluster, wait_until, big):
    settings = {**SETTINGS, "controller": {**SETTINGS["controller"], "replace_after": "3s"}}
    with new_cluster(pools=5, **settings) as cluster:
        interrupt(cluster, wait_until, big, 1, lambda put: put.kill())
        lost = cluster.pools.pop()
        lost.kill()
        wait_until(lambda: at_rest(cluster) or cluster.status().repair.done, "nothing is rebuilt")
        cluster.droppex("put", str(big), "docs/big", "--layout", "2+1")
        assert fetched(cluster) == big.read_bytes()
        described = cluster.describe("docs/big")
        assert {str(extent.layout) for extent in described.extents} == {"3+2", "2+1"}
