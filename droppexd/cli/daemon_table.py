"""The table of processes that `droppexd dev` prints."""

import sys
from collections.abc import Sequence

_HEADINGS = ("role", "name", "pid", "address", "folder")


def print_processes(rows: Sequence[Sequence[str]]) -> None:
    """Print the table: with rich on a terminal, as plain columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*_HEADINGS)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    for row in (_HEADINGS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
