"""The one file that `scripts/build-binary` makes is both commands."""

import sys
from pathlib import Path

_COMMANDS = ("droppex", "droppexd")


def main() -> None:
    """Run the command that the first argument names, or else the one that this file was called as."""
    if sys.argv[1:2] and sys.argv[1] in _COMMANDS:
        del sys.argv[0]
    name = Path(sys.argv[0]).name
    if name == "droppex":
        from droppexd.cli.client import main as run
    elif name == "droppexd":
        from droppexd.cli.daemon import main as run
    else:
        print(f"{name}: call this file droppex or droppexd, or put one of these words first", file=sys.stderr)
        sys.exit(2)
    run()
