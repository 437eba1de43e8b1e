"""What a controller that joined a cluster remembers of it: which cluster, and where its engine is.

The file is for people too. Without it, a controller that is started again without `--master` would begin a
cluster of its own.
"""

import json
from pathlib import Path
from typing import NamedTuple

from droppexd.errors import CatalogError
from droppexd.folders import flush_folder, read_small_file, replace_file

MEMBERSHIP_FILE = "cluster.json"
"""Its name in a controller's folder."""

_FORMAT = 1
_MOST_BYTES = 64 * 1024


class Membership(NamedTuple):
    """Which cluster a controller is of, and how its group meets."""

    cluster_id: bytes
    engine: str
    endpoints: tuple[str, ...] = ()
    prefix: str = ""
    controllers: tuple[str, ...] = ()
    """Who was asked; they are asked again at the next start."""


def read_membership(folder: Path) -> Membership | None:
    """Return what is remembered in this folder, or None. Blocking. Raise CatalogError when it is damaged."""
    path = folder / MEMBERSHIP_FILE
    try:
        text = read_small_file(path, _MOST_BYTES)
        return None if text is None else _parsed(text)
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CatalogError(
            f"{path} is damaged ({error}); take it away and start this controller with --master"
        ) from error


def _parsed(text: bytes) -> Membership:
    fields = json.loads(text)
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise ValueError("not a format that this release reads")
    cluster_id = bytes.fromhex(fields["cluster_id"])
    if len(cluster_id) != 16:
        raise ValueError("not the id of a cluster")
    texts = (fields["engine"], fields["prefix"], *fields["endpoints"], *fields["controllers"])
    if not all(isinstance(text, str) and len(text) <= 256 for text in texts) or len(texts) > 2 + 2 * 64:
        raise ValueError("fields of a wrong kind")
    return Membership(
        cluster_id=cluster_id,
        engine=fields["engine"],
        endpoints=tuple(fields["endpoints"]),
        prefix=fields["prefix"],
        controllers=tuple(fields["controllers"]),
    )


def forget_membership(folder: Path) -> None:
    """Forget that the controller of a folder joined others: it goes on alone. Raise CatalogError."""
    path = folder / MEMBERSHIP_FILE
    try:
        if path.exists():
            path.unlink()
            flush_folder(folder)
    except OSError as error:
        raise CatalogError(f"{path} cannot be removed: {error.strerror}") from error


def write_membership(folder: Path, membership: Membership) -> None:
    """Remember it, durably: old or new, there is a whole file at any moment. Blocking. Raise CatalogError."""
    path = folder / MEMBERSHIP_FILE
    fields = {
        "format": _FORMAT,
        "cluster_id": membership.cluster_id.hex(),
        "engine": membership.engine,
        "endpoints": list(membership.endpoints),
        "prefix": membership.prefix,
        "controllers": list(membership.controllers),
    }
    try:
        replace_file(path, (json.dumps(fields, indent=2) + "\n").encode())
    except OSError as error:
        raise CatalogError(f"{path} cannot be written: {error.strerror}") from error
