"""One `droppex` command from start to exit code: a client, its signals, and its errors told to the user."""

import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar, TypeVarTuple

import trio

from droppexd.allocator import tune_allocator
from droppexd.cli.client_settings import ClientSettings, load_settings
from droppexd.cli.exits import ExitCode, ReaderGone, exit_code, leaves
from droppexd.cli.render import Output, discard_stdout
from droppexd.client import Client, OnWait, Patience, open_client
from droppexd.daemon import system_runtime
from droppexd.errors import DroppexError
from droppexd.wire.keys import load_keys
from droppexd.wire.zeromq import open_zeromq_transport

CONNECT_S = 4.0
"""An app that is not there after so long is called unreachable."""

_DEBUG_VARIABLE = "DROPPEX_DEBUG"

Ts = TypeVarTuple("Ts")
T = TypeVar("T")


class GlobalOptions(NamedTuple):
    """The options in front of the command."""

    app: str | None = None
    config: Path | None = None
    quiet: bool = False
    as_json: bool = False


class Session(NamedTuple):
    """What a command works with."""

    client: Client
    output: Output


Work = Callable[[Session], Awaitable[int]]
"""A command's work; returns its exit code."""


def make_output(options: GlobalOptions, *, as_json: bool = False, quiet: bool = False) -> Output:
    """Return the standard streams as a command uses them."""
    for stream in (sys.stdout, sys.stderr):
        # A name may hold what the terminal's encoding lacks.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    return Output(quiet=quiet or options.quiet, as_json=as_json or options.as_json)


def run_command(
    options: GlobalOptions,
    output: Output,
    work: Work,
    *,
    abandon_blocking: bool = False,
    connect_first: bool = True,
) -> int:
    """Do a command's work with a client and return the exit code; tell the user about errors.

    With `abandon_blocking` an interrupt does not wait for reads and writes that hang on somebody else: for
    commands that use pipes. Without `connect_first` the work itself finds out whether the app is there.
    """

    def run() -> int:
        settings = load_settings(options.app, options.config, os.environ)
        return trio.run(_until_signal, settings, output, work, abandon_blocking, connect_first)

    return guarded(output, run)


def guarded(output: Output, run: Callable[[], int]) -> int:
    """Return what `run` returns, or the exit code of its error, which the user is told."""
    try:
        code = run()
        output.flush()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except ReaderGone:
        discard_stdout()
        return ExitCode.READER_GONE
    except (DroppexError, OSError) as error:
        output.error(error)
        return exit_code(error)
    except BaseExceptionGroup as group:
        return _tell_group(output, group)
    return code


def _tell_group(output: Output, group: BaseExceptionGroup[BaseException]) -> int:
    """Tell the errors that ended the tasks of a command; return the exit code of the first."""
    if os.environ.get(_DEBUG_VARIABLE):
        raise group
    errors = leaves(group)
    if any(isinstance(error, ReaderGone) for error in errors):
        discard_stdout()
        return ExitCode.READER_GONE
    output.error(errors[0])
    return exit_code(errors[0])


async def _until_signal(
    settings: ClientSettings, output: Output, work: Work, abandon_blocking: bool, connect_first: bool
) -> int:
    """Do the work; SIGINT and SIGTERM cancel it, and decide the exit code.

    The first signal cancels the work and not the client, with which the work may still clean up: give up its
    upload, for one. A second signal waits for nothing.
    """
    received: list[int] = []
    code: int = ExitCode.FAILURE
    working = trio.CancelScope()

    async def watch(signals: AsyncIterator[int]) -> None:
        async for number in signals:
            scope = nursery.cancel_scope if received else working
            received.append(number)
            scope.cancel()

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, signals)
                patience = Patience(total_s=settings.patience_s, on_wait=_waiting_note(output))
                async with _opened_client(settings, patience, abandon_blocking) as client:
                    with working:
                        if connect_first:
                            await client.connect(timeout_s=CONNECT_S)
                        code = await work(Session(client, output))
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup:
            if not received:  # What fails while an interrupted command cleans up is the interrupt's doing.
                raise
    if received:
        return ExitCode.INTERRUPTED if received[0] == signal.SIGINT else ExitCode.TERMINATED
    return code


@asynccontextmanager
async def _opened_client(
    settings: ClientSettings, patience: Patience, abandon_blocking: bool
) -> AsyncIterator[Client]:
    tune_allocator()
    runtime = system_runtime()
    if abandon_blocking:
        runtime = replace(runtime, run_blocking=_run_abandonable)
    keys = load_keys(settings.key) if settings.key else None
    async with (
        open_zeromq_transport(keys=keys) as transport,
        open_client(settings.app, transport, runtime, patience=patience) as client,
    ):
        yield client


def _waiting_note(output: Output) -> OnWait:
    """Return what tells that the app is waited for, once for each way in which it is away."""
    told: set[str] = set()

    def note(error: DroppexError, left_s: float) -> None:
        if str(error) not in told:
            told.add(str(error))
            output.note(f"{error}; trying for {left_s:.0f} s")

    return note


def _run_abandonable(function: Callable[[*Ts], T], *args: *Ts) -> Awaitable[T]:
    """Run a blocking function in a thread that is left behind when the command is cancelled.

    Such a thread reads standard input or writes standard output, and both end with the process.
    """
    return trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)
