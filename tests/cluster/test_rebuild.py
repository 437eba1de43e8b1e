"""The folder of the only controller is deleted, and everything acknowledged comes back from the pools."""

import json
import shutil

import pytest

from droppexd.errors import NotEnoughShards, NotFound
from droppexd.model import CHUNK_SIZE

LARGE = 2 * CHUNK_SIZE + 5000
SETTINGS = {"controller": {"heartbeat": "300ms", "down_after": "2s", "delete_grace": "1s"}}


def apart(cluster):
    """Put each pool on a machine of its own."""
    for pool in cluster.pools:
        pool.options += ["--machine", pool.name]


@pytest.fixture
def cluster(new_cluster):
    with new_cluster(pools=4, prepare=apart, **SETTINGS) as running:
        yield running


def stores(cluster, name, data):
    """Store a file, if the app has heard by now that the pools are up."""
    try:
        cluster.put(name, data)
    except NotEnoughShards:
        return False
    return True


def journals(cluster):
    return [pool for pool in cluster.pools if (pool.data / "journal" / "catalogue.sqlite").exists()]


def test_everything_acknowledged_is_rebuilt_from_the_journals(cluster, content, wait_until, droppexd):
    wait_until(lambda: len(journals(cluster)) == 3, "no journal is kept")
    stored = {
        f"docs/{number}": content(size, number) for number, size in enumerate((10, 5000, LARGE, 300_000))
    }
    for name, data in stored.items():
        cluster.put(name, data)
    cluster.put("docs/gone", content(1000))
    cluster.remove("docs/gone")
    cluster.controller.kill()
    lost = cluster.controller.data
    shutil.rmtree(lost)

    nobody = droppexd("catalog", "rebuild", "--from-pools", "tcp://127.0.0.1:1", "--data", lost, code=1)
    assert "no pool answers" in nobody.stderr
    no_pool = droppexd(
        "catalog", "rebuild", "--from-pools", cluster.app.addresses["app"], "--data", lost, code=1
    )
    assert "does not say what it keeps" in no_pool.stderr
    keeping = journals(cluster)
    keeping[0].kill()
    other = next(pool for pool in cluster.pools if pool not in keeping)
    # A pool that keeps no journal is all that is named: one that does is not known yet.
    alone = droppexd(
        "catalog", "rebuild", "--from-pools", keeping[1].address, "--data", lost, "--json", code=0
    )
    told = json.loads(alone.stdout)
    assert told["files"] == len(stored)
    assert told["pools"] == 3
    assert told["silent"] == [keeping[0].name]
    again = droppexd("catalog", "rebuild", "--from-pools", other.address, "--data", lost, code=1)
    assert "there is a catalogue already" in again.stderr
    checked = droppexd("catalog", "check", "--data", lost, code=0)
    assert "all is sound" in checked.stdout

    cluster.controller.start()
    keeping[0].start()
    cluster.wait_until_up()
    for name, data in stored.items():
        assert cluster.get(name) == data
    with pytest.raises(NotFound):
        cluster.get("docs/gone")
    wait_until(lambda: stores(cluster, "docs/more", content(LARGE, 9)), "nothing can be stored")
    assert sorted(cluster.names()) == sorted([*stored, "docs/more"])
    wait_until(lambda: not cluster.status().quarantined, "something is quarantined")


def test_a_journal_is_a_catalogue_that_can_be_restored_and_checked(cluster, content, wait_until, droppexd):
    wait_until(lambda: len(journals(cluster)) == 3, "no journal is kept")
    data = content(LARGE)
    cluster.put("docs/one", data)
    cluster.controller.kill()
    shutil.rmtree(cluster.controller.data)
    (pool, *_) = journals(cluster)
    pool.terminate()
    checked = droppexd("pool", "check", "--data", pool.data, code=0)
    assert "sound" in checked.stdout
    file = pool.data / "journal" / "catalogue.sqlite"
    droppexd("catalog", "restore", file, "--data", cluster.controller.data, code=0)
    cluster.controller.start()
    pool.start()
    cluster.wait_until_up()
    assert cluster.get("docs/one") == data


def test_what_only_shards_tell_of_is_put_below_lost_and_found(new_cluster, content, wait_until, droppexd):
    with new_cluster(pools=4, **SETTINGS) as cluster:  # On one machine: there is no journal.
        stored = {f"docs/{number}": content(size, number) for number, size in enumerate((10, 5000, 300_000))}
        for name, data in {**stored, "docs/torn": content(LARGE)}.items():
            cluster.put(name, data)
        torn = cluster.shard_files("docs/torn")
        cluster.controller.kill()
        shutil.rmtree(cluster.controller.data)
        for file in torn[1:]:
            file.unlink()
        named = [argument for pool in cluster.pools for argument in ("--from-pools", pool.address)]
        rebuilt = droppexd("catalog", "rebuild", *named, "--data", cluster.controller.data, code=0)
        assert "begun anew for 4 pools: no pool has a journal" in rebuilt.stdout
        assert "lost+found" in rebuilt.stdout
        cluster.controller.start()
        cluster.wait_until_up()
        wait_until(
            lambda: sorted(cluster.names()) == sorted(f"lost+found/{name}" for name in stored),
            lambda: f"not all is found: {cluster.names()} {cluster.droppex('orphans').stdout}",
        )
        wait_until(
            lambda: not any("lost+found" in warning for warning in cluster.status().warnings),
            "the search does not end",
        )
        for name, data in stored.items():
            assert cluster.get(f"lost+found/{name}") == data
        metadata = dict(cluster.describe("lost+found/docs/1").metadata)
        assert metadata["adopted"].startswith("uncertain")
        wait_until(
            # A pool that compares once more cannot be asked meanwhile.
            lambda: "incomplete" in (left := cluster.droppex("orphans").stdout) and "docs/torn" in left,
            "what cannot be read is not told",
        )
