"""A cluster as its app sees it: its controllers, apps, pools and files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from droppexd import __version__
from droppexd.doctor.peers import (
    THIS_MACHINE,
    ClockAhead,
    answers,
    clocks_of,
    judge_clocks,
    judge_versions,
    place_of,
    round_trip_text,
    silent,
)
from droppexd.doctor.verdicts import Level, Verdict, error, ok, warning
from droppexd.errors import DroppexError, RemoteProtocolError
from droppexd.model import ClusterStatus, ControllerInfo, Membership, PoolInfo, PoolState, Role
from droppexd.wire.group_messages import ControllersListed, PeerReport

_NEARLY = 20
"""A pool with less than a twentieth of its disk left, beyond its reserve, is nearly full."""


class Cluster(NamedTuple):
    """What was heard of a cluster. What is None was not told, and `failures` say why, by the question."""

    app: PeerReport
    """As this machine sees it."""
    peers: tuple[PeerReport, ...] | None
    """As the app sees them, itself among them."""
    status: ClusterStatus | None
    controllers: ControllersListed | None
    failures: Mapping[str, DroppexError]


def judge_cluster(cluster: Cluster) -> list[Verdict]:
    """Return what there is to say of a cluster."""
    if cluster.app.code:
        advice = "is droppexd running there? `droppexd doctor` there says more; --app names another app"
        return [silent(cluster.app, advice)]
    app = cluster.app
    verdicts = [ok("peers", f"the {place_of(app)} answers this machine in {round_trip_text(app)}")]
    verdicts += _judge_failures(cluster.failures)
    peers = cluster.peers or ()
    verdicts += judge_controllers(cluster)
    others = [report for report in peers if report.role != app.role or report.name != app.name]
    verdicts += [_judge_app(report) for report in others if report.role == Role.APP]
    if cluster.status is not None:
        by_address = {report.address: report for report in peers if report.role == Role.POOL}
        for pool in cluster.status.pools:
            if pool.membership != Membership.REMOVED:
                verdicts += judge_pool(pool, by_address.get(pool.address))
        verdicts += judge_files(cluster.status)
    return [*verdicts, *judge_clocks(_clocks(app, others)), *judge_versions(peers or (app,))]


def _judge_failures(failures: Mapping[str, DroppexError]) -> list[Verdict]:
    """Say what the app was asked and did not tell. That of the controllers is told among them."""
    verdicts = []
    for question, failure in failures.items():
        text = f"the app does not tell how its {question} are: {failure}"
        if isinstance(failure, RemoteProtocolError):
            verdicts.append(warning("peers", text, f"install droppex {__version__} there as well"))
        elif question != "controllers":
            verdicts.append(error("peers", text, "`droppexd doctor` on its machine says whom it reaches"))
    return verdicts


def _clocks(app: PeerReport, others: Sequence[PeerReport]) -> list[ClockAhead]:
    """Return all clocks as this machine's sees them, by way of the app's."""
    seen = clocks_of([app], THIS_MACHINE)
    return [THIS_MACHINE, *seen, *(clocks_of(others, seen[0]) if seen else ())]


def judge_controllers(cluster: Cluster) -> list[Verdict]:
    """Say whether there is a master, and how each controller is."""
    listed = cluster.controllers
    if listed is None:
        text = f"the controllers cannot be told: {cluster.failures.get('controllers', 'nobody was asked')}"
        return [error("peers", text, "`droppexd doctor` on the app's machine says whether it reaches one")]
    verdicts = []
    if not listed.master:
        advice = "start the controllers; `droppex controllers promote` makes one the master where all are up"
        verdicts.append(error("peers", "no controller is the master: nothing can be read or written", advice))
    reports = {report.address: report for report in cluster.peers or () if report.role == Role.CONTROLLER}
    for one in listed.controllers:
        verdicts += _judge_controller(one, reports.get(one.address), master=one.address == listed.master)
    return verdicts


def _judge_controller(one: ControllerInfo, report: PeerReport | None, *, master: bool) -> list[Verdict]:
    who = f"controller {one.name}" if one.name not in ("", "controller") else "controller"
    subject = one.name or one.address
    gone = f"start droppexd there; if it is gone for good: `droppex controllers remove {one.name or 'NAME'}`"
    if report is not None and report.code:
        return [silent(replace(report, name=report.name or one.name), gone)]
    if report is None and one.role == "unreachable":
        text = f"the {who} at {one.address} does not answer"
        return [error("peers", text, gone, subject=subject)]
    verdicts = []
    if one.failure:
        text = f"the {who} at {one.address} takes no writes: {one.failure}"
        verdicts.append(
            error("peers", text, "`droppexd doctor` there says what its disk is like", subject=subject)
        )
    verdicts += [
        warning(
            "peers",
            f"the {who} at {one.address}: {said}",
            "`droppex controllers` shows how it is",
            subject=subject,
        )
        for said in one.warnings
    ]
    if verdicts:
        return verdicts
    speed = f" in {round_trip_text(report)}" if report is not None else ""
    leads = ", and is the master" if master else ""
    return [ok("peers", f"the {who} at {one.address} answers{speed}{leads}", subject=subject)]


def _judge_app(report: PeerReport) -> Verdict:
    if not report.code:
        return answers(report)
    # Apps do not work with each other: a firewall may keep them apart, and nothing is amiss.
    advice = "start droppexd there, unless a firewall keeps apps apart; one that is gone is forgotten"
    return replace(silent(report, advice), level=Level.WARNING)


def judge_pool(pool: PoolInfo, report: PeerReport | None) -> list[Verdict]:
    """Say how a pool is: what the master makes of it, and what came of asking it."""
    who, subject = f"pool {pool.name} on {pool.machine or '?'} at {pool.address}", pool.name
    if report is not None and report.code:
        advice = f"start droppexd there; if its disk or machine is lost: `droppex pools replace {pool.name}`"
        return [silent(report, advice, who=f"{who}, {pool.state} to the controllers,")]
    if pool.state in (PoolState.DOWN, PoolState.OUT):
        text = f"the {who} is {pool.state} to the controllers" + (", and answers the app" if report else "")
        return [error("peers", text, "`droppexd doctor` there says whether it reaches them", subject=subject)]
    verdicts = []
    if pool.state == PoolState.READ_ONLY:
        text = f"the {who} takes no writes: {pool.trouble or 'it does not say why'}"
        advice = (
            "`droppexd doctor` there says what its disk is like; `droppex pools replace` when it is broken"
        )
        verdicts.append(error("disk", text, advice, subject=subject))
    elif pool.state == PoolState.CHECKING:
        text = f"the {who} runs on an older copy of its folder, and compares it with the records"
        verdicts.append(warning("peers", text, "wait: it counts when it is through", subject=subject))
    elif pool.capacity and pool.free * _NEARLY < pool.capacity and pool.membership == Membership.MEMBER:
        share = f"{100 * pool.free / pool.capacity:.1f}% of its disk left beyond the reserve"
        verdicts.append(warning("disk", f"the {who} is nearly full: {share}", "add a pool", subject=subject))
    if verdicts:
        return verdicts
    if report is None:
        return [ok("peers", f"the {who} is up", subject=subject)]
    return [ok("peers", f"the {who} answers in {round_trip_text(report)}", subject=subject)]


def judge_files(status: ClusterStatus) -> list[Verdict]:
    """Say whether all files can be read, and would survive one more loss."""
    verdicts = []
    unreadable = sum(count.files for count in status.survival if count.survives < 0)
    bare = sum(count.files for count in status.survival if count.survives == 0)
    if unreadable:
        text = f"{_files(unreadable)} cannot be read now"
        verdicts.append(error("files", text, "bring the pools back that do not answer"))
    if bare:
        text = f"{_files(bare)} would not survive the loss of one more pool"
        verdicts.append(
            warning("files", text, "`droppex status` says whether they are being mended; else add pools")
        )
    if not status.files:
        return [ok("files", "there are no files yet")]
    return verdicts or [ok("files", f"{_files(status.files)} can be read, and would survive one more loss")]


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"
