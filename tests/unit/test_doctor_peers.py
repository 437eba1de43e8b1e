"""What the doctor makes of peers: of their answers, their clocks and their releases."""

import socket

import trio

from droppexd.config import Config
from droppexd.doctor.around import reach_etcd
from droppexd.doctor.peers import (
    THIS_MACHINE,
    ClockAhead,
    clocks_of,
    judge_clocks,
    judge_controllers,
    judge_etcd,
    judge_versions,
)
from droppexd.model import Role
from droppexd.wire.group_messages import PeerReport


def peer(name, *, role="pool", **fields):
    known = {"release": "1.0", "python": "3.12.1", "ahead_ms": 0, "round_trip_us": 400}
    return PeerReport(role=role, name=name, address=f"tcp://{name}:1", **(known | fields))


def silent(name, code="peer", *, role="pool", failure="not reachable"):
    return PeerReport(role=role, name=name, address=f"tcp://{name}:1", code=code, failure=failure)


def clocks(*ahead_ms):
    others = [peer(f"p{number}", ahead_ms=ms) for number, ms in enumerate(ahead_ms)]
    return judge_clocks([THIS_MACHINE, *clocks_of(others, THIS_MACHINE)])


def test_clocks_that_agree_are_one_line():
    (verdict,) = clocks(5, -3, 900)
    assert verdict.level == "ok"
    assert verdict.text == "4 clocks agree to 0.900 s"


def test_the_clock_that_is_far_from_most_is_named():
    (verdict,) = clocks(0, 3_600_000, 10)
    assert (verdict.level, verdict.subject) == ("warning", "the pool p1")
    assert verdict.text == "the clock of the pool p1 is 3600.0 s ahead of those of most"
    (verdict,) = clocks(-60_000, -60_010, -60_020)
    assert verdict.text == "the clock of this machine is 60.0 s ahead of those of most"


def test_of_two_clocks_neither_is_blamed():
    (verdict,) = clocks(-7000)
    assert verdict.text == "the clocks of this machine and the pool p0 are 7.0 s apart"


def test_a_clock_is_not_blamed_for_a_slow_answer():
    slow = peer("far", ahead_ms=3000, round_trip_us=4_000_000)
    assert judge_clocks([THIS_MACHINE, *clocks_of([slow], THIS_MACHINE)])[0].level == "ok"


def test_what_an_app_sees_is_seen_from_here_by_way_of_it():
    app = ClockAhead("the app", -60_000, 1.0)
    (clock,) = clocks_of([peer("a", ahead_ms=60_000), silent("b"), peer("c", ahead_ms=None)], app)
    assert (clock.who, clock.ahead_ms) == ("the pool a", 0)
    assert judge_clocks([THIS_MACHINE]) == []


def test_one_release_everywhere_is_one_line():
    (verdict,) = judge_versions([peer("a"), peer("b", python="3.11.2"), silent("c")], own="1.0")
    assert verdict.level == "ok"
    assert "2 peers run droppex 1.0, protocol 1, Python 3.11.2, Python 3.12.1" in verdict.text


def test_another_release_is_named():
    same, other, older = judge_versions(
        [peer("a"), peer("b", release="0.9"), peer("c", release="")], own="1.0"
    )
    assert same.text.startswith("1 peer runs droppex 1.0")
    assert (other.level, other.subject) == ("warning", "b")
    assert "the pool b runs droppex 0.9, and this is droppex 1.0" in other.text
    assert "an older release" in older.text


def test_what_to_do_about_a_silent_peer_goes_by_why():
    reports = [
        peer("north", role="controller"),
        silent("south", role="controller"),
        silent("west", "version-mismatch", role="controller"),
        silent("east", "key-refused", role="controller"),
    ]
    there, gone, other, refused = judge_controllers([*reports, peer("no controller")])
    assert there.text == "the controller north at tcp://north:1 answers in 0.4 ms"
    assert "firewall" in gone.advice
    assert gone.subject == "south"
    assert "install droppex" in other.advice
    assert "droppex members" in refused.advice


def test_each_member_of_etcd_is_a_line():
    north, south = "https://north:2379", "https://south:2379"
    config = Config(roles=(Role.CONTROLLER,), catalog_engine="etcd", catalog_endpoints=(north, south))
    there, gone = judge_etcd(config, {south: "Connection refused"})
    assert (there.level, there.subject) == ("ok", north)
    assert (gone.level, gone.subject) == ("error", south)
    assert "Connection refused" in gone.text
    pool = Config(roles=(Role.POOL,), catalog_engine="etcd", catalog_endpoints=(north,))
    assert judge_etcd(pool, {}) == []


def test_members_of_etcd_are_tried_all_at_once():
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        there.listen()
        reached = f"http://127.0.0.1:{there.getsockname()[1]}"
        config = Config(roles=(Role.CONTROLLER,), catalog_endpoints=(reached, "http://127.0.0.1:1"))
        failures = trio.run(reach_etcd, config)
    assert list(failures) == ["http://127.0.0.1:1"]
