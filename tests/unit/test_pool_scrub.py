"""The scrub on the mock clock: its pace, its memory, what it finds and whom it tells."""

import json
import random

import pytest
import trio

from droppexd.coding import piece_checksum
from droppexd.errors import IntegrityError, PeerError, StoreError
from droppexd.model import ExtentId, Holding, Layout, ShardHeader, VersionId
from droppexd.roles.pool_check import LOST, ShardState
from droppexd.roles.pool_scrub import Scrubber, ScrubSettings
from droppexd.roles.scrub_record import SUBJECT, ScrubRecord
from droppexd.store.simulated import SimulatedDisk, SimulatedStore
from droppexd.wire.messages import GetScrub, GetScrubFindings, StartScrub

LAYOUT = Layout(1, 1)
SIZE = 4000
EVERY_S = 72_000.0
"""A slice of it is 100 s."""


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes):
        return self.random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self.random.uniform(low, high)


class Reports:
    """Takes what a master would be told, unless it is away."""

    def __init__(self):
        self.told = []
        self.away = False
        self.tries = 0

    async def tell(self, checks):
        self.tries += 1
        await trio.sleep(0.01)
        if self.away:
            raise PeerError("no master answers")
        self.told += [(check.extent.counter, check.state.value) for check in checks if check.state in LOST]


class CountingStore(SimulatedStore):
    """Notes which shards are examined, and may be slow to list them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.examined = []
        self.page_errors = []

    def examine(self, extent, index):
        self.examined.append(extent.counter)
        return super().examine(extent, index)

    def page(self, after, limit):
        if self.page_errors:
            raise self.page_errors.pop()
        return super().page(after, limit)


class Scene:
    def __init__(self, stage, settings):
        self.stage = stage
        self.settings = settings
        self.disk = SimulatedDisk()
        self.reports = Reports()
        self.served = 0
        self.store = self.scrubber = self.scope = self.ended = None
        self.open()

    def open(self):
        self.store = CountingStore(self.disk, entropy=SeededEntropy())

    def hold(self, count, *, size=SIZE, first=1):
        for counter in range(first, first + count):
            piece = random.Random(counter).randbytes(size)
            extent = ExtentId(1, counter)
            header = ShardHeader(
                incarnation=bytes(16),
                extent=extent,
                index=0,
                layout=LAYOUT,
                size=size,
                chunk_size=4 * 1024 * 1024,
                checksums=(piece_checksum(extent, LAYOUT, 0, 0, piece),),
                version=VersionId(1, counter),
                name=f"files/{counter}",
            )
            writer = self.store.begin(size)
            writer.write(0, piece)
            writer.finish(header)

    def start(self):
        self.scrubber = Scrubber(
            self.store, self.stage.runtime, self.reports, lambda: self.served, self.settings
        )
        self.scope, self.ended = trio.CancelScope(), trio.Event()
        self.stage.nursery.start_soon(self._run, self.scope, self.ended)

    async def _run(self, scope, ended):
        with scope:
            await self.scrubber.run()
        ended.set()

    async def stop(self, *, crash=False):
        if crash:
            self.store.crash()
        self.scope.cancel()
        await self.ended.wait()
        self.store.close()

    async def restart(self, *, crash=False, away_s=0.0):
        await self.stop(crash=crash)
        await trio.sleep(away_s)
        self.open()
        self.start()

    async def ask(self, request):
        handler = {
            StartScrub: "start_scrub",
            GetScrub: "get_scrub",
            GetScrubFindings: "get_findings",
        }[type(request)]
        reply = await getattr(self.scrubber, handler)(None, request, ())
        return getattr(reply, "progress", reply)

    async def wait_for_end(self, number):
        while self.scrubber.record.last is None or self.scrubber.record.last.number < number:
            await trio.sleep(0.5)
        return self.scrubber.record.last

    def disk_note(self):
        """Return what the disk remembers, past any store."""
        return json.loads(self.disk.notes[SUBJECT])

    @property
    def shards(self):
        return self.scrubber.record.current.shards


@pytest.fixture
def scene(play):
    def run(body, **settings):
        async def story(stage):
            one = Scene(stage, ScrubSettings(**{"every_s": EVERY_S, "limit_bytes_s": 10**9, **settings}))
            await body(one)

        play(story)

    return run


def test_who_starts_a_pass_is_told_of_it_however_soon_it_ends(scene):
    async def body(one):
        one.hold(3)
        one.start()
        await trio.sleep(1)
        run_blocking = one.scrubber._run_blocking

        async def slow_to_count(function, *args):
            if function == one.store.usage:
                await trio.sleep(60)
            return await run_blocking(function, *args)

        one.scrubber._run_blocking = slow_to_count
        progress = await one.ask(StartScrub())
        assert progress.current is not None
        await one.wait_for_end(progress.current.number)

    scene(body)


# -- pace ----------------------------------------------------------------------------------------------


def test_a_pass_is_spread_over_its_period_and_reads_everything_once(scene):
    async def body(one):
        one.hold(1440)
        one.start()
        await trio.sleep(50)
        assert one.shards == 2
        await trio.sleep(100)
        assert one.shards == 4
        await trio.sleep(EVERY_S / 2 - 150)
        assert abs(one.shards - 720) <= 2
        await trio.sleep(EVERY_S / 2 - 5)
        assert one.store.examined == list(range(1, 1441))
        await trio.sleep(10)
        record = one.scrubber.record
        assert (record.last.number, record.last.shards, record.last.size) == (1, 1440, 1440 * SIZE)
        assert record.current.number == 2

    scene(body)


def test_the_next_pass_begins_a_period_after_the_last_began(scene):
    async def body(one):
        one.hold(3)
        one.start()
        await trio.sleep(0.1)
        begun_ms = one.stage.runtime.clock.wall_ms()
        await trio.sleep(3 * EVERY_S + 1)
        assert one.scrubber.record.current.number == 4
        assert abs(one.scrubber.record.current.begun_ms - begun_ms - 3000 * EVERY_S) < 1000
        assert one.reports.told == []

    scene(body)


def test_an_empty_pool_is_scrubbed_without_work(scene):
    async def body(one):
        one.start()
        await trio.sleep(EVERY_S + 1)
        assert one.scrubber.record.last.shards == 0
        assert one.store.examined == []

    scene(body)


def test_the_limit_holds_when_the_period_would_want_more(scene):
    async def body(one):
        one.hold(400, size=1_000)
        one.start()
        await trio.sleep(100)
        assert 90_000 < one.scrubber.record.current.size <= 120_000
        await trio.sleep(100)
        assert 190_000 < one.scrubber.record.current.size <= 220_000

    scene(body, every_s=10.0, limit_bytes_s=1_000)


async def serve_clients(one):
    while True:
        one.served += 1
        await trio.sleep(0.1)


def test_a_paced_pass_takes_a_quarter_while_clients_are_served(scene):
    async def body(one):
        one.hold(1200, size=1_000)
        one.stage.nursery.start_soon(serve_clients, one)
        await trio.sleep(0.05)
        one.start()
        await trio.sleep(2000)
        assert 450_000 < one.scrubber.record.current.size <= 700_000

    scene(body, every_s=10.0, limit_bytes_s=1_000)


def test_a_requested_pass_has_no_limit_unless_clients_are_served(scene):
    async def body(one):
        one.hold(1200, size=1_000)
        one.start()
        await trio.sleep(10)
        await one.ask(StartScrub())
        await trio.sleep(1)
        assert one.scrubber.record.last.size == 1_200_000
        one.stage.nursery.start_soon(serve_clients, one)
        await trio.sleep(1)
        await one.ask(StartScrub())
        await trio.sleep(2)
        assert one.scrubber.record.current.size <= 400_000
        await one.wait_for_end(one.scrubber.record.current.number)
        assert one.scrubber.record.last.size == 1_200_000

    scene(body, limit_bytes_s=100_000)


# -- memory --------------------------------------------------------------------------------------------


def test_a_pass_goes_on_where_it_was_after_an_orderly_restart(scene):
    async def body(one):
        one.hold(1440)
        one.start()
        await trio.sleep(EVERY_S / 3 + 50)
        done = one.shards
        assert done > 400
        await one.restart()
        await trio.sleep(1)
        record = one.scrubber.record
        assert (record.current.number, record.current.shards) == (1, done)
        await trio.sleep(EVERY_S * 2 / 3 - 60)
        assert one.store.examined == list(range(done + 1, 1441))

    scene(body)


def test_a_crash_repeats_little_and_leaves_nothing_out(scene):
    async def body(one):
        one.hold(3000, size=1_000)
        one.start()
        await trio.sleep(100)
        before = list(one.store.examined)
        await one.restart(crash=True)
        await one.wait_for_end(1)
        after = one.store.examined
        assert after[0] <= before[-1] + 1
        assert before[-1] - after[0] <= 60  # What is read in half a minute, and in a stretch.
        assert after[: 3001 - after[0]] == list(range(after[0], 3001))
        assert after[0] > 1

    scene(body, every_s=10.0, limit_bytes_s=1_000)


def test_the_time_that_a_pool_is_away_counts(scene):
    async def body(one):
        one.hold(1440)
        one.start()
        await trio.sleep(EVERY_S / 4)
        await one.restart(away_s=EVERY_S / 4)
        await trio.sleep(10)
        assert abs(one.shards - 720) <= 4
        await one.restart(away_s=40 * EVERY_S)
        await trio.sleep(1)
        assert one.scrubber.record.last.shards == 1440
        assert one.scrubber.record.current.number == 2

    scene(body)


def test_a_wall_clock_that_went_back_stops_no_scrub(scene):
    async def body(one):
        one.hold(1440)
        one.start()
        await trio.sleep(EVERY_S / 4)
        await one.stop()
        fields = dict(one.disk_note())
        one.open()
        one.store.remember(SUBJECT, {**fields, "written_ms": fields["written_ms"] + 10**12})
        one.start()
        await trio.sleep(EVERY_S / 4)
        assert abs(one.shards - 720) <= 4

    scene(body)


def test_a_damaged_record_begins_a_new_pass(scene):
    async def body(one):
        one.hold(3)
        one.start()
        await trio.sleep(EVERY_S * 2.5)
        await one.stop()
        one.disk.damage_note(SUBJECT)
        one.open()
        one.start()
        await trio.sleep(1)
        assert one.scrubber.record.current.number == 1
        await one.stop()
        one.open()
        assert ScrubRecord.from_fields(one.store.recall(SUBJECT)).current.number == 1
        one.store.remember(SUBJECT, {"record": 99})
        one.start()
        await trio.sleep(1)
        assert one.scrubber.record.current.number == 1

    scene(body)


def test_a_store_that_remembers_nothing_is_scrubbed_all_the_same(scene):
    async def body(one):
        one.hold(3)

        def refuse(_subject, _fields):
            raise StoreError("the store is read-only")

        one.store.remember = refuse
        one.start()
        await trio.sleep(EVERY_S + 1)
        assert one.scrubber.record.last.shards == 3

    scene(body)


def test_that_nothing_can_be_remembered_is_said_once_and_that_it_can_again_too(scene, caplog):
    async def body(one):
        caplog.set_level("INFO", "droppex.pool")
        one.hold(3)
        remember = one.store.remember
        refused = []

        def refuse(subject, _fields):
            refused.append(subject)
            raise StoreError("the store is read-only")

        def said():
            return [line for line in caplog.messages if "remembered" in line]

        one.store.remember = refuse
        one.start()
        await trio.sleep(EVERY_S + 1)
        assert len(refused) > 2
        assert said() == ["where the scrub is cannot be remembered for now: the store is read-only"]
        one.store.remember = remember
        await trio.sleep(EVERY_S)
        assert said()[1:] == ["where the scrub is can be remembered again"]
        one.store.remember = refuse
        await trio.sleep(EVERY_S)
        assert len(said()) == 3

    scene(body)


# -- findings ------------------------------------------------------------------------------------------


def test_what_is_damaged_is_told_to_the_master_and_kept_with_its_name(scene):
    async def body(one):
        one.hold(50)
        one.disk.flip_piece(ExtentId(1, 7), 0, 0)
        one.disk.damage_header(ExtentId(1, 9), 0)
        one.start()
        await one.ask(StartScrub())
        last = await one.wait_for_end(2)
        assert (last.shards, last.size, last.lost, last.unreadable) == (50, 49 * SIZE, 2, 0)
        assert sorted(one.reports.told) == [(7, "damaged"), (9, "damaged")]
        findings = (await one.ask(GetScrubFindings(number=2))).findings
        assert [(finding.shard.extent.counter, finding.name) for finding in findings] == [
            (7, "files/7"),
            (9, ""),
        ]
        await one.restart()
        assert (await one.ask(GetScrubFindings(number=2))).findings == findings
        assert (await one.ask(GetScrubFindings(number=1))).findings == ()

    scene(body)


def test_a_shard_that_was_dropped_meanwhile_is_no_finding_and_one_that_vanished_is(scene):
    async def body(one):
        one.hold(5)
        page = one.store.page

        def page_then_lose(after, limit):
            held = page(after, limit)
            if held:
                one.store.drop([holding for holding in held if holding.extent.counter == 2])
            return held

        one.store.page = page_then_lose
        gone = Holding(ExtentId(1, 9), 0, 77)
        find = one.store.find
        one.store.find = lambda extents: [gone] if gone.extent in extents else find(extents)
        one.start()
        await one.ask(StartScrub())
        assert (await one.wait_for_end(2)).lost == 0

        one.store.page = lambda after, limit: [*page(after, limit), *([gone] if after is None else [])]
        await one.ask(StartScrub())
        last = await one.wait_for_end(3)
        assert [finding.state for finding in last.findings] == [ShardState.ABSENT]
        assert one.reports.told == [(9, "absent")]

    scene(body)


def test_unreadable_shards_are_counted_and_not_called_lost(scene):
    async def body(one):
        one.hold(5)
        examine = one.store.examine

        def fail(extent, index):
            if extent.counter == 3:
                raise StoreError("too many open files")
            return examine(extent, index)

        one.store.examine = fail
        one.start()
        await one.ask(StartScrub())
        last = await one.wait_for_end(2)
        assert (last.shards, last.lost, last.unreadable) == (5, 0, 1)
        assert one.reports.told == []

    scene(body)


def test_a_finding_is_kept_until_a_master_takes_it_and_its_place_is_not_passed_before(scene):
    async def body(one):
        one.hold(3000, size=1_000)
        one.disk.flip_piece(ExtentId(1, 40), 0, 0)
        one.reports.away = True
        one.start()
        await trio.sleep(250)
        assert one.shards > 200
        assert one.reports.told == []
        await one.restart(crash=True)  # Nobody was told: it must be found again.
        await trio.sleep(100)
        assert one.reports.told == []
        one.reports.away = False
        await trio.sleep(100)
        assert one.reports.told == [(40, "damaged")]
        seen = one.shards
        await one.restart(crash=True)
        await trio.sleep(1)
        assert one.shards > seen - 60
        await one.wait_for_end(1)
        assert one.reports.told == [(40, "damaged")]

    scene(body, every_s=10.0, limit_bytes_s=1_000)


def test_what_was_rebuilt_while_the_master_was_away_is_not_called_lost(scene):
    async def body(one):
        one.hold(3)
        one.disk.flip_piece(ExtentId(1, 2), 0, 0)
        one.disk.flip_piece(ExtentId(1, 3), 0, 0)
        one.reports.away = True
        one.start()
        await one.ask(StartScrub())
        await one.wait_for_end(2)
        one.disk.flip_piece(ExtentId(1, 2), 0, 0)
        one.reports.away = False
        await trio.sleep(10)
        assert one.reports.told == [(3, "damaged")]

    scene(body)


def test_a_heartbeat_tells_of_the_last_whole_pass_and_of_the_present_one(scene):
    async def body(one):
        one.hold(720)
        one.disk.flip_piece(ExtentId(1, 7), 0, 0)
        one.start()
        await trio.sleep(EVERY_S / 4 + 50)
        report = one.scrubber.report(720)
        assert (report.ended_ms, report.percent, report.lost) == (0, 25, 1)
        await one.ask(StartScrub())
        ended_ms = (await one.wait_for_end(2)).ended_ms
        report = one.scrubber.report(720)
        assert (report.ended_ms, report.percent, report.lost) == (ended_ms, 0, 1)

    scene(body)


def test_a_finding_of_a_pass_that_ended_is_told_when_the_master_is_back(scene):
    async def body(one):
        one.hold(3)
        one.disk.flip_piece(ExtentId(1, 3), 0, 0)
        one.reports.away = True
        one.start()
        await one.ask(StartScrub())
        await one.wait_for_end(2)
        await trio.sleep(60)
        tries = one.reports.tries
        assert 5 < tries < 20
        one.reports.away = False
        await trio.sleep(10)
        assert one.reports.told == [(3, "damaged")]
        await trio.sleep(60)
        assert one.reports.tries == tries + 1

    scene(body)


@pytest.mark.parametrize("error", [StoreError("cannot read"), IntegrityError("the database is damaged")])
def test_a_store_that_cannot_list_its_shards_ends_the_pass_after_some_tries(scene, error):
    async def body(one):
        one.hold(500)
        one.start()
        await trio.sleep(1)
        one.store.page_errors = [error] * 2
        await one.ask(StartScrub())
        last = await one.wait_for_end(2)
        assert (last.trouble, last.shards) == ("", 500)
        one.store.page_errors = [error] * 3
        await one.ask(StartScrub())
        last = await one.wait_for_end(3)
        assert (last.trouble, last.shards) == (str(error), 0)
        state = await one.ask(GetScrub())
        assert state.last.trouble == str(error)
        await one.ask(StartScrub())
        assert (await one.wait_for_end(4)).shards == 500

    scene(body)


def test_a_disk_that_cannot_tell_its_room_does_not_end_the_scrub(scene):
    async def body(one):
        one.hold(3)
        usage = one.store.usage

        def fail():
            raise StoreError("cannot tell how full the disk is")

        one.store.usage = fail
        one.start()
        await trio.sleep(1000)
        one.store.usage = usage
        await trio.sleep(EVERY_S)
        assert one.scrubber.record.last.shards == 3

    scene(body)


# -- asked for -----------------------------------------------------------------------------------------


def test_a_requested_pass_reads_everything_anew_and_counts_for_the_schedule(scene):
    async def body(one):
        one.hold(1440)
        one.start()
        await trio.sleep(EVERY_S / 2 + 50)
        one.store.examined.clear()
        state = await one.ask(StartScrub())
        assert (state.current.number, state.current.requested, state.current.shards) == (2, True, 0)
        await one.wait_for_end(2)
        assert one.store.examined == list(range(1, 1441))
        await trio.sleep(EVERY_S - 100)
        assert one.scrubber.record.current is None
        await trio.sleep(200)
        assert one.scrubber.record.current.number == 3

    scene(body)


def test_who_asks_while_a_requested_pass_runs_joins_it(scene):
    async def body(one):
        one.hold(1200, size=1_000)
        one.stage.nursery.start_soon(serve_clients, one)
        one.start()
        first = await one.ask(StartScrub())
        await trio.sleep(5)
        second = await one.ask(StartScrub())
        assert second.current.number == first.current.number
        assert second.current.shards > 0
        assert second.held == 1200
        assert second.current.size < second.expected_size
        await trio.sleep(3)
        assert abs(second.expected_size - 1_200_000) < 10_000
        assert 80_000 < (await one.ask(GetScrub())).rate < 200_000
        await one.wait_for_end(first.current.number)
        idle = await one.ask(GetScrub())
        assert (idle.current, idle.rate, idle.last.number) == (None, 0, first.current.number)

    scene(body, limit_bytes_s=100_000)


def test_a_requested_pass_goes_on_as_such_after_a_restart(scene):
    async def body(one):
        one.hold(1200, size=1_000)
        one.stage.nursery.start_soon(serve_clients, one)
        one.start()
        number = (await one.ask(StartScrub())).current.number
        await trio.sleep(8)
        await one.restart()
        state = await one.ask(GetScrub())
        assert (state.current.number, state.current.requested) == (number, True)
        last = await one.wait_for_end(number)
        assert last.shards == 1200
        assert len(one.store.examined) < 1200

    scene(body, limit_bytes_s=100_000)


def test_a_pass_can_be_asked_for_before_the_record_is_read(scene):
    async def body(one):
        one.hold(10)
        one.start()
        await trio.sleep(1)
        await one.restart()
        state = await one.ask(StartScrub())
        assert state.current.number == 2
        await one.wait_for_end(2)

    scene(body)
