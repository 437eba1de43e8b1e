"""Three controllers with a copy of the catalogue each, an app and pools, as real processes."""

import json

import pytest

from droppexd.errors import Conflict, DroppexError, NotFound
from droppexd.model import CHUNK_SIZE

LARGE = 2 * CHUNK_SIZE + 5000
SETTINGS = {"controller": {"heartbeat": "500ms", "down_after": "3s"}}


def role_of(cluster, process):
    return next(
        (one.role for one in cluster.controllers().controllers if one.name == process.name), "unknown"
    )


def master_of(cluster):
    return next(one for one in cluster.controller_processes if role_of(cluster, one) == "master")


def level(cluster, count):
    """Return whether so many controllers are there and none lacks anything."""
    found = cluster.controllers().controllers
    return len(found) == count and all(one.role != "unreachable" and not one.lag for one in found)


@pytest.fixture
def group(new_cluster, wait_until):
    with new_cluster(pools=4, controllers=3, catalog={"sync": 1}, **SETTINGS) as cluster:
        wait_until(lambda: level(cluster, 3), "the standbys do not follow")
        yield cluster


def test_files_survive_the_loss_of_the_master_and_of_its_disk(group, content, wait_until):
    data = content(LARGE)
    first, second, third = group.controller_processes
    group.put("docs/before", data)
    group.put("docs/gone", data[:1000])
    third.kill()
    group.remove("docs/gone")
    third.start()
    first.kill()
    group.promote(third)
    assert group.get("docs/before") == data
    with pytest.raises(NotFound):
        group.get("docs/gone")
    group.put("docs/after", data[1:])
    assert master_of(group) is third
    # Its disk is lost as well: it comes back empty, and copies.
    for file in first.data.iterdir():
        file.unlink()
    first.options += ["--master", second.address]
    first.start()
    wait_until(lambda: level(group, 3), "the first controller does not follow")
    third.kill()
    group.promote(first)
    assert group.get("docs/after") == data[1:]
    assert sorted(group.names()) == ["docs/after", "docs/before"]
    group.wait_until_up()


def test_a_master_that_stood_still_is_none_when_it_goes_on(group, content, wait_until):
    data = content(LARGE)
    group.put("docs/one", data)
    first, second, _ = group.controller_processes
    first.stop()
    try:
        group.promote(second)
        group.put("docs/two", data[1:])
    finally:
        first.go_on()
    wait_until(lambda: role_of(group, first) == "standby", "the former master does not stand by")
    wait_until(lambda: level(group, 3), "the former master does not follow")
    assert group.get("docs/two") == data[1:]
    assert master_of(group) is second


def test_without_its_standbys_a_master_says_nothing_and_with_one_of_them_everything(group, content):
    data = content(1000)
    group.put("docs/one", data)
    first, second, third = group.controller_processes
    second.kill()
    third.kill()
    with pytest.raises(DroppexError, match="does not hear from the 1 standbys"):
        group.get("docs/one")
    third.start()
    assert group.get("docs/one") == data
    first.restart()
    assert group.get("docs/one") == data
    assert master_of(group) is first


def test_what_an_operator_sees_and_says(group, content, wait_until):
    group.put("docs/one", content(1000))
    first, second, third = group.controller_processes
    lines = group.droppex("controllers").stdout.splitlines()
    assert lines[0].split() == ["NAME", "ROLE", "TERM", "REVISION", "LAG", "ENGINE", "HEALTH", "ADDRESS"]
    assert sorted(line.split()[1] for line in lines[1:]) == ["master", "standby", "standby"]
    assert {line.split()[5:7] == ["sqlite", "ok"] for line in lines[1:]} == {True}
    already = group.droppex("controllers", "promote", first.name, code=4)
    assert "is the master already" in already.stderr
    group.droppex("controllers", "promote", "nobody", code=3)
    group.droppex("controllers", "promote", "tcp://127.0.0.1:1", code=6)

    first.kill()
    third.kill()
    few = group.droppex("controllers", "promote", second.name, code=4)
    assert "2 controllers are needed, and 1 can be reached" in few.stderr
    unsure = group.droppex("controllers", "promote", second.address, "--accept-loss", code=2)
    assert "this may be lost" in unsure.stderr
    assert "--yes" in unsure.stderr
    done = group.droppex("controllers", "promote", second.address, "--accept-loss", "--yes", "--json")
    assert len(json.loads(done.stdout)["lost"]) == 2
    assert group.get("docs/one") == content(1000)
    first.start()
    third.start()
    wait_until(lambda: level(group, 3), "the others do not follow the new history")
    wait_until(lambda: role_of(group, first) == "standby", "the former master does not stand by")
    group.put("docs/two", content(2000))
    group.droppex("controllers", "remove", third.name, code=4)
    third.kill()
    wait_until(lambda: role_of(group, third) == "unreachable", "it is still there")
    group.droppex("controllers", "remove", third.name)
    first.kill()
    needed = group.droppex("controllers", "remove", first.name, code=6)
    assert "--force" in needed.stderr
    group.droppex("controllers", "remove", first.name, "--force")
    assert group.get("docs/two") == content(2000)


def test_controllers_join_one_that_was_alone_and_one_of_another_cluster_does_not(
    new_cluster, content, wait_until, droppexd, tmp_path
):
    data = content(LARGE)
    with new_cluster(pools=3, **SETTINGS) as cluster:
        cluster.put("docs/one", data)
        second = cluster.join_controller("second", cluster.controller.address)
        third = cluster.join_controller("third", second.address)
        wait_until(lambda: level(cluster, 3), "they do not follow")
        assert '"engine": "sqlite"' in (third.data / "cluster.json").read_text()
        cluster.put("docs/two", data[1:])
        cluster.controller.kill()
        cluster.promote(third)
        assert cluster.get("docs/one") == data
        assert cluster.get("docs/two") == data[1:]
        assert len(cluster.status().pools) == 3
        start = ["--role", "controller", "--listen", "tcp://127.0.0.1:0", "--data"]
        pool = droppexd(*start, tmp_path / "x", "--master", cluster.pools[0].address, code=2)
        assert "is the pool pool-1, not a controller" in pool.stderr
        with new_cluster(pools=1, **SETTINGS) as other:
            other.controller.terminate()
            held = droppexd(*start, other.controller.data, "--master", third.address, code=1)
            assert "another cluster" in held.stderr
            other.controller.start()
        with pytest.raises(Conflict):
            cluster.promote(third)
