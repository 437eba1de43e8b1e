"""The way to the master: led on, passed on, and given up in time."""

import pytest
import trio

from droppexd.errors import Conflict, NotMaster, PeerError, VersionMismatch
from droppexd.model import Role
from droppexd.roles.master import MasterLink
from droppexd.wire.messages import Ping, Pong

NOBODY = "tcp://127.0.0.1:9"


class Controller:
    """Answers pings as a master, a standby, or with an error."""

    def __init__(self, name):
        self.name = name
        self.error = None
        self.asked = 0

    async def ping(self, _call, _request, _body):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return Pong(role="controller", name=self.name, boot_id=b"")


async def controllers(stage, *names):
    made = [Controller(name) for name in names]
    addresses = [await stage.serve(one.name, {Ping: one.ping}, role=Role.CONTROLLER) for one in made]
    return made, addresses


async def link_to(stage, *seeds, name="app"):
    return MasterLink(await stage.connections(name), seeds, stage.runtime)


def test_a_standby_leads_to_the_master_and_is_not_asked_again(play):
    async def story(stage):
        (standby, master), addresses = await controllers(stage, "standby", "master")
        standby.error = NotMaster("ask the other", addresses[1])
        link = await link_to(stage, addresses[0])
        for _ in range(3):
            assert (await link.call(Ping(), timeout_s=5)).name == "master"
        assert (standby.asked, master.asked) == (1, 3)
        assert link.address == addresses[1]

    play(story)


def test_a_standby_that_knows_no_master_is_passed_over(play):
    async def story(stage):
        (standby, _), addresses = await controllers(stage, "standby", "master")
        standby.error = NotMaster("no idea")
        link = await link_to(stage, *addresses)
        assert (await link.call(Ping(), timeout_s=5)).name == "master"

    play(story)


def test_a_controller_of_a_far_release_is_passed_over_and_named_when_there_is_no_other(play):
    async def story(stage):
        (far, master), addresses = await controllers(stage, "far", "master")
        far.error = VersionMismatch("protocol versions 3 and 1 do not work together")
        link = await link_to(stage, *addresses)
        assert (await link.call(Ping(), timeout_s=5)).name == "master"
        assert master.asked == 1
        link = await link_to(stage, addresses[0], name="another")
        with pytest.raises(PeerError, match=r"no master answers .* versions 3 and 1 do not work"):
            await link.call(Ping(), timeout_s=5)

    play(story)


def test_the_next_seed_is_asked_when_one_refuses_connections(play):
    async def story(stage):
        _, addresses = await controllers(stage, "master")
        link = await link_to(stage, NOBODY, "tcp://127.0.0.1:10", *addresses)
        assert (await link.call(Ping(), timeout_s=5)).name == "master"

    play(story)


def test_the_next_seed_is_asked_when_one_is_silent(play):
    async def story(stage):
        _, addresses = await controllers(stage, "stopped", "master")
        stage.network.pause("stopped")
        link = await link_to(stage, *addresses)
        assert (await link.call(Ping(), timeout_s=30)).name == "master"

    play(story)


def test_a_hint_that_leads_nowhere_leads_back_to_the_seeds(play):
    async def story(stage):
        (standby,), addresses = await controllers(stage, "standby")
        standby.error = NotMaster("it was there", NOBODY)
        link = await link_to(stage, *addresses)

        async def take_over():
            await trio.sleep(2)
            standby.error = None

        stage.nursery.start_soon(take_over)
        assert (await link.call(Ping(), timeout_s=30)).name == "standby"

    play(story)


def test_the_master_of_later_is_found_while_time_is_left(play):
    async def story(stage):
        link = await link_to(stage, "tcp://127.0.0.1:20001")
        found = []

        async def ask():
            found.append(await link.call(Ping(), timeout_s=30))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(7)
            assert not found
            await controllers(stage, "late")
        assert found[0].name == "late"

    play(story)


@pytest.mark.parametrize("silent", [True, False])
def test_it_gives_up_in_time_and_says_who_was_asked(play, silent):
    async def story(stage):
        _, addresses = await controllers(stage, "one", "other")
        for name in ("one", "other"):
            (stage.network.pause if silent else stage.network.kill)(name)
        link = await link_to(stage, *addresses)
        started = trio.current_time()
        with pytest.raises(PeerError) as caught:
            await link.call(Ping(), timeout_s=12)
        assert all(address in str(caught.value) for address in addresses)
        assert trio.current_time() - started < 13

    play(story)


def test_what_the_master_refuses_is_not_asked_elsewhere(play):
    async def story(stage):
        (master, other), addresses = await controllers(stage, "master", "other")
        master.error = Conflict("the name exists")
        link = await link_to(stage, *addresses)
        with pytest.raises(Conflict):
            await link.call(Ping(), timeout_s=5)
        assert (master.asked, other.asked) == (1, 0)

    play(story)


def test_standbys_that_name_each_other_are_not_asked_without_a_pause(play):
    async def story(stage):
        made, addresses = await controllers(stage, "one", "other")
        made[0].error = NotMaster("the other", addresses[1])
        made[1].error = NotMaster("the one", addresses[0])
        link = await link_to(stage, *addresses)
        with pytest.raises(PeerError):
            await link.call(Ping(), timeout_s=10)
        assert made[0].asked + made[1].asked < 2 * 10 / 0.05 + 2

    play(story)


@pytest.mark.parametrize("calls", [2, 3, 4])
def test_calls_that_fail_together_move_on_together(play, calls):
    async def story(stage):
        (_, master), addresses = await controllers(stage, "stopped", "master")
        stage.network.pause("stopped")
        link = await link_to(stage, *addresses)
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(calls):
                nursery.start_soon(lambda: link.call(Ping(), timeout_s=60))
        assert master.asked == calls
        assert trio.current_time() - started < 6  # One attempt at the first, and none again.

    play(story)


def test_a_masters_word_is_followed_and_its_controllers_are_asked_too(play):
    async def story(stage):
        (gone, first, _), addresses = await controllers(stage, "gone", "first", "second")
        gone.error = NotMaster("no idea")
        link = await link_to(stage, addresses[0])
        link.follow(addresses[1], addresses[1:])
        assert (await link.call(Ping(), timeout_s=5)).name == "first"
        assert gone.asked == 0
        first.error = NotMaster("not any more")
        assert (await link.call(Ping(), timeout_s=5)).name == "second"
        assert link.known == tuple(addresses)

    play(story)


def test_a_masters_word_ends_the_wait_for_one_that_stands_still(play):
    async def story(stage):
        async def stand_still(_call, _request, _body):
            await trio.sleep_forever()

        _, (address,) = await controllers(stage, "master")
        silent = await stage.serve("silent", {Ping: stand_still}, role=Role.CONTROLLER)
        link = await link_to(stage, silent)
        names = []

        async def ask():
            names.append((await link.call(Ping(), timeout_s=30)).name)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
            await trio.sleep(1)
            began = trio.current_time()
            link.follow(address, [address])
        assert names == ["master"] * 3
        assert trio.current_time() - began < 1  # Of the mock clock: nobody waited for the silent one.

    play(story)


def test_a_call_that_is_nearly_out_of_time_gives_no_connection_up(play):
    """What others wait for on it would be lost with it."""

    async def story(stage):
        async def ping(_call, request, _body):
            await trio.sleep(0.05)
            raise NotMaster("no idea")

        standby = await stage.serve("standby", {Ping: ping}, role=Role.CONTROLLER)
        connections = await stage.connections("app")
        failures = []

        async def ask_always():
            while True:
                try:
                    await connections.call(standby, Ping(), timeout_s=30)
                except NotMaster:
                    pass
                except PeerError as error:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_always)
            for number in range(40):
                link = MasterLink(connections, [standby], stage.runtime)
                with pytest.raises(PeerError, match="no master answers"):
                    await link.call(Ping(), timeout_s=1 + number / 40)
            nursery.cancel_scope.cancel()
        assert failures == []

    play(story)


def test_a_word_that_is_repeated_does_not_bring_back_who_has_looked_elsewhere(play):
    async def story(stage):
        _, (first, second) = await controllers(stage, "first", "second")
        link = await link_to(stage, first, second)
        link.follow(first, [first])
        stage.network.kill("first")
        assert (await link.call(Ping(), timeout_s=5)).name == "second"
        link.follow(first, [first])
        assert link.address == second
        link.follow(second, [second])
        link.follow(first, [first])
        assert link.address == first

    play(story)


def test_other_sources_are_not_asked_when_the_time_is_over(play):
    async def story(stage):
        await controllers(stage, "stopped")
        asked = []

        async def find():
            asked.append(None)
            await trio.sleep(60)
            return ()

        connections = await stage.connections("app")
        link = MasterLink(connections, [NOBODY], stage.runtime, find)
        began = trio.current_time()
        for timeout_s in (0.0, 0.0005, 0.05, 1.0):
            with pytest.raises(PeerError, match="no master answers"):
                await link.call(Ping(), timeout_s=timeout_s)
        assert trio.current_time() - began < 2

    play(story)
