"""What an error means to the shell: an exit code and one clear line that says what to do."""

import enum
import os

from droppexd.errors import (
    CatalogFull,
    ClusterFull,
    ConfigError,
    Conflict,
    DroppexError,
    IntegrityError,
    InvalidName,
    InvalidRequest,
    KeyRefused,
    NotAuthorised,
    NotEnoughShards,
    NotFound,
    NotMaster,
    PeerError,
    PeerTimeout,
    RemoteProtocolError,
    StoreFull,
    UnknownKind,
    VersionMismatch,
)


class ExitCode(enum.IntEnum):
    """How a `droppex` command ended. Documented in `docs/cli.md` and in `droppex --help`."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    NOT_ENOUGH_SHARDS = 5
    UNREACHABLE = 6
    INTERRUPTED = 130
    READER_GONE = 141
    TERMINATED = 143


EXIT_CODES_HELP = (
    "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 no such file in the cluster; 4 the name exists or "
    "changed meanwhile; 5 not enough shards (pools are missing); 6 the cluster cannot be reached; "
    "130 interrupted."
)


class UsageError(DroppexError):
    """The command line asks for something that cannot be. Read `droppex COMMAND --help`."""

    code = "usage"


class ReaderGone(Exception):
    """Whoever read our standard output closed it (`| head`). Stop quietly."""


_CODES: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (UsageError, ExitCode.USAGE),
    (ConfigError, ExitCode.USAGE),
    (InvalidName, ExitCode.USAGE),
    (InvalidRequest, ExitCode.USAGE),
    (NotFound, ExitCode.NOT_FOUND),
    (Conflict, ExitCode.CONFLICT),
    (FileExistsError, ExitCode.CONFLICT),
    (NotEnoughShards, ExitCode.NOT_ENOUGH_SHARDS),
    (NotAuthorised, ExitCode.FAILURE),
    (KeyRefused, ExitCode.FAILURE),
    (PeerError, ExitCode.UNREACHABLE),
    (NotMaster, ExitCode.UNREACHABLE),
    (ReaderGone, ExitCode.READER_GONE),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
)
"""The first class that fits decides, so that a class stands before its bases."""

_ADVICE: tuple[tuple[type[DroppexError], str], ...] = (
    (UsageError, ""),
    (NotFound, "`droppex ls` shows what is there"),
    (ClusterFull, "delete files or add a pool"),
    (NotEnoughShards, "`droppex status` shows the pools"),
    (NotAuthorised, "check the keys in the client file"),
    (KeyRefused, "a member can make a token for a new one with `droppexd join-token`"),
    (PeerTimeout, "is the cluster up? `--app` chooses another app"),
    (PeerError, "is the cluster up? `--app` chooses another app"),
    (NotMaster, "no controller leads just now; try again"),
    (IntegrityError, "nothing wrong was kept; `droppex stat` shows where the shards are"),
    (StoreFull, "delete files or add a pool"),
    (CatalogFull, "make room on the controller's disk: it goes on by itself"),
    (VersionMismatch, ""),
    (UnknownKind, ""),
    (RemoteProtocolError, "run the same release of droppex everywhere"),
)


def exit_code(error: BaseException) -> ExitCode:
    """Return the exit code for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILURE)


def error_text(error: BaseException, subject: str = "") -> str:
    """Return what to tell a person, without control characters: one line, and one for each missing shard.

    `subject` is the name or path at work, put in front unless the text says it already.
    """
    if isinstance(error, OSError):
        named = [
            os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
        ]
        subject = subject or " -> ".join(named)
        text = error.strerror or str(error) or type(error).__name__
    elif isinstance(error, DroppexError):
        text = "; ".join(str(error).splitlines()) or type(error).__name__
        advice = next((advice for kind, advice in _ADVICE if isinstance(error, kind)), "")
        if advice and "`" not in text:  # Else it says itself what to do.
            text = f"{text} ({advice})"
    else:
        text = (
            f"a bug in droppex: {type(error).__name__}: {error}; "
            "set DROPPEX_DEBUG=1 to see where, and report it"
        )
    if subject and subject not in text:
        text = f"{subject}: {text}"
    lines = [printable(text)]
    if isinstance(error, NotEnoughShards):
        lines += [f"  missing: {printable(missing)}" for missing in error.missing]
    return "\n".join(lines)


_JOINER = "\N{ZERO WIDTH JOINER}"
"""Not printable to Python, but it holds emoji together and moves no cursor."""


def printable(text: str) -> str:
    """Return `text` with everything that could move a cursor, or hide, written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one == _JOINER else one.encode("unicode_escape").decode() for one in text
    )


def leaves(error: BaseException) -> list[BaseException]:
    """Return the single errors in a group, however deeply nested."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


def expected_error(error: BaseException) -> DroppexError | OSError | None:
    """Return what went wrong when all in `error` was foreseen; None when any of it is a bug or a cancel."""
    found: DroppexError | OSError | None = None
    for leaf in leaves(error):
        if not isinstance(leaf, DroppexError | OSError):
            return None
        found = found or leaf
    return found
