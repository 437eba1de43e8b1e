"""In the one file, in place of certifi's own, which would leave a temporary file when it is killed."""

from functools import cache
from pathlib import Path

from droppexd.packed import path_of


@cache
def where() -> str:
    """Return the path of the certificates, which are in memory."""
    path = path_of("certifi/cacert.pem")
    assert path is not None
    return path


def contents() -> str:
    """Return the certificates."""
    return Path(where()).read_text(encoding="ascii")
