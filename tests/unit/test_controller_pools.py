"""What the master makes of announcements, heartbeats and silence."""

import pytest

from droppexd.errors import IdentityError, NotFound, PeerBusy
from droppexd.model import PoolState
from droppexd.roles.controller_pools import PoolTable
from droppexd.wire.messages import Announce, Heartbeat

CLUSTER = b"c" * 16
BOOT_1, BOOT_2, BOOT_3 = b"1" * 16, b"2" * 16, b"3" * 16
HERE, THERE = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"


def table(records=(), term=1):
    return PoolTable(
        {record.number: record for record in records},
        cluster_id=CLUSTER,
        incarnation=b"i" * 16,
        term=term,
        heartbeat_s=2.0,
        down_after_s=10.0,
        began=0.0,
    )


def announce(**fields):
    given = {
        "pool_id": b"p" * 16,
        "cluster_id": b"",
        "boot_id": BOOT_1,
        "previous_boot_id": b"",
        "name": "pool",
        "machine": "m",
        "zone": "",
        "address": HERE,
        "capacity": 6400,
        "free": 6400,
        "shards": 0,
        "read_only": False,
    }
    return Announce(**(given | fields))


def beat(boot_id=BOOT_1, **fields):
    given = {"number": 1, "boot_id": boot_id, "capacity": 6400, "free": 6400, "shards": 0, "read_only": False}
    return Heartbeat(**(given | fields))


def enter(pools, now=0.0, **fields):
    said = announce(**fields)
    record = pools.judge(said, now, 5)
    if record.number == 0:
        record = type(record)(**{name: getattr(record, name) for name in record.__slots__} | {"number": 1})
    pools.enter(record, said, now)
    return record


def state(pools):
    return pools.map().pools[0].state


def test_a_new_pool_joins_and_keeps_its_number():
    pools = table()
    assert pools.judge(announce(), 0.0, 5).number == 0
    first = enter(pools)
    assert first.joined_ms == 5
    again = enter(pools, 1.0, cluster_id=CLUSTER, name="renamed", boot_id=BOOT_2, previous_boot_id=BOOT_1)
    assert (again.number, again.name, again.joined_ms) == (1, "renamed", 5)


def test_a_pool_of_another_cluster_is_refused():
    with pytest.raises(IdentityError, match="belongs to cluster"):
        table().judge(announce(cluster_id=b"x" * 16), 0.0, 5)


def test_a_restart_elsewhere_takes_over_once_the_old_start_is_silent():
    pools = table()
    enter(pools)
    restart = announce(cluster_id=CLUSTER, boot_id=BOOT_2, previous_boot_id=BOOT_1, address=THERE)
    with pytest.raises(PeerBusy):
        pools.judge(restart, 1.0, 5)
    with pytest.raises(PeerBusy):
        pools.judge(restart, 3.0, 5)
    assert pools.judge(restart, 5.1, 5).address == THERE


def test_a_copy_of_a_pool_that_lives_is_refused():
    pools = table()
    enter(pools)
    copy = announce(cluster_id=CLUSTER, boot_id=BOOT_2, previous_boot_id=BOOT_1, address=THERE)
    with pytest.raises(PeerBusy):
        pools.judge(copy, 1.0, 5)
    pools.heartbeat(beat(), 2.0)
    with pytest.raises(IdentityError, match="copy of its data folder"):
        pools.judge(copy, 3.0, 5)
    older_copy = announce(cluster_id=CLUSTER, boot_id=BOOT_3, previous_boot_id=BOOT_2, address=THERE)
    with pytest.raises(IdentityError):
        pools.judge(older_copy, 3.0, 5)


def test_a_new_master_knows_a_copy_from_the_pool_that_lives():
    record = enter(table())
    copy = announce(cluster_id=CLUSTER, boot_id=BOOT_2, previous_boot_id=BOOT_1, address=THERE)
    pools = table([record], term=2)
    with pytest.raises(PeerBusy):
        pools.judge(copy, 1.0, 5)
    pools.heartbeat(beat(), 2.0)
    with pytest.raises(IdentityError, match="copy of its data folder"):
        pools.judge(copy, 3.0, 5)


@pytest.mark.parametrize("previous", [BOOT_1, BOOT_3])
def test_a_new_master_takes_a_restart_elsewhere_once_the_old_start_had_time_to_be_heard(previous):
    record = enter(table())
    restart = announce(cluster_id=CLUSTER, boot_id=BOOT_2, previous_boot_id=previous, address=THERE)
    pools = table([record], term=2)
    with pytest.raises(PeerBusy):
        pools.judge(restart, 4.9, 5)
    assert pools.judge(restart, 5.1, 5).address == THERE


def test_a_restart_at_the_same_address_is_taken_at_once():
    pools = table()
    enter(pools)
    assert enter(pools, 0.1, boot_id=BOOT_2, previous_boot_id=BOOT_1).boot_id == BOOT_2
    with pytest.raises(NotFound, match="announce"):
        pools.heartbeat(beat(BOOT_1), 0.2)
    pools.heartbeat(beat(BOOT_2), 0.2)


def test_a_heartbeat_under_an_unknown_number_asks_for_an_announcement():
    with pytest.raises(NotFound, match="announce"):
        table().heartbeat(beat(), 0.0)


def test_pools_are_down_until_heard_and_again_after_silence():
    record = enter(table())
    pools = table([record], term=2)
    assert state(pools) == PoolState.DOWN
    assert pools.unreadable() == {1}
    assert pools.expire(100.0) == []
    pools.heartbeat(beat(), 100.0)
    assert state(pools) == PoolState.UP
    assert pools.expire(110.0) == []
    assert pools.expire(110.1) == [record]
    assert state(pools) == PoolState.DOWN
    pools.heartbeat(beat(read_only=True), 111.0)
    assert state(pools) == PoolState.READ_ONLY
    assert pools.unreadable() == frozenset()


MIB, TIB = 1024**2, 1024**4


@pytest.mark.parametrize("capacity", [TIB, 640 * MIB])
def test_a_pool_without_room_is_read_only_until_there_is_some_again(capacity):
    room = min(64 * MIB, capacity // 64)
    pools = table()
    enter(pools, capacity=capacity, free=room)
    for free, full in (
        (room, False),
        (room - 1, True),
        (0, True),
        (2 * room - 1, True),
        (2 * room, False),
        (room, False),
    ):
        version = pools.version
        was = state(pools)
        pools.heartbeat(beat(capacity=capacity, free=free), 1.0)
        assert state(pools) == (PoolState.READ_ONLY if full else PoolState.UP)
        assert pools.map().pools[0].writable is not full
        assert pools.full() == ({1} if full else set())
        assert (pools.version > version) or state(pools) == was
    assert pools.unreadable() == frozenset()


def test_a_failed_disk_is_not_told_to_be_full():
    pools = table()
    enter(pools, free=0, read_only=True)
    assert state(pools) == PoolState.READ_ONLY
    assert pools.full() == frozenset()


def test_the_map_changes_its_version_only_when_something_matters():
    pools = table()
    before = pools.version
    record = enter(pools)
    joined = pools.version
    assert joined > before
    same = pools.map()
    pools.heartbeat(beat(free=6399, shards=3), 1.0)  # Within one step: 6399/6400 is step 63.
    stepped = pools.version
    pools.heartbeat(beat(free=6350, shards=4), 2.0)
    assert pools.version == stepped
    pools.heartbeat(beat(free=3000), 3.0)
    assert pools.version > stepped
    assert pools.map() is not same
    assert pools.map() is pools.map()
    assert table([record], term=2).version > pools.version
