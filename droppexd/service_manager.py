"""Telling systemd how this process is: ready, well, stopping.

The protocol is a datagram of lines to the socket that NOTIFY_SOCKET names (sd_notify(3)). Where there is no
service manager nothing is told.
"""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

import trio

_MOST_STATUS = 256


class ServiceManager:
    """The service manager that started this process, if one did and wants to hear."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = watchdog_s

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "ServiceManager":
        """Return the one that the environment tells of. A watchdog of another process is not ours to feed."""
        address = environment.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return cls()
        watchdog_s = 0.0
        if environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with suppress(ValueError):
                watchdog_s = int(environment.get("WATCHDOG_USEC", "0")) / 1e6
        return cls(address, watchdog_s)

    def ready(self, status: str) -> None:
        """Say that everything serves."""
        self._tell(f"READY=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        """Say what is going on, for `systemctl status`."""
        self._tell(f"STATUS={_line(status)}")

    def stopping(self) -> None:
        """Say that the process ends in order."""
        self._tell("STOPPING=1\nSTATUS=stopping")

    async def watch(self) -> None:
        """Say now and then that the event loop turns, for ever: one that hangs is killed and started anew."""
        if self._watchdog_s <= 0:
            return
        while True:
            self._tell("WATCHDOG=1")
            await trio.sleep(self._watchdog_s / 3)

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        # A manager that is gone or does not keep up is no reason to end, nor to wait.
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as teller,
        ):
            teller.setblocking(False)
            teller.sendto(text.encode(), self._address)


def _line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:_MOST_STATUS])
