"""The async client that `droppex`, tests and other programs use.

async with open_client("tcp://127.0.0.1:7701", transport, runtime) as client:
    receipt = await client.put_bytes("folder/name", b"content")
    content = await client.get_bytes("folder/name")
"""

from droppexd.client.client import Client, OnStale, open_client
from droppexd.client.download import Download
from droppexd.client.orphans import OrphanListing, OrphanState, OrphanVersion
from droppexd.client.patience import OnWait, Patience
from droppexd.client.putting import layout_text

__all__ = [
    "Client",
    "Download",
    "OnStale",
    "OnWait",
    "OrphanListing",
    "OrphanState",
    "OrphanVersion",
    "Patience",
    "layout_text",
    "open_client",
]
