"""What `droppex controllers` prints."""

from droppexd.cli.client_controllers import controller_document, controller_lines
from droppexd.model import ControllerInfo
from droppexd.wire.group_messages import ControllersListed

MASTER = ControllerInfo(
    name="north", address="tcp://10.0.0.1:7700", role="master", term=7, revision=900, engine="etcd"
)
STANDBY = ControllerInfo(
    name="south",
    address="tcp://10.0.0.2:7700",
    role="standby",
    term=7,
    revision=880,
    lag=20,
    engine="etcd",
    master="tcp://10.0.0.1:7700",
    warnings=("the database is 85% full",),
)
GONE = ControllerInfo(name="west", address="tcp://10.0.0.3:7700", role="unreachable")


def test_each_controller_is_a_line_and_what_is_wrong_is_told_below():
    listed = ControllersListed(master=MASTER.address, controllers=(MASTER, STANDBY, GONE))
    assert controller_lines(listed) == [
        "NAME   ROLE         TERM  REVISION  LAG  ENGINE  HEALTH   ADDRESS",
        "north  master          7       900    -  etcd    ok       tcp://10.0.0.1:7700",
        "south  standby         7       880   20  etcd    warning  tcp://10.0.0.2:7700",
        "west   unreachable     -         -    -  -       -        tcp://10.0.0.3:7700",
        "south: the database is 85% full",
    ]


def test_that_there_is_no_master_is_said():
    failed = ControllerInfo(
        name="n",
        address="tcp://10.0.0.1:1",
        role="standby",
        engine="etcd",
        failure="etcd\x1b does not answer",
    )
    lines = controller_lines(ControllersListed(master="", controllers=(failed,)))
    assert "failed" in lines[1]
    assert lines[2] == "there is no master: no controller serves reads or writes now"
    assert lines[3].startswith("n takes no writes: etcd")
    assert "\x1b" not in "".join(lines)


def test_a_program_gets_every_field():
    assert controller_document(STANDBY) == {
        "name": "south",
        "address": "tcp://10.0.0.2:7700",
        "role": "standby",
        "term": 7,
        "revision": 880,
        "lag": 20,
        "engine": "etcd",
        "master": "tcp://10.0.0.1:7700",
        "failure": None,
        "warnings": ["the database is 85% full"],
    }
