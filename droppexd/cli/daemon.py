"""The command `droppexd`: roles by option, and the sub-commands."""

import enum
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from droppexd import __version__
from droppexd.cli.daemon_catalog import catalog_app
from droppexd.cli.daemon_logs import journal_handler, set_up_logs
from droppexd.cli.daemon_members import init, join, join_token
from droppexd.cli.daemon_parent import die_with_parent
from droppexd.cli.daemon_pool import pool_app
from droppexd.cli.exits import ExitCode, expected_error
from droppexd.config import OPTIONS, Config, describe_problems, flags_of, variable_of
from droppexd.errors import ConfigError, DroppexError
from droppexd.model import MEMBER_ROLES, Role

log = logging.getLogger("droppex.daemon")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run `droppexd`; end the process with its exit code."""
    try:
        app(prog_name="droppexd")
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


def fail(error: BaseException) -> int:
    """Say what went wrong, in one line for each problem, and return the exit code."""
    expected = expected_error(error)
    if isinstance(expected, ConfigError):
        _say(describe_problems(expected.problems))
        return ExitCode.USAGE
    if expected is not None:
        _say("; ".join(str(expected).splitlines()))
        return ExitCode.FAILURE
    log.critical("a bug in droppexd: please report it", exc_info=error)
    return ExitCode.FAILURE


def _say(text: str) -> None:
    print(f"droppexd: {text}", file=sys.stderr, flush=True)


# -- roles -----------------------------------------------------------------------------------------


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each option of the table, ahead of its own parameters."""
    parameters = []
    for name, option in OPTIONS.items():
        kind = list[str] if option.repeatable else str
        flag = typer.Option(
            *flags_of(name), help=f"{option.help} [{variable_of(name)}]", metavar=option.metavar
        )
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag]
            )
        )
    own = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind != inspect.Parameter.VAR_KEYWORD
    ]
    signature = inspect.Signature([*own, *parameters])
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {
        parameter.name: parameter.annotation for parameter in signature.parameters.values()
    }
    return function


@app.callback(invoke_without_command=True)
@_with_options
def roles(
    context: typer.Context,
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", envvar="DROPPEXD_CONFIG", help="A file like droppex.toml.example."
        ),
    ] = None,
    report_fd: Annotated[int | None, typer.Option("--report-fd", hidden=True)] = None,
    die_with_parent: Annotated[int | None, typer.Option("--die-with-parent", hidden=True)] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    **options: Any,
) -> None:
    """Run the daemon of droppex in one or several roles, or a whole cluster with `droppexd dev`.

    Each option can also stand in the file given with --config, or in the environment under the name in
    brackets. A flag wins over the environment, the environment over the file.
    """
    if version:
        print(__version__)
        return
    flags = {name: value for name, value in options.items() if value is not None and value != []}
    if context.invoked_subcommand is not None:
        if flags or config is not None:
            _say(f"options of `droppexd {context.invoked_subcommand}` stand behind its name")
            raise typer.Exit(ExitCode.USAGE)
        return
    raise typer.Exit(run(flags, config, report_fd=report_fd, parent=die_with_parent))


def run(
    flags: dict[str, object], file: Path | None, *, report_fd: int | None = None, parent: int | None = None
) -> int:
    """Run roles until a signal; return the exit code."""
    if not flags and file is None and not any(os.environ.get(variable_of(name)) for name in OPTIONS):
        _say("say what to run: --role controller, app or pool; or `droppexd dev`; see `droppexd --help`")
        return ExitCode.USAGE
    try:
        config = Config.load(flags, os.environ, file)
    except ConfigError as error:
        return fail(error)
    if parent is not None:
        die_with_parent(parent)
    set_up_logs(config.log_level, journal=journal_handler(os.environ))
    import trio

    from droppexd.daemon import Ready, run_roles
    from droppexd.service_manager import ServiceManager

    def report(ready: Ready) -> None:
        if report_fd is not None:
            line = {"role": ready.role, "name": ready.name, "pid": os.getpid()}
            line |= {"address": ready.address, "data": ready.data}
            os.write(report_fd, json.dumps(line).encode() + b"\n")

    try:
        trio.run(run_roles, config, report, ServiceManager.of(os.environ))
    except (DroppexError, OSError, ExceptionGroup) as error:
        return fail(error)
    return ExitCode.OK


app.add_typer(pool_app, name="pool")
app.add_typer(catalog_app, name="catalog")
app.command()(init)
app.command("join-token")(join_token)
app.command()(join)


@app.command()
@_with_options
def doctor(
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            envvar="DROPPEXD_CONFIG",
            help="The configuration to check. Default: droppex.toml where `droppexd init` makes it.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only what is not ok.")] = False,
    **options: Any,
) -> None:
    """Check this machine: its configuration, keys, ports, disks, clock, and the way to the controllers.

    It takes the options of `droppexd` and changes nothing; to see how fast a data folder is flushed it writes
    a file there, and removes it. What is not ok comes with what to do. The exit code is 1 when there is an
    error, and 0 when all is ok or there are warnings alone. `droppex doctor` checks the whole cluster.
    """
    from droppexd.cli.daemon_doctor import examine_machine
    from droppexd.cli.render import Output

    flags = {name: value for name, value in options.items() if value is not None and value != []}
    try:
        code = examine_machine(flags, config, Output(quiet=quiet, as_json=as_json))
    except (DroppexError, OSError, ExceptionGroup) as error:
        code = fail(error)
    raise typer.Exit(code)


@app.command()
def dev(
    pools: Annotated[int, typer.Option("--pools", min=1, max=64, help="How many pools.")] = 6,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Where the cluster keeps everything; the same folder again continues it. "
            "Default: ~/.local/share/droppex/dev (in XDG_DATA_HOME, if set).",
        ),
    ] = None,
    layout: Annotated[str, typer.Option("--layout", metavar="K+M", help=OPTIONS["layout"].help)] = "auto",
    delete_grace: Annotated[
        str,
        typer.Option("--delete-grace", metavar="DURATION", help=OPTIONS["controller_delete_grace"].help),
    ] = "60s",
    replace_after: Annotated[
        str,
        typer.Option("--replace-after", metavar="DURATION", help=OPTIONS["controller_replace_after"].help),
    ] = "10m",
    secure: Annotated[
        bool, typer.Option("--secure", help="Encrypt all links, with keys that are made for it.")
    ] = False,
    io_threads: Annotated[
        int, typer.Option("--io-threads", min=1, max=16, help=OPTIONS["io_threads"].help)
    ] = 1,
    log_level: Annotated[
        str, typer.Option("--log-level", metavar="LEVEL", help=OPTIONS["log_level"].help)
    ] = "info",
    die_with: Annotated[int | None, typer.Option("--die-with-parent", hidden=True)] = None,
) -> None:
    """Run a whole cluster on this machine, for trying out: a controller, an app and pools.

    Each is a process of its own on a free port of 127.0.0.1. None is restarted when it ends. Ctrl-C ends
    them all; the data stays. DIR/dev.json tells which process is what, DIR/client.toml is for
    `droppex --config`, DIR/logs has the logs.
    """
    if die_with is not None:
        die_with_parent(die_with)
    from droppexd.cli.daemon_dev import DevOptions, run_dev

    options = DevOptions(
        pools=pools,
        layout=layout,
        delete_grace=delete_grace,
        replace_after=replace_after,
        log_level=log_level,
        secure=secure,
        io_threads=io_threads,
    )
    try:
        code = run_dev(data, options)
    except (DroppexError, OSError, ExceptionGroup) as error:
        code = fail(error)
    raise typer.Exit(code)


_MemberRole = enum.StrEnum("_MemberRole", {role.name: role.value for role in MEMBER_ROLES})  # type: ignore[misc]
"""What `keygen` makes keys for, as typer wants to be told."""


@app.command()
def keygen(
    role: Annotated[_MemberRole, typer.Argument(help="Who gets the key: controller, app, pool or client.")],
    name: Annotated[str, typer.Argument(help="The name of the process or person.")],
    folder: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Where all keys of the cluster are made.")
    ] = Path("keys"),
) -> None:
    """Make a key, and with the first one the cluster's own.

    DIR/cluster.key is for all controllers, apps and pools; DIR/members.toml lists who may connect;
    DIR/ROLE-NAME.key is for the new member alone. Clients get only their own.
    """
    from droppexd.cli.daemon_keys import make_key

    try:
        print(make_key(folder, Role(role), name))
    except (DroppexError, OSError) as error:
        raise typer.Exit(fail(error)) from None


@app.command("bucket-key")
def bucket_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the secret key goes.")],
) -> None:
    """Make the pair of keys that a bucket is signed with.

    FILE, readable by its owner alone, is for the controllers that write the bucket; the public key is
    printed, for all that read it.
    """
    from droppexd.bucket import make_signing_key

    try:
        public = make_signing_key(file)
    except (DroppexError, OSError) as error:
        raise typer.Exit(fail(error)) from None
    print(f'{file}: for controllers, as bucket_signing_key; and for every role:\nbucket_key = "{public}"')
