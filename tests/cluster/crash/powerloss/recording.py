"""From traced calls to what was asked of the disk below one folder, and what the processes noted meanwhile."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from powerloss.disk import ROOT, AllKept, Change, Disk, Flush, Naming, Resize, Write
from powerloss.strace import Call, text_of

_UNKNOWN = frozenset(
    ("link", "linkat", "symlink", "symlinkat", "rmdir", "truncate", "copy_file_range", "sendfile", "splice")
)
_EVERYTHING = frozenset(("sync", "syncfs"))

LAID = 2
"""The moment at which what lies there before a recording is safe."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a traced process wrote into its file of notes, and when it did."""

    moment: int
    process: str
    kind: str
    fields: dict


@dataclass(slots=True)
class Recording:
    """Everything that was asked of the disk below the root, and the notes."""

    operations: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    folders: set = field(default_factory=lambda: {ROOT})
    paths: dict = field(default_factory=dict)
    """Every path that an inode ever had, by inode."""
    mapped: set = field(default_factory=set)
    """Paths of files that were mapped for shared writing."""

    def disk(self):
        return Disk(self.operations, self.folders)

    def final(self):
        """Return the tree as the processes left it."""
        return self.disk().after_crash(max(operation.ended for operation in self.operations), AllKept())


def record(traces, root, notes, lying=None):
    """Return the recording of several traces, which run in one time.

    `traces` maps a name to lists of calls, one list a process that was traced: one after another, or at once.
    `notes` is the name of the file that a process of that name writes its notes to. `lying` is the image that
    lay in `root` before, safe.
    """
    player = _Player(root)
    if lying is not None:
        player.lay(lying)
    events = []
    for name, runs in traces.items():
        for calls in runs:
            process = _Process(name, calls, notes(name))
            # A descriptor is free as soon as it is being closed, and open once it is returned.
            events += [
                (call.began if call.name.startswith("close") else call.ended, process, call) for call in calls
            ]
    events.sort(key=lambda event: event[0])
    for _, process, call in events:
        player.play(process, call)
    return player.recording


class _Process:
    """One traced process with its threads, and what its descriptors are."""

    def __init__(self, name, calls, notes):
        self.name = name
        self.notes = str(notes)
        self.open = {}
        self.children = {
            call.result
            for call in calls
            if call.name in ("fork", "vfork")
            or (call.name in ("clone", "clone3") and "CLONE_FILES" not in call.arguments)
        }


_NOTES = object()


class _Player:
    def __init__(self, root):
        self.recording = Recording()
        self._root = f"{root}/"
        self._tree = {ROOT: {}}
        self._inodes = itertools.count(ROOT + 1)

    def lay(self, image):
        """Put a tree there, flushed, before everything else."""
        before = Call(thread=0, name="", arguments="", began=1, ended=1, result=0)
        for path in sorted(image.folders):
            folder, name, _ = self._find(path)
            self._make_folder(before, folder, name)
        for path, data in image.files.items():
            folder, name, _ = self._find(path)
            inode = self._make(before, folder, name)
            self._note(Write(began=1, ended=1, inode=inode, offset=0, data=data))
        for inode in (ROOT, *self.recording.paths):
            self._note(Flush(began=LAID, ended=LAID, inode=inode))

    def play(self, process, call):
        if call.thread in process.children:
            # A helper program that was started and ended: it has no business in here.
            assert not any(self._inside(text) for text in _strings(call)), f"a child touches the disk: {call}"
            return
        handler = getattr(self, f"_{call.name}", None)
        if handler is not None:
            handler(process, call, call.split())
        elif call.name in _EVERYTHING:
            raise AssertionError(f"{call.name} flushes everything; the model does not know it")
        elif call.name in _UNKNOWN:
            named = any(self._inside(text) for text in _strings(call))
            numbers = {int(part) for part in call.split() if part.isdecimal()}
            if named or numbers & process.open.keys():
                raise AssertionError(f"the model does not know {call}")

    # -- descriptors -------------------------------------------------------------------------------

    def _openat(self, process, call, arguments):
        if call.result is None or call.result < 0:
            return
        process.open.pop(call.result, None)
        path = text_of(arguments[1]).decode(errors="surrogateescape")
        if path == process.notes:
            process.open[call.result] = _NOTES
            return
        assert path.startswith("/") or "AT_FDCWD" in arguments[0], f"relative to a folder: {path}"
        if f"{path}/" == self._root:
            process.open[call.result] = ROOT
            return
        if not self._inside(path):
            return
        folder, name, inode = self._find(path)
        if inode is None and "O_CREAT" in arguments[2]:
            inode = self._make(call, folder, name)
        elif inode is not None and "O_TRUNC" in arguments[2]:
            self._note(Resize(began=call.began, ended=call.ended, inode=inode, length=0))
        if inode is not None:
            process.open[call.result] = inode

    def _close(self, process, _call, arguments):
        process.open.pop(int(arguments[0]), None)

    def _close_range(self, process, _call, arguments):
        first, last = int(arguments[0]), int(arguments[1])
        for descriptor in [descriptor for descriptor in process.open if first <= descriptor <= last]:
            del process.open[descriptor]

    def _dup(self, process, call, arguments):
        self._alias(process, int(arguments[0]), call.result)

    _dup2 = _dup3 = _dup

    def _fcntl(self, process, call, arguments):
        if arguments[1].startswith("F_DUPFD"):
            self._alias(process, int(arguments[0]), call.result)

    def _alias(self, process, old, new):
        process.open.pop(new, None)
        if old in process.open and new is not None and new >= 0:
            process.open[new] = process.open[old]

    # -- content -----------------------------------------------------------------------------------

    def _pwrite64(self, process, call, arguments):
        inode = process.open.get(int(arguments[0]))
        if inode is not None:
            data = text_of(arguments[1])
            data = data if call.result is None else data[: max(0, call.result)]
            offset = int(arguments[3])
            self._note(Write(began=call.began, ended=call.ended, inode=inode, offset=offset, data=data))

    def _write(self, process, call, arguments):
        inode = process.open.get(int(arguments[0]))
        if inode is _NOTES:
            for line in text_of(arguments[1]).splitlines():
                kind, fields = json.loads(line)
                self.recording.notes.append(Note(call.began, process.name, kind, fields))
        else:
            assert inode is None, f"the model knows no position of a descriptor: {call.name} to {inode}"

    _writev = _pwritev = _pwritev2 = _write

    def _ftruncate(self, process, call, arguments):
        inode = process.open.get(int(arguments[0]))
        if inode is not None and call.result == 0:
            length = int(arguments[1])
            self._note(Resize(began=call.began, ended=call.ended, inode=inode, length=length))

    def _fallocate(self, process, call, arguments):
        inode = process.open.get(int(arguments[0]))
        if inode is not None and call.result == 0:
            assert arguments[1] == "0", f"the model does not know {call}"
            length = int(arguments[2]) + int(arguments[3])
            self._note(Resize(began=call.began, ended=call.ended, inode=inode, length=length, only_grow=True))

    def _fsync(self, process, call, arguments):
        inode = process.open.get(int(arguments[0]))
        if inode is not None and call.result is not None:
            assert call.result == 0, f"a flush failed: {call}"
            self._note(Flush(began=call.began, ended=call.ended, inode=inode))

    _fdatasync = _fsync

    def _mmap(self, process, _call, arguments):
        if arguments[4].lstrip("-").isdecimal() and int(arguments[4]) in process.open:
            inode = process.open[int(arguments[4])]
            if "PROT_WRITE" in arguments[2] and "MAP_SHARED" in arguments[3]:
                self.recording.mapped |= self.recording.paths[inode]

    # -- names -------------------------------------------------------------------------------------

    def _mkdir(self, _process, call, arguments):
        path = text_of(arguments[0]).decode(errors="surrogateescape")
        if self._inside(path) and call.result == 0:
            folder, name, _ = self._find(path)
            self._make_folder(call, folder, name)

    def _rename(self, _process, call, arguments):
        source, target = (text_of(part).decode(errors="surrogateescape") for part in arguments)
        if call.result != 0 or not (self._inside(source) or self._inside(target)):
            return
        folder, name, inode = self._find(source)
        assert inode is not None, f"renamed and never made: {source}"
        target_folder, target_name, _ = self._find(target)
        self._name(call, Change(target_folder, target_name, inode), Change(folder, name, None))

    def _unlink(self, _process, call, arguments):
        path = text_of(arguments[0]).decode(errors="surrogateescape")
        if self._inside(path) and call.result == 0:
            folder, name, _ = self._find(path)
            self._name(call, Change(folder, name, None))

    def _renameat2(self, *_):
        raise AssertionError("the model does not know renameat")

    _renameat = _mkdirat = _unlinkat = _open = _creat = _renameat2

    # -- the tree as it is now ---------------------------------------------------------------------

    def _inside(self, path):
        return path.startswith(self._root)

    def _find(self, path):
        """Return the folder, the name in it, and what that is now; None for what was never made."""
        *folders, name = Path(path.removeprefix(self._root)).parts
        folder = ROOT
        for part in folders:
            folder = self._tree[folder].get(part)
            if folder is None:
                return None, name, None
        return folder, name, self._tree[folder].get(name)

    def _make(self, call, folder, name):
        assert folder is not None, f"made in a folder that was not: {call}"
        inode = next(self._inodes)
        self._name(call, Change(folder, name, inode))
        return inode

    def _make_folder(self, call, folder, name):
        inode = self._make(call, folder, name)
        self._tree[inode] = {}
        self.recording.folders.add(inode)

    def _name(self, call, *changes):
        for change in changes:
            self._tree[change.folder][change.name] = change.inode
            if change.inode is not None:
                path = f"{self._path_of(change.folder)}{change.name}"
                self.recording.paths.setdefault(change.inode, set()).add(path)
        self._note(Naming(began=call.began, ended=call.ended, changes=changes))

    def _path_of(self, folder):
        if folder == ROOT:
            return ""
        return min(self.recording.paths[folder]) + "/"

    def _note(self, operation):
        self.recording.operations.append(operation)


def _strings(call):
    return [text_of(part).decode(errors="replace") for part in call.split() if part.startswith('"')]
