"""What readers find wrong is told to its pool once, however many readers find it."""

import trio

from droppexd.errors import StoreError
from droppexd.model import ExtentId
from droppexd.roles.app_reporter import Reporter
from droppexd.wire.messages import CheckShards, ShardCheck, ShardsChecked


class Pool:
    def __init__(self):
        self.asked = []
        self.at_once = 0
        self.most_at_once = 0
        self.fails = False

    async def check(self, _call, request, _body):
        self.asked += request.shards
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await trio.sleep(1)
        self.at_once -= 1
        if self.fails:
            raise StoreError("the disk is gone")
        return ShardsChecked(checks=tuple(ShardCheck(name, "damaged", 1) for name in request.shards))


async def open_reporter(stage):
    pool = Pool()
    address = await stage.serve("pool", {CheckShards: pool.check})
    reporter = Reporter(await stage.connections("app"), stage.runtime.clock)
    stage.nursery.start_soon(reporter.run)
    return pool, address, reporter


def test_a_shard_is_told_of_once_until_some_time_has_passed(play):
    async def story(stage):
        pool, address, reporter = await open_reporter(stage)
        for _ in range(100):
            reporter.note(address, ExtentId(1, 1), 3)
        await trio.sleep(20)
        reporter.note(address, ExtentId(1, 1), 3)
        await trio.sleep(5)
        assert [(name.extent, name.shard) for name in pool.asked] == [(ExtentId(1, 1), 3)]
        await trio.sleep(20)
        reporter.note(address, ExtentId(1, 1), 3)
        await trio.sleep(5)
        assert len(pool.asked) == 2

    play(story)


def test_many_shards_are_told_of_a_few_at_once_and_the_rest_is_forgotten(play):
    async def story(stage):
        pool, address, reporter = await open_reporter(stage)
        for counter in range(3000):
            reporter.note(address, ExtentId(1, counter), 0)
        await trio.sleep(3000)
        assert len(pool.asked) == 1024
        assert pool.most_at_once == 4

    play(story)


def test_a_pool_that_fails_or_is_gone_ends_nothing(play):
    async def story(stage):
        pool, address, reporter = await open_reporter(stage)
        pool.fails = True
        reporter.note("tcp://127.0.0.1:1", ExtentId(1, 1), 0)
        reporter.note(address, ExtentId(1, 2), 0)
        await trio.sleep(10)
        reporter.note(address, ExtentId(1, 3), 0)
        await trio.sleep(10)
        assert [name.extent.counter for name in pool.asked] == [2, 3]

    play(story)
