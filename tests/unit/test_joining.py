"""How a controller that starts finds out what it must know."""

import itertools

import pytest
import trio

from droppexd.errors import ConfigError, NotMaster
from droppexd.model import Role
from droppexd.roles.joining import ask_group
from droppexd.wire.group_messages import DescribeGroup, GroupDescribed
from droppexd.wire.messages import Ping, Pong

NOBODY = "tcp://127.0.0.1:9"


class Controller:
    """Answers as one that knows its cluster, or not yet."""

    def __init__(self, cluster_id=b"\x01" * 16):
        self.cluster_id = cluster_id
        self.asked = 0

    async def describe(self, _call, _request, _body):
        self.asked += 1
        if self.asked < 3 and not self.cluster_id:
            return GroupDescribed(cluster_id=b"", engine="etcd", endpoints=(), prefix="", master="")
        return GroupDescribed(
            cluster_id=self.cluster_id or b"\x02" * 16,
            engine="etcd",
            endpoints=("http://127.0.0.1:2379",),
            prefix="droppex/",
            master="",
        )


async def pong(_call, _request, _body):
    return Pong(role="pool", name="attic", boot_id=b"")


def test_the_first_that_knows_its_cluster_is_believed(play):
    async def story(stage):
        one = Controller()
        address = await stage.serve("one", {DescribeGroup: one.describe}, role=Role.CONTROLLER)
        described = await ask_group(await stage.connections("new", Role.CONTROLLER), [NOBODY, address])
        assert described.cluster_id == b"\x01" * 16
        assert described.endpoints == ("http://127.0.0.1:2379",)

    play(story)


def test_others_are_looked_for_when_none_answers(play):
    async def story(stage):
        one = Controller()
        address = await stage.serve("one", {DescribeGroup: one.describe}, role=Role.CONTROLLER)
        looked = []

        async def find():
            looked.append(trio.current_time())
            return (address,) if len(looked) == 3 else ()

        with trio.fail_after(60):
            described = await ask_group(await stage.connections("new", Role.CONTROLLER), [NOBODY], find)
        assert described.cluster_id == b"\x01" * 16
        assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(looked))

    play(story)


def test_one_that_knows_of_no_cluster_is_asked_again(play):
    async def story(stage):
        one = Controller(cluster_id=b"")
        address = await stage.serve("one", {DescribeGroup: one.describe}, role=Role.CONTROLLER)
        described = await ask_group(await stage.connections("new", Role.CONTROLLER), [address])
        assert described.cluster_id == b"\x02" * 16
        assert one.asked == 3

    play(story)


def test_an_address_of_a_pool_is_told_to_be_one(play):
    async def story(stage):
        address = await stage.serve("one", {Ping: pong}, role=Role.POOL)
        with pytest.raises(ConfigError, match="is the pool attic, not a controller"):
            await ask_group(await stage.connections("new", Role.CONTROLLER), [address])

    play(story)


def test_a_controller_that_cannot_say_is_asked_again(play):
    async def story(stage):
        answers = iter([NotMaster("not now")])
        one = Controller()

        async def describe(call, request, body):
            for error in answers:
                raise error
            return await one.describe(call, request, body)

        address = await stage.serve("one", {DescribeGroup: describe}, role=Role.CONTROLLER)
        assert (await ask_group(await stage.connections("new", Role.CONTROLLER), [address])).engine == "etcd"

    play(story)
