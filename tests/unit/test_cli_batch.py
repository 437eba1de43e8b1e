"""Many transfers side by side."""

import io
from typing import NamedTuple

import pytest
import trio
from trio.testing import MockClock

from droppexd.cli.client_batch import AT_ONCE, LARGE_AT_ONCE, LARGE_SIZE, MOST_UNREACHABLE, run_batch
from droppexd.cli.render import Output
from droppexd.errors import NotFound, PeerError


class Item(NamedTuple):
    label: str
    size: int | None = 1


def run(items, work):
    stderr = io.StringIO()

    async def listed():
        for item in items:
            yield item

    async def main():
        return await run_batch(listed(), work, Output(quiet=False, as_json=False, stderr=stderr))

    return trio.run(main, clock=MockClock(autojump_threshold=0)), stderr.getvalue()


@pytest.mark.parametrize(
    ("size", "most"), [(1, AT_ONCE), (LARGE_SIZE + 1, LARGE_AT_ONCE), (None, LARGE_AT_ONCE)]
)
def test_so_many_are_under_way_at_once_and_no_more(size, most):
    now = highest = 0

    async def work(item):
        nonlocal now, highest
        now += 1
        highest = max(highest, now)
        await trio.sleep(1)
        now -= 1

    batch, _ = run([Item(str(number), size) for number in range(3 * AT_ONCE)], work)
    assert highest == most
    assert (batch.done, batch.failed, batch.exit_code) == (3 * AT_ONCE, 0, 0)


def test_a_failure_is_told_in_one_line_and_the_others_go_on():
    async def work(item):
        if item.label == "2":
            raise ExceptionGroup("", [NotFound("no\nsuch file")])
        if item.label == "3":
            raise FileNotFoundError(2, "No such file or directory", "3")

    batch, told = run([Item(str(number)) for number in range(5)], work)
    assert (batch.done, batch.failed, batch.exit_code) == (3, 2, 1)
    assert sorted(line.split(":")[1] for line in told.splitlines()) == [" 2", " 3"]


def test_a_single_transfer_decides_the_exit_code():
    async def work(item):
        raise NotFound("x")

    batch, _ = run([Item("1")], work)
    assert batch.exit_code == 3
    batch, _ = run([], work)
    assert batch.exit_code == 0


def test_a_cluster_that_is_gone_ends_the_batch():
    begun = 0

    async def work(item):
        nonlocal begun
        begun += 1
        await trio.sleep(30)
        raise PeerError("not reachable")

    with pytest.RaisesGroup(pytest.RaisesExc(PeerError, match="gave up")):
        run([Item(str(number)) for number in range(1000)], work)
    assert begun <= MOST_UNREACHABLE + AT_ONCE


def test_now_and_then_unreachable_does_not_end_the_batch():
    async def work(item):
        if int(item.label) % 2:
            raise PeerError("not reachable")

    batch, _ = run([Item(str(number)) for number in range(10 * MOST_UNREACHABLE)], work)
    assert batch.done == batch.failed == 5 * MOST_UNREACHABLE


def test_a_bug_ends_the_batch():
    async def work(item):
        raise KeyError(item.label)

    with pytest.RaisesGroup(KeyError, flatten_subgroups=True):
        run([Item("1")], work)
