"""Progress bars, on a terminal only. rich is imported when a bar is drawn, and not before."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from droppexd.cli.exits import printable
from droppexd.cli.render import Output, rate_text, size_text

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_S = 30.0
"""Without a terminal a line says so often how far it is."""


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


class Gauge(Protocol):
    """Told how far something is that nobody here does."""

    def show(self, done: int, total: int, *, title: str = "") -> None:
        """Show `done` of about `total` bytes, or of what the gauge counts."""
        ...


class _NoGauge:
    """Shows nothing: --quiet."""

    def show(self, done: int, total: int, *, title: str = "") -> None:
        """Show nothing."""


class _LineGauge:
    """A line now and then, where there is no terminal."""

    def __init__(self, output: Output, title: str, unit: str) -> None:
        self._output = output
        self._title = title
        self._unit = unit
        self._began = time.monotonic()
        self._next = self._began + _LINE_S

    def show(self, done: int, total: int, *, title: str = "") -> None:
        """Print a line, if it is time."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LINE_S
        if self._unit:
            self._output.note(f"{title or self._title}: {done} of about {total} {self._unit}")
            return
        rate = rate_text(done, now - self._began)
        self._output.note(f"{title or self._title}: {size_text(done)} of about {size_text(total)}, {rate}")


@contextmanager
def progress_gauge(output: Output, title: str, *, unit: str = "") -> Iterator[Gauge]:
    """Show a bar with speed and time left on a terminal, else a line now and then, on standard error.

    What is shown are bytes, or with `unit` as many of these.
    """
    if output.quiet:
        yield _NoGauge()
        return
    if not output.progress_wanted:
        yield _LineGauge(output, title, unit)
        return
    progress = _count_bar(unit) if unit else _transfer_bar()
    task = progress.add_task(printable(title), total=None)

    class Bar:
        """The bar."""

        def show(self, done: int, total: int, *, title: str = "") -> None:
            progress.update(task, completed=done, total=max(done, total) or None)
            if title:
                progress.update(task, description=printable(title))

    def above(text: str) -> None:
        progress.console.print(text, soft_wrap=True, highlight=False, markup=False)

    with progress, output.lines_above_bar(above):
        yield Bar()


def _count_bar(unit: str) -> "Progress":
    """Return a bar with a count of something, and time left, on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False, markup=False, emoji=False),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _transfer_bar() -> "Progress":
    """Return a bar with bytes, speed and time left, on standard error."""
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

    return Progress(
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


@contextmanager
def progress_meter(output: Output, title: str) -> Iterator[Meter]:
    """Show one bar for all transfers of a command, with speed and time left, on standard error."""
    if not output.progress_wanted:
        yield NoMeter()
        return
    progress = _transfer_bar()
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
