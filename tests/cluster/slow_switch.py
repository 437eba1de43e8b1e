"""A switch that is slow and loses frames, for kernels without netem: slow_switch.py DELAY_MS LOSS_PERCENT PORT...

Each frame that arrives at one of the interfaces leaves at the one that its receiver was heard at, or at all others,
DELAY_MS later, or of LOSS_PERCENT of them not at all. It says "ready" and runs until its standard input is closed.
"""

import random
import selectors
import socket
import sys
import time
from collections import deque
from contextlib import suppress

SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
EVERY_PROTOCOL = socket.htons(3)
MOST_BYTES = 128 * 1024
"""More than a frame has. Between two ends of one machine TCP sends many segments as one frame of up to 64 KiB."""

VNET_BYTES = 10
"""The size of that header, which stands before the frame: six bytes of the receiver, six of the sender."""

MOST_WAITING = 4096
"""Frames on their way. More are lost, as a real switch has it."""


def open_port(name):
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, EVERY_PROTOCOL)
    # With this header checksums and segments that the sender left to its network card stay left to it.
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    port.bind((name, 0))
    port.setblocking(False)
    return port


class Switch:
    """The ports, and the frames that wait, in the order in which they leave."""

    def __init__(self, names, delay_s, loss):
        self.ports = [open_port(name) for name in names]
        self._delay_s = delay_s
        self._loss = loss
        self._chance = random.Random(1)
        self._waiting = deque()
        self._heard = {}

    def take(self, port):
        """Take all frames that have arrived at a port."""
        while True:
            try:
                frame = port.recv(MOST_BYTES)
            except OSError:
                return  # There is none, or the link is down.
            self._heard[frame[VNET_BYTES + 6 : VNET_BYTES + 12]] = port
            if self._chance.random() >= self._loss and len(self._waiting) < MOST_WAITING:
                self._waiting.append((time.monotonic() + self._delay_s, port, frame))

    def deliver(self):
        """Send what has waited long enough; return after how many seconds there is more to send, or None."""
        while self._waiting:
            due, source, frame = self._waiting[0]
            if (left_s := due - time.monotonic()) > 0:
                return left_s
            self._waiting.popleft()
            known = self._heard.get(frame[VNET_BYTES : VNET_BYTES + 6])
            for port in self.ports if known is None else [known]:
                if port is not source:
                    send(port, frame)
        return None


def send(port, frame):
    with suppress(OSError):  # The link is down or its queue is full: the frame is lost.
        port.send(frame)


def main():
    delay_ms, loss_percent, *names = sys.argv[1:]
    switch = Switch(names, float(delay_ms) / 1000, float(loss_percent) / 100)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    for port in switch.ports:
        selector.register(port, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select(switch.deliver()):
            if key.fileobj is sys.stdin:
                return
            switch.take(key.fileobj)


if __name__ == "__main__":
    main()
