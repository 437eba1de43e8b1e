"""`droppex doctor`: what may be wrong with a cluster, as it is seen from here, and what to do about it."""

import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from droppexd.cli.client_session import GlobalOptions, Session, guarded, run_command
from droppexd.cli.client_settings import ClientSettings, load_settings
from droppexd.cli.doctor_report import report, silence_logs
from droppexd.cli.render import Output
from droppexd.client import Client
from droppexd.doctor.cluster import Cluster, judge_cluster
from droppexd.doctor.keys import judge_membership, read_key, refused
from droppexd.doctor.machine import judge_software
from droppexd.doctor.verdicts import Level, Verdict, error, ok, worst
from droppexd.errors import ConfigError, DroppexError, KeyRefused, PeerTimeout
from droppexd.wire.keys import MemberKey

_ANSWER_S = 20.0
"""For so long the app may ask others; without a master it would look for one longer."""


def examine_cluster(options: GlobalOptions, output: Output) -> int:
    """Check this machine as a client, and the cluster; print what was found; return the exit code."""
    silence_logs()
    verdicts, settings = check_settings(options)
    key = read_key(settings.key, verdicts) if settings is not None and settings.key else None
    if worst(verdicts) == Level.ERROR:
        return guarded(output, lambda: report(output, verdicts))

    async def work(session: Session) -> int:
        assert settings is not None
        return report(output, [*verdicts, *await check_cluster(session.client, settings.app, key)])

    return run_command(options, output, work, connect_first=False)


def check_settings(options: GlobalOptions) -> tuple[list[Verdict], ClientSettings | None]:
    """Read the settings of the client; return what there is to say, and them if they can be used."""
    verdicts = judge_software()
    try:
        settings = load_settings(options.app, options.config, os.environ)
    except ConfigError as problem:
        advice = "name the app with --app or in the client file: docs/cli.md tells where that is looked for"
        return [*verdicts, *(error("config", line, advice) for line in problem.problems)], None
    without = "" if settings.key else "; no key: only an app on this machine can be reached"
    return [*verdicts, ok("config", f"the app is {settings.app}{without}", subject=settings.app)], settings


async def check_cluster(client: Client, address: str, key: MemberKey | None) -> list[Verdict]:
    """Ask the app, and have it ask all others; return what there is to say."""
    app = await client.examine_app()
    if app.code == KeyRefused.code and key is not None:
        return [refused(key, "it is no member's, or revoked")]
    told: dict[str, Any] = {}
    failures: dict[str, DroppexError] = {}

    async def ask(question: str, call: Callable[[], Awaitable[object]]) -> None:
        failures[question] = PeerTimeout(f"{address} did not answer in time")
        with trio.move_on_after(_ANSWER_S):
            try:
                told[question] = await call()
                del failures[question]
            except DroppexError as failure:
                failures[question] = failure

    if not app.code:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "peers", partial(client.examine_peers, timeout_s=_ANSWER_S))
            nursery.start_soon(ask, "pools", client.status)
            nursery.start_soon(ask, "controllers", client.controllers)
            if key is not None:
                nursery.start_soon(ask, "members", client.members)
    cluster = Cluster(
        app=app,
        peers=told["peers"].peers if "peers" in told else None,
        status=told["pools"].status if "pools" in told else None,
        controllers=told.get("controllers"),
        failures=failures,
    )
    known = [judge_membership(key, told["members"])] if key is not None and "members" in told else []
    return [*known, *judge_cluster(cluster)]
