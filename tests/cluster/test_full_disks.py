"""Disks without room under real processes: small file systems, filled by the cluster or by somebody else."""

import io
import itertools
import os
import re
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from droppexd.cli.exits import ExitCode
from droppexd.errors import DroppexError, NotEnoughShards
from droppexd.model import CHUNK_SIZE, DISK_FULL, Layout
from droppexd.placement import usable_space

MEBIBYTE = 1024 * 1024
FILLER = "of-somebody-else"
MOST_PUTS = 40
PATIENCE_S = 150.0
SMALL = 4000
LAYOUT = Layout(2, 2)
VICTIM = "pool-1"
QUICK = {"heartbeat": "300ms", "down_after": "4s", "delete_grace": "1s", "replace_after": "1h"}
AUTO = {"reserve": "auto"}


# -- disks -----------------------------------------------------------------------------------------


@contextmanager
def small_disk(place, mebibytes):
    """A file system of that size at `place`. Raise OSError where that cannot be had."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def disks():
    """Skip, and say why, where no small file system can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount the small disks of this test")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder) / "probe", 1):
                pass
        except OSError as error:
            pytest.skip(f"this system lets nobody mount a small disk: {error}")
    return small_disk


def fill(place):
    """Write a file until its disk has not one byte left; return it. What is there already grows."""
    path = place / FILLER
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (MEBIBYTE, 4096, 1):
            with suppress(OSError):
                while os.write(descriptor, bytes(size)):
                    pass
    finally:
        os.close(descriptor)
    assert os.statvfs(place).f_bavail == 0
    return path


# -- clusters on such disks ------------------------------------------------------------------------


def on_machines_of_their_own(cluster):
    """As pools are: those on another machine than the controller's keep a copy of its log as well."""
    for pool in cluster.pools:
        pool.options += ["--machine", f"machine-of-{pool.name}"]


def check_all(cluster, files):
    """Every byte is right, and no other name is there."""

    async def read(client):
        for name, data in files.items():
            assert await client.get_bytes(name) == data, name

    cluster.run(read)
    assert sorted(cluster.names()) == sorted(files)


def check_one_line(done, *wanted):
    """What a command said is one line for people with these words in it."""
    lines = done.stderr.strip().splitlines()
    assert len([line for line in lines if not line.startswith("  ")]) == 1, done.stderr
    for words in wanted:
        assert words in lines[0], done.stderr


def state_of(cluster, *names):
    """Return in which states pools are, all of them without names."""
    return {str(pool.state) for pool in cluster.status().pools if not names or pool.name in names}


def full_pools(cluster):
    return sum(pool.trouble == DISK_FULL for pool in cluster.status().pools)


def unfinished(cluster):
    return [path for pool in cluster.pools for path in pool.unfinished()]


def puts_again(cluster, name, data, **options):
    """Return a condition: a put is taken. Pools that failed a moment ago get nothing for a while."""

    def put():
        try:
            return cluster.put(name, data, **options)
        except DroppexError:
            return None

    return put


def put_full(cluster, content, size, files):
    """Put files of this size until one is refused for want of room."""
    for number in itertools.count():
        name, data = f"full/{size}-{number}", content(size, len(files))
        try:
            cluster.put(name, data)
        except NotEnoughShards:
            break
        files[name] = data


def refused_at_once(cluster):
    """Return what is said of a put that is refused before anything is sent."""
    done = cluster.droppex("put", "file", "full/more", code=ExitCode.NOT_ENOUGH_SHARDS)
    return None if "; trying for " in done.stderr else done


@pytest.mark.slow
def test_a_cluster_is_put_full_and_a_delete_makes_room(new_cluster, disks, content, wait_until, tmp_path):
    with ExitStack() as mounts:
        for number in range(1, 5):
            mounts.enter_context(disks(tmp_path / f"pool-{number}", 32))
        with new_cluster(
            pools=4, folder=tmp_path, controller=QUICK, pool=AUTO, prepare=on_machines_of_their_own
        ) as cluster:
            files = {"full/small": content(SMALL)}
            cluster.put("full/small", files["full/small"])
            put_full(cluster, content, 2 * CHUNK_SIZE + 12_345, files)
            wait_until(lambda: not unfinished(cluster), "what did not fit is still there")
            put_full(cluster, content, CHUNK_SIZE // 8, files)
            # A last one that has room is of no use alone; whether there is one may still be on its way.
            wait_until(lambda: full_pools(cluster) >= 3, "the pools do not say that they are full")
            (tmp_path / "file").write_bytes(content(CHUNK_SIZE))
            done = wait_until(lambda: refused_at_once(cluster), "the app does not hear that pools are full")
            check_one_line(done, "pools are full (delete files or add a pool)")

            check_all(cluster, files)
            wait_until(lambda: not unfinished(cluster), "what did not fit is still there")
            told = cluster.droppex("status", "--check", code=1).stdout
            assert told.count("takes no writes: its disk is full") >= 3
            status = cluster.status()
            assert (status.files, status.size) == (len(files), sum(map(len, files.values())))

            doomed = [name for name in files if name != "full/small"][::2]
            cluster.droppex("rm", doomed[0])
            del files[doomed.pop(0)]
            remove_all(cluster, doomed, files, wait_until)
            data = content(CHUNK_SIZE, 77)
            wait_until(puts_again(cluster, "full/again", data), "nothing can be put after a delete")
            check_all(cluster, files | {"full/again": data})


# -- one pool, filled by somebody else ---------------------------------------------------------------


def put_some(cluster, content, folder, count):
    """Put large and small files; return them."""
    files = {}
    for number in range(count):
        large, small = f"{folder}/large-{number}", f"{folder}/small-{number}"
        files |= {large: content(CHUNK_SIZE // 2, number), small: content(SMALL, 1000 + number)}
        cluster.put(large, files[large], layout=LAYOUT)
        cluster.put(small, files[small])
    return files


def held_by(cluster, pool, files):
    return [name for name in files if pool in {place.name for place in places_of(cluster, [name])}]


def places_of(cluster, names):
    described = [cluster.describe(name) for name in names]
    return [place for one in described for extent in one.extents for place in extent.shards]


def is_whole(cluster, files):
    """Whether all shards of all files are on pools that can be read."""
    return all(place.state in ("up", "read-only") for place in places_of(cluster, files))


def remove_all(cluster, names, files, wait_until):
    """Remove files, and see that all pools have dropped what they had of them."""
    for name in names:
        cluster.remove(name)
        del files[name]
    wait_until(lambda: not cluster.status().garbage, "not every pool drops what was removed")


@pytest.mark.slow
def test_a_pool_without_a_byte_left_serves_drops_and_starts(
    new_cluster, disks, content, wait_until, tmp_path
):
    with ExitStack() as mounts:
        for number in range(1, 7):
            mounts.enter_context(disks(tmp_path / f"pool-{number}", 128))
        with new_cluster(pools=6, folder=tmp_path, controller=QUICK, pool=AUTO) as cluster:
            pool = cluster.pool(VICTIM)
            files = put_some(cluster, content, "before", 20)
            filler = fill(pool.data)
            wait_until(lambda: state_of(cluster, VICTIM) == {"read-only"}, "the pool is not full")
            for told in (cluster.droppex("status", "--check", code=1), cluster.droppex("pools")):
                assert re.search(rf"{VICTIM}.* takes no writes: its disk is full", told.stdout), told.stdout
            check_all(cluster, files)

            files |= put_some(cluster, content, "meanwhile", 4)
            check_all(cluster, files)
            assert not held_by(cluster, VICTIM, [name for name in files if name.startswith("meanwhile")])

            mine = held_by(cluster, VICTIM, files)
            large = [name for name in mine if "large" in name]
            small = [name for name in mine if "small" in name]
            assert len(large) >= 4
            assert len(small) >= 2
            remove_all(cluster, [small.pop()], files, wait_until)
            fill(pool.data)
            remove_all(cluster, [large.pop(), small.pop()], files, wait_until)

            for _ in range(2):
                fill(pool.data)
                pool.restart()
                wait_until(lambda: state_of(cluster, VICTIM) == {"read-only"}, "the pool is not back")
            fill(pool.data)
            check_all(cluster, files)
            remove_all(cluster, [large.pop(), large.pop()], files, wait_until)

            lost = cluster.pool("pool-2")
            lost.kill()
            wait_until(lambda: state_of(cluster, lost.name) == {"down"}, "the pool is not down")
            cluster.droppex("pools", "replace", lost.name, "--yes")
            fill(pool.data)
            before = {name for name in files if name not in held_by(cluster, VICTIM, files)}
            wait_until(lambda: is_whole(cluster, files), "what was lost is not rebuilt")
            assert not before & set(held_by(cluster, VICTIM, files))
            check_all(cluster, files)

            filler.unlink()
            wait_until(lambda: state_of(cluster, VICTIM) == {"up"}, "the pool takes no shards again")
            names = (f"after/{number}" for number in itertools.count())

            def gets_shards():
                name = next(names)
                files[name] = content(SMALL)
                cluster.put(name, files[name])
                return held_by(cluster, VICTIM, [name])

            wait_until(gets_shards, "nothing is put on the pool that has room again")
            check_all(cluster, files)


# -- the controller ----------------------------------------------------------------------------------


def fill_catalogue(cluster, content, filler_place, files):
    """Put small files while somebody else takes what room there is, until one is refused; return what was said."""
    for number in range(MOST_PUTS):
        fill(filler_place)
        name, data = f"meanwhile/{number}", content(SMALL, 100 + number)
        (cluster.folder / "file").write_bytes(data)
        done = cluster.droppex("put", "file", name, code=None)
        if done.returncode:
            return done
        files[name] = data
    return pytest.fail("a controller with a full disk goes on to take files")


@pytest.mark.slow
def test_a_controller_without_a_byte_left_reads_deletes_and_starts(
    new_cluster, disks, content, wait_until, tmp_path
):
    place = tmp_path / "controller"
    with disks(place, 64), new_cluster(pools=3, folder=tmp_path, controller=QUICK) as cluster:
        files = {f"docs/{number}": content(SMALL, number) for number in range(12)}
        for name, data in files.items():
            cluster.put(name, data)
        done = fill_catalogue(cluster, content, place, files)
        assert done.returncode == ExitCode.FAILURE
        check_one_line(done, "is full: nothing is added", "make room on the controller's disk")
        check_all(cluster, files)
        check_one_line(cluster.droppex("cp", "docs/0", "docs/copy", code=ExitCode.FAILURE), "is full")
        told = cluster.droppex("status", "--check", code=1).stdout
        assert re.search("needs a person: the controller controller: .* is full: nothing is added", told)
        assert cluster.status().files == len(files)

        fill(place)
        remove_all(cluster, ["docs/1", "docs/2"], files, wait_until)
        cluster.droppex("mv", "docs/3", "docs/moved")
        files["docs/moved"] = files.pop("docs/3")
        fill(place)
        cluster.controller.restart()
        cluster.wait_until_up()
        check_all(cluster, files)
        fill(place)
        remove_all(cluster, ["docs/4"], files, wait_until)
        check_all(cluster, files)

        (place / FILLER).unlink()
        files["docs/after"] = content(SMALL, 77)
        wait_until(puts_again(cluster, "docs/after", files["docs/after"]), "it does not go on by itself")
        wait_until(lambda: cluster.droppex("status", "--check", code=None).returncode == 0, "it warns still")
        check_all(cluster, files)


@pytest.mark.slow
def test_a_controller_that_has_no_room_to_begin_waits_for_it(
    new_cluster, disks, content, wait_until, tmp_path
):
    """Without the ballast, which somebody took away, it keeps what it has, and begins when there is room."""
    place = tmp_path / "controller"
    with disks(place, 64), new_cluster(pools=3, folder=tmp_path, controller=QUICK) as cluster:
        files = {"docs/1": content(SMALL)}
        cluster.put("docs/1", files["docs/1"])
        controller = cluster.controller
        controller.kill()
        (place / "ballast").unlink()
        fill(place)
        controller.spawn()
        wait_until(lambda: "No space left on device" in controller.log.read_text(), "it does not say why")
        assert controller.running
        (place / FILLER).unlink()
        controller.wait_until_ready()
        cluster.wait_until_up()
        files["docs/2"] = content(SMALL, 2)
        cluster.put("docs/2", files["docs/2"])
        check_all(cluster, files)


@pytest.mark.slow
def test_a_standby_without_room_is_named_and_what_waits_for_it_goes_on_once_it_has_some(
    new_cluster, disks, content, wait_until, tmp_path
):
    place = tmp_path / "controller-2"
    with disks(place, 64), new_cluster(pools=3, folder=tmp_path, controller=QUICK, controllers=2) as cluster:
        files = {"docs/1": content(SMALL), "docs/2": content(SMALL, 2)}
        cluster.put("docs/1", files["docs/1"])
        standby = cluster.controller_processes[1]
        standby.kill()
        (place / "ballast").unlink()
        standby.start()
        fill(place)
        (tmp_path / "file").write_bytes(files["docs/2"])
        with cluster.start_droppex("put", "file", "docs/2") as put:
            wait_until(
                lambda: "is full" in cluster.droppex("controllers").stdout, "nobody says which is full"
            )
            (place / FILLER).unlink()
            assert put.wait(PATIENCE_S) == 0
        check_all(cluster, files)
        assert all(process.running for process in cluster.processes)


# -- pools of all sizes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_pools_of_all_sizes_fill_in_proportion_until_the_cluster_is_full(
    new_cluster, disks, content, tmp_path
):
    sizes = {"pool-1": 24, "pool-2": 24, "pool-3": 160, "pool-4": 160, "pool-5": 160}
    with ExitStack() as mounts:
        for name, mebibytes in sizes.items():
            mounts.enter_context(disks(tmp_path / name, mebibytes))
        with new_cluster(pools=len(sizes), folder=tmp_path, controller=QUICK, pool=AUTO) as cluster:
            layout = Layout(2, 1)
            room = usable_space(cluster.status().pools, layout)
            data = content(CHUNK_SIZE // 4)
            stored, pools = cluster.run(lambda client: put_while_taken(client, data, layout, room))
            assert stored >= 0.9 * room, (stored, room)
            # How evenly is for tests of placement alone: of so few shards a small pool's share is by chance.
            assert all(pool.writable and pool.shards for pool in pools), pools
            assert len(cluster.names()) == stored // len(data)


async def put_while_taken(client, data, layout, room):
    """Put copies of a file until one is refused.

    Return how many bytes were stored, and how the pools were when a third of the room was taken.
    """
    pools = ()
    for number in itertools.count():
        stored = number * len(data)
        if not pools and stored >= room / 3:
            await trio.sleep(1)  # A heartbeat or two, which tell what is free.
            pools = (await client.status()).status.pools
        try:
            await client.put_file(f"full/{number}", io.BytesIO(data), size=len(data), layout=layout)
        except NotEnoughShards:
            break
    return stored, pools
