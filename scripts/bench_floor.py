"""The floor of the benchmark: the same processes, bytes, frames and hops over bare ZeroMQ.

A client, an app, a controller and six pools. Large files: chunks of 4 MiB cut into four pieces of 1 MiB,
and two more pieces of as many bytes where parity would be. Small files: one message to each of three
pools and one to the controller. Plain writes and reads; no checksum, no catalogue, no flush, no coding.
Run by `bench.py`, one process a role: python bench_floor.py ROLE ...

With DROPPEX_FLOOR_CURVE in the environment all sockets are encrypted, and DROPPEX_FLOOR_THREADS says how many
threads of libzmq each process has.
"""

import os
import sys
import time
from collections import deque
from pathlib import Path

import zmq

from droppexd.allocator import tune_allocator

CHUNK = 4 * 1024 * 1024
K, M = 4, 2
WINDOW = 4
"""Chunks in flight, as the app gives credit."""
SMALL_COPIES = 3


CURVE = os.environ.get("DROPPEX_FLOOR_CURVE", "").encode()
"""A secret key that all processes share, servers and clients, or nothing."""
THREADS = int(os.environ.get("DROPPEX_FLOOR_THREADS", "1"))


def new_socket(kind: int, *, serves: bool) -> zmq.Socket:
    """Make a socket, encrypted if that is wanted."""
    socket = zmq.Context.instance(THREADS).socket(kind)
    if CURVE:
        public = zmq.curve_public(CURVE)
        socket.curve_secretkey = CURVE
        if serves:
            socket.curve_server = True
        else:
            socket.curve_publickey = socket.curve_serverkey = public
    return socket


def bound(kind: int) -> zmq.Socket:
    """Bind a socket to a free port and tell it to the parent."""
    socket = new_socket(kind, serves=True)
    print(socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
    return socket


def connected(port: str) -> zmq.Socket:
    """Connect to a port."""
    socket = new_socket(zmq.DEALER, serves=False)
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


def pool(folder: str) -> None:
    """Write the pieces that come; serve those that are asked for."""
    socket = bound(zmq.ROUTER)
    large = os.open(Path(folder) / "large", os.O_RDWR | os.O_CREAT)
    small = os.open(Path(folder) / "small", os.O_RDWR | os.O_CREAT)
    while True:
        route, verb, number, *body = socket.recv_multipart(copy=False)
        at = int.from_bytes(number.bytes)
        match verb.bytes:
            case b"put":
                os.pwrite(large, body[0].buffer, at * (CHUNK // K))
                answer = b"ok"
            case b"get":
                answer = os.pread(large, CHUNK // K, at * (CHUNK // K))
            case b"sput":
                os.pwrite(small, body[0].buffer, at * 4096)
                answer = b"ok"
            case b"sget":
                answer = os.pread(small, 4096, at * 4096)
            case _:
                os.ftruncate(large, 0)
                answer = b"ok"
        socket.send_multipart([route, number, answer], copy=len(answer) < 65536)


def controller() -> None:
    """Answer at once."""
    socket = bound(zmq.ROUTER)
    while True:
        route, _, number = socket.recv_multipart()
        socket.send_multipart([route, number, b"ok"])


class App:
    """Cut and hand on; collect and hand back."""

    def __init__(self, ports: list[str]) -> None:
        self.front = bound(zmq.ROUTER)
        self.controller = connected(ports[0])
        self.pools = [connected(port) for port in ports[1:]]
        self.order = {one: index for index, one in enumerate([*self.pools, self.controller])}
        self.waiting: dict[bytes, list] = {}

    def run(self) -> None:
        """Serve for ever."""
        poller = zmq.Poller()
        for socket in (self.front, self.controller, *self.pools):
            poller.register(socket, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll():
                if socket is self.front:
                    self.ask(*socket.recv_multipart(copy=False))
                else:
                    self.answer(socket, *socket.recv_multipart(copy=False))

    def ask(self, route: zmq.Frame, verb: zmq.Frame, number: zmq.Frame, *body: zmq.Frame) -> None:
        """Hand a request on to those it concerns."""
        kind, at = verb.bytes, number.bytes
        if kind == b"put":
            view = body[0].buffer
            piece = len(view) // K
            pieces = [view[i * piece : (i + 1) * piece] for i in range(K)]
            for one, part in zip(self.pools, pieces + pieces[:M], strict=True):
                one.send_multipart([kind, at, part], copy=False)
            left = K + M
        elif kind == b"sput":
            for one in self.pools[:SMALL_COPIES]:
                one.send_multipart([kind, at, body[0].bytes])
            left = SMALL_COPIES
        elif kind == b"sget":
            self.controller.send_multipart([kind, at])
            left = 1
        else:
            targets = self.pools[:K] if kind == b"get" else self.pools
            for one in targets:
                one.send_multipart([kind, at])
            left = len(targets)
        self.waiting[at] = [route, kind, left, [b""] * len(self.order)]

    def answer(self, socket: zmq.Socket, number: zmq.Frame, body: zmq.Frame) -> None:
        """Take one answer; after the last, answer the client."""
        at = number.bytes
        request = self.waiting[at]
        route, kind, left, parts = request
        parts[self.order[socket]] = body
        request[2] = left - 1
        if left > 1:
            return
        if kind == b"sput" and socket is not self.controller:
            request[2] = 1
            self.controller.send_multipart([kind, at])
            return
        if kind == b"sget" and socket is self.controller:
            request[2] = 1
            self.pools[0].send_multipart([kind, at])
            return
        del self.waiting[at]
        self.front.send_multipart([route, number, *[part for part in parts if part]], copy=False)


def client(port: str) -> None:
    """Do what the lines of standard input say (`VERB PATH COUNT CONCURRENCY`); print the seconds."""
    socket = connected(port)
    for line in sys.stdin:
        verb, path, count, concurrency = line.split()
        started = time.perf_counter()
        match verb:
            case "put":
                transfer_out(socket, path, int(count))
            case "get":
                transfer_in(socket, path, int(count))
            case "sput" | "sget":
                small(socket, verb.encode(), int(count), int(concurrency))
            case _:
                socket.send_multipart([b"drop", (0).to_bytes(4)])
                socket.recv_multipart()
        print(time.perf_counter() - started, flush=True)


def transfer_out(socket: zmq.Socket, path: str, chunks: int) -> None:
    """Send a file in a window of chunks."""
    outstanding: deque[int] = deque()
    with Path(path).open("rb", buffering=0) as source:
        for number in range(chunks):
            if len(outstanding) == WINDOW:
                socket.recv_multipart(copy=False)
                outstanding.popleft()
            socket.send_multipart([b"put", number.to_bytes(4), source.read(CHUNK)], copy=False)
            outstanding.append(number)
        for _ in outstanding:
            socket.recv_multipart(copy=False)


def transfer_in(socket: zmq.Socket, path: str, chunks: int) -> None:
    """Fetch a file in a window of chunks."""
    with Path(path).open("wb", buffering=0) as target:
        asked = 0
        for done in range(chunks):
            while asked < chunks and asked < done + WINDOW:
                socket.send_multipart([b"get", asked.to_bytes(4)])
                asked += 1
            number, *parts = socket.recv_multipart(copy=False)
            os.pwritev(target.fileno(), [part.buffer for part in parts], int.from_bytes(number.bytes) * CHUNK)


def small(socket: zmq.Socket, verb: bytes, count: int, concurrency: int) -> None:
    """Put or get small files, so many at once."""
    body = [os.urandom(4096)] if verb == b"sput" else []
    asked = 0
    for done in range(count):
        while asked < count and asked < done + concurrency:
            socket.send_multipart([verb, asked.to_bytes(4), *body])
            asked += 1
        socket.recv_multipart()


def copier(port: str, folder: str) -> None:
    """Copy so many pieces from a pool to a new file, for each line of standard input; print the seconds.

    Each is kept: a pool that is copied to has no pages of an older file to write on either.
    """
    socket = connected(port)
    for copy, line in enumerate(sys.stdin):
        count = int(line)
        target = os.open(Path(folder) / f"copied-{copy}", os.O_RDWR | os.O_CREAT)
        started = time.perf_counter()
        asked = 0
        for done in range(count):
            while asked < count and asked < done + WINDOW * K:
                socket.send_multipart([b"get", asked.to_bytes(4)])
                asked += 1
            number, piece = socket.recv_multipart(copy=False)
            os.pwrite(target, piece.buffer, int.from_bytes(number.bytes) * (CHUNK // K))
        os.fsync(target)
        print(time.perf_counter() - started, flush=True)


ROLES = {
    "copier": copier,
    "pool": pool,
    "controller": controller,
    "app": lambda *ports: App(list(ports)).run(),
    "client": client,
}

if __name__ == "__main__":
    tune_allocator()
    ROLES[sys.argv[1]](*sys.argv[2:])
