"""An older copy of the catalogue is put back by hand: what it never knew is kept, and adopted or dropped."""

import json
import shutil

import pytest

from droppexd.model import CHUNK_SIZE

LARGE = 2 * CHUNK_SIZE + 5000


@pytest.fixture
def cluster(new_cluster):
    controller = {"heartbeat": "300ms", "down_after": "2s", "delete_grace": "1s"}
    with new_cluster(pools=4, controller=controller) as running:
        yield running


@pytest.fixture
def lose(cluster, wait_until):
    """Put files that the catalogue does not know afterwards, in sessions that it does not know."""

    def put_and_forget(files):
        assert cluster.app.terminate() == 0
        assert cluster.controller.terminate() == 0
        copy = cluster.folder / "copy.sqlite"
        shutil.copyfile(cluster.controller.data / "catalogue.sqlite", copy)
        cluster.controller.start()
        cluster.app.start()
        cluster.wait_until_up()
        for name, data in files.items():
            cluster.put(name, data)
        # A pool that was slow for a moment missed its shard: what is lost is then rebuilt, not counted short.
        for name in files:
            wait_until(lambda name=name: cluster.survives(name) == 2, f"a shard of {name} is missing")
        assert cluster.app.terminate() == 0
        cluster.controller.kill()
        for file in cluster.controller.data.glob("catalogue.sqlite*"):
            file.unlink()
        shutil.copyfile(copy, cluster.controller.data / "catalogue.sqlite")
        cluster.controller.start()
        cluster.app.start()
        cluster.wait_until_up()
        wait_until(lambda: cluster.status().quarantined, "nothing is quarantined")

    return put_and_forget


def held(cluster):
    return sum(pool.shards for pool in cluster.status().pools)


def test_what_an_older_catalogue_never_knew_is_adopted_or_dropped(cluster, lose, content, wait_until):
    known = content(LARGE, 1)
    cluster.put("kept/known", known)
    wait_until(lambda: held(cluster) == 4, "the shards are not counted")
    files = {
        "lost/large": content(LARGE, 2),
        "lost/small": content(3000, 3),
        "lost/unwanted": content(LARGE, 4),
    }
    lose(files)
    shards = 4 + 3 + 4
    wait_until(
        lambda: cluster.status().quarantined == shards,
        lambda: f"{cluster.status().quarantined} of {shards} shards are quarantined",
    )
    assert cluster.names() == ["kept/known"]
    assert f"{shards} shards" in cluster.droppex("status").stdout
    cluster.droppex("status", "--check", code=1)

    listed = json.loads(cluster.droppex("orphans", "--json").stdout)
    versions = {orphan["name"]: orphan["version"] for orphan in listed}
    assert set(versions) == set(files)
    assert {orphan["state"] for orphan in listed} == {"whole"}
    assert {orphan["name"]: orphan["size"] for orphan in listed} == {name: len(files[name]) for name in files}
    lines = cluster.droppex("orphans", "list").stdout.splitlines()
    assert lines[0].split() == ["VERSION", "SIZE", "EXTENTS", "SHARDS", "STATE", "NAME"]
    assert len(lines) == 4

    said = cluster.droppex("orphans", "adopt", versions["lost/large"], versions["lost/small"]).stdout
    assert "as lost+found/lost/large" in said
    for name in ("lost/large", "lost/small"):
        assert cluster.get(f"lost+found/{name}") == files[name]
    assert "uncertain" in cluster.droppex("stat", "lost+found/lost/large").stdout
    cluster.droppex("orphans", "adopt", versions["lost/large"], code=3)

    cluster.droppex("orphans", "drop", versions["lost/large"], "--yes", code=3)
    cluster.droppex("orphans", "drop", "--all", code=2)
    assert "dropped 1 version" in cluster.droppex("orphans", "drop", "--all", "--yes").stdout
    wait_until(lambda: not cluster.status().quarantined, "the quarantine is not empty")
    wait_until(lambda: held(cluster) == 4 + 4 + 3, "the pools keep what was dropped")
    assert cluster.droppex("orphans").stdout == "there are no orphans\n"
    assert cluster.get("kept/known") == known
    for name in ("lost/large", "lost/small"):
        assert cluster.get(f"lost+found/{name}") == files[name]
    cluster.droppex("status", "--check")


@pytest.mark.slow
def test_what_a_pool_that_is_away_may_hold_is_adopted_with_force_alone(cluster, lose, content, wait_until):
    data = content(LARGE, 5)
    lose({"lost/large": data})
    cluster.pools[0].kill()
    wait_until(lambda: any(pool.state == "down" for pool in cluster.status().pools), "no pool is down")
    done = cluster.droppex("orphans", "adopt", "--all", code=5)
    assert "pool-1" in done.stderr
    done = cluster.droppex("orphans", "adopt", "--all", "--force", "--to", "found", "--json")
    (receipt,) = json.loads(done.stdout)
    assert receipt["name"] == "found/lost/large"
    assert cluster.get("found/lost/large") == data
    cluster.pools[0].start()
    wait_until(lambda: cluster.survives("found/lost/large") == 2, "the shard does not count")
    wait_until(lambda: not cluster.status().quarantined, "the quarantine is not empty")
