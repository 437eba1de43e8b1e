"""Peers: whether they answer, whether their clocks agree, and whether they run the same release."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median_low
from typing import NamedTuple

from droppexd import __version__
from droppexd.config import Config
from droppexd.doctor.verdicts import Verdict, error, ok, warning
from droppexd.errors import KeyRefused, NotAuthorised, VersionMismatch
from droppexd.model import Role
from droppexd.wire.examining import ANOTHER
from droppexd.wire.group_messages import PeerReport
from droppexd.wire.messages import PROTOCOL_VERSION

_SET = "set what is wrong, and start a time service there: systemd-timesyncd, chrony or ntpd"

_AHEAD_MS = 2000
"""Clocks that are further apart are told of. They decide nothing but when a join token expires: what people
are shown as the time of a file, and in logs, is wrong."""


def name_of(report: PeerReport) -> str:
    """Return how people call a peer; one that has no name of its own goes by its address."""
    if report.name in ("", report.role):
        return f"{report.role} at {report.address}"
    return f"{report.role} {report.name}"


def place_of(report: PeerReport) -> str:
    """Return who a peer is and where."""
    name = name_of(report)
    return name if name.endswith(report.address) else f"{name} at {report.address}"


def round_trip_text(report: PeerReport) -> str:
    """Return how fast a peer answered."""
    return f"{report.round_trip_us / 1000:.1f} ms"


def answers(report: PeerReport) -> Verdict:
    """Return that a peer answers."""
    text = f"the {place_of(report)} answers in {round_trip_text(report)}"
    return ok("peers", text, subject=report.name or report.address)


def silent(report: PeerReport, advice: str, *, who: str = "") -> Verdict:
    """Return that a peer does not answer as it should, and what to do.

    `advice` is for one that is not there. `who` says more of the peer than its report.
    """
    text = f"the {who or place_of(report)} does not answer: {report.failure}"
    return error("peers", text, _known_advice(report.code) or advice, subject=report.name or report.address)


def _known_advice(code: str) -> str:
    if code == VersionMismatch.code:
        return f"install droppex {__version__} there, or here what runs there"
    if code in (KeyRefused.code, NotAuthorised.code):
        return "`droppex members` shows whose keys are let in"
    if code == ANOTHER:
        return "give each role an address of its own, and restart what was given another's"
    return ""


def judge_controllers(reports: Iterable[PeerReport]) -> list[Verdict]:
    """Say which controllers answer to a machine that has the keys of a role."""
    advice = "is droppexd running there, and does a firewall let this machine through?"
    return [
        silent(report, advice) if report.code else answers(report)
        for report in reports
        if report.role == Role.CONTROLLER
    ]


def etcd_endpoints(config: Config) -> Sequence[str]:
    """Return where a controller of this configuration expects etcd."""
    return config.catalog_endpoints if Role.CONTROLLER in config.roles else ()


def judge_etcd(config: Config, failures: Mapping[str, str]) -> list[Verdict]:
    """Say which members of etcd can be connected to: most of them must be there for a controller to lead."""
    return [
        error(
            "peers",
            f"etcd at {endpoint} cannot be reached: {failures[endpoint]}",
            "is etcd running there, and does a firewall let this machine through?",
            subject=endpoint,
        )
        if endpoint in failures
        else ok("peers", f"etcd at {endpoint} can be reached", subject=endpoint)
        for endpoint in etcd_endpoints(config)
    ]


# -- clocks ----------------------------------------------------------------------------------------


class ClockAhead(NamedTuple):
    """A clock as one of them, whose `ahead_ms` is 0, sees it."""

    who: str
    ahead_ms: int
    unsure_ms: float


def clocks_of(reports: Iterable[PeerReport], asker: ClockAhead) -> list[ClockAhead]:
    """Return the clocks of those that answered, seen as that of their asker is seen."""
    return [
        ClockAhead(
            f"the {name_of(report)}",
            asker.ahead_ms + report.ahead_ms,
            asker.unsure_ms + report.round_trip_us / 2000,
        )
        for report in reports
        if not report.code and report.ahead_ms is not None
    ]


THIS_MACHINE = ClockAhead("this machine", 0, 0.0)


def judge_clocks(clocks: Sequence[ClockAhead]) -> list[Verdict]:
    """Say whose clock is wrong: those that are far from what most say."""
    if len(clocks) < 2:
        return []
    usual = median_low(clock.ahead_ms for clock in clocks)
    wrong = [clock for clock in clocks if abs(clock.ahead_ms - usual) > _AHEAD_MS + clock.unsure_ms]
    if not wrong:
        most = max(abs(clock.ahead_ms - usual) for clock in clocks)
        return [ok("clock", f"{len(clocks)} clocks agree to {most / 1000:.3f} s")]
    if len(clocks) == 2:
        one, other = (clock.who for clock in clocks)
        apart = abs(clocks[0].ahead_ms - clocks[1].ahead_ms)
        return [warning("clock", f"the clocks of {one} and {other} are {apart / 1000:.1f} s apart", _SET)]
    return [
        warning(
            "clock", f"the clock of {clock.who} is {_off(clock.ahead_ms - usual)}", _SET, subject=clock.who
        )
        for clock in wrong
    ]


def _off(ahead_ms: int) -> str:
    return f"{abs(ahead_ms) / 1000:.1f} s {'ahead of' if ahead_ms > 0 else 'behind'} those of most"


# -- versions --------------------------------------------------------------------------------------


def judge_versions(reports: Iterable[PeerReport], own: str = __version__) -> list[Verdict]:
    """Say who runs another release than this one. Those that do not answer are told of elsewhere."""
    answering = [report for report in reports if not report.code]
    others = [report for report in answering if report.release != own]
    verdicts = [
        warning(
            "versions",
            f"the {name_of(report)} runs {_release(report)}, and this is droppex {own}",
            "install the same release everywhere",
            subject=report.name or report.address,
        )
        for report in others
    ]
    same = len(answering) - len(others)
    if same:
        pythons = Counter(report.python for report in answering if report.release == own)
        said = ", ".join(f"Python {python}" for python in sorted(pythons))
        who = "1 peer runs" if same == 1 else f"{same} peers run"
        verdicts.insert(0, ok("versions", f"{who} droppex {own}, protocol {PROTOCOL_VERSION}, {said}"))
    return verdicts


def _release(report: PeerReport) -> str:
    return (
        f"droppex {report.release}" if report.release else "an older release, which does not say its number"
    )
