"""How far something is that the cluster does: a bar on a terminal, a line now and then elsewhere."""

import io

import pytest

from droppexd.cli import progress
from droppexd.cli.progress import progress_gauge
from droppexd.cli.render import Output

MIB = 1024 * 1024


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def output_to(stderr, **options):
    return Output(**{"quiet": False, "as_json": False, **options}, stdout=io.StringIO(), stderr=stderr)


def test_without_a_terminal_a_line_comes_now_and_then(clock):
    stderr = io.StringIO()
    with progress_gauge(output_to(stderr), "verifying") as gauge:
        for second in range(75):
            clock[0] = 100.0 + second
            gauge.show(second * 10 * MIB, 1000 * MIB, title="verifying 1/2 pools" if second > 50 else "")
    assert stderr.getvalue().splitlines() == [
        "droppex: verifying: 300.0 MiB of about 1000.0 MiB, 10.0 MiB/s",
        "droppex: verifying 1/2 pools: 600.0 MiB of about 1000.0 MiB, 10.0 MiB/s",
    ]


@pytest.mark.parametrize("stderr", [io.StringIO(), Terminal()])
def test_quiet_shows_nothing(clock, stderr):
    with progress_gauge(output_to(stderr, quiet=True), "verifying") as gauge:
        clock[0] += 1000
        gauge.show(1, 2)
    assert stderr.getvalue() == ""


def test_on_a_terminal_a_bar_has_amount_and_title(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    output = output_to(Terminal())
    with progress_gauge(output, "verifying\x1b") as gauge:
        gauge.show(0, 0)
        gauge.show(30 * MIB, 20 * MIB, title="verifying 2/3 pools")
        output.note("a note")
    shown = capsys.readouterr().err
    assert "a note" in shown
    assert "verifying\\x1b" in shown
    assert "verifying 2/3 pools" in shown
    assert "30.0/30.0 MiB" in shown
