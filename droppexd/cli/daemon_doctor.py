"""`droppexd doctor`: what may be wrong with this machine, and what to do about it."""

import os
import signal
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import trio

from droppexd.cli.daemon_join import (
    CONFIG_FILE,
    SERVICE_UNIT,
    SERVICE_USER,
    SYSTEM_FOLDER,
    config_folder,
)
from droppexd.cli.doctor_report import report, silence_logs
from droppexd.cli.exits import ExitCode, ReaderGone
from droppexd.cli.render import Output, discard_stdout
from droppexd.coding.kernels import best_kernel
from droppexd.config import Config
from droppexd.doctor.around import Asked, ask_around, look_at_folders, reach_etcd
from droppexd.doctor.disks import Folder, judge_folder
from droppexd.doctor.keys import check_key_files, judge_membership, refused
from droppexd.doctor.machine import (
    judge_clock_state,
    judge_coding,
    judge_memory,
    judge_open_files,
    judge_software,
    measure_coding,
    memory_needed,
    read_clock_state,
    read_memory,
    read_open_files,
)
from droppexd.doctor.peers import (
    THIS_MACHINE,
    clocks_of,
    judge_clocks,
    judge_controllers,
    judge_etcd,
    judge_versions,
)
from droppexd.doctor.ports import judge_listening
from droppexd.doctor.verdicts import Verdict, error, ok, warning
from droppexd.errors import ConfigError, KeyRefused, StoreError
from droppexd.model import Role
from droppexd.store.disk import usual_reserve
from droppexd.wire.group_messages import PeerReport
from droppexd.wire.keys import MemberKey


def examine_machine(flags: dict[str, object], file: Path | None, output: Output) -> int:
    """Check this machine, and what its configuration says; print what was found; return the exit code."""
    silence_logs()
    verdicts, config = check_config(flags, file)
    verdicts += check_machine(config)
    if config is None:
        return _tell(output, verdicts)
    said_of_keys, keys = check_key_files(config)
    verdicts += said_of_keys
    received, found = trio.run(partial(_until_signal, config, keys))
    if received:
        return ExitCode.INTERRUPTED if received == signal.SIGINT else ExitCode.TERMINATED
    asked, folders, unreached = found
    for role, folder in folders.items():
        verdicts += judge_folder(role, folder, _reserve(config, folder))
    return _tell(output, [*verdicts, *judge_asked(asked, keys), *judge_etcd(config, unreached)])


def _tell(output: Output, verdicts: list[Verdict]) -> int:
    """Print verdicts; return the exit code."""
    try:
        code = report(output, verdicts)
        output.flush()
    except ReaderGone:
        discard_stdout()
        return ExitCode.READER_GONE
    return code


def check_config(flags: dict[str, object], file: Path | None) -> tuple[list[Verdict], Config | None]:
    """Read the configuration; return what there is to say of it, and it if it can be used."""
    named = file
    if file is None and not flags:
        named = usual_config()
    if named is None and not flags:
        text = f"there is no {config_folder(os.environ) / CONFIG_FILE}: this machine has no roles"
        advice = "`droppexd init` or `droppexd join` make it; --config names another"
        return [warning("config", text, advice)], None
    try:
        config = Config.load(flags, os.environ, named)
    except ConfigError as problem:
        advice = "mend it: droppex.toml.example explains all options"
        return [error("config", line, advice) for line in problem.problems], None
    said = f"{named}: " if named else ""
    text = f"{said}{', '.join(config.roles)} on {config.machine}, named {config.name}"
    return [ok("config", text), *_judge_user(named)], config


def usual_config() -> Path | None:
    """Return the configuration of this user, or else that of the machine; None when there is neither."""
    usual = (config_folder(os.environ) / CONFIG_FILE, SYSTEM_FOLDER / CONFIG_FILE)
    return next((file for file in usual if file.exists()), None)


def _judge_user(file: Path | None) -> list[Verdict]:
    """Say so when root looks at what a service does as another user, who may do less."""
    if os.geteuid() != 0 or file is None or file.parent != SYSTEM_FOLDER or not SERVICE_UNIT.exists():
        return []
    text = f"root may read and write what the services, which run as {SERVICE_USER}, may not"
    return [warning("config", text, f"run it as they do: `sudo -u {SERVICE_USER} droppexd doctor`")]


def check_machine(config: Config | None) -> list[Verdict]:
    """Check what is the same for whatever runs here."""
    needed_bytes = 0 if config is None else memory_needed(config)
    return [
        *judge_software(),
        *judge_coding(measure_coding(best_kernel(), time.perf_counter)),
        *judge_open_files(read_open_files()),
        *judge_memory(read_memory(), needed_bytes),
        *judge_clock_state(read_clock_state()),
    ]


def judge_asked(asked: dict[Role, Asked], keys: list[MemberKey]) -> list[Verdict]:
    """Say what came of asking around with the keys of this machine."""
    verdicts = [judge_listening(one.listening) for one in asked.values()]
    for key in keys:
        one = asked.get(key.member.role)
        if one is not None and one.refused:
            verdicts.append(refused(key, "it is no member's, or revoked"))
        elif one is not None and one.members is not None:
            verdicts.append(judge_membership(key, one.members))
    best = _best_reports(asked)
    return [
        *verdicts,
        *judge_controllers(best),
        *judge_clocks([THIS_MACHINE, *clocks_of(best, THIS_MACHINE)]),
        *judge_versions([*best, *(one.listening.report for one in asked.values() if one.listening.report)]),
    ]


def _best_reports(asked: dict[Role, Asked]) -> list[PeerReport]:
    """Return one report of each controller, of whichever role it answered; not of a refused key."""
    best: dict[str, PeerReport] = {}
    for one in asked.values():
        for heard in one.controllers:
            if heard.code != KeyRefused.code and (heard.address not in best or not heard.code):
                best[heard.address] = heard
    return list(best.values())


def _reserve(config: Config, folder: Folder) -> int:
    """Return what the pool leaves free of the disk of its folder."""
    if config.pool_reserve is not None:
        return config.pool_reserve
    try:
        return usual_reserve(folder.looked_at)
    except StoreError:
        return 0  # That nothing can be told of the disk is said already.


_Found = tuple[dict[Role, Asked], dict[Role, Folder], dict[str, str]]


async def _until_signal(config: Config, keys: list[MemberKey]) -> tuple[int, _Found]:
    """Ask around and look at the folders, or return the signal that came meanwhile.

    A signal waits for what is written to a folder, so that it is removed as well.
    """
    received: list[int] = []
    found: _Found = ({}, {}, {})

    async def watch(signals: AsyncIterator[int]) -> None:
        received.append(await anext(signals))
        nursery.cancel_scope.cancel()

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, signals)
            asked = await ask_around(config, {key.member.role: key for key in keys})
            unreached = await reach_etcd(config)
            found = asked, await look_at_folders(config, time.perf_counter), unreached
            nursery.cancel_scope.cancel()
    return (received[0] if received else 0), found
