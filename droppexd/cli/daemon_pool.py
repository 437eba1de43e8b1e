"""`droppexd pool`: what is done to the folder of a pool that is not running."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from droppexd.cli.exits import ExitCode, printable

if TYPE_CHECKING:
    from droppexd.cli.render import Document
    from droppexd.roles.pool_check import CheckedShard, ShardState
    from droppexd.roles.pool_folder import FolderReport

pool_app = typer.Typer(
    help="Look after the folder of a pool that is not running.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@pool_app.callback()
def pool_commands() -> None:
    """Look after the folder of a pool that is not running."""


@pool_app.command()
def check(
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="The folder of the pool, as `pool.data` has it.")
    ],
    exact: Annotated[bool, typer.Option("--bytes", help="Print sizes as plain numbers of bytes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Read and verify everything in the folder of a stopped pool; change nothing.

    The records of who the pool is, the index against the files, and every shard against its checksums. The
    exit code is 0 when all is sound, and 1 when something is wrong or the folder cannot be used: because the
    pool is running, for one.
    """
    from droppexd.cli.daemon import fail
    from droppexd.errors import DroppexError

    try:
        code = _check(data, exact=exact, as_json=as_json, quiet=quiet)
    except (DroppexError, OSError) as error:
        code = fail(error)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED  # typer would make it 1.
    raise typer.Exit(code)


def _check(folder: Path, *, exact: bool, as_json: bool, quiet: bool) -> int:
    from droppexd.allocator import tune_allocator
    from droppexd.cli.progress import progress_gauge
    from droppexd.cli.render import Output
    from droppexd.roles.pool_folder import check_folder
    from droppexd.store.stopped import open_stopped_pool

    tune_allocator()
    output = Output(quiet=quiet, as_json=as_json)
    began = time.monotonic()
    pool = open_stopped_pool(folder)
    try:
        with progress_gauge(output, "checking the index") as gauge:

            def progress(report: "FolderReport", listed: int) -> None:
                if report.shards:
                    expected = report.size * max(listed, report.shards) // report.shards
                    gauge.show(report.size, expected, title="checking the shards")

            report = check_folder(pool, progress)
    finally:
        pool.close()
    seconds = time.monotonic() - began
    if as_json:
        output.document(folder_document(report, folder, seconds))
    elif not quiet:
        for line in folder_lines(report, folder, seconds, exact=exact):
            output.line(line)
    output.flush()
    return ExitCode.OK if report.sound else ExitCode.FAILURE


def folder_document(report: "FolderReport", folder: Path, seconds: float) -> "Document":
    """Return the report for programs."""
    return {
        "data": str(folder),
        "sound": report.sound,
        "problems": report.problems,
        "shards": report.shards,
        "size": report.size,
        "unlisted": report.unlisted,
        **{state: report.states.get(state, 0) for state in _states()},
        "findings": [
            {
                "state": finding.state.value,
                "name": finding.name or None,
                "version": None if finding.version is None else str(finding.version),
                "extent": str(finding.extent),
                "shard": finding.shard,
                "chunks": list(finding.chunks),
                "reason": finding.reason,
            }
            for finding in report.findings
        ],
        "seconds": round(seconds, 3),
    }


def folder_lines(report: "FolderReport", folder: Path, seconds: float, *, exact: bool) -> list[str]:
    """Return the report for people."""
    from droppexd.cli.render import count_text, rate_text, size_text

    lines = [f"problem: {printable(problem)}" for problem in report.problems]
    lines += map(_finding_line, report.findings)
    wrong = sum(report.states.values())
    if wrong > len(report.findings):
        lines.append(f"and {count_text(wrong - len(report.findings), 'more shard')}")
    if report.unlisted:
        lines.append(
            f"{count_text(report.unlisted, 'sound shard')} not in the index: the next start finds them"
        )
    verdict = [count_text(len(report.problems), "problem")] if report.problems else []
    verdict += [f"{count} {state}" for state in _states() if (count := report.states.get(state, 0))]
    lines.append(
        f"{printable(str(folder))}: read {count_text(report.shards, 'shard')}, "
        f"{size_text(report.size, exact=exact)}, {rate_text(report.size, seconds)}: "
        f"{', '.join(verdict) or 'all is sound'}"
    )
    return lines


def _states() -> tuple["ShardState", ...]:
    from droppexd.roles.pool_check import ShardState

    return ShardState.ABSENT, ShardState.DAMAGED, ShardState.UNREADABLE


def _finding_line(finding: "CheckedShard") -> str:
    name = f"{printable(finding.name)}, " if finding.name else ""
    return (
        f"{finding.state}: {name}shard {finding.shard} of extent {finding.extent}: "
        f"{printable(finding.reason)}"
    )
