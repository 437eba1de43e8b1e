"""Moments that a load seldom meets: a process is killed and then the power goes, a damaged shard is replaced."""

import random
from pathlib import Path

import powerloss
import pytest
from powerloss.crashes import moments
from powerloss.disk import AllDropped, AllKept, Mixed
from powerloss.pools import Scratch, open_pool
from powerloss.verdict import PoolPromises, wrong_with_pool

SCRIPT = Path(powerloss.__file__).with_name("store_process.py")
AT_THE_END = 2**63


@pytest.fixture
def recorded_store(record_scripts, tmp_path):
    """Run processes with a store one after another, each of which dies as it is told to."""

    def run(*ways):
        root = tmp_path / "root"
        root.mkdir()
        scripts = [(SCRIPT, root / "pool", tmp_path / "notes", how) for how in ways]
        return record_scripts(root, "pool", *scripts)

    return run


@pytest.fixture
def after_crash():
    """Return what the store finds after a crash, with all dropped, all kept, and some mixtures."""
    scratch = Scratch()

    def open_each(recording, moment, mixtures=8):
        disk = recording.disk()
        lucks = [AllDropped(), AllKept(), *(Mixed(random.Random(seed)) for seed in range(mixtures))]
        images = [disk.after_crash(moment, luck).below("pool") for luck in lucks]
        return [open_pool(scratch.fill(image)) for image in images]

    yield open_each
    scratch.close()


@pytest.fixture
def lost_after(recorded_store, after_crash):
    """Let one process die somewhere and the next store two shards; return what a crash then takes."""

    def run(how):
        recording = recorded_store(how, "stores")
        promises = PoolPromises(recording.notes, "pool")
        assert len(promises.shards(AT_THE_END)) == 2
        pools = after_crash(recording, AT_THE_END)
        return [wrong for pool in pools if (wrong := wrong_with_pool(pool, promises, AT_THE_END))]

    return run


def test_a_shard_that_a_killed_process_wrote_is_flushed_before_it_is_acknowledged_again(lost_after):
    assert lost_after("writes-and-dies") == []


def test_folders_that_a_killed_process_made_are_flushed_before_shards_are_acknowledged_in_them(lost_after):
    assert lost_after("dies-among-new-folders") == []


@pytest.mark.slow
def test_while_a_damaged_shard_is_replaced_there_is_always_one_of_the_two(recorded_store, after_crash):
    recording = recorded_store("replaces")
    promises = PoolPromises(recording.notes, "pool")
    *_, stored, small_replaced, large_replaced = [note.moment for note in recording.notes]
    small, large = (note.fields["extent"] for note in recording.notes[-2:])
    for moment in moments(recording, 1):
        if moment <= stored:
            continue
        for pool in after_crash(recording, moment, mixtures=2):
            assert pool.shards.keys() | pool.broken.keys() == {(small, 0), (large, 0)}
            if moment >= small_replaced:
                assert pool.shards[small, 0] == promises.shards(small_replaced)[small, 0]
            if moment >= large_replaced:
                assert pool.shards[large, 0] == promises.shards(large_replaced)[large, 0]
