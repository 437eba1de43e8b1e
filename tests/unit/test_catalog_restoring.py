"""A backup becomes the catalogue again: checked first, whole after a crash at any point, and a new history."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio

from droppexd.catalog import replacement, restoring
from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.copies import back_up, open_stopped_catalogue, read_facts
from droppexd.catalog.keys import OUTCOMES, SESSIONS, TOTALS
from droppexd.catalog.replacement import pending
from droppexd.catalog.restoring import TERMS_AHEAD, restore
from droppexd.catalog.sqlite import CATALOGUE_FILE, open_sqlite_engine
from droppexd.errors import CatalogError, Conflict, IdentityError
from droppexd.held import shard_key
from droppexd.model import MISSING, ExtentId, Holding, PoolRecord
from tests.unit.test_catalog_copies import POOLS, RUNTIME, Author, checked, fill


def run_catalogue(path, story=None):
    """Be the master of a catalogue for a while."""

    async def main():
        async with (
            open_sqlite_engine(path, RUNTIME) as engine,
            open_catalogue(engine, RUNTIME, delete_grace_s=0.0) as catalogue,
        ):
            return None if story is None else await story(catalogue)

    return trio.run(main)


def restored(path, backup, *, force=False):
    async def main():
        return await restore(path, backup, RUNTIME, force=force, progress=lambda _done, _total: None)

    return trio.run(main)


def facts_of(path):
    with open_stopped_catalogue(path) as connection:
        return read_facts(connection)


def keys_of(path, prefix):
    with open_stopped_catalogue(path) as connection:
        query = "SELECT key FROM kv WHERE substr(key, 1, 2) = ?"
        return [key for (key,) in connection.execute(query, (prefix,))]


@pytest.fixture
def path(tmp_path):
    """A catalogue with some of everything."""
    folder = tmp_path / "controller"
    folder.mkdir()

    async def story(catalogue):
        await fill(Author(catalogue, await catalogue.open_session("tcp://127.0.0.1:1", bytes(16))))

    run_catalogue(folder / CATALOGUE_FILE, story)
    return folder / CATALOGUE_FILE


@pytest.fixture
def backup(path, tmp_path):
    back_up(path, tmp_path / "backup", force=False, progress=lambda _done, _total: None)
    return tmp_path / "backup"


def files_in(folder):
    return {file.name for file in folder.iterdir()} - {f"{CATALOGUE_FILE}.lock"}


def test_a_restored_catalogue_has_the_files_and_a_history_of_its_own(path, backup):
    before = facts_of(backup)
    shutil.rmtree(path.parent)
    done = restored(path, backup)
    assert done.former is None
    assert files_in(path.parent) == {CATALOGUE_FILE}
    report = checked(path)
    assert report.sound, report.problems
    facts = report.facts
    assert facts == done.facts
    assert (facts.files, facts.size, facts.cluster_id) == (before.files, before.size, before.cluster_id)
    assert facts.incarnation != before.incarnation
    assert facts.term == before.term + TERMS_AHEAD
    assert facts.revision == before.revision + 1
    assert keys_of(path, SESSIONS) == keys_of(path, OUTCOMES) == []
    assert facts_of(backup) == before

    async def story(catalogue):
        assert catalogue.restored_ms == before.written_ms
        assert catalogue.term == facts.term + 1
        found = await catalogue.lookup("docs/copy")
        assert len(found.extents) == 3
        record = await catalogue.save_pool(
            PoolRecord(
                number=0, pool_id=b"n" * 16, name="new", machine="new", zone="", address="tcp://127.0.0.1:9"
            )
        )
        assert record.number > max(POOLS) + 100

    run_catalogue(path, story)


def test_a_catalogue_that_is_there_is_kept_with_its_log(path, backup):
    log = path.with_name(f"{CATALOGUE_FILE}-wal")

    async def story(catalogue):
        author = Author(catalogue, await catalogue.open_session("tcp://127.0.0.1:2", bytes(16)))
        await author.put("docs/later", 1000)
        return path.read_bytes(), log.read_bytes()

    content = run_catalogue(path, story)
    path.write_bytes(content[0])
    log.write_bytes(content[1])
    with pytest.raises(Conflict, match="--force"):
        restored(path, backup)
    assert (path.read_bytes(), log.read_bytes()) == content
    done = restored(path, backup, force=True)
    assert done.former == path.with_name(f"{CATALOGUE_FILE}.before-1")
    assert checked(done.former).records["files"] == 6
    assert checked(path).records["files"] == 5
    # The term that the former one had reached is left behind, and so it is by the next restore.
    assert done.facts.term == facts_of(done.former).term + TERMS_AHEAD
    again = restored(path, done.former, force=True)
    assert again.former == path.with_name(f"{CATALOGUE_FILE}.before-2")
    assert again.facts.term == done.facts.term + TERMS_AHEAD
    assert checked(path).records["files"] == 6


def test_a_damaged_catalogue_is_replaced_and_kept(path, backup):
    path.write_bytes(b"no longer what it was" * 300)
    with pytest.raises(CatalogError) as caught:
        run_catalogue(path)
    assert f"droppexd catalog restore BACKUP --force --data {path.parent}" in str(caught.value)
    assert "\n" not in str(caught.value)
    done = restored(path, backup, force=True)
    assert done.former.read_bytes().startswith(b"no longer")
    assert checked(path).sound


def test_a_backup_that_is_not_sound_changes_nothing(path, backup):
    with closing(sqlite3.connect(backup, isolation_level=None)) as connection:
        connection.execute("DELETE FROM kv WHERE key = ?", (TOTALS,))
    before = path.read_bytes()
    with pytest.raises(CatalogError, match="is not sound, and nothing was changed"):
        restored(path, backup, force=True)
    with pytest.raises(CatalogError, match="there is no catalogue"):
        restored(path, backup.with_name("nothing"), force=True)
    with pytest.raises(CatalogError, match="the catalogue itself"):
        restored(path, path, force=True)
    assert path.read_bytes() == before
    assert files_in(path.parent) == {CATALOGUE_FILE}


def test_a_catalogue_in_use_is_not_replaced(path, backup):
    async def main():
        async with open_sqlite_engine(path, RUNTIME):
            await restore(path, backup, RUNTIME, force=True, progress=lambda _done, _total: None)

    with pytest.raises(IdentityError, match="in use"):
        trio.run(main)


class Crash(BaseException):
    """The process is killed."""


class Steps:
    """Lets so many steps be done that change names in a folder, and then ends the process."""

    def __init__(self, monkeypatch):
        self.left = 10**6
        self.done = 0
        for name in ("rename", "replace"):
            monkeypatch.setattr(Path, name, self._counted(getattr(Path, name)))
        monkeypatch.setattr(replacement, "flush_folder", self._counted(replacement.flush_folder))

    def _counted(self, function):
        def step(*args):
            if not self.left:
                raise Crash
            self.left -= 1
            self.done += 1
            return function(*args)

        return step


def test_a_crash_at_any_step_leaves_the_old_one_or_the_new(path, backup, tmp_path, monkeypatch):
    async def story(catalogue):
        author = Author(catalogue, await catalogue.open_session("tcp://127.0.0.1:2", bytes(16)))
        await author.put("docs/later", 1000)
        return path.read_bytes(), Path(f"{path}-wal").read_bytes()

    content = run_catalogue(path, story)
    steps = Steps(monkeypatch)
    outcomes = []
    for crash_after in range(20):
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        path.write_bytes(content[0])
        Path(f"{path}-wal").write_bytes(content[1])
        steps.left, steps.done = crash_after, 0
        try:
            restored(path, backup, force=True)
        except Crash:
            ended = False
        else:
            ended = True
        steps.left = 10**6
        if pending(path).exists():
            with pytest.raises(CatalogError, match="broken off"):
                checked(path)

        async def look(catalogue):
            return catalogue.totals.files, catalogue.restored_ms is not None

        files, is_new = run_catalogue(path, look)
        outcomes.append(is_new)
        assert files == (5 if is_new else 6)
        if not is_new:
            assert checked(path).sound
            assert restored(path, backup, force=True).facts.files == 5
        former = path.with_name(f"{CATALOGUE_FILE}.before-1")
        assert checked(former).records["files"] == 6
        assert files_in(path.parent) - {f"{former.name}-wal"} == {CATALOGUE_FILE, former.name}
        if ended:
            break
    assert ended
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False
    assert outcomes.count(True) > 3


def test_a_prepared_copy_of_a_killed_restore_is_in_nobodys_way(path, backup, monkeypatch):
    def killed(*_):
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(restoring, "commit_replacement", killed)
        patched.setattr(restoring, "remove_prepared", lambda _: None)
        with pytest.raises(Crash):
            restored(path, backup, force=True)
    assert f"{CATALOGUE_FILE}.preparing" in files_in(path.parent)
    assert checked(path).records["files"] == 5
    run_catalogue(path)
    restored(path, backup, force=True)
    assert files_in(path.parent) == {CATALOGUE_FILE, f"{CATALOGUE_FILE}.before-1"}


# -- the mark --------------------------------------------------------------------------------------


def at(pool, *shards):
    return {shard_key(extent, shard): 1 for extent, shard in shards} if pool else {}


def test_while_the_mark_is_set_nothing_is_dead_that_a_record_knows(path, backup):
    restored(path, backup, force=True)

    async def story(catalogue):
        (extent,) = (await catalogue.lookup("docs/moved")).extents
        (degraded,) = (await catalogue.lookup("docs/degraded")).extents
        assert extent.pools == POOLS
        # Shard 0 is pool 1's; pool 6 has it, and what it has by the record, shard 5, it lacks.
        held = at(6, (extent.id, 0), (degraded.id, 5))
        stretch = await catalogue.reconcile(6, None, held, last=True)
        assert stretch.drop == []
        assert (extent.id, 5, 0) in stretch.absent
        assert stretch.wanted == []  # It stands in the record with another shard still.
        await catalogue.lose_shards(6, [(extent.id, 5, False)])
        stretch = await catalogue.reconcile(6, None, held, last=True)
        assert stretch.wanted == [(extent.id, 0, 1)]
        # Pool 1 was compared, and has it: pool 6's is kept, and not wanted.
        stretch = await catalogue.reconcile(6, None, held, last=True, compared={1})
        assert (stretch.wanted, stretch.drop) == ([], [])
        assert await catalogue.review(6, [Holding(extent.id, 0, 1)]) == []
        # What is of no record and of a session of the lost history is nobody's to judge.
        stranger = ExtentId(extent.id.session, extent.id.counter + 1000)
        stretch = await catalogue.reconcile(6, None, at(6, (stranger, 0)), last=True)
        assert [holding.extent for holding in stretch.unknown] == [stranger]

        boot = catalogue.pools[6].boot_id
        start = catalogue.ruling >> 32
        assert await catalogue.place_shards(6, boot, [(extent.id, 0, 1)]) == []
        assert (await catalogue.lookup("docs/moved")).extents[0].pools == (6, 2, 3, 4, 5, MISSING)
        await catalogue.end_restore()
        assert catalogue.restored_ms is None
        assert catalogue.ruling >> 32 not in (0, start)
        stretch = await catalogue.reconcile(1, None, at(1, (extent.id, 0)), last=True)
        assert [holding.extent for holding in stretch.drop] == [extent.id]
        assert len(await catalogue.review(1, [Holding(extent.id, 0, 1)])) == 1

    run_catalogue(path, story)
    assert checked(path).sound


def test_the_mark_outlives_a_start_until_it_is_taken_away(path, backup):
    restored(path, backup, force=True)

    async def look(catalogue):
        return catalogue.restored_ms is not None

    assert run_catalogue(path, look)
    assert run_catalogue(path, look)
    run_catalogue(path, lambda catalogue: catalogue.end_restore())
    assert not run_catalogue(path, look)
    assert checked(path).sound


def test_all_pools_confirm_what_dies_while_the_mark_is_set(path, backup):
    restored(path, backup, force=True)

    async def story(catalogue):
        author = Author(catalogue, await catalogue.open_session("tcp://127.0.0.1:2", bytes(16)))
        _, extents = await author.put("docs/new", 1000, pools=(1, 2, 3, 4, 5, MISSING))
        await catalogue.remove(author.operation(), "docs/new", Expected())
        return [extents[0].id in await catalogue.garbage(pool, None, 100) for pool in POOLS]

    assert run_catalogue(path, story) == [True] * 6
