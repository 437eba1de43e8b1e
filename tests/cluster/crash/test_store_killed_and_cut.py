"""A process that is killed leaves its unflushed writes to the next one, and then the power goes."""

import random
from pathlib import Path

import powerloss
import pytest
from powerloss.disk import AllDropped, AllKept, Mixed
from powerloss.pools import Scratch, open_pool
from powerloss.verdict import PoolPromises, wrong_with_pool

SCRIPT = Path(powerloss.__file__).with_name("store_process.py")
AT_THE_END = 2**63


@pytest.fixture
def stored_after(record_scripts, tmp_path):
    """Let one process die somewhere and the next store two shards; return what a crash then leaves."""

    scratch = Scratch()

    def run(how):
        root = tmp_path / "root"
        root.mkdir()
        script = SCRIPT, root / "pool", tmp_path / "notes"
        recording = record_scripts(root, "pool", (*script, how), (*script, "stores"))
        promises = PoolPromises(recording.notes, "pool")
        assert len(promises.shards(AT_THE_END)) == 2
        lucks = [AllDropped(), AllKept(), *(Mixed(random.Random(seed)) for seed in range(8))]
        images = [recording.disk().after_crash(AT_THE_END, luck) for luck in lucks]
        pools = [open_pool(scratch.fill(image.below("pool"))) for image in images]
        return [wrong for pool in pools if (wrong := wrong_with_pool(pool, promises, AT_THE_END))]

    yield run
    scratch.close()


def test_a_shard_that_a_killed_process_wrote_is_flushed_before_it_is_acknowledged_again(stored_after):
    assert stored_after("writes-and-dies") == []


def test_folders_that_a_killed_process_made_are_flushed_before_shards_are_acknowledged_in_them(stored_after):
    assert stored_after("dies-among-new-folders") == []
