"""Asking around from a machine with roles: what listens here, the controllers, and who may connect.

The same keys, and the same ways to find controllers, as `droppexd` has with this configuration.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

import trio

from droppexd.config import Config
from droppexd.daemon import ThreadsLeftBehind, system_runtime
from droppexd.doctor.disks import Clock, Folder, look_at_folder
from droppexd.doctor.peers import etcd_endpoints
from droppexd.doctor.ports import Listening, reached_at, split_address, try_to_bind
from droppexd.errors import DroppexError, KeyRefused
from droppexd.finding import Bucket, Finder
from droppexd.model import MemberRecord, Role
from droppexd.roles.admission import fetch
from droppexd.runtime import Runtime
from droppexd.wire.examining import ASK_S, Acquaintance, examine_peers
from droppexd.wire.group_messages import PeerReport
from droppexd.wire.keys import AllowList, MemberKey, TransportKeys
from droppexd.wire.member_messages import ListMembers, MembersListed
from droppexd.wire.rpc import Connections, Terms, open_connections
from droppexd.wire.zeromq import open_zeromq_transport

_DISK_S = 15.0
"""A folder that takes longer to look at hangs, as a share of the network can."""


class Asked(NamedTuple):
    """What one role of this machine heard with its key."""

    listening: Listening
    controllers: Sequence[PeerReport]
    members: Sequence[MemberRecord] | None
    """None when nobody could tell, or there are no keys."""
    refused: str
    """Why nobody lets the key in; empty when somebody does, or nobody answers."""


async def ask_around(config: Config, keys: Mapping[Role, MemberKey]) -> dict[Role, Asked]:
    """Ask for each role of a configuration, with its key where there are keys; all at once."""
    runtime = system_runtime()
    found: dict[Role, Asked] = {}
    addresses = await _controllers(config)

    async def ask(role: Role) -> None:
        found[role] = await _ask_as(role, config, keys.get(role), addresses, runtime)

    async with trio.open_nursery() as nursery:
        for role in config.roles:
            if keys or not config.keys_own:
                nursery.start_soon(ask, role)
            else:
                found[role] = Asked(await _listening(role, config, None, None), (), None, "")
    return {role: found[role] for role in config.roles}


async def _controllers(config: Config) -> tuple[str, ...]:
    """Return where controllers may be, other than on this machine's own address."""
    bucket = None
    if config.bucket:
        bucket = Bucket(config.bucket, bytes.fromhex(config.bucket_key), ThreadsLeftBehind())
    found = await Finder(config.controllers, bucket).find(0)
    own: set[str] = set()
    if Role.CONTROLLER in config.roles:
        own = {config.controller_listen, config.controller_advertise}
    return tuple(address for address in dict.fromkeys((*config.controllers, *found)) if address not in own)


async def _listening(
    role: Role, config: Config, report: PeerReport | None, advertised: PeerReport | None
) -> Listening:
    """Return what is at a role's address; where nobody answered, whether it is free."""
    address, taken = config.listen_address(role), 0
    if report is None or report.code:
        taken = await trio.to_thread.run_sync(try_to_bind, address)
    return Listening(role, address, report, taken, advertised)


async def _ask_as(
    role: Role, config: Config, key: MemberKey | None, controllers: Sequence[str], runtime: Runtime
) -> Asked:
    proof = None if key is None else TransportKeys(own=key.pair, cluster_public=key.cluster_public)
    async with (
        open_zeromq_transport(keys=proof) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        own, advertised, reports = await _examine(role, config, controllers, connections, runtime)
        listening = await _listening(role, config, own, advertised)
        asked = [*reports, *([own] if own is not None and role == Role.CONTROLLER else [])]
        told = [report for report in asked if not report.code]
        members = None if key is None else await _members([report.address for report in told], connections)
    refusals = [report for report in asked if report.code == KeyRefused.code]
    return Asked(listening, reports, members, refusals[0].failure if refusals and not told else "")


async def _examine(
    role: Role, config: Config, controllers: Sequence[str], connections: Connections, runtime: Runtime
) -> tuple[PeerReport | None, PeerReport | None, list[PeerReport]]:
    """Return reports of what listens at this role's address, where others reach it, and of controllers."""
    listen, advertise = config.listen_address(role), str(getattr(config, f"{role}_advertise"))
    own = [] if split_address(listen)[1] == 0 else [reached_at(listen)]
    elsewhere = [advertise] if advertise and advertise != listen else []
    peers = [Acquaintance(role, config.name, address) for address in (*own, *elsewhere)]
    peers += [Acquaintance(Role.CONTROLLER, "", address) for address in controllers]
    reports = await examine_peers(connections, runtime.clock, peers)
    first = reports.pop(0) if own else None
    second = reports.pop(0) if elsewhere else None
    return first, second, reports


async def _members(addresses: Sequence[str], connections: Connections) -> tuple[MemberRecord, ...] | None:
    """Return whose keys the cluster knows, as the first of these controllers tells."""

    async def ask(address: str, request: ListMembers) -> MembersListed:
        listed, _ = await connections.call(address, request, timeout_s=ASK_S)
        return listed

    for address in addresses:
        allowed = AllowList()
        try:
            await fetch(allowed, partial(ask, address))
        except DroppexError:
            continue
        return allowed.records
    return None


async def look_at_folders(config: Config, clock: Clock) -> dict[Role, Folder]:
    """Look at the data folders, one after another: they may be on one disk. A signal waits for that."""
    found: dict[Role, Folder] = {}
    for role in config.roles:
        if role == Role.APP:
            continue
        folder = config.folder(role)
        found[role] = Folder(folder, folder, f"it does not answer within {_DISK_S:g} s", None, 0, 0, None)
        with trio.move_on_after(_DISK_S, shield=True):
            found[role] = await trio.to_thread.run_sync(look_at_folder, folder, clock, abandon_on_cancel=True)
        await trio.lowlevel.checkpoint()
    return found


async def reach_etcd(config: Config) -> dict[str, str]:
    """Return which members of etcd cannot be connected to, and why; all are tried at once."""
    failures: dict[str, str] = {}

    async def reach(endpoint: str) -> None:
        parts = urlsplit(endpoint)
        failures[endpoint] = f"no connection within {ASK_S:g} s"
        with trio.move_on_after(ASK_S):
            try:
                await (await trio.open_tcp_stream(parts.hostname or "", parts.port or 0)).aclose()
                del failures[endpoint]
            except OSError as failure:
                failures[endpoint] = failure.strerror or str(failure)

    async with trio.open_nursery() as nursery:
        for endpoint in etcd_endpoints(config):
            nursery.start_soon(reach, endpoint)
    return failures
