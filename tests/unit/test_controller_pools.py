"""What the master makes of announcements, heartbeats and silence."""

from dataclasses import replace

import pytest

from droppexd.errors import Conflict, IdentityError, NotFound, PeerBusy
from droppexd.model import MAX_TROUBLE, Membership, PoolRecord, PoolState
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
        replace_after_s=60.0,
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
        assert pools.infos()[0].trouble == ("its disk is full" if full else "")
        assert (pools.version > version) or state(pools) == was
    assert pools.unreadable() == frozenset()


def test_a_failed_disk_is_not_told_to_be_full():
    pools = table()
    enter(pools, free=0, read_only=True)
    assert state(pools) == PoolState.READ_ONLY
    assert pools.infos()[0].trouble == "its disk failed"
    pools.heartbeat(beat(read_only=True, trouble="a flush failed"), 1.0)
    assert pools.infos()[0].trouble == "its disk failed: a flush failed"
    pools.heartbeat(beat(read_only=True, trouble="x" * MAX_TROUBLE), 2.0)
    assert len(pools.infos()[0].trouble) == MAX_TROUBLE
    pools.expire(1000.0)
    assert state(pools) == PoolState.DOWN
    assert pools.infos()[0].trouble == ""


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
    pools.heartbeat(beat(free=0), 4.0)
    full = pools.version
    pools.heartbeat(beat(free=0, read_only=True, trouble="a flush failed"), 5.0)
    assert pools.version > full
    assert pools.map().pools[0].trouble == pools.infos()[0].trouble
    pools.heartbeat(beat(free=3000), 6.0)
    assert pools.map() is not same
    assert pools.map() is pools.map()
    assert table([record], term=2).version > pools.version


def test_a_new_master_knows_how_large_pools_are_that_it_has_not_heard_of():
    former = table()
    enter(former, capacity=TIB)
    new = table([former.known(1)], term=2)
    assert (new.map().pools[0].state, new.map().pools[0].capacity) == (PoolState.DOWN, TIB)
    same, other = TIB + TIB // 100, 2 * TIB
    assert new.judge(announce(cluster_id=CLUSTER, capacity=same), 1.0, 5) == former.known(1)
    assert new.judge(announce(cluster_id=CLUSTER, capacity=other), 1.0, 5).capacity == other


def test_an_empty_folder_under_the_name_of_a_known_pool_is_refused_until_that_is_removed():
    pools = table()
    record = enter(pools)
    with pytest.raises(IdentityError, match="Is its disk mounted"):
        pools.judge(announce(pool_id=b"q" * 16), 100.0, 5)
    assert pools.judge(announce(pool_id=b"q" * 16, machine="n"), 100.0, 5).number == 0
    pools.remove(replace(record, number=1, membership=Membership.REMOVED.value))
    assert pools.judge(announce(pool_id=b"q" * 16), 100.0, 5).number == 0
    assert pools.infos() == ()
    with pytest.raises(IdentityError, match="was removed"):
        pools.judge(announce(), 200.0, 5)
    with pytest.raises(IdentityError, match="was removed"):
        pools.heartbeat(beat(), 200.0)


def test_a_folder_older_than_what_was_heard_of_it_is_checked_before_it_counts():
    pools = table()
    enter(pools)
    enter(pools, now=20.0, boot_id=BOOT_2, previous_boot_id=BOOT_1)
    assert state(pools) == PoolState.UP
    enter(pools, now=40.0, boot_id=BOOT_3, previous_boot_id=BOOT_1)
    assert state(pools) == PoolState.CHECKING
    assert pools.unreadable() == {1}
    assert pools.heartbeat(beat(boot_id=BOOT_3, reconciled=False), 41.0) is None
    checked = pools.heartbeat(beat(boot_id=BOOT_3), 42.0)
    assert checked is not None
    pools.checked(checked)
    assert state(pools) == PoolState.UP


def test_a_pool_is_out_after_a_time_of_this_masters_own_and_never_too_many_at_once():
    known = [
        PoolRecord(
            number=number, pool_id=bytes([number]) * 16, name=f"p{number}", machine="m", zone="", address=HERE
        )
        for number in (1, 2, 3)
    ]
    pools = table(known)
    assert pools.give_up(59.0, 2) == []
    assert [record.number for record in pools.give_up(60.0, 2)] == [1, 2]
    assert pools.give_up(600.0, 2) == []
    assert pools.out() == {1, 2}
    assert [pool.state for pool in pools.infos()] == ["out", "out", "down"]
    pools.enter(known[0], announce(pool_id=known[0].pool_id), 700.0)
    assert pools.out() == {2}
    assert [record.number for record in pools.give_up(700.0, 2)] == [3]


def test_pools_are_found_by_name_or_number():
    known = [
        PoolRecord(
            number=number, pool_id=bytes([number]) * 16, name=name, machine=machine, zone="", address=HERE
        )
        for number, name, machine in ((1, "a", "m"), (2, "b", "m"), (3, "b", "n"), (4, "1", "m"))
    ]
    pools = table(known)
    assert pools.named("a").number == 1
    assert pools.named("3").number == 3
    assert pools.named("1").number == 4
    with pytest.raises(Conflict, match="2, 3"):
        pools.named("b")
    with pytest.raises(NotFound):
        pools.named("c")


def test_a_comparison_counts_for_one_start_of_a_master_and_one_of_the_pool():
    pools = table()
    enter(pools)
    pools.heartbeat(beat(reconciled=True), 1.0)
    assert pools.compared(7) == frozenset()
    pools.heartbeat(beat(compared=6), 2.0)
    assert [record.number for record in pools.uncompared(7)] == [1]
    pools.heartbeat(beat(compared=7), 3.0)
    assert (pools.compared(7), pools.uncompared(7)) == (frozenset({1}), [])
    enter(pools, 4.0, cluster_id=CLUSTER, boot_id=BOOT_2, previous_boot_id=BOOT_1)
    assert [record.number for record in pools.uncompared(7)] == [1]
    pools.remove(type(pools.known(1))(**{**fields_of(pools.known(1)), "membership": "removed"}))
    assert pools.uncompared(7) == []


def fields_of(record):
    return {name: getattr(record, name) for name in record.__slots__}


def test_a_pool_that_joined_in_a_lost_history_may_have_the_name_of_one_that_is_known():
    pools = table()
    enter(pools)
    with pytest.raises(IdentityError, match="Is its disk mounted"):
        pools.judge(announce(pool_id=b"q" * 16), 1.0, 5)
    assert pools.judge(announce(pool_id=b"q" * 16, cluster_id=CLUSTER), 1.0, 5).number == 0


def test_a_disk_that_was_made_larger_changes_the_map_and_a_few_blocks_do_not():
    pools = table()
    enter(pools, capacity=TIB, free=TIB // 2)
    before = pools.version
    pools.heartbeat(beat(capacity=TIB + TIB // 100, free=TIB // 2 + TIB // 100), 1.0)
    assert pools.version == before
    pools.heartbeat(beat(capacity=2 * TIB, free=TIB), 2.0)
    assert pools.version > before
    assert pools.map().pools[0].capacity == 2 * TIB
