"""Local files as `droppex` reads and writes them: trees to walk, targets that appear whole or not at all."""

import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from droppexd.cli.exits import ReaderGone, UsageError
from droppexd.errors import Conflict
from droppexd.model import Metadata

TEMPORARY_PREFIX = ".droppex-get-"
TEMPORARY_SUFFIX = ".part"
"""What an unfinished get is called. One that is left over (kill -9, power loss) may be deleted."""

MTIME_KEY = "mtime"
MODE_KEY = "mode"

_NANOSECONDS = 1_000_000_000
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class WholeFile(io.FileIO):
    """An unbuffered file whose reads and writes are short only at the end of the file."""

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer`; return less than its length only at the end of the file."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            count = super().readinto(view[done:])
            if not count:
                break
            done += count
        return done

    def read(self, size: int | None = -1, /) -> bytes:
        """Return `size` bytes, or all that is left."""
        if size is None or size < 0:
            return super().readall()
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.readinto(buffer)])

    def write(self, data: Any, /) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += super().write(view[done:])
        return done


class StandardOutput(WholeFile):
    """Standard output for a file's bytes; raises ReaderGone when nobody reads any more."""

    def __init__(self) -> None:
        super().__init__(1, "wb", closefd=False)

    def write(self, data: Any, /) -> int:
        """Write all of `data`."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise ReaderGone from None


def standard_input() -> BinaryIO:
    """Return standard input for a file's bytes."""
    return WholeFile(0, "rb", closefd=False)


# -- sources ---------------------------------------------------------------------------------------


class Source(NamedTuple):
    """An opened local file that is about to be stored."""

    stream: BinaryIO
    size: int | None
    """None for what is no regular file: it is read to its end, once."""
    metadata: Metadata


def open_source(path: str) -> Source:
    """Open a local file to store it. Raise OSError, and UsageError for a folder."""
    stream = WholeFile(path, "rb")
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode):
        return Source(stream, None, ())
    return Source(stream, status.st_size, file_metadata(status))


def file_metadata(status: os.stat_result) -> Metadata:
    """Return the pairs that travel with a file: its last change (seconds since 1970), its mode (octal)."""
    sign = "-" if status.st_mtime_ns < 0 else ""
    seconds, rest = divmod(abs(status.st_mtime_ns), _NANOSECONDS)
    return ((MTIME_KEY, f"{sign}{seconds}.{rest:09d}"), (MODE_KEY, f"{stat.S_IMODE(status.st_mode):o}"))


def metadata_mtime_ns(metadata: Metadata) -> int | None:
    """Return the time of the last change that `file_metadata` noted; None when there is none to trust."""
    text = _value_of(metadata, MTIME_KEY)
    digits = text.removeprefix("-")
    seconds, _, rest = digits.partition(".")
    if not (seconds.isascii() and seconds.isdigit() and len(seconds) <= 11):
        return None
    if rest and not (rest.isascii() and rest.isdigit() and len(rest) <= 9):
        return None
    nanoseconds = int(seconds) * _NANOSECONDS + int(rest.ljust(9, "0"))
    return -nanoseconds if text != digits else nanoseconds


def metadata_mode(metadata: Metadata) -> int | None:
    """Return the permissions that `file_metadata` noted, without set-uid, set-gid and sticky bits."""
    text = _value_of(metadata, MODE_KEY)
    if not 1 <= len(text) <= 6 or not set(text) <= set("01234567"):
        return None
    return int(text, 8) & 0o777


def _value_of(metadata: Metadata, wanted: str) -> str:
    return next((value for key, value in metadata if key == wanted), "")


class Found(NamedTuple):
    """A file of a walked tree: where it is, and its path below the tree with slashes."""

    path: str
    relative: str
    size: int


def walk_files(folder: str, skipped: Callable[[str, str], None]) -> Iterator[Found]:
    """Yield every regular file below `folder`, in the order of the names.

    Links and special files are not followed: `skipped(path, why)` hears of them, and of folders that
    cannot be read.
    """
    waiting = [(folder, "")]
    while waiting:
        path, relative = waiting.pop()
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            skipped(path, error.strerror or str(error))
            continue
        folders = []
        for entry in entries:
            below = f"{relative}{entry.name}"
            if entry.is_symlink():
                skipped(entry.path, "a symbolic link")
            elif entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, f"{below}/"))
            elif entry.is_file(follow_symlinks=False):
                yield Found(entry.path, below, _size_of(entry))
            else:
                skipped(entry.path, "not a regular file")
        waiting.extend(reversed(folders))


def _size_of(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return 0  # It vanished; opening it will say so.


# -- targets ---------------------------------------------------------------------------------------


class NewFile:
    """A local file under a temporary name in its folder, until `commit` gives it its own."""

    def __init__(self, folder: int, temporary: str, name: str, path: str, stream: WholeFile) -> None:
        self.stream = stream
        self.path = path
        self._folder = folder
        self._temporary = temporary
        self._name = name

    def restart(self) -> None:
        """Forget what was written."""
        self.stream.seek(0)
        self.stream.truncate()

    def commit(self, *, force: bool, mode: int, mtime_ns: int | None) -> tuple[int, int]:
        """Give the file its name, permissions and time of change; return its device and inode.

        Raise Conflict when the name is taken: without `force` by anything, with it by a folder or device.
        """
        descriptor = self.stream.fileno()
        os.fchmod(descriptor, mode)
        if mtime_ns is not None:
            # A time that this file system cannot hold is no reason to lose the bytes.
            with suppress(OSError, OverflowError):
                os.utime(descriptor, ns=(mtime_ns, mtime_ns))
        status = os.fstat(descriptor)
        self.stream.close()
        if force:
            refuse_taken(self._folder, self._name, self.path, force=True)
            os.replace(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        else:
            self._link()
        return status.st_dev, status.st_ino

    def _link(self) -> None:
        """Give the file its name only if that is free, in one step where the file system has hard links."""
        try:
            os.link(
                self._temporary,
                self._name,
                src_dir_fd=self._folder,
                dst_dir_fd=self._folder,
                follow_symlinks=False,
            )
        except FileExistsError:
            raise _taken(self.path) from None
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            refuse_taken(self._folder, self._name, self.path, force=False)
            os.rename(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)


def _taken(path: str) -> Conflict:
    return Conflict(f"{path} exists; --force replaces it")


def refuse_taken(folder: int, name: str, path: str, *, force: bool) -> os.stat_result | None:
    """Raise Conflict when a new file may not take this name in the opened folder; return what it replaces."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not force:
        raise _taken(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        raise Conflict(f"{path} is no regular file and is not replaced")
    return status


@contextmanager
def new_file(folder: int, name: str, path: str) -> Iterator[NewFile]:
    """Make a file in an opened folder; without a `commit` nothing of it is left.

    `path` is what people are told.
    """
    temporary = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        with WholeFile(descriptor, "wb") as stream:
            yield NewFile(folder, temporary, name, path, stream)
    finally:
        with suppress(FileNotFoundError):  # It has its name by now.
            os.unlink(temporary, dir_fd=folder)


@contextmanager
def opened_folder(path: str) -> Iterator[int]:
    """Open a folder that the user named; links in the path are the user's own."""
    descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def opened_subfolder(root: int, parts: Sequence[str], path: str) -> Iterator[int]:
    """Open the folder `parts` below an opened one, making what is missing.

    No link is followed on the way, so that nothing in the tree leads outside it: raise Conflict for a link
    or a file in the way. `path` is what people are told.
    """
    folder = os.dup(root)
    try:
        for part in parts:
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=folder)
            folder = _descend(folder, part, path)
        yield folder
    finally:
        os.close(folder)


def _descend(folder: int, part: str, path: str) -> int:
    """Return the opened folder `part` in `folder`, which is closed unless this raises."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        below = os.open(part, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Conflict(f"{path}: {part!r} on the way is a link or a file, not a folder") from None
        raise
    os.close(folder)
    return below


def make_folder(path: str) -> None:
    """Make a folder that the user named, and those above it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise Conflict(f"{path} exists and is not a folder") from None


def is_stream(path: str) -> bool:
    """Return whether reading this path may wait for somebody: a pipe, a terminal, a device."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_folder(path: str) -> bool:
    """Return whether this is a folder, or a link to one."""
    return Path(path).is_dir()


def regular_size(path: str) -> int | None:
    """Return the bytes of a regular file; None for anything else."""
    try:
        status = Path(path).stat()
    except OSError:
        return None  # Opening it says why.
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def refuse_folder(path: str) -> None:
    """Raise UsageError when a path that should be one file is a folder."""
    if Path(path).is_dir():
        raise UsageError(f"{path} is a folder: use -r")


def current_umask() -> int:
    """Return the permissions that this process withholds. Call it while there is one thread."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
