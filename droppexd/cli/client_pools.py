"""`droppex pools` and what it does with one pool."""

from droppexd.cli.client_session import Session
from droppexd.cli.exits import ExitCode, printable
from droppexd.cli.render import count_text, pool_document, pool_lines, trouble_lines


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
