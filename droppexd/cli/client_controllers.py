"""`droppex controllers` and what it does with one controller."""

from droppexd.cli.client_session import Session
from droppexd.cli.exits import ExitCode, UsageError, printable
from droppexd.cli.render import table
from droppexd.errors import NotFound
from droppexd.model import ControllerInfo, ControllerRole
from droppexd.wire.group_messages import ControllersListed


async def show_controllers(session: Session) -> int:
    """Print the controllers; fail when none of them is the master."""
    output = session.output
    listed = await session.client.controllers()
    if output.as_json:
        output.document(
            {
                "master": listed.master or None,
                "controllers": [controller_document(one) for one in listed.controllers],
            }
        )
    else:
        for line in controller_lines(listed):
            output.line(line)
    return ExitCode.OK if listed.master else ExitCode.UNREACHABLE


async def remove_controller(session: Session, name: str, *, force: bool = False) -> int:
    """Forget a controller."""
    output = session.output
    await session.client.remove_controller(name, force=force)
    if output.as_json:
        output.document({"name": name})
    output.say(f"the controller {printable(name)} is forgotten")
    return ExitCode.OK


async def promote_controller(session: Session, target: str, *, accept_loss: bool, confirmed: bool) -> int:
    """Make a controller the master; with `accept_loss` say first what may be lost. Raise UsageError."""
    output, client = session.output, session.client
    address = target if "://" in target else await _address_of(session, target)
    if accept_loss:
        plan = await client.promote(address, accept_loss=True, trial=True)
        if plan.reached < plan.needed:
            output.note(f"{plan.reached} of the {plan.needed} controllers that are needed can be reached")
            for line in plan.lost:
                output.note(f"this may be lost: {printable(line)}")
            if not confirmed:
                raise UsageError("nothing was changed; to begin a new history without that, add --yes")
    promoted = await client.promote(address, accept_loss=accept_loss)
    if output.as_json:
        output.document(
            {
                "address": address,
                "term": promoted.term,
                "revision": promoted.revision,
                "lost": list(promoted.lost),
            }
        )
    output.say(f"the controller at {printable(address)} is the master of term {promoted.term}")
    return ExitCode.OK


async def _address_of(session: Session, name: str) -> str:
    listed = await session.client.controllers()
    for one in listed.controllers:
        if one.name == name:
            return one.address
    raise NotFound(f"there is no controller {name!r}; name its address, tcp://HOST:PORT")


def controller_document(one: ControllerInfo) -> dict[str, object]:
    """Return a controller for programs."""
    return {
        "name": one.name,
        "address": one.address,
        "role": one.role,
        "term": one.term,
        "revision": one.revision,
        "lag": one.lag,
        "engine": one.engine,
        "master": one.master or None,
        "failure": one.failure or None,
        "warnings": list(one.warnings),
    }


def controller_lines(listed: ControllersListed) -> list[str]:
    """Return the controllers as a table for people, and below it what is wrong."""
    rows: list[tuple[str, ...]] = [("NAME", "ROLE", "TERM", "REVISION", "LAG", "ENGINE", "HEALTH", "ADDRESS")]
    rows += [_row(one) for one in listed.controllers]
    lines = list(table(rows, right=(2, 3, 4)))
    if not listed.master:
        lines.append("there is no master: no controller serves reads or writes now")
    for one in listed.controllers:
        name = printable(one.name) or printable(one.address)
        lines += [f"{name} takes no writes: {printable(one.failure)}"] if one.failure else []
        lines += [f"{name}: {printable(warning)}" for warning in one.warnings]
    return lines


def _row(one: ControllerInfo) -> tuple[str, ...]:
    name, address = printable(one.name) or "-", printable(one.address)
    if one.role == ControllerRole.UNREACHABLE:
        return (name, one.role, "-", "-", "-", "-", "-", address)
    health = "failed" if one.failure else "warning" if one.warnings else "ok"
    lag = str(one.lag) if one.role == ControllerRole.STANDBY else "-"
    return (name, one.role, str(one.term), str(one.revision), lag, one.engine, health, address)
