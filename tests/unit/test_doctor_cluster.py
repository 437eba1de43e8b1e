"""What the doctor makes of a cluster, as its app tells of it."""

import pytest

from droppexd import __version__
from droppexd.doctor.cluster import Cluster, judge_cluster
from droppexd.errors import PeerTimeout, RemoteProtocolError
from droppexd.model import ClusterStatus, ControllerInfo, PoolInfo, SurvivalCount
from droppexd.wire.group_messages import ControllersListed, PeerReport

GIB = 1024**3


def report(role, name, **fields):
    known = {"release": __version__, "python": "3.12.1", "ahead_ms": 0, "round_trip_us": 400}
    return PeerReport(role=role, name=name, address=f"tcp://{name}:1", **(known | fields))


def silent(role, name):
    return PeerReport(role=role, name=name, address=f"tcp://{name}:1", code="peer", failure="not reachable")


def pool(name, **fields):
    known = {
        "number": 1,
        "pool_id": bytes(16),
        "name": name,
        "machine": f"machine of {name}",
        "zone": "",
        "address": f"tcp://{name}:1",
        "state": "up",
        "membership": "member",
        "capacity": 100 * GIB,
        "free": 50 * GIB,
    }
    return PoolInfo(**(known | fields))


def status(*pools, survival=(), files=3):
    return ClusterStatus(
        cluster_id=bytes(16),
        term=1,
        files=files,
        size=1,
        extents=1,
        garbage=0,
        survival=survival,
        pools=pools,
        controllers=(),
        sessions=1,
    )


NORTH = ControllerInfo(name="north", address="tcp://north:1", role="master", master="tcp://north:1")
SOUTH = ControllerInfo(name="south", address="tcp://south:1", role="standby", master="tcp://north:1")
LISTED = ControllersListed(master=NORTH.address, controllers=(NORTH, SOUTH))
APP = report("app", "door")
PEERS = (
    report("controller", "north"),
    report("controller", "south"),
    APP,
    report("pool", "attic"),
    report("pool", "cellar"),
)


def judged(**changes):
    fields = {
        "app": APP,
        "peers": PEERS,
        "status": status(pool("attic"), pool("cellar")),
        "controllers": LISTED,
        "failures": {},
    }
    return judge_cluster(Cluster(**(fields | changes)))


def without(name, role):
    return tuple(silent(role, name) if peer.name == name else peer for peer in PEERS)


def wrong(verdicts):
    return [verdict for verdict in verdicts if verdict.level != "ok"]


def test_a_healthy_cluster_has_a_line_for_each_and_nothing_to_do():
    verdicts = judged()
    assert wrong(verdicts) == []
    assert not any(verdict.advice for verdict in verdicts)
    said = [verdict.text for verdict in verdicts]
    assert said == [
        "the app door at tcp://door:1 answers this machine in 0.4 ms",
        "the controller north at tcp://north:1 answers in 0.4 ms, and is the master",
        "the controller south at tcp://south:1 answers in 0.4 ms",
        "the pool attic on machine of attic at tcp://attic:1 answers in 0.4 ms",
        "the pool cellar on machine of cellar at tcp://cellar:1 answers in 0.4 ms",
        "3 files can be read, and would survive one more loss",
        "6 clocks agree to 0.000 s",
        f"5 peers run droppex {__version__}, protocol 1, Python 3.12.1",
    ]


def test_without_the_app_nothing_else_is_said():
    (verdict,) = judged(app=silent("app", "door"), peers=None, status=None, controllers=None)
    assert (verdict.level, verdict.subject) == ("error", "door")
    assert "droppexd doctor" in verdict.advice


def test_a_pool_that_does_not_answer_is_named_with_what_to_do():
    (verdict,) = wrong(judged(peers=without("attic", "pool")))
    assert (verdict.level, verdict.subject) == ("error", "attic")
    assert "pool attic on machine of attic at tcp://attic:1" in verdict.text
    assert "not reachable" in verdict.text
    assert "droppex pools replace attic" in verdict.advice


@pytest.mark.parametrize(
    ("fields", "check", "level", "said"),
    [
        ({"state": "down"}, "peers", "error", "is down to the controllers, and answers the app"),
        ({"state": "out"}, "peers", "error", "is out to the controllers"),
        ({"state": "read-only", "trouble": "its disk is full"}, "disk", "error", "its disk is full"),
        ({"state": "checking"}, "peers", "warning", "older copy"),
        ({"free": 4 * GIB}, "disk", "warning", "4.0% of its disk"),
    ],
)
def test_what_the_master_says_of_a_pool_counts_as_well(fields, check, level, said):
    (verdict,) = wrong(judged(status=status(pool("attic", **fields), pool("cellar"))))
    assert (verdict.check, verdict.level, verdict.subject) == (check, level, "attic")
    assert said in verdict.text
    assert verdict.advice


def test_pools_that_were_removed_are_no_matter():
    removed = pool("attic", membership="removed", state="out")
    assert wrong(judged(status=status(removed, pool("cellar")), peers=without("attic", "pool"))) == []


def test_a_controller_that_does_not_answer_is_named():
    gone = ControllerInfo(name="south", address="tcp://south:1", role="unreachable")
    listed = ControllersListed(master=NORTH.address, controllers=(NORTH, gone))
    nameless = PeerReport(role="controller", name="", address=gone.address, code="peer", failure="gone")
    peers = tuple(nameless if peer.name == "south" else peer for peer in PEERS)
    (verdict,) = wrong(judged(controllers=listed, peers=peers))
    assert (verdict.level, verdict.subject) == ("error", "south")
    assert "droppex controllers remove south" in verdict.advice
    # The same when the app could not be had to ask it.
    (verdict,) = [one for one in wrong(judged(controllers=listed, peers=None)) if one.level == "error"]
    assert verdict.subject == "south"


def test_that_there_is_no_master_is_an_error():
    verdicts = wrong(judged(controllers=ControllersListed(master="", controllers=(SOUTH,))))
    assert [verdict.level for verdict in verdicts] == ["error"]
    assert "no controller is the master" in verdicts[0].text


def test_what_a_controller_says_of_itself_is_passed_on():
    sick = ControllerInfo(
        name="north",
        address="tcp://north:1",
        role="master",
        failure="the disk failed",
        warnings=("its log is long",),
    )
    listed = ControllersListed(master=NORTH.address, controllers=(sick, SOUTH))
    failed, warned = wrong(judged(controllers=listed))
    assert (failed.level, warned.level) == ("error", "warning")
    assert "the disk failed" in failed.text
    assert "its log is long" in warned.text


def test_another_app_that_does_not_answer_is_a_warning_for_apps_need_no_other():
    other = PeerReport(role="app", name="", address="tcp://window:1", code="peer", failure="not reachable")
    (verdict,) = wrong(judged(peers=(*PEERS, other)))
    assert (verdict.level, verdict.subject) == ("warning", "tcp://window:1")


def test_files_that_cannot_be_read_or_hang_by_a_thread_are_told_of():
    survival = (
        SurvivalCount(survives=-1, files=1, extents=1),
        SurvivalCount(survives=0, files=2, extents=2),
        SurvivalCount(survives=2, files=3, extents=3),
    )
    lost, bare = wrong(judged(status=status(pool("attic"), pool("cellar"), survival=survival)))
    assert (lost.check, lost.level, lost.text) == ("files", "error", "1 file cannot be read now")
    assert (bare.level, bare.text) == ("warning", "2 files would not survive the loss of one more pool")


def test_what_the_app_does_not_tell_is_told():
    failures = {"pools": PeerTimeout("no answer in time")}
    (verdict,) = wrong(judged(status=None, failures=failures))
    assert verdict.level == "error"
    assert "how its pools are: no answer in time" in verdict.text
    older = {"peers": RemoteProtocolError("unknown kind of message 144")}
    (verdict,) = wrong(judged(peers=None, failures=older))
    assert verdict.level == "warning"
    assert f"install droppex {__version__}" in verdict.advice
    (verdict,) = wrong(judged(controllers=None, failures={"controllers": PeerTimeout("no answer")}))
    assert verdict.level == "error"


def test_the_clock_of_this_machine_is_compared_by_way_of_the_app():
    ahead = report("app", "door", ahead_ms=90_000)
    (verdict,) = wrong(judged(app=ahead))
    assert verdict.text == "the clock of this machine is 90.0 s behind those of most"
    peers = tuple(report("pool", "attic", ahead_ms=-5000) if one.name == "attic" else one for one in PEERS)
    (verdict,) = wrong(judged(peers=peers))
    assert verdict.subject == "the pool attic"
