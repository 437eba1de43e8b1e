"""`droppex members`: who may connect, and revoking."""

from datetime import UTC, datetime

from droppexd.cli.client_session import Session
from droppexd.cli.exits import ExitCode, printable
from droppexd.cli.render import table
from droppexd.model import MemberRecord, Role


async def show_members(session: Session, *, everybody: bool) -> int:
    """Print the members, and with `everybody` the revoked as well."""
    output = session.output
    members = [member for member in await session.client.members() if everybody or not member.revoked_ms]
    members.sort(key=lambda member: (member.role, member.name, member.joined_ms))
    if output.as_json:
        output.document({"members": [member_document(member) for member in members]})
        return ExitCode.OK
    if not members:
        output.say("there are no members: this cluster has no keys, and only this machine reaches it")
        return ExitCode.OK
    rows = [("ROLE", "NAME", "KEY", "JOINED", "STATE")]
    rows += [
        (
            member.role,
            printable(member.name),
            member.public.decode()[:8],
            _when(member.joined_ms),
            f"revoked {_when(member.revoked_ms)}" if member.revoked_ms else "member",
        )
        for member in members
    ]
    for line in table(rows):
        output.line(line)
    return ExitCode.OK


async def revoke_member(session: Session, name: str, role: str) -> int:
    """Never let a member in again."""
    output = session.output
    revoked = await session.client.revoke_member(name, role)
    if output.as_json:
        output.document({"revoked": [member_document(member) for member in revoked]})
    for member in revoked:
        output.say(f"the {member.role} {printable(member.name)} is let in no more")
        if member.role == Role.POOL:
            command = f"droppex pools replace {printable(member.name)}"
            later = f"what it has is rebuilt once it is out; `{command}` does it now"
            output.say(f"unless it was removed before, {later}")
    return ExitCode.OK


def member_document(member: MemberRecord) -> dict[str, object]:
    """Return a member as JSON has it."""
    return {
        "role": member.role,
        "name": member.name,
        "public": member.public.decode(),
        "joined_ms": member.joined_ms,
        "revoked_ms": member.revoked_ms or None,
    }


def _when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
