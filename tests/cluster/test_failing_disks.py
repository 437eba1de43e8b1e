"""Disks that fail under real pools: the system makes them read-only, a flush fails, nothing can be read.

The disk that fails is an ext4 on a loop device whose bytes are in memory. With those sealed, or cut short, the
kernel meets the errors of a worn out disk, and the pool meets what the kernel makes of them.
"""

import fcntl
import io
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from droppexd.errors import DroppexError
from droppexd.model import CHUNK_SIZE, MISSING, Layout, PoolState

DISK_BYTES = 160 * 1024 * 1024
LAYOUT = Layout(2, 2)
LARGE, SMALL = CHUNK_SIZE + 12_345, 4000
QUICK = {"heartbeat": "300ms", "down_after": "4s", "delete_grace": "1s", "replace_after": "1h"}
POOLS = 5
VICTIM = "pool-1"
MOST_FILES = 40


# -- disks -----------------------------------------------------------------------------------------


def system(*command):
    """Run a command of the system; raise OSError with what it says when it fails."""
    if shutil.which(command[0]) is None:
        raise OSError(f"there is no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


class Disk:
    """A disk of its own at `place`."""

    def __init__(self, place, device, content):
        self._place = place
        self._device = device
        self._content = content

    def settle(self):
        """Have all that was written on the disk, as it is some time after."""
        system("sync", "--file-system", str(self._place))

    def turn_read_only(self):
        """Let the kernel find an error in the file system: with errors=remount-ro it takes no writes then."""
        Path(f"/sys/fs/ext4/{Path(self._device).name}/trigger_fs_error").write_text("1")

    def fail_writes(self):
        """Let nothing reach the disk any more: a write is taken, and its flush is an EIO."""
        fcntl.fcntl(self._content, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)

    def fail(self):
        """Let nothing be read or written any more: EIO, apart from what the system has in memory."""
        files = [path for path in self._place.rglob("*") if path.is_file()]
        self.settle()
        os.ftruncate(self._content, 4096)
        fcntl.fcntl(self._content, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
        for path in files:
            with suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def mounted_disk(place):
    """A new disk at `place`. Raise OSError where that cannot be had."""
    place.mkdir(exist_ok=True)
    with ExitStack() as cleaning:
        content = os.memfd_create("disk", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        cleaning.callback(os.close, content)
        os.ftruncate(content, DISK_BYTES)
        device = system("losetup", "--find", "--show", f"/proc/{os.getpid()}/fd/{content}")
        cleaning.callback(system, "losetup", "--detach", device)
        system("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        system("mount", "-t", "ext4", "-o", "errors=remount-ro", device, str(place))
        cleaning.callback(system, "umount", str(place))
        yield Disk(place, device, content)


@contextmanager
def mounted_memory(place):
    """A file system of that size that never fails, for the other pools: a pool gets shards by its size."""
    place.mkdir()
    system("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place))
    try:
        yield
    finally:
        system("umount", str(place))


@pytest.fixture(scope="module")
def disks():
    """Skip, and say why, where no disk can be made that fails."""
    if os.geteuid() != 0:
        pytest.skip("only root may make the disks of this test")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "probe"
        try:
            with mounted_disk(place) as disk:
                disk.turn_read_only()
        except OSError as error:
            pytest.skip(f"this system makes no disk that fails: {error}")
    return mounted_disk


# -- a cluster with one such disk ------------------------------------------------------------------


def places_of(cluster, names):
    described = [cluster.describe(name) for name in names]
    return [place for one in described for extent in one.extents for place in extent.shards]


def is_whole_without(cluster, files, pool):
    """Whether all shards of all files are on other pools, which are up."""
    try:
        places = places_of(cluster, files)
    except DroppexError:
        return False
    return all(
        place.pool != MISSING and place.name != pool and place.state == PoolState.UP for place in places
    )


def state_of(cluster, name):
    """Return the state of a pool; None while that cannot be told."""
    try:
        pools = cluster.status().pools
    except DroppexError:
        return None
    return next((pool.state for pool in pools if pool.name == name), None)


def put_until_all_kinds_are_on(cluster, content, pool):
    """Put files until this pool has a data shard of a large one and of a small one; return all of them."""
    files = {}

    async def put(client):
        for size, layout, k in ((LARGE, LAYOUT, LAYOUT.k), (SMALL, None, 1)):
            for number in range(MOST_FILES):
                name, data = f"docs/{size}-{number}", content(size, len(files))
                await client.put_file(name, io.BytesIO(data), size=size, layout=layout)
                files[name] = data
                (extent,) = (await client.describe(name)).extents
                if any(shard.name == pool and shard.index < k for shard in extent.shards):
                    break
            else:
                pytest.fail(f"{pool} gets no data of files of {size} bytes")

    cluster.run(put)
    return files


def use(cluster, files, content, event):
    """Let clients put and get while something happens; no put and no get fails. Return all files."""
    added = {}

    async def go_on(client):
        async def put(count, event=None):
            for number in range(count):
                size = LARGE if len(added) % 2 else SMALL
                name, data = f"docs/later-{len(added)}", content(size, 100 + len(added))
                layout = LAYOUT if size == LARGE else None
                if event is not None and number == count // 2:
                    nursery.start_soon(trio.to_thread.run_sync, event)
                await client.put_file(name, io.BytesIO(data), size=len(data), layout=layout)
                added[name] = data

        async def get():
            while True:
                for name, data in [*files.items(), *added.items()]:
                    assert await client.get_bytes(name) == data, name

        async with trio.open_nursery() as readers:
            readers.start_soon(get)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(put, 6, event)
            await put(6)
            readers.cancel_scope.cancel()

    cluster.run(go_on)
    return files | added


def check_all(cluster, files):
    """Every byte is right."""

    async def read(client):
        for name, data in files.items():
            assert await client.get_bytes(name) == data, name

    cluster.run(read)


def check_that_it_is_told(cluster, pool, wait_until, reason):
    """The pool that failed runs, and everybody says what is the matter with it."""
    wait_until(lambda: state_of(cluster, pool.name) == PoolState.READ_ONLY, "the pool is not read-only")
    told = cluster.droppex("status", "--check", code=1).stdout
    (problem,) = re.findall(rf"needs a person: pool {pool.name} \(.*\) takes no writes: (.*)", told)
    assert re.match(f"its disk failed: {reason}", problem), problem
    table = cluster.droppex("pools").stdout
    assert re.search(rf"\b{pool.name} .* read-only ", table), table
    assert f"{pool.name} takes no writes: {problem}" in table
    assert pool.running
    assert pool.log.read_text().count("this pool takes no more writes") == 1


def check_that_it_can_be_replaced(cluster, pool, files, content, wait_until, exchange):
    """What was on the failed disk is on others by now; a person gives the pool up and puts in a new disk."""
    assert "is up: stop it first" in cluster.droppex("pools", "replace", pool.name, "--yes", code=4).stderr
    assert pool.terminate() == 0
    exchange()
    wait_until(lambda: state_of(cluster, pool.name) == PoolState.DOWN, "the pool is not down")
    assert "is given up: 0 shards" in cluster.droppex("pools", "replace", pool.name, "--yes").stdout
    pool.start()
    cluster.wait_until_up()
    assert "all is well" in cluster.droppex("status", "--check").stdout
    check_all(cluster, files)

    numbers = itertools.count()

    def gets_shards():
        name = f"docs/new-{next(numbers)}"
        cluster.put(name, content(LARGE))  # 3+2 takes all five pools, once the app has the new map.
        return pool.name in {place.name for place in places_of(cluster, [name])}

    wait_until(gets_shards, "nothing is put on the new disk")


def check_that_it_does_not_start(pool):
    """On its failed disk the pool says so in a line and ends."""
    pool.spawn()
    with pytest.raises(AssertionError, match="did not start"):
        pool.wait_until_ready()
    assert pool.wait() != 0
    assert str(pool.data) in pool.log.read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["turn_read_only", "fail_writes", "fail"])
def test_a_disk_that_fails_under_a_pool_takes_nobody_with_it(
    new_cluster, disks, content, wait_until, tmp_path, failure
):
    place = tmp_path / VICTIM
    with ExitStack() as mounts:
        for number in range(2, POOLS + 1):
            mounts.enter_context(mounted_memory(tmp_path / f"pool-{number}"))
        old = mounts.enter_context(ExitStack())
        disk = old.enter_context(disks(place))

        def exchange():
            check_that_it_does_not_start(pool)
            old.close()
            mounts.enter_context(disks(place))

        with new_cluster(pools=POOLS, folder=tmp_path, controller=QUICK) as cluster:
            pool = cluster.pool(VICTIM)
            files = put_until_all_kinds_are_on(cluster, content, VICTIM)
            disk.settle()
            files = use(cluster, files, content, getattr(disk, failure))
            check_that_it_is_told(cluster, pool, wait_until, ".* failed ")
            wait_until(lambda: is_whole_without(cluster, files, VICTIM), "its shards were not moved")
            check_all(cluster, files)
            check_that_it_can_be_replaced(cluster, pool, files, content, wait_until, exchange)


# -- a place on the disk that cannot be read -------------------------------------------------------


@contextmanager
def unreadable(pool, path, wait_until):
    """Let each read of this file be an EIO for a pool that runs, also after it was written anew."""
    command = ["strace", "-f", "-q", "-p", str(pool.pid), "-P", str(path)]
    command += ["-e", "trace=pread64", "-e", "inject=pread64:error=EIO", "-o", os.devnull]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as strace:
        try:
            wait_until(lambda: strace.poll() is not None or is_traced(pool.pid), "strace does not begin")
            if strace.poll() is not None:
                pytest.skip(f"strace may not trace here: {strace.stderr.read().strip()}")
            yield
        finally:
            strace.terminate()


def is_traced(pid):
    tasks = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/status")]
    return not any("TracerPid:\t0\n" in task for task in tasks)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_pool_that_cannot_read_back_what_it_rebuilt_gets_no_more(new_cluster, content, wait_until):
    with new_cluster(pools=POOLS, controller=QUICK) as cluster:
        files = {f"docs/{number}": content(LARGE + number, number) for number in range(4)}
        for name, data in files.items():
            cluster.put(name, data, layout=LAYOUT)
        pool, path = cluster.holders("docs/0")[0], cluster.shard_files("docs/0")[0]
        with unreadable(pool, path, wait_until):
            files = use(cluster, files, content, lambda: None)
            check_that_it_is_told(cluster, pool, wait_until, "reading back .*Input/output error")
            wait_until(lambda: is_whole_without(cluster, files, pool.name), "its shards were not moved")
            check_all(cluster, files)
        check_that_it_can_be_replaced(
            cluster, pool, files, content, wait_until, lambda: shutil.rmtree(pool.data)
        )
