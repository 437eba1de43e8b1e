"""Progress bars, on a terminal only. rich is imported when a bar is drawn, and not before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from droppexd.cli.exits import printable
from droppexd.cli.render import Output


class Meter(Protocol):
    """Told how far the transfers of one command are."""

    def expect(self, size: int | None) -> None:
        """Add a file of `size` bytes to what is to come; None when its size is not known."""
        ...

    def advance(self, size: int) -> None:
        """Note that `size` more bytes went through; less than 0 takes back a failed attempt."""
        ...

    def finish_file(self) -> None:
        """Note that one more file is done, well or not."""
        ...


class NoMeter:
    """Shows nothing: no terminal, or --quiet."""

    def expect(self, size: int | None) -> None:
        """Show nothing."""

    def advance(self, size: int) -> None:
        """Show nothing."""

    def finish_file(self) -> None:
        """Show nothing."""


@contextmanager
def progress_meter(output: Output, title: str) -> Iterator[Meter]:
    """Show one bar for all transfers of a command, with speed and time left, on standard error."""
    if not output.progress_wanted:
        yield NoMeter()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False, markup=False, emoji=False),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = progress.add_task(printable(title), total=None)

    class Bar:
        """The bar, with a count of files once there are several."""

        files = 0
        done = 0
        total = 0
        endless = False

        def expect(self, size: int | None) -> None:
            self.files += 1
            self.total += size or 0
            self.endless = self.endless or size is None
            progress.update(task, total=None if self.endless else self.total, description=self._title())

        def advance(self, size: int) -> None:
            progress.advance(task, size)

        def finish_file(self) -> None:
            self.done += 1
            progress.update(task, description=self._title())

        def _title(self) -> str:
            return printable(title) if self.files <= 1 else f"{printable(title)} {self.done}/{self.files}"

    def above(text: str) -> None:
        progress.console.print(text, soft_wrap=True, highlight=False, markup=False)

    with progress, output.lines_above_bar(above):
        yield Bar()
