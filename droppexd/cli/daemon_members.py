"""`droppexd init`, `join-token` and `join`: what a person says when a cluster begins and grows."""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from droppexd.config import Config
from droppexd.errors import ConfigError, DroppexError
from droppexd.model import MEMBER_ROLES, SERVER_ROLES, Role

DirOption = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        help="Of configuration and keys. Default: /etc/droppex for root, else ~/.config/droppex.",
    ),
]
HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Of the data. Default: /var/lib/droppex for root, else ~/.local/share/droppex.",
    ),
]
NameOption = Annotated[
    str, typer.Option("--name", metavar="NAME", help="What people call it. Default: the host name.")
]
MachineOption = Annotated[
    str,
    typer.Option("--machine", metavar="NAME", help="What is lost together with it. Default: the host name."),
]
ZoneOption = Annotated[
    str, typer.Option("--zone", metavar="NAME", help="A room, building or provider that may fail as one.")
]
AddressOption = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="HOST[:PORT]",
        help="Where others reach this machine; the roles listen on the port, 7700 if not given, and the next "
        "two. Default: its own address on the way to the others.",
    ),
]


def _failed(error: Exception) -> typer.Exit:
    """Say what went wrong; return how to end."""
    from droppexd.cli.daemon import fail

    return typer.Exit(fail(error))


def _member_roles(names: list[str], among: Sequence[Role]) -> tuple[Role, ...]:
    """Return roles by their names, in the usual order. Raise ConfigError."""
    wrong = [name for name in names if name not in among]
    if wrong:
        raise ConfigError([f"{wrong[0]!r} is no role here: say {', '.join(among)}"])
    return tuple(role for role in among if role in names)


def init(
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role", metavar="ROLE", help="What runs here, with the controller: app, pool, or both."
        ),
    ] = None,
    folder: DirOption = None,
    data: HomeOption = None,
    name: NameOption = "",
    machine: MachineOption = "",
    zone: ZoneOption = "",
    address: AddressOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Begin a cluster: make its id, its keys and the configuration of its first machine.

    That machine runs a controller, an app and a pool unless --role says otherwise. What is there already is
    left as it is. `droppexd join-token` then prints the line with which other machines join.
    """
    from droppexd.cli.daemon_join import begin_cluster, describe_machine, next_steps

    try:
        roles = _member_roles([*(role or ("app", "pool")), "controller"], SERVER_ROLES)
        described = describe_machine(
            os.environ, folder=folder, data=data, name=name, machine=machine, zone=zone, address=address,
            towards="",
        )  # fmt: skip
        begun = begin_cluster(described, roles)
    except (DroppexError, OSError) as error:
        raise _failed(error) from None
    if as_json:
        made = [str(file) for file in begun.made]
        print(json.dumps({"cluster": begun.cluster, "config": str(described.config), "made": made}, indent=2))
        return
    if begun.made:
        print(f"made {described.config}: the cluster {begun.cluster}, {', '.join(roles)} at {described.host}")
    else:
        where = f" at {begun.controller}" if begun.controller else ""
        print(f"{described.config} is there already: the cluster {begun.cluster}{where}; nothing was changed")
    print("\n".join(next_steps(described, roles, os.environ, controller=begun.controller)))


def join_token(
    role: Annotated[
        list[str] | None,
        typer.Option("--role", metavar="ROLE", help="What may join: pool, app, controller, client; several."),
    ] = None,
    ttl: Annotated[str, typer.Option("--ttl", metavar="DURATION", help="How long it is good for.")] = "1h",
    uses: Annotated[
        int, typer.Option("--uses", metavar="N", min=1, max=1000, help="How many machines may join with it.")
    ] = 1,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            envvar="DROPPEXD_CONFIG",
            help="The configuration of a controller. Default: droppex.toml where `droppexd init` makes it.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print one line with which a machine joins: `droppexd join LINE` there. Run it beside a controller.

    The line is a secret until it was used or has expired, and worth nothing then.
    """
    import trio

    from droppexd.cli.daemon_join import CONFIG_FILE, config_folder
    from droppexd.config import parse_duration
    from droppexd.daemon import make_token
    from droppexd.wire.member_messages import MAX_TOKEN_MS
    from droppexd.wire.tokens import format_token

    try:
        roles = _member_roles(role or ["pool"], MEMBER_ROLES)
        try:
            ttl_s = parse_duration(ttl)
        except ValueError as error:
            raise ConfigError([f"--ttl: {error}"]) from error
        if ttl_s * 1000 > MAX_TOKEN_MS:
            raise ConfigError([f"--ttl: {ttl} is too long: a token is good for 30 days at most"])
        file = config or config_folder(os.environ) / CONFIG_FILE
        loaded = Config.load({}, os.environ, file)
        token, expires_ms = trio.run(partial(make_token, loaded, roles, uses=uses, ttl_s=ttl_s))
    except (DroppexError, OSError) as error:
        raise _failed(error) from None
    line = format_token(token)
    if as_json:
        document = {"token": line, "roles": list(roles), "uses": uses, "expires_ms": expires_ms}
        print(json.dumps(document, indent=2))
        return
    print(line)
    machines = "one machine" if uses == 1 else f"{uses} machines"
    print(f"for {machines} as {', '.join(roles)}, good for {ttl}: droppexd join LINE", file=sys.stderr)


def join(
    line: Annotated[
        str, typer.Argument(metavar="TOKEN", help="What `droppexd join-token` printed; - reads it.")
    ],
    role: Annotated[
        list[str] | None,
        typer.Option("--role", metavar="ROLE", help="Only this of what the token is for; several."),
    ] = None,
    folder: DirOption = None,
    data: HomeOption = None,
    name: NameOption = "",
    machine: MachineOption = "",
    zone: ZoneOption = "",
    address: AddressOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make this machine a part of a cluster: its keys, known to all the others, and its configuration.

    Nothing that is there is overwritten, and what was interrupted may be repeated.
    """
    from droppexd.cli.daemon_join import describe_machine, has_joined, join_cluster, next_steps
    from droppexd.wire.tokens import parse_token

    try:
        parsed = parse_token(sys.stdin.readline() if line == "-" else line)
        among = tuple(one for one in MEMBER_ROLES if one in parsed.roles)
        roles = _member_roles(role or list(parsed.roles), among)
        described = describe_machine(
            os.environ, folder=folder, data=data, name=name, machine=machine, zone=zone, address=address,
            towards=parsed.controllers[0],
        )  # fmt: skip
        known = has_joined(described, roles)
        made = () if known else join_cluster(described, parsed, roles)
    except (DroppexError, OSError) as error:
        raise _failed(error) from None
    if as_json:
        print(
            json.dumps({"name": described.name, "roles": list(roles), "made": list(map(str, made))}, indent=2)
        )
        return
    if known:
        print(
            f"{known} is there already: nothing was changed. To join anew move it and keys/ away; "
            "to join another cluster give --dir"
        )
        return
    print(f"{described.name} is a member: {', '.join(roles)} at {described.host}")
    print("\n".join(next_steps(described, roles, os.environ)))
