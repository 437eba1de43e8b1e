"""The controller's disk is lost and a backup of the catalogue restored, in a cluster that went on meanwhile."""

import json
import shutil
import threading

import pytest

from droppexd.errors import DroppexError, NotEnoughShards
from droppexd.model import CHUNK_SIZE, MISSING, PoolState

LARGE = 2 * CHUNK_SIZE + 12_345

QUICK = {"heartbeat": "500ms", "down_after": "4s", "delete_grace": "1s", "replace_after": "6s"}


def is_whole(cluster, names):
    """Whether every extent of these files has all of its shards on pools that are up."""
    try:
        described = [cluster.describe(name) for name in names]
    except DroppexError:
        return False
    places = [place for one in described for extent in one.extents for place in extent.shards]
    return all(place.pool != MISSING and place.state == PoolState.UP for place in places)


def is_mended(cluster, names):
    repair = cluster.status().repair
    return not repair.left and not repair.moving and repair.balanced and is_whole(cluster, names)


def adopted(cluster, names):
    """Adopt what is still listed of these: a pool may seem to be away while the machine is busy."""
    listed = {one["name"]: one["version"] for one in json.loads(cluster.droppex("orphans", "--json").stdout)}
    left = [listed[name] for name in names if name in listed]
    return not left or cluster.droppex("orphans", "adopt", *left, code=None).returncode == 0


def is_restored(cluster):
    """Whether the mark of the restore is still set."""
    try:
        return any("was restored from a backup" in warning for warning in cluster.status().warnings)
    except DroppexError:
        return True


def check_all(cluster, files):
    """Every byte is right."""

    async def read(client):
        for name, data in files.items():
            assert await client.get_bytes(name) == data, name

    cluster.run(read)


class Load:
    """Puts small files until it is told to stop."""

    def __init__(self, cluster):
        self._cluster = cluster
        self._stop = threading.Event()
        self.done = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def _run(self):
        number = 0
        while not self._stop.is_set():
            name = f"load/{number}"
            self._cluster.put(name, b"%d" % number * 1000)
            self.done.append(name)
            number += 1

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


@pytest.mark.slow
def test_a_backup_made_under_load_brings_everything_back(
    new_cluster, content, wait_until, droppexd, tmp_path
):
    backup = tmp_path / "backup"
    with new_cluster(pools=7, controller=QUICK) as cluster:
        files = {f"docs/large-{n}": content(LARGE + n, n) for n in range(3)}
        files |= {f"docs/small-{n}": content(4000 + n, 10 + n) for n in range(3)}
        for name, data in files.items():
            cluster.put(name, data)
        data = cluster.controller.data
        with Load(cluster) as load:
            wait_until(lambda: len(load.done) >= 3, "nothing is put")
            before = list(load.done)
            made = json.loads(droppexd("catalog", "backup", backup, "--data", data, "--json", code=0).stdout)
            wait_until(lambda: len(load.done) >= len(before) + 3, "nothing is put any more")
        assert made["files"] >= len(files) + len(before)
        files |= {f"load/{number}": b"%d" % number * 1000 for number in range(len(before))}
        droppexd("catalog", "check", backup, code=0)

        # What the backup does not know: files, a removed one, and where the shards of a lost pool went.
        later = {"later/large": content(LARGE, 77), "later/small": content(5000, 78)}
        for name, stored in later.items():
            cluster.put(name, stored)
        shards = cluster.shard_files("docs/large-2")
        cluster.remove("docs/large-2")
        gone = files.pop("docs/large-2")
        wait_until(lambda: not any(file.exists() for file in shards), "removed, and not dropped")
        lost = cluster.holders("docs/large-0")[0]
        lost.kill()
        shutil.rmtree(lost.data)
        wait_until(lambda: any(pool.state == PoolState.OUT for pool in cluster.status().pools), "not out")
        wait_until(lambda: is_mended(cluster, files), "not rebuilt")

        cluster.controller.kill()
        shutil.rmtree(data)
        restored = json.loads(droppexd("catalog", "restore", backup, "--data", data, "--json", code=0).stdout)
        assert restored["incarnation"] != made["incarnation"]
        assert restored["files"] == made["files"]
        cluster.controller.start()
        wait_until(lambda: cluster.droppex("status", code=None).returncode == 0, "no status")
        assert is_restored(cluster)
        assert "was restored from a backup" in cluster.droppex("status", "--check", code=1).stdout
        cluster.droppex("pools", "replace", lost.name, "--yes", "--force")
        wait_until(lambda: not is_restored(cluster), "the pools do not compare")
        wait_until(lambda: is_whole(cluster, files), "not rebuilt")
        check_all(cluster, files)

        # What was removed since is listed again, and status tells the truth about it.
        with pytest.raises(NotEnoughShards):
            cluster.get("docs/large-2")
        assert any("cannot be read now" in warning for warning in cluster.status().warnings)
        cluster.remove("docs/large-2")

        wait_until(lambda: cluster.status().quarantined, "nothing is quarantined")
        listed = json.loads(cluster.droppex("orphans", "--json").stdout)
        versions = {orphan["name"]: orphan["version"] for orphan in listed}
        assert set(later) <= set(versions)
        assert not set(files) & set(versions)
        wait_until(lambda: adopted(cluster, later), "not adopted")
        check_all(cluster, {f"lost+found/{name}": stored for name, stored in later.items()})
        cluster.droppex("orphans", "drop", "--all", "--yes", code=None)
        cluster.put("docs/large-2", gone)
        check_all(cluster, files | {"docs/large-2": gone})
        assert cluster.controller.terminate() == 0
        droppexd("catalog", "check", "--data", data, code=0)


def test_a_damaged_catalogue_is_refused_in_one_line_that_says_how_to_go_back(new_cluster, droppexd, tmp_path):
    backup = tmp_path / "backup"
    with new_cluster(pools=3, controller=QUICK) as cluster:
        cluster.put("docs/a", b"kept")
        data = cluster.controller.data
        droppexd("catalog", "backup", backup, "--data", data, code=0)
        assert cluster.controller.terminate() == 0
        catalogue = data / "catalogue.sqlite"
        catalogue.write_bytes(b"no longer what it was" * 300)
        refused = droppexd("--role", "controller", "--data", data, code=1)
        (line,) = [one for one in refused.stderr.splitlines() if one.startswith("droppexd: ")]
        assert f"droppexd catalog restore BACKUP --force --data {data}" in line
        droppexd("catalog", "restore", backup, "--data", data, code=1)
        told = droppexd("catalog", "restore", backup, "--data", data, "--force", code=0).stdout
        assert "catalogue.sqlite.before-1" in told
        cluster.controller.start()
        cluster.wait_until_up()
        assert cluster.get("docs/a") == b"kept"
