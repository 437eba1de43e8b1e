"""Noting extents with the master: in order, each once, and no upload fails for what cannot be noted."""

import pytest
import trio
import trio.testing

from droppexd.errors import Conflict, NotEnoughShards, PeerError
from droppexd.model import Extent, ExtentId, Layout, OperationId, UploadRecord, VersionId
from droppexd.roles.app_recording import Recording
from droppexd.wire.messages import Done

UPLOAD = UploadRecord(
    version=VersionId(7, 1), name="docs/a", source=b"here", size=10**9, chunk_size=4, holder=OperationId(7, 2)
)


class Ids:
    """Ids of one session."""

    def __init__(self):
        self.last = 2

    def operation(self):
        self.last += 1
        return OperationId(7, self.last)


class Master:
    """Notes what it is asked, and fails as it is told."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.asked = []

    async def call(self, request, *, timeout_s):
        await trio.lowlevel.checkpoint()
        self.asked.append(request)
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return Done()

    @property
    def noted(self):
        return [(one.upload.extents, one.extent.id.counter) for one in self.asked]


def extent(counter):
    return Extent(id=ExtentId(7, counter), layout=Layout(1, 1), size=256, chunk_size=4, pools=(1, 2))


def play(story, *failures):
    master = Master(*failures)
    recording = Recording(master, Ids(), UPLOAD)
    trio.run(story, recording, master, clock=trio.testing.MockClock(autojump_threshold=0))
    return recording, master


async def add(recording, place):
    await recording.add(place, extent(10 + place), bytes(32))


def test_extents_are_noted_in_their_order_whatever_the_order_in_which_they_are_durable():
    async def story(recording, master):
        await add(recording, 1)
        assert master.asked == []
        await add(recording, 2)
        await add(recording, 0)

    recording, master = play(story)
    assert master.noted == [(0, 10), (1, 11), (2, 12)]
    assert len({one.operation for one in master.asked}) == 3
    assert recording.count == 3


def test_what_could_not_be_noted_is_noted_with_the_next_under_the_same_operation():
    async def story(recording, _master):
        await add(recording, 0)
        assert recording.count == 0
        await add(recording, 1)

    recording, master = play(story, PeerError("no master"))
    assert master.noted == [(0, 10), (0, 10), (1, 11)]
    assert master.asked[0].operation == master.asked[1].operation
    assert recording.count == 2


def test_a_commit_waits_until_it_is_known_what_is_noted():
    async def story(recording, _master):
        await add(recording, 0)
        with pytest.raises(PeerError):
            await recording.settle()
        await recording.settle()

    recording, _ = play(story, PeerError("lost"), PeerError("still"))
    assert recording.count == 1


@pytest.mark.parametrize("refusal", [Conflict("too many"), NotEnoughShards("few", [])])
def test_an_upload_that_is_not_noted_goes_on_without(refusal):
    async def story(recording, _master):
        for place in range(3):
            await add(recording, place)
        await recording.settle()

    recording, master = play(story, refusal)
    assert (recording.count, len(master.asked)) == (0, 1)


def test_an_upload_that_was_taken_over_ends():
    async def story(recording, _master):
        await add(recording, 0)
        with pytest.raises(Conflict, match="taken over"):
            await add(recording, 1)

    recording, _ = play(story, None, Conflict("taken over"))
    assert recording.count == 1
