"""What the doctor makes of data folders."""

import os

import pytest

from droppexd.doctor.disks import (
    FlushSpeed,
    Folder,
    Mount,
    judge_folder,
    look_at_folder,
    measure_flush,
    mount_of,
    read_mounts,
)
from droppexd.model import Role
from droppexd.store.files import Files, Space

GIB = 1024**3
FAST = FlushSpeed(4000.0, 300e6)


def folder(tmp_path, **changes):
    disk = Mount("/", "ext4", read_only=False)
    return Folder(tmp_path, tmp_path, "", disk, 100 * GIB, 50 * GIB, FAST)._replace(**changes)


def ticking(step_s):
    ticks = iter(range(10**6))
    return lambda: next(ticks) * step_s


class Disk(Files):
    """A disk that counts its flushes, and may be as good as full, or fail."""

    def __init__(self, free=10 * GIB, failure=None):
        self.flushed = 0
        self._free = free
        self._failure = failure

    def fdatasync(self, fd):
        self.flushed += 1
        if self._failure is not None:
            raise self._failure

    def space(self, folder):
        return Space(100 * GIB, self._free)


# -- looking ---------------------------------------------------------------------------------------


def test_each_small_write_is_flushed_and_nothing_is_left_behind(tmp_path):
    disk = Disk()
    speed = measure_flush(tmp_path, ticking(0.1), room_bytes=GIB, files=disk)
    # Half a second for either, at a tenth a look at the clock.
    assert disk.flushed == 10
    assert speed.flushes_per_s == pytest.approx(10)
    assert speed.bytes_per_s == pytest.approx(40 * 1024 * 1024)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_bounded_however_fast_the_disk_is(tmp_path):
    disk = Disk()
    measure_flush(tmp_path, lambda: 0.0, room_bytes=GIB, files=disk)
    assert disk.flushed == 32 * 1024 // 4 + 32 // 4


def test_a_disk_that_is_nearly_full_is_not_written_to(tmp_path):
    disk = Disk()
    assert measure_flush(tmp_path, ticking(1), room_bytes=1024 * 1024, files=disk) is None
    assert disk.flushed == 0
    assert list(tmp_path.iterdir()) == []


def test_a_flush_that_fails_is_told_of_and_leaves_nothing_behind(tmp_path):
    seen = look_at_folder(tmp_path, ticking(1), Disk(failure=OSError(5, "Input/output error")))
    assert (seen.failure, seen.flush) == ("Input/output error", None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_looked_at_whole(tmp_path):
    (tmp_path / "mine").write_text("x")
    seen = look_at_folder(tmp_path, ticking(0.3), Disk())
    assert (seen.path, seen.looked_at, seen.failure) == (tmp_path, tmp_path, "")
    assert (seen.capacity, seen.free) == (100 * GIB, 10 * GIB)
    assert seen.flush is not None
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_of_a_folder_that_is_not_there_yet_what_is_above_it_is_looked_at(tmp_path):
    seen = look_at_folder(tmp_path / "a" / "b", ticking(1))
    assert (seen.looked_at, seen.failure, seen.flush) == (tmp_path, "", None)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_told_of(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in look_at_folder(tmp_path / "file" / "data", ticking(1)).failure
    assert look_at_folder(tmp_path / "file", ticking(1)).failure == "Not a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_told_of(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    assert look_at_folder(tmp_path / "theirs", ticking(1)).failure == "Permission denied"
    assert look_at_folder(tmp_path / "theirs" / "data", ticking(1)).failure


def test_mounts_are_read_as_the_kernel_writes_them(tmp_path):
    file = tmp_path / "mountinfo"
    file.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:40 / /srv/my\\040disk ro,relatime - xfs /dev/sdb1 rw\n"
        "41 22 0:41 / /srv/failed rw - ext4 /dev/sdc1 ro,errors=remount-ro\n"
        "nonsense\n"
        "42 22 0:42 / /srv/over rw - tmpfs tmpfs rw\n"
        "43 22 0:43 / /srv/over rw - nfs4 nas:/export rw\n"
    )
    mounts = read_mounts(file)
    found = {place: mount_of(tmp_path.__class__(place), mounts) for place in (
        "/srv/my disk/pool", "/srv/failed", "/srv/over/pool", "/srv/overlap", "/home"
    )}  # fmt: skip
    assert {place: (mount.kind, mount.read_only) for place, mount in found.items()} == {
        "/srv/my disk/pool": ("xfs", True),
        "/srv/failed": ("ext4", True),
        "/srv/over/pool": ("nfs4", False),
        "/srv/overlap": ("ext4", False),
        "/home": ("ext4", False),
    }
    assert read_mounts(tmp_path / "nowhere") == []
    assert mount_of(tmp_path, []) is None


# -- judging ---------------------------------------------------------------------------------------


def test_a_good_folder_is_a_line_and_its_speed_another(tmp_path):
    disk, flush = judge_folder(Role.POOL, folder(tmp_path), GIB)
    assert (disk.check, disk.level, disk.subject) == ("disk", "ok", str(tmp_path))
    assert "50.0 GiB free of 100.0 GiB, ext4" in disk.text
    assert (flush.check, flush.level) == ("flush", "ok")
    assert "4000 small writes a second" in flush.text
    assert "300 MB/s" in flush.text


@pytest.mark.parametrize("speed", [FlushSpeed(20.0, 300e6), FlushSpeed(4000.0, 5e6)])
def test_a_slow_disk_is_a_warning(tmp_path, speed):
    disk, flush = judge_folder(Role.POOL, folder(tmp_path, flush=speed), GIB)
    assert (disk.level, flush.level) == ("ok", "warning")
    assert "that is slow" in flush.text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("tmpfs", "in memory"),
        ("overlay", "container"),
        ("nfs4", "another machine"),
        ("fuse.sshfs", "machine"),
    ],
)
def test_file_systems_that_keep_less_than_a_disk_are_warned_of(tmp_path, kind, said):
    mount = Mount("/", kind, read_only=False)
    disk, _ = judge_folder(Role.POOL, folder(tmp_path, mount=mount), GIB)
    assert disk.level == "warning"
    assert said in disk.text
    assert disk.advice


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "fuse.mergerfs"])
def test_disks_are_not_warned_of(tmp_path, kind):
    mount = Mount("/", kind, read_only=False)
    assert {one.level for one in judge_folder(Role.POOL, folder(tmp_path, mount=mount), GIB)} == {"ok"}


def test_a_read_only_disk_is_one_error_and_says_where(tmp_path):
    mount = Mount("/srv", "ext4", read_only=True)
    seen = folder(tmp_path, mount=mount, failure="Read-only file system", flush=None)
    (verdict,) = judge_folder(Role.POOL, seen, GIB)
    assert verdict.level == "error"
    assert "mounted read-only, at /srv" in verdict.text


def test_a_folder_that_cannot_be_written_says_to_whom_to_give_it(tmp_path):
    (verdict,) = judge_folder(Role.POOL, folder(tmp_path, failure="Permission denied", flush=None), GIB)
    assert verdict.level == "error"
    assert str(tmp_path) in verdict.advice
    full = folder(tmp_path, failure=os.strerror(28), free=0, flush=None)
    assert "make room" in judge_folder(Role.CONTROLLER, full, 0)[0].advice


@pytest.mark.parametrize(
    ("role", "free", "level"),
    [
        (Role.POOL, 20 * GIB, "ok"),
        (Role.POOL, 14 * GIB, "warning"),
        (Role.POOL, 10 * GIB, "error"),
        (Role.CONTROLLER, 2 * GIB, "ok"),
        (Role.CONTROLLER, GIB // 2, "warning"),
    ],
)
def test_a_pool_keeps_its_reserve_and_a_catalogue_needs_room(tmp_path, role, free, level):
    disk, _ = judge_folder(role, folder(tmp_path, free=free), 10 * GIB)
    assert disk.level == level


def test_a_folder_that_the_first_start_makes_is_no_fault(tmp_path):
    seen = folder(tmp_path / "data", looked_at=tmp_path, flush=None)
    (verdict,) = judge_folder(Role.POOL, seen, GIB)
    assert verdict.level == "ok"
    assert f"first start, in {tmp_path}" in verdict.text
