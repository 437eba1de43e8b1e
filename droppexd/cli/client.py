"""`droppex`, the terminal client: what its commands are called and which options they take.

`droppex --help` is to be quick: this module imports typer and nothing heavier; each command imports what it
needs.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from droppexd import __version__
from droppexd.cli.exits import EXIT_CODES_HELP, ExitCode

if TYPE_CHECKING:
    from droppexd.cli.client_session import Session, Work

T = TypeVar("T")

app = typer.Typer(
    name="droppex",
    help="Store files on the machines you already have, and get them back.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
BytesFlag = Annotated[bool, typer.Option("--bytes", help="Print sizes as plain numbers of bytes.")]
ForceFlag = Annotated[bool, typer.Option("--force", "-f", help="Replace what has that name already.")]
LongFlag = Annotated[bool, typer.Option("--long", "-l", help="Sizes and times as well.")]


def main() -> None:
    """Run `droppex`."""
    try:
        app(prog_name="droppex")
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"droppex {__version__}")
        raise typer.Exit


@app.callback()
def global_options(
    context: typer.Context,
    app_address: Annotated[
        str | None,
        typer.Option(
            "--app",
            metavar="ADDRESS",
            help="The app to talk to, tcp://HOST:PORT. Else DROPPEX_APP, else a file.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The client file. Else DROPPEX_CONFIG, else ~/.config/droppex/client.toml.",
        ),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep the options in front of the command for the command."""
    del version
    context.obj = (app_address, config, quiet, as_json)


class _Command:
    """What every command starts with: its output, and how to end with the exit code of its work."""

    def __init__(self, context: typer.Context, *, as_json: bool = False, quiet: bool = False) -> None:
        from droppexd.cli.client_session import GlobalOptions, make_output

        self.options = GlobalOptions(*context.obj)
        self.output = make_output(self.options, as_json=as_json, quiet=quiet)

    def run(self, work: "Work", *, abandon_blocking: bool = False) -> int:
        """Do the work with a client and return the exit code."""
        from droppexd.cli.client_session import run_command

        return run_command(self.options, self.output, work, abandon_blocking=abandon_blocking)

    def finish(self, work: "Work", *, abandon_blocking: bool = False) -> NoReturn:
        """Do the work with a client and end with its exit code."""
        raise typer.Exit(self.run(work, abandon_blocking=abandon_blocking))

    def checked(self, check: "Callable[[], T]") -> "T":
        """Return what `check` makes of the command line; end with one line when it is wrong."""
        from droppexd.cli.exits import exit_code
        from droppexd.errors import DroppexError

        try:
            return check()
        except DroppexError as error:
            self.output.error(error)
            raise typer.Exit(exit_code(error)) from None


@app.command()
def put(
    context: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="LOCAL... [REMOTE]",
            help="Files or, with -r, folders; `-` is standard input. The last of several is the remote name, "
            "or with a slash at its end the remote folder.",
        ),
    ],
    recursive: Annotated[bool, typer.Option("-r", "--recursive", help="Store whole folders.")] = False,
    force: ForceFlag = False,
    layout: Annotated[
        str | None,
        typer.Option(metavar="K+M", help="How to code the file, as in 4+2; else the cluster chooses."),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Store files; print a receipt for each.

    A name that exists is refused unless --force is given. With -r or several files each file is stored
    whole or not at all, but not all of them together: when some fail, the others are stored, and the exit
    code is 1. Links and special files in a folder are left out. A name without a folder goes to the folder
    `files`.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_arguments import parse_layout, plan_put
    from droppexd.cli.client_transfers import PutOptions, reads_streams
    from droppexd.cli.client_transfers import put as put_files

    uploads = command.checked(lambda: plan_put(arguments))
    options = PutOptions(recursive, force, command.checked(lambda: parse_layout(layout)))
    command.finish(
        lambda session: put_files(session, uploads, options), abandon_blocking=reads_streams(uploads)
    )


@app.command()
def get(
    context: typer.Context,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="A file or, with -r, a folder.")],
    local: Annotated[
        str | None,
        typer.Argument(metavar="[LOCAL]", help="Where to; `-` is standard output. Else its own name, here."),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("-r", "--recursive", help="Fetch everything below a folder.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="START-END",
            help="Only these bytes, both included, from 0; or START- or -LAST.",
        ),
    ] = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Fetch a file, or with -r a folder.

    A local file that exists is refused unless --force is given. A file appears under its name when all of
    it is there and its BLAKE3 matched, and not before. With -r this holds for each file, not for all of them
    together: when some fail, the others are fetched, and the exit code is 1. Nothing is written outside
    LOCAL, and no link in it is followed.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_arguments import STREAM, WHOLE, parse_range, refuse_get
    from droppexd.cli.client_transfers import GetOptions, get_tree
    from droppexd.cli.client_transfers import get as get_file

    command.checked(lambda: refuse_get(local, recursive=recursive, part=part, as_json=command.output.as_json))
    options = GetOptions(force, WHOLE if part is None else command.checked(lambda: parse_range(part)))
    work = get_tree if recursive else get_file
    command.finish(lambda session: work(session, remote, local, options), abandon_blocking=local == STREAM)


@app.command()
def cat(
    context: typer.Context, names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Files.")]
) -> None:
    """Write files to standard output."""
    command = _Command(context)

    from droppexd.cli.client_transfers import cat as cat_files

    command.finish(lambda session: cat_files(session, names), abandon_blocking=True)


@app.command()
def ls(
    context: typer.Context,
    prefixes: Annotated[
        list[str] | None, typer.Argument(metavar="[PREFIX]...", help="`folder/`, or how names begin.")
    ] = None,
    long: LongFlag = False,
    recursive: Annotated[
        bool, typer.Option("-r", "--recursive", help="All names, not only folders.")
    ] = False,
    stale_ok: Annotated[
        bool,
        typer.Option(
            "--stale-ok", help="Without a master, list what another controller knows, and how old it is."
        ),
    ] = False,
    exact: BytesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """List names, in order; folders end in a slash."""
    command = _Command(context, as_json=as_json)

    from droppexd.cli.client_names import ListOptions, list_names

    options = ListOptions(long, recursive, exact, stale_ok)
    command.finish(lambda session: list_names(session, prefixes or [], options))


@app.command()
def find(
    context: typer.Context,
    pattern: Annotated[
        str,
        typer.Argument(metavar="PATTERN", help="A glob over whole names: `*` `**` `?` `[...]`. Quote it."),
    ],
    long: LongFlag = False,
    exact: BytesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """List the names that match a pattern."""
    command = _Command(context, as_json=as_json)

    from droppexd.cli.client_names import ListOptions, find_names

    options = ListOptions(long=long, exact=exact)
    command.finish(lambda session: find_names(session, pattern, options))


@app.command()
def stat(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Files.")],
    exact: BytesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Show all that is known of a file: content, layout, where each shard is, what it survives."""
    command = _Command(context, as_json=as_json)

    from droppexd.cli.client_names import stat_names

    command.finish(lambda session: stat_names(session, names, exact=exact))


@app.command()
def rm(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Files or, with -r, folders.")],
    recursive: Annotated[
        bool, typer.Option("-r", "--recursive", help="Remove everything below a folder; asks first.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Remove files.

    With -r each file is removed by itself: when some fail, the others are removed, and the exit code is 1.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_names import remove

    if recursive and not yes:
        _confirm_removal(command, names)
    command.finish(lambda session: remove(session, names, recursive=recursive))


def _confirm_removal(command: _Command, names: list[str]) -> None:
    """Ask, outside of the event loop, so that Ctrl-C ends the question as well."""
    from droppexd.cli.client_arguments import refuse_unasked
    from droppexd.cli.client_names import Amount, count_below

    command.checked(lambda: refuse_unasked("rm -r", on_terminal=sys.stdin.isatty()))
    counted: list[Amount] = []

    async def count(session: "Session") -> int:
        counted.append(await count_below(session, names))
        return 0

    code = command.run(count)
    if code:
        raise typer.Exit(code)
    if not _says_yes(f"Remove {counted[0]}?"):
        raise typer.Exit(1)


def _says_yes(question: str) -> bool:
    """Ask on the terminal, with no as the default. typer's own question makes a Ctrl-C an exit code of 1."""
    typer.echo(f"{question} [y/N] ", nl=False, err=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


@app.command()
def mv(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Its new name, or `folder/`.")],
    force: ForceFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Give a file another name. Its bytes stay where they are."""
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_names import rename

    command.finish(lambda session: rename(session, source, target, force=force, keep=False))


@app.command()
def cp(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The further name, or `folder/`.")],
    force: ForceFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Give a file one more name. No byte is copied; either name may be replaced or removed later."""
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_names import rename

    command.finish(lambda session: rename(session, source, target, force=force, keep=True))


@app.command()
def status(
    context: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="Fail when something needs a person.")] = False,
    exact: BytesFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show the cluster at a glance."""
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_names import show_status

    command.finish(lambda session: show_status(session, exact=exact, check=check))


pools = typer.Typer(
    help="List the pools: where they are, how they are, how full they are.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(pools, name="pools", invoke_without_command=True)


@pools.callback()
def list_pools(context: typer.Context, exact: BytesFlag = False, as_json: JsonFlag = False) -> None:
    """List the pools: where they are, how they are, how full they are."""
    if context.invoked_subcommand is not None:
        return
    command = _Command(context, as_json=as_json)

    from droppexd.cli.client_pools import show_pools

    command.finish(lambda session: show_pools(session, exact=exact))


@pools.command()
def replace(
    context: typer.Context,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="The name or the number of a pool.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even if the pool is up, or files are lost with it.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Give up a pool whose disk or machine is lost, at once and for good.

    Its shards are rebuilt on the other pools. It cannot come back; an empty folder may take its name.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_arguments import refuse_unasked
    from droppexd.cli.client_pools import replace_pool

    if not yes:
        command.checked(lambda: refuse_unasked("pools replace", on_terminal=sys.stdin.isatty()))
        if not _says_yes(f"Give up pool {pool} for good and rebuild its shards on the others?"):
            raise typer.Exit(1)
    command.finish(lambda session: replace_pool(session, pool, force=force))


@pools.command()
def drain(
    context: typer.Context,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="The name or the number of a pool.")],
    undo: Annotated[bool, typer.Option("--undo", help="Use it like the others again.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even if the others are too few for some of what is on it.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until it is empty. Ctrl-C ends the waiting alone.")
    ] = True,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Move everything off a pool, so that it can be removed. Nothing has less redundancy on the way.

    Nothing new is put there from now on. `droppex pools remove POOL` then takes it out.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_pools import drain_pool

    command.finish(lambda session: drain_pool(session, pool, undo=undo, force=force, wait=wait))


@pools.command("remove")
def remove_pool(
    context: typer.Context,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="The name or the number of a pool.")],
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Take a pool that was drained out of the cluster, for good. Refused while anything is on it."""
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_pools import remove_pool

    command.finish(lambda session: remove_pool(session, pool))


controllers = typer.Typer(
    help="List the controllers: which is the master, and how each of them is.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(controllers, name="controllers", invoke_without_command=True)


@controllers.callback()
def list_controllers(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List the controllers: which is the master, and how each of them is.

    LAG is how many transactions a standby is behind the master. Without a master the exit code is that of a
    cluster which cannot be reached.
    """
    if context.invoked_subcommand is not None:
        return
    command = _Command(context, as_json=as_json)

    from droppexd.cli.client_controllers import show_controllers

    command.finish(show_controllers)


@controllers.command("remove")
def remove_controller(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of a controller.")],
    force: Annotated[
        bool, typer.Option("--force", help="It never comes back, though too few others are left without it.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Forget a controller that is gone for good. It must be stopped."""
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_controllers import remove_controller

    command.finish(lambda session: remove_controller(session, name, force=force))


@controllers.command("promote")
def promote_controller(
    context: typer.Context,
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The address of a standby, or its name.")],
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss",
            help="Though too few others can be reached: what they alone know of is lost.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Lose it.")] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Make a standby the master, where each controller has a copy of the catalogue (engine sqlite).

    It takes over what the others have that it lacks, and the former master follows it from then on. Without
    enough of the others it is refused: something that was acknowledged may be known to those alone.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_controllers import promote_controller

    command.finish(
        lambda session: promote_controller(session, address, accept_loss=accept_loss, confirmed=yes)
    )


members = typer.Typer(
    help="List the members: whose keys may connect, in which role.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(members, name="members", invoke_without_command=True)


@members.callback()
def list_members(
    context: typer.Context,
    everybody: Annotated[bool, typer.Option("--all", help="Those that were revoked as well.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the members: whose keys may connect, in which role."""
    if context.invoked_subcommand is not None:
        return
    command = _Command(context, as_json=as_json)

    from droppexd.cli.client_members import show_members

    command.finish(lambda session: show_members(session, everybody=everybody))


@members.command("revoke")
def revoke_member(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of a member.")],
    role: Annotated[
        str, typer.Option("--role", metavar="ROLE", help="Which, when several roles have this name.")
    ] = "",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Never let a member in again. Its connections get no more answers from then on."""
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_members import revoke_member

    command.finish(lambda session: revoke_member(session, name, role))


@app.command()
def relayout(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A file, or a folder that ends in a slash; else all files."),
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", metavar="K+M", help="The layout to give them, as in 4+2.")
    ] = None,
    exact: BytesFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Code stored files anew in the layout that new files get now, as after a cluster has grown.

    Files are read and written as before meanwhile. What was done stays done when this is interrupted: the
    next `relayout` goes on from there. Without --layout a file whose layout survives more losses keeps it.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_arguments import parse_layout
    from droppexd.cli.client_relayout import relayout_files

    wanted = command.checked(lambda: parse_layout(layout))
    command.finish(lambda session: relayout_files(session, name, wanted, exact=exact))


@app.command()
def verify(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A file; else everything that the pools hold.")
    ] = None,
    exact: BytesFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Have the pools read and verify every shard of a file, or all that they hold; report what is wrong.

    What is damaged is told to the controller as well. Without NAME it is a scrub at full speed on every pool
    that is up; it goes on when this command is interrupted, and the next `verify` joins it. The exit code is
    1 when a shard is damaged, missing or cannot be judged, 5 when the file cannot be read now, 6 when nothing
    is wrong but a pool could not be asked.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_verify import verify_everything, verify_file

    if name is None:
        command.finish(lambda session: verify_everything(session, exact=exact))
    command.finish(lambda session: verify_file(session, name, exact=exact))


uploads = typer.Typer(
    help="Puts of large files that were interrupted: list them, or give them up.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(uploads, name="uploads", invoke_without_command=True)


@uploads.callback()
def list_uploads(context: typer.Context, exact: BytesFlag = False, as_json: JsonFlag = False) -> None:
    """List puts of large files that were interrupted, or are under way.

    The same put goes on where it stopped. What nobody goes on with is given up after a week (`uploads_kept`).
    """
    if context.invoked_subcommand is not None:
        return
    command = _Command(context, as_json=as_json)

    from droppexd.cli.client_uploads import list_uploads

    command.finish(lambda session: list_uploads(session, exact=exact))


@uploads.command("drop")
def drop_uploads(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[UPLOAD]...", help="Uploads as `droppex uploads` lists them."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that are listed.")] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Give uploads up: what they have stored is cleared away. A put that is under way fails."""
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_uploads import drop_uploads

    command.finish(lambda session: drop_uploads(session, names or [], everything=everything))


@app.command()
def doctor(
    context: typer.Context,
    as_json: JsonFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only what is not ok.")] = False,
) -> None:
    """Check the cluster as it is seen from here, and say what to do.

    The client file and its key; the way to the app; and as the app sees them all controllers, apps and
    pools: whether they answer, how fast, what time it is there and what they run. The exit code is 1 when
    there is an error, and 0 when all is ok or there are warnings alone. `droppexd doctor` checks a machine
    with roles.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_doctor import examine_cluster

    raise typer.Exit(examine_cluster(command.options, command.output))


orphans = typer.Typer(
    help="What pools hold of files that the catalogue never knew: list it, adopt it or drop it.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(orphans, name="orphans", invoke_without_command=True)

VersionsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[VERSION]...", help="Versions as `droppex orphans` lists them.")
]
AllFlag = Annotated[bool, typer.Option("--all", help="All that is listed.")]


@orphans.callback()
def orphans_alone(context: typer.Context, exact: BytesFlag = False, as_json: JsonFlag = False) -> None:
    """List what pools hold of files that the catalogue never knew."""
    if context.invoked_subcommand is None:
        list_orphans(context, exact=exact, as_json=as_json)


@orphans.command("list")
def list_orphans(context: typer.Context, exact: BytesFlag = False, as_json: JsonFlag = False) -> None:
    """List versions that pools hold shards of and the catalogue never knew. They are kept until told.

    `whole` can be read, as far as its shards tell. `open` too, but it may have been cut: its last part is
    full. `incomplete` cannot be read with what is there. `damaged` are shards that do not say whose they are.
    """
    command = _Command(context, as_json=as_json)

    from droppexd.cli.client_orphans import list_versions

    command.finish(lambda session: list_versions(session, exact=exact))


@orphans.command()
def adopt(
    context: typer.Context,
    versions: VersionsArgument = None,
    everything: AllFlag = False,
    to: Annotated[
        str, typer.Option("--to", metavar="FOLDER", help="The folder below which they get their names.")
    ] = "lost+found",
    force: Annotated[
        bool, typer.Option("--force", help="Even if pools are away that may hold more of them.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Give versions a name again, below `lost+found`. Each is read whole and verified first.

    With --all what cannot be read is left where it is. That nothing is missing in a file which was adopted
    is likely and not certain: look at it. `droppex stat` shows that it was adopted.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_orphans import adopt_versions, choose

    choice = command.checked(lambda: choose(versions or [], everything=everything))
    command.finish(lambda session: adopt_versions(session, choice, to, force=force))


@orphans.command()
def drop(
    context: typer.Context,
    versions: VersionsArgument = None,
    everything: AllFlag = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Drop shards of versions that the catalogue never knew, for good; asks first.

    The pools do it after the grace that every removal has. Nothing that has a record is touched.
    """
    command = _Command(context, as_json=as_json, quiet=quiet)

    from droppexd.cli.client_arguments import refuse_unasked
    from droppexd.cli.client_orphans import OrphanAmount, choose, count_versions, drop_versions

    choice = command.checked(lambda: choose(versions or [], everything=everything))
    if not yes:
        command.checked(lambda: refuse_unasked("orphans drop", on_terminal=sys.stdin.isatty()))
        counted: list[OrphanAmount] = []

        async def count(session: "Session") -> int:
            counted.append(await count_versions(session, choice))
            return 0

        code = command.run(count)
        if code:
            raise typer.Exit(code)
        if not _says_yes(f"Drop {counted[0]} for good?"):
            raise typer.Exit(1)
    command.finish(lambda session: drop_versions(session, choice))


if __name__ == "__main__":
    main()
