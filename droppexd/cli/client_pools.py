"""`droppex pools` and what it does with one pool."""

import math

import trio

from droppexd.cli.client_session import Session
from droppexd.cli.exits import ExitCode, printable
from droppexd.cli.progress import progress_gauge
from droppexd.cli.render import count_text, pool_document, pool_lines, trouble_lines
from droppexd.errors import NotEnoughShards, PeerError
from droppexd.model import Membership
from droppexd.wire.pool_messages import PoolDrained

_POLL_S = 1.0
_PATIENCE_S = 60.0
"""For so long a cluster that does not answer is waited for."""
_STUCK_S = 30.0
"""For so long nothing of the rest may have anywhere to go before the waiting ends."""


async def show_pools(session: Session, *, exact: bool) -> int:
    """Print the pools."""
    output = session.output
    pools = (await session.client.status()).status.pools
    if output.as_json:
        output.document([pool_document(pool) for pool in pools])
        return ExitCode.OK
    for line in [*pool_lines(pools, exact=exact), *trouble_lines(pools)]:
        output.line(line)
    return ExitCode.OK


async def replace_pool(session: Session, pool: str, *, force: bool) -> int:
    """Remove a pool for good and say what happens now."""
    output = session.output
    replaced = await session.client.replace_pool(pool, force=force)
    if output.as_json:
        output.document({"number": replaced.number, "name": replaced.name, "shards": replaced.shards})
    output.say(
        f"pool {printable(replaced.name)} is given up: {count_text(replaced.shards, 'shard')} "
        "to be rebuilt on the others; `droppex status` shows how far that is"
    )
    return ExitCode.OK


async def drain_pool(session: Session, pool: str, *, undo: bool, force: bool, wait: bool) -> int:
    """Have a pool emptied, and wait for that; or have it used like the others again."""
    output = session.output
    told = await session.client.drain_pool(pool, undo=undo, force=force)
    name = printable(told.name)
    if wait and not undo:
        told = await _wait_until_empty(session, told)
    if output.as_json:
        output.document(
            {
                "number": told.number,
                "name": told.name,
                "membership": told.membership,
                "shards": told.shards,
                "stuck": told.stuck,
            }
        )
    elif undo or told.membership != Membership.DRAINING:
        output.say(f"pool {name} is used like the others again")
    elif told.shards:
        output.say(
            f"pool {name} is being emptied: {count_text(told.shards, 'shard')} to move; `droppex status` "
            "shows how far that is"
        )
    else:
        output.say(f"pool {name} is empty: `droppex pools remove {name}` takes it out of the cluster")
    if not told.shards or not wait or told.membership != Membership.DRAINING:
        return ExitCode.OK
    raise NotEnoughShards(
        f"{count_text(told.stuck, 'shard')} of pool {told.name} have nowhere to go: add a pool, or free "
        "space on the others; it stays as it is until then",
        [],
    )


async def _wait_until_empty(session: Session, told: PoolDrained) -> PoolDrained:
    """Ask until a pool is empty, used again, or what is left has nowhere to go; Ctrl-C ends the asking."""
    first, heard, stuck_since = told.shards, trio.current_time(), math.inf
    with progress_gauge(session.output, f"draining {told.name}", unit="shards") as gauge:
        while told.shards and told.membership == Membership.DRAINING:
            gauge.show(first - told.shards, first)
            await trio.sleep(_POLL_S)
            now = trio.current_time()
            try:
                told = await session.client.drain_pool(str(told.number), ask=True)
            except PeerError:
                if now - heard > _PATIENCE_S:
                    raise
                continue
            heard, first = now, max(first, told.shards)
            stuck_since = min(stuck_since, now) if told.stuck >= told.shards else math.inf
            if now - stuck_since > _STUCK_S:
                break
    return told


async def remove_pool(session: Session, pool: str) -> int:
    """Remove a pool for good that was emptied."""
    output = session.output
    removed = await session.client.remove_pool(pool)
    if output.as_json:
        output.document({"number": removed.number, "name": removed.name})
    output.say(
        f"pool {printable(removed.name)} is no part of the cluster any more: stop it, and its folder can be "
        "deleted"
    )
    return ExitCode.OK
