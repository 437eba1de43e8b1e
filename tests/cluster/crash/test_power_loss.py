"""The power goes, again and again, during a real run: what was acknowledged by then is there, and is whole.

A pool and a controller run under strace while files are put, overwritten, renamed and removed. From what they
asked of their disk their folders are rebuilt as a crash at each moment may leave them (`powerloss.disk`), and
opened by the real store and the real catalogue. docs/protocol.md says which step of the code each rests on.
"""

import itertools
import random
import re
from pathlib import Path

import powerloss
import pytest
from powerloss.catalogues import FILE, History
from powerloss.crashes import CONTROLLER, POOL, Crashes, Opened, moments
from powerloss.disk import AllKept, Flush, Mixed, Resize, Write
from powerloss.mutants import (
    flushed_at_checkpoints_only,
    promised_before_flushing,
    without_flushes,
    without_later_flushes,
)
from powerloss.verdict import CataloguePromises, PoolPromises

pytestmark = pytest.mark.slow

OPENING = Path(powerloss.__file__).with_name("opening_process.py")
EVERY = 12
"""Of the moments without a flush or a promise nearby so many are passed over for one that is looked at."""
MIXTURES = 1
SEED = 1


@pytest.fixture(scope="module")
def recording(recorded_run):
    return recorded_run[0]


@pytest.fixture(scope="module")
def opened(recorded_run):
    opened = Opened(History(recorded_run[2] / CONTROLLER / FILE))
    yield opened
    opened.close()


def test_the_recording_is_complete(recorded_run):
    """What the model rebuilds with everything kept is what lies there, byte for byte."""
    recording, _, folder = recorded_run
    final = recording.disk().after_crash(2**63, AllKept())
    for name in (POOL, CONTROLLER):
        rebuilt = final.below(name)
        real = {str(path.relative_to(folder / name)): path for path in (folder / name).rglob("*")}
        assert {path for path, file in real.items() if file.is_dir()} == rebuilt.folders
        assert {path for path, file in real.items() if file.is_file()} == rebuilt.files.keys()
        assert all(real[path].read_bytes() == data for path, data in rebuilt.files.items())


def test_the_recording_has_every_kind_of_change(recording):
    def done(kind, pattern):
        return sum(
            isinstance(operation, kind)
            and any(re.fullmatch(pattern, path) for path in recording.paths.get(operation.inode, ()))
            for operation in recording.operations
        )

    for database in (f"{POOL}/index.db", f"{CONTROLLER}/{FILE}"):
        assert done(Flush, f"{database}-wal") > 10
        assert done(Write, database) > 10, "no checkpoints"
        assert done(Flush, database) > 2
    assert done(Resize, f"{POOL}/index.db-wal"), "the log was never cut"
    assert done(Flush, f"{POOL}/large/[0-9a-f]+-?.*") > 5
    assert done(Resize, f"{POOL}/ballast") == 1
    removed = [
        change.name
        for operation in recording.disk().namings
        for change in operation.changes
        if change.inode is None and "-0" in change.name
    ]
    assert len(removed) >= 3, "no large shard was dropped"
    assert len({note.fields["boot_id"] for note in recording.notes if note.kind == "Announce"}) >= 3


def test_only_shared_memory_is_written_through_a_mapping(recording):
    """Such writes are no system calls: the recording would miss them."""
    assert recording.mapped == {f"{POOL}/index.db-shm", f"{CONTROLLER}/{FILE}-shm"}


def test_a_receipt_rests_on_what_pool_and_controller_had_promised_before(recorded_run, opened):
    """Client and strace read one clock. So what follows about promises holds for receipts."""
    recording, load, _ = recorded_run
    history = opened.history
    catalogue, pool = CataloguePromises(recording.notes, history), PoolPromises(recording.notes, POOL)
    assert len(load.receipts) > 40
    for moment, name, version in load.receipts:
        assert history.named(name, version) <= catalogue.revision(moment)
        assert history.shards_of(version, pool.number) <= pool.shards(moment).keys()


def test_whatever_was_acknowledged_before_the_power_went_is_whole(recording, opened):
    failures = Crashes(recording, opened).failures(moments(recording, EVERY), MIXTURES, SEED)
    assert list(itertools.islice(failures, 5)) == []


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_second_cut_while_all_is_opened_again_loses_nothing(
    recording, opened, record_scripts, tmp_path, share
):
    crashes = Crashes(recording, opened)
    every = moments(recording, EVERY)
    first = every[int(share * len(every))]
    root = tmp_path / "root"
    root.mkdir()
    image = crashes.image(first, Mixed(random.Random(SEED)))
    image.write(root)
    script = OPENING, root / POOL, root / CONTROLLER / FILE
    second = record_scripts(root, "opening", script, lying=image)
    assert list(itertools.islice(crashes.failures_of_second(second, first, EVERY), 5)) == []


MUTANTS = {
    "a large shard is not flushed before it has its name": (without_flushes, rf"{POOL}/incoming/\d+"),
    "the name of a large shard is not flushed": (without_flushes, rf"{POOL}/large/.."),
    "the folders of large shards are not flushed": (without_flushes, rf"{POOL}/large"),
    "the folder of a pool is not flushed": (without_flushes, POOL),
    "the names of the data folders are not flushed": (without_flushes, ""),
    "the records of a pool are not flushed": (without_flushes, rf"{POOL}/(pool|boot)\.json\.new"),
    "the index of a pool has synchronous=OFF": (without_flushes, rf"{POOL}/index\.db(-wal)?"),
    "the index of a pool has synchronous=NORMAL": (flushed_at_checkpoints_only, rf"{POOL}/index\.db"),
    "the index of a pool is not flushed at a checkpoint": (without_later_flushes, rf"{POOL}/index\.db"),
    "the catalogue has synchronous=OFF": (without_flushes, rf"{CONTROLLER}/{FILE}(-wal)?"),
    "the catalogue has synchronous=NORMAL": (flushed_at_checkpoints_only, rf"{CONTROLLER}/{FILE}"),
    "the catalogue is not flushed at a checkpoint": (without_later_flushes, rf"{CONTROLLER}/{FILE}"),
    "the folder of the catalogue is not flushed": (without_flushes, CONTROLLER),
    "a pool answers before it flushes": (promised_before_flushing, POOL),
    "a controller answers before it flushes": (promised_before_flushing, CONTROLLER),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_code_that_flushes_less_is_caught(recording, opened, mutant):
    change, what = MUTANTS[mutant]
    changed = change(recording, what)
    crashes = Crashes(changed, opened)
    failure = next(crashes.failures(moments(changed, EVERY), MIXTURES, SEED), None)
    assert failure is not None
    print(failure)
