"""Three controllers on a real etcd, an app and pools, as real processes: whoever fails, clients see a pause."""

import time

import pytest

from droppexd.errors import DroppexError
from tests.etcd_servers import Etcd, require_etcd

LEASE_S = 3
SETTINGS = {"controller": {"heartbeat": "500ms", "down_after": "3s"}}


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    require_etcd()
    etcd = Etcd(tmp_path_factory.mktemp("etcd"))
    etcd.start()
    yield etcd
    etcd.kill()


@pytest.fixture
def group(etcd, new_cluster, request):
    """A cluster of three controllers and four pools, below a prefix of its own."""
    etcd.start()
    catalog = {
        "engine": "etcd",
        "endpoints": list(etcd.endpoints),
        "etcd_prefix": f"{request.node.name}/"[:64],
        "etcd_lease": f"{LEASE_S}s",
    }
    with new_cluster(pools=4, controllers=3, catalog=catalog, **SETTINGS) as cluster:
        yield cluster


def master_of(cluster):
    """Return the process of the master, and what each controller says of itself."""
    listed = cluster.controllers()
    names = [one.name for one in listed.controllers if one.role == "master"]
    assert len(names) == 1, listed
    return next(one for one in cluster.controller_processes if one.name == names[0])


def test_files_survive_that_the_master_is_killed(group, content):
    data = content(3_000_000)
    group.put("docs/before", data)
    group.put("docs/gone", data[:1000])
    first = master_of(group)
    by_hand = group.droppex("controllers", "promote", first.name, code=2)
    assert "takes over by itself" in by_hand.stderr
    first.kill()
    killed_at = time.monotonic()
    group.put("docs/after", data[1:])
    print(f"the next commit came {time.monotonic() - killed_at:.1f} s after the kill")
    assert group.get("docs/before") == data
    assert group.get("docs/after") == data[1:]
    assert master_of(group) is not first
    group.remove("docs/gone")
    first.start()
    master_of(group).kill()  # So that the one who was away may become the master.
    group.put("docs/more", data[2:])
    assert sorted(group.names()) == ["docs/after", "docs/before", "docs/more"]
    group.wait_until_up()


def test_a_master_that_stood_still_changes_nothing_when_it_goes_on(group, content, wait_until):
    first = master_of(group)
    first.stop()
    try:
        group.put("docs/one", content(100_000))
        assert master_of(group) is not first
    finally:
        first.go_on()
    wait_until(lambda: state_of(group, first.name) == "standby", "the old master does not stand by")
    assert group.get("docs/one") == content(100_000)


def state_of(cluster, name):
    return next(one.role for one in cluster.controllers().controllers if one.name == name)


def test_a_member_of_etcd_may_die_or_stand_still_and_two_may_not(group, etcd, content, wait_until):
    data = content(50_000)
    leader = etcd.leader()
    leader.kill()
    group.put("docs/one", data)
    other = next(member for member in etcd.members if member.running)
    other.stop()
    try:
        with pytest.raises(DroppexError):
            group.get("docs/one")
        assert group.controllers().master == ""
        listed = group.droppex("ls", "--stale-ok", "docs/")
        assert listed.stdout.split() == ["docs/one"]
        assert "no master answers" in listed.stderr
    finally:
        other.go_on()
    etcd.start()
    group.put("docs/three", data)
    assert group.get("docs/one") == data
    assert group.get("docs/three") == data


def test_a_controller_joins_with_nothing_but_the_address_of_another(group, wait_until, content):
    joined = group.join_controller("fourth", master_of(group).address)
    assert '"engine": "etcd"' in (joined.data / "cluster.json").read_text()
    wait_until(lambda: state_of(group, "fourth") == "standby", "the fourth controller is not known")
    for process in group.controller_processes:
        if process is not joined:
            process.kill()
    group.put("docs/one", content(100_000))
    assert master_of(group) is joined
    assert len(group.status().pools) == 4
    joined.terminate()
    joined.options = []  # It remembers: nobody needs to name a master again.
    joined.start()
    assert group.get("docs/one") == content(100_000)


def test_a_controller_that_ends_in_order_hands_over_at_once(group, content):
    first = master_of(group)
    asked_at = time.monotonic()
    assert first.terminate() == 0
    group.put("docs/one", content(1000))
    print(f"handed over in {time.monotonic() - asked_at:.1f} s")


def test_a_catalogue_moves_from_sqlite_into_etcd_and_back(etcd, new_cluster, content, droppexd, tmp_path):
    etcd.start()
    data = content(1_000_000)
    place = f"etcd:{','.join(etcd.endpoints)}/moved/"
    with new_cluster(pools=3, **SETTINGS) as cluster:
        cluster.put("docs/one", data)
        droppexd("catalog", "copy", "--from", "sqlite:/nowhere", "--to", place, code=1)
        busy = droppexd("catalog", "copy", "--from", f"sqlite:{catalogue(cluster)}", "--to", place, code=1)
        assert "in use" in busy.stderr
        cluster.controller.terminate()
        droppexd("catalog", "copy", "--from", f"sqlite:{catalogue(cluster)}", "--to", place, code=0)
        again = droppexd("catalog", "copy", "--from", f"sqlite:{catalogue(cluster)}", "--to", place, code=1)
        assert "already" in again.stderr
        endpoints = [part for endpoint in etcd.endpoints for part in ("--catalog-endpoints", endpoint)]
        cluster.controller.options = ["--catalog-engine", "etcd", *endpoints]
        cluster.controller.options += [
            "--catalog-etcd-prefix",
            "moved/",
            "--catalog-etcd-lease",
            f"{LEASE_S}s",
        ]
        cluster.controller.start()
        assert cluster.get("docs/one") == data
        cluster.put("docs/two", data[1:])
        running = droppexd("catalog", "copy", "--from", place, "--to", f"sqlite:{tmp_path / 'x'}", code=1)
        assert "runs on it" in running.stderr
        cluster.controller.terminate()
        back = catalogue(cluster).with_name("back.sqlite")
        droppexd("catalog", "copy", "--from", place, "--to", f"sqlite:{back}", code=0)
        assert "all is sound" in droppexd("catalog", "check", back, code=0).stdout
        back.rename(catalogue(cluster))
        cluster.controller.options = []
        cluster.controller.start()
        assert cluster.get("docs/one") == data
        assert cluster.get("docs/two") == data[1:]
        cluster.wait_until_up()


def catalogue(cluster):
    return cluster.controller.data / "catalogue.sqlite"
