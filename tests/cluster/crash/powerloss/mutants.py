"""Recordings as they would be if the code flushed less, or promised sooner."""

import itertools
import re
from bisect import bisect_left
from dataclasses import replace

from powerloss.disk import Flush, Write
from powerloss.recording import Recording


def without_flushes(recording, pattern):
    """Leave out the flushes of every file or folder with such a path; the root's is empty."""
    wanted = re.compile(pattern)
    return _without(recording, lambda flush: _is(recording, flush, wanted))


def without_later_flushes(recording, pattern):
    """Leave out those that came after the first promise: not those that belong to making the files."""
    wanted = re.compile(pattern)
    first = min(note.moment for note in recording.notes if note.kind in ("WritePiece", "Commit"))
    return _without(recording, lambda flush: flush.began > first and _is(recording, flush, wanted))


def flushed_at_checkpoints_only(recording, database):
    """Leave out the flushes of a log that no checkpoint follows at once: SQLite's synchronous=NORMAL."""
    of_log, of_database = re.compile(f"{database}-wal"), re.compile(database)
    both = [
        operation
        for operation in sorted(recording.operations, key=lambda operation: operation.began)
        if isinstance(operation, Flush | Write)
        and (_is(recording, operation, of_log) or _is(recording, operation, of_database))
    ]
    commits = {
        id(flush)
        for flush, after in itertools.pairwise(both)
        if isinstance(flush, Flush)
        and _is(recording, flush, of_log)
        and not (isinstance(after, Write) and _is(recording, after, of_database))
    }
    return _without(recording, lambda flush: id(flush) in commits)


def promised_before_flushing(recording, process):
    """Move what a process noted to before the flush that it came after."""
    flushes = sorted(
        (operation for operation in recording.operations if isinstance(operation, Flush)),
        key=lambda flush: flush.ended,
    )
    flushes = [flush for flush in flushes if _is(recording, flush, re.compile(f"{process}(/.*)?"))]
    ends = [flush.ended for flush in flushes]

    def sooner(note):
        number = bisect_left(ends, note.moment)
        if note.process != process or not number:
            return note
        return replace(note, moment=flushes[number - 1].began)

    return _changed(recording, notes=[sooner(note) for note in recording.notes])


def _is(recording, operation, pattern):
    return any(pattern.fullmatch(path) for path in recording.paths.get(operation.inode, {""}))


def _without(recording, is_left_out):
    left = [
        operation
        for operation in recording.operations
        if not (isinstance(operation, Flush) and is_left_out(operation))
    ]
    assert len(left) < len(recording.operations), "there is no such flush to leave out"
    return _changed(recording, operations=left)


def _changed(recording, **changes):
    return Recording(
        **{
            "operations": recording.operations,
            "notes": recording.notes,
            "folders": recording.folders,
            "paths": recording.paths,
            **changes,
        }
    )
