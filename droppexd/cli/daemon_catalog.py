"""`droppexd catalog`: backups of the catalogue, and what is done to it while its controller is stopped."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from droppexd.cli.exits import ExitCode, printable

if TYPE_CHECKING:
    from droppexd.catalog.checking import CatalogueReport
    from droppexd.catalog.copies import Facts
    from droppexd.catalog.restoring import Restored
    from droppexd.cli.render import Document, Output
    from droppexd.config import Config
    from droppexd.roles.rebuilding import Rebuilt

catalog_app = typer.Typer(
    help="Back up, restore and check the catalogue of a controller.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="The folder of the catalogue, as `controller.data` has it."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar="DROPPEXD_CONFIG",
        help="Or a file like droppex.toml.example, which names the folder.",
    ),
]
ExactOption = Annotated[bool, typer.Option("--bytes", help="Print sizes as plain numbers of bytes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@catalog_app.callback()
def catalog_commands() -> None:
    """Back up, restore and check the catalogue of a controller."""


def _finish(command: Callable[[], int]) -> None:
    """Run a command; end with its exit code, or with what an error means."""
    from droppexd.cli.daemon import fail
    from droppexd.errors import DroppexError

    try:
        code = command()
    except (DroppexError, OSError) as error:
        code = fail(error)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED  # typer would make it 1.
    raise typer.Exit(code)


def _catalogue(data: Path | None, config: Path | None) -> Path:
    """Return where the catalogue is. Raise ConfigError when neither option says so."""
    from droppexd.catalog.sqlite import CATALOGUE_FILE
    from droppexd.errors import ConfigError
    from droppexd.model import Role

    if data is not None:
        return data / CATALOGUE_FILE
    loaded = _loaded(config)
    if loaded is None:
        raise ConfigError(["name the controller's folder with --data DIR, or its --config FILE"])
    if not loaded.controller_data:
        raise ConfigError([f"{config} is not the file of a controller: name its folder with --data DIR"])
    return loaded.folder(Role.CONTROLLER) / CATALOGUE_FILE


def _loaded(config: Path | None) -> "Config | None":
    """Return what a configuration file says, where one is named. Raise ConfigError."""
    from droppexd.config import Config
    from droppexd.errors import ConfigError
    from droppexd.model import Role

    if config is None:
        return None
    try:
        return Config.load({}, os.environ, config)
    except ConfigError:
        # The file of a daemon that is told its roles by options; if it is wrong otherwise, this says so.
        return Config.load({"roles": [Role.CONTROLLER.value]}, os.environ, config)


# -- backup ----------------------------------------------------------------------------------------


@catalog_app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the backup goes.")],
    data: DataOption = None,
    config: ConfigOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    exact: ExactOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Copy the catalogue into one file, whether or not its controller runs.

    The copy is the catalogue as it is at one moment; what is stored meanwhile is not held up, and is not in
    it. FILE appears when all is there, flushed and read back. Put it on another disk or machine.
    """

    def command() -> int:
        from droppexd.catalog.copies import back_up
        from droppexd.cli.progress import progress_gauge
        from droppexd.cli.render import Output

        output = Output(quiet=quiet, as_json=as_json)
        source = _catalogue(data, config)
        began = time.monotonic()
        with progress_gauge(output, "copying the catalogue") as gauge:
            facts = back_up(source, file, force=force, progress=gauge.show)
        size = file.stat().st_size
        if as_json:
            seconds = round(time.monotonic() - began, 3)
            output.document(
                {"file": str(file), "file_size": size, **facts_document(facts), "seconds": seconds}
            )
        else:
            output.say(backup_line(file, size, facts, exact=exact))
        output.flush()
        return ExitCode.OK

    _finish(command)


def backup_line(file: Path, size: int, facts: "Facts", *, exact: bool) -> str:
    """Return what was backed up, for people."""
    from droppexd.cli.render import size_text

    return f"{printable(str(file))}: {size_text(size, exact=exact)}, {facts_text(facts, exact=exact)}"


def facts_text(facts: "Facts", *, exact: bool) -> str:
    """Return what a catalogue says of itself, for people."""
    from droppexd.cli.render import count_text, size_text, time_text

    return (
        f"revision {facts.revision} of {time_text(facts.written_ms)}, incarnation {facts.incarnation.hex()}, "
        f"{count_text(facts.files, 'file')}, {size_text(facts.size, exact=exact)}"
    )


def facts_document(facts: "Facts") -> "Document":
    """Return what a catalogue says of itself, for programs."""
    from droppexd.cli.render import time_document

    return {
        "revision": facts.revision,
        "written": time_document(facts.written_ms) if facts.written_ms else None,
        "cluster_id": facts.cluster_id.hex(),
        "incarnation": facts.incarnation.hex(),
        "term": facts.term,
        "files": facts.files,
        "size": facts.size,
    }


# -- restore ---------------------------------------------------------------------------------------


@catalog_app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.")],
    data: DataOption = None,
    config: ConfigOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even if there is a catalogue: it is kept under another name.")
    ] = False,
    exact: ExactOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a backup the catalogue of a controller that is not running.

    The backup is checked first. It becomes a new incarnation: what was stored since is kept on the pools and
    shown by `droppex orphans`, and nothing is cleared away until all pools were compared with it.
    """

    def command() -> int:
        import trio

        from droppexd.catalog.restoring import restore as restore_backup
        from droppexd.cli.progress import progress_gauge
        from droppexd.cli.render import Output
        from droppexd.daemon import system_runtime
        from droppexd.errors import CatalogError

        output = Output(quiet=quiet, as_json=as_json)
        path = _catalogue(data, config)
        if not file.is_file():
            raise CatalogError(f"there is no backup {file}")
        size = file.stat().st_size
        with progress_gauge(output, "checking the backup") as gauge:

            def progress(done: int, total: int) -> None:
                gauge.show(size * done // max(total, 1), size)

            async def run() -> "Restored":
                return await restore_backup(path, file, system_runtime(), force=force, progress=progress)

            restored = trio.run(run)
        if as_json:
            former = None if restored.former is None else str(restored.former)
            output.document({"catalogue": str(path), "former": former, **facts_document(restored.facts)})
        else:
            output.say(f"{printable(str(path))}: restored, {facts_text(restored.facts, exact=exact)}")
            if restored.former is not None:
                output.say(f"the catalogue that was there is kept as {printable(str(restored.former))}")
        output.flush()
        return ExitCode.OK

    _finish(command)


# -- rebuild ---------------------------------------------------------------------------------------


@catalog_app.command()
def rebuild(
    from_pools: Annotated[
        list[str],
        typer.Option("--from-pools", metavar="ADDRESS", help="Where a pool is. Name all that you know."),
    ],
    data: DataOption = None,
    config: ConfigOption = None,
    exact: ExactOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a lost catalogue anew from the journals that pools keep. No controller runs, and the pools do.

    The folder of the catalogue must be empty. Of the pools named, and all that they know of, the journal that
    goes furthest is taken: it has all that was acknowledged. Start the controller then: what only shards tell
    of is put into the folder lost+found, marked uncertain, and `droppex orphans` shows what cannot be read.
    """

    def command() -> int:
        import trio

        from droppexd.cli.progress import progress_gauge
        from droppexd.cli.render import Output
        from droppexd.daemon import rebuild_catalogue

        output = Output(quiet=quiet, as_json=as_json)
        path = _catalogue(data, config)
        with progress_gauge(output, "rebuilding the catalogue"):
            rebuilt = trio.run(rebuild_catalogue, path, tuple(from_pools), _loaded(config))
        if as_json:
            output.document(
                {
                    "catalogue": str(path),
                    "journal": rebuilt.journal or None,
                    "pools": rebuilt.asked,
                    "silent": list(rebuilt.silent),
                    **facts_document(rebuilt.facts),
                }
            )
        else:
            for line in rebuilt_lines(rebuilt, path, exact=exact):
                output.say(line)
        output.flush()
        return ExitCode.OK

    _finish(command)


def rebuilt_lines(rebuilt: "Rebuilt", path: Path, *, exact: bool) -> list[str]:
    """Return what a rebuild came to, for people."""
    from droppexd.cli.render import count_text

    where = printable(str(path))
    if rebuilt.journal:
        facts = facts_text(rebuilt.facts, exact=exact)
        lines = [f"{where}: rebuilt from the journal of the pool at {printable(rebuilt.journal)}, {facts}"]
    else:
        pools = count_text(rebuilt.asked, "pool")
        lines = [f"{where}: begun anew for {pools}: no pool has a journal, so that only shards tell of files"]
    lines += [
        f"the pool {printable(name)} did not answer: what it alone may know of is not in there"
        for name in rebuilt.silent
    ]
    return [
        *lines,
        "start the controller; once all pools have compared with it, files of which only shards tell are put",
        "into the folder lost+found, marked uncertain, and `droppex orphans` shows what cannot be read",
    ]


# -- copy ------------------------------------------------------------------------------------------


@catalog_app.command()
def copy(
    source: Annotated[
        str, typer.Option("--from", metavar="WHERE", help="sqlite:FILE, or etcd: as for --to.")
    ],
    target: Annotated[
        str, typer.Option("--to", metavar="WHERE", help="sqlite:FILE, or etcd:URL[,URL]...[/PREFIX/].")
    ],
    ca: Annotated[str, typer.Option("--etcd-ca", metavar="FILE", help="For TLS with etcd.")] = "",
    cert: Annotated[str, typer.Option("--etcd-cert", metavar="FILE", help="For TLS with etcd.")] = "",
    key: Annotated[str, typer.Option("--etcd-key", metavar="FILE", help="For TLS with etcd.")] = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Copy a whole catalogue from SQLite to etcd or back, into an empty place. All controllers are stopped.

    It stays the same catalogue: configure the controllers for the new place, start them, and pools and apps
    go on with it. What it was copied from is left as it is; start no controller on that any more.
    """

    def command() -> int:
        import trio

        from droppexd.catalog.copying import copy_catalogue
        from droppexd.catalog.places import open_place, parse_place
        from droppexd.cli.progress import progress_gauge
        from droppexd.cli.render import Output, count_text
        from droppexd.daemon import system_runtime

        output = Output(quiet=quiet, as_json=as_json)
        one, other = parse_place(source), parse_place(target)
        began = time.monotonic()
        with progress_gauge(output, "copying the catalogue") as gauge:

            async def run() -> int:
                runtime, files = system_runtime(), (ca, cert, key)
                async with (
                    open_place(one, runtime, files, must_exist=True) as engine,
                    open_place(other, runtime, files) as into,
                ):
                    return await copy_catalogue(engine, into, gauge.show)

            copied = trio.run(run)
        if as_json:
            seconds = round(time.monotonic() - began, 3)
            output.document({"from": source, "to": target, "records": copied, "seconds": seconds})
        else:
            output.say(
                f"{printable(target)}: {count_text(copied, 'record')}, the same as {printable(source)}"
            )
        output.flush()
        return ExitCode.OK

    _finish(command)


# -- check -----------------------------------------------------------------------------------------


@catalog_app.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A backup; without one the catalogue itself.")
    ] = None,
    data: DataOption = None,
    config: ConfigOption = None,
    exact: ExactOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read and verify every record of a backup, or of the catalogue of a stopped controller; change nothing.

    The structure of the database, each record by itself, and all that is written twice against each other.
    The exit code is 0 when all is sound, and 1 when something is wrong or the catalogue cannot be used:
    because its controller is running, for one.
    """

    def command() -> int:
        from droppexd.cli.render import Output

        output = Output(quiet=quiet, as_json=as_json)
        path = file if file is not None else _catalogue(data, config)
        began = time.monotonic()
        report = checked(path, output)
        if as_json:
            output.document(check_document(report, path, time.monotonic() - began))
        elif not quiet:
            for line in check_lines(report, path, exact=exact):
                output.line(line)
        output.flush()
        return ExitCode.OK if report.sound else ExitCode.FAILURE

    _finish(command)


def checked(path: Path, output: "Output") -> "CatalogueReport":
    """Check a catalogue that is not in use, and show how far that is."""
    from droppexd.catalog.checking import check_catalogue
    from droppexd.catalog.copies import open_stopped_catalogue
    from droppexd.cli.progress import progress_gauge

    with (
        open_stopped_catalogue(path) as connection,
        progress_gauge(output, "checking the catalogue") as gauge,
    ):
        size = path.stat().st_size

        def progress(done: int, total: int) -> None:
            gauge.show(size * done // max(total, 1), size)

        return check_catalogue(connection, progress)


def check_document(report: "CatalogueReport", path: Path, seconds: float) -> "Document":
    """Return the report for programs."""
    facts = None if report.facts is None else facts_document(report.facts)
    return {
        "catalogue": str(path),
        "sound": report.sound,
        "wrong": report.wrong,
        "problems": report.problems,
        "facts": facts,
        "records": dict(sorted(report.records.items())),
        "seconds": round(seconds, 3),
    }


def check_lines(report: "CatalogueReport", path: Path, *, exact: bool) -> list[str]:
    """Return the report for people."""
    from droppexd.cli.render import count_text

    lines = [f"problem: {printable(problem)}" for problem in report.problems]
    if report.wrong > len(report.problems):
        lines.append(f"and {count_text(report.wrong - len(report.problems), 'more problem')}")
    verdict = count_text(report.wrong, "problem") if report.wrong else "all is sound"
    facts = "" if report.facts is None else f"{facts_text(report.facts, exact=exact)}: "
    lines.append(f"{printable(str(path))}: {facts}{verdict}")
    return lines
