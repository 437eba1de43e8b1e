"""What the words on a `droppex` command line mean. Pure but for looking at what is a local folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from droppexd.cli.exits import UsageError
from droppexd.errors import InvalidName, InvalidRequest
from droppexd.model import Layout, normal_name, normal_prefix

STREAM = "-"
"""Stands for standard input or output."""


class ByteRange(NamedTuple):
    """A part of a file: `length` bytes from `start` (None: to the end), or with `from_end` the last ones."""

    start: int
    length: int | None
    from_end: bool = False


WHOLE = ByteRange(0, None)


def parse_range(text: str) -> ByteRange:
    """Return the range that `START-END` (both included, from 0), `START-` or `-LAST` means, as in HTTP."""
    first, dash, last = text.partition("-")
    if not dash or not all(part == "" or (part.isascii() and part.isdigit()) for part in (first, last)):
        raise UsageError(f"range {text!r} is not of the form START-END, START- or -LAST")
    if first == "":
        if last == "" or int(last) == 0:
            raise UsageError(f"range {text!r} names no byte")
        return ByteRange(0, int(last), from_end=True)
    if last == "":
        return ByteRange(int(first), None)
    if int(last) < int(first):
        raise UsageError(f"range {text!r} ends before it starts")
    return ByteRange(int(first), int(last) - int(first) + 1)


def parse_layout(text: str | None) -> Layout | None:
    """Return the layout of `K+M`; None leaves the choice to the cluster."""
    try:
        return None if text in (None, "auto") else Layout.parse(text)
    except InvalidRequest as error:
        raise UsageError(str(error)) from None


def refuse_get(local: str | None, *, recursive: bool, part: str | None, as_json: bool) -> None:
    """Raise UsageError for options of `get` that exclude each other."""
    if recursive and part is not None:
        raise UsageError("--range is for one file, not for -r")
    if recursive and local == STREAM:
        raise UsageError("-r needs a folder; standard output is none")
    if as_json and local == STREAM:
        raise UsageError("--json and the file cannot both go to standard output")


def refuse_unasked(command: str, *, on_terminal: bool) -> None:
    """Raise UsageError when a command would have to ask and nobody is there."""
    if not on_terminal:
        raise UsageError(f"{command} asks before it removes, and there is no terminal: add --yes")


class Upload(NamedTuple):
    """One LOCAL of a put and the name that it, or the tree below it, gets."""

    path: str
    name: str


def plan_put(arguments: Sequence[str]) -> list[Upload]:
    """Return what `put ARGUMENTS` stores, and under which names (of folders: the folder's name).

    As with cp the last of several arguments is the destination. A destination that ends in a slash is a
    folder; several LOCALs need one.
    """
    *paths, target = [*arguments, ""] if len(arguments) == 1 else arguments
    if len(arguments) > 1 and target == "":
        raise UsageError("REMOTE is empty")
    if len(paths) > 1 and not target.endswith("/"):
        raise UsageError(
            f"with several files the last argument is the remote folder: end it with a slash: {target}/"
        )
    return [Upload(path, _put_name(path, target)) for path in paths]


def _put_name(path: str, target: str) -> str:
    into_folder = target == "" or target.endswith("/")
    if path == STREAM and into_folder:
        raise UsageError("standard input has no name: give REMOTE, as in `put - folder/name`")
    return target + local_base_name(path) if into_folder else target


def local_base_name(path: str) -> str:
    """Return the last part of a local path, also of `.` and `folder/`."""
    base = base_name(path)
    if base in ("", ".", ".."):
        base = Path(path).resolve().name
    if base == "":
        raise UsageError(f"{path!r} has no name of its own: give REMOTE")
    return base


def mv_target(source: str, target: str) -> str:
    """Return the new name for `mv` and `cp`: below `target` when that ends in a slash."""
    return normal_name(target + base_name(source) if target.endswith("/") else target)


def base_name(name: str) -> str:
    """Return the last part of a name or path."""
    return name.rstrip("/").rpartition("/")[2]


def get_path(name: str, local: str | None) -> str:
    """Return the local path for one file: LOCAL, or below it when it is a folder."""
    base = base_name(name)
    if local is None:
        return base
    if local == "":
        raise UsageError("LOCAL is empty")
    return join_path(local, base) if local.endswith("/") or Path(local).is_dir() else local


def join_path(folder: str, *parts: str) -> str:
    """Return the local path of `parts` below a folder."""
    return "/".join((folder.rstrip("/"), *parts))


def get_folder_path(prefix: str, local: str | None) -> str:
    """Return the local folder for the tree below `prefix`: LOCAL, or below it when it ends in a slash."""
    base = base_name(prefix)
    if local == "" or (local is None and base == ""):
        raise UsageError("give LOCAL, the folder to write to")
    if local is None:
        return base
    return join_path(local, base) if local.endswith("/") or base_name(local) in (".", "..") else local


def folder_prefix(name: str) -> str:
    """Return the listing prefix of everything below a folder; `` and `/` are the whole cluster."""
    stripped = name.rstrip("/")
    return normal_prefix(stripped + "/") if stripped else ""


def relative_parts(name: str, prefix: str) -> tuple[str, ...]:
    """Return the parts of `name` below `prefix`, each of them fit to be one local file name.

    Raise InvalidName for anything that could lead elsewhere. The catalogue allows no such name; this does
    not rely on it.
    """
    parts = tuple(name.removeprefix(prefix).split("/"))
    separators = {os.sep, os.altsep or os.sep, "\0"}
    for part in parts:
        if part in ("", ".", "..") or not separators.isdisjoint(part):
            raise InvalidName(f"{name!r} cannot be a local path")
    if not name.startswith(prefix):
        raise InvalidName(f"{name!r} is not below {prefix!r}")
    return parts
