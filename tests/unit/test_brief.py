"""Work is done at once while it is brief, and in a thread while it is not."""

import os
import threading

import pytest
import trio

from droppexd.brief import BRIEF_S, SLOW_S, STRIKES, BriefWork
from droppexd.daemon import thread_waits
from droppexd.runtime import Runtime


class Machine:
    """A clock that work moves on, and threads that count."""

    def __init__(self):
        self.time = 100.0
        self.threads = 0
        self.waited = 0
        self.work = BriefWork(
            Runtime(clock=self, entropy=None, run_blocking=self.run_blocking, waits=lambda: self.waited)
        )

    def now(self):
        return self.time

    async def run_blocking(self, function, *args):
        self.threads += 1
        return function(*args)

    def take(self, seconds):
        self.time += seconds
        self.waited += 1
        return seconds

    def compute(self, seconds):
        self.time += seconds
        return seconds

    def run(self, seconds, work=None):
        return trio.run(self.work.run, work or self.take, seconds)


def test_brief_work_takes_no_thread():
    machine = Machine()
    assert [machine.run(BRIEF_S / 2) for _ in range(10)] == [BRIEF_S / 2] * 10
    assert machine.threads == 0


def test_one_long_call_may_be_the_processors_doing():
    machine = Machine()
    for seconds in [2 * BRIEF_S, 2 * BRIEF_S, BRIEF_S / 2] * 5:
        machine.run(seconds)
    assert machine.threads == 0


def test_work_that_takes_long_again_and_again_goes_to_a_thread_for_a_while():
    machine = Machine()
    for _ in range(STRIKES):
        assert machine.work.brief
        machine.run(2 * BRIEF_S)
    assert not machine.work.brief
    machine.run(BRIEF_S / 2)
    assert machine.threads == 1
    machine.take(SLOW_S)
    machine.run(BRIEF_S / 2)
    assert machine.threads == 1


def test_long_work_that_never_waits_stays_where_it_is():
    machine = Machine()
    for _ in range(5 * STRIKES):
        machine.run(2 * BRIEF_S, machine.compute)
    assert machine.work.brief
    assert machine.threads == 0


def test_without_a_count_of_waits_time_alone_decides():
    machine = Machine()
    work = BriefWork(Runtime(clock=machine, entropy=None, run_blocking=machine.run_blocking))
    for _ in range(STRIKES):
        assert work.brief
        work.now(machine.compute, 2 * BRIEF_S)
    assert not work.brief


def test_the_system_counts_the_waits_of_a_thread():
    before = thread_waits()
    reader, writer = os.pipe()
    timer = threading.Timer(0.01, os.write, (writer, b"x"))
    timer.start()
    os.read(reader, 1)
    timer.join()
    os.close(reader)
    os.close(writer)
    assert thread_waits() > before


def test_a_disk_that_stays_slow_holds_the_loop_up_once_a_while():
    machine = Machine()
    for _ in range(STRIKES):
        machine.run(2 * BRIEF_S)
    machine.take(SLOW_S)
    machine.run(2 * BRIEF_S)
    assert not machine.work.brief


def test_work_that_fails_late_counts_as_slow_too():
    machine = Machine()

    def fail():
        machine.take(1)
        raise ValueError("broken")

    for _ in range(STRIKES):
        with pytest.raises(ValueError, match="broken"):
            machine.work.now(fail)
    assert not machine.work.brief
