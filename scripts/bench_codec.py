"""The codec of the benchmark: one chunk of 4 MiB at 4+2, beside bare ISA-L. Prints a JSON line a figure."""

import ctypes
import json
import os
import time
from collections.abc import Callable
from statistics import median

from droppexd.allocator import tune_allocator
from droppexd.coding import encode_chunk, rebuild_pieces
from droppexd.coding.code import parity_matrix
from droppexd.coding.kernels import IsalKernel, available_kernels, best_kernel
from droppexd.model import ExtentId, Layout

CHUNK = 4 * 1024 * 1024
LAYOUT = Layout(4, 2)
EXTENT = ExtentId(1, 1)
ROUNDS = 5


def rate(work: Callable[[], object], repeats: int) -> float:
    """Return MB/s of one chunk's file data."""
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return repeats * CHUNK / 1e6 / (time.perf_counter() - started)


def compare(name: str, work: Callable[[], object], floor: Callable[[], object] | None, repeats: int) -> None:
    """Take turns and print the medians."""
    values, floors = [], []
    for _ in range(ROUNDS):
        if floor is not None:
            floors.append(rate(floor, repeats))
        values.append(rate(work, repeats))
    row = {
        "name": name,
        "value": median(values),
        "unit": "MB/s",
        "floor": median(floors) if floors else None,
    }
    print(json.dumps(row), flush=True)


def bare_isal(path: str) -> Callable[[], object]:
    """Return ISA-L itself at work on one chunk, into buffers that are there already."""
    library = ctypes.CDLL(path)
    piece = CHUNK // LAYOUT.k
    sources = [ctypes.create_string_buffer(os.urandom(piece), piece) for _ in range(LAYOUT.k)]
    outputs = [ctypes.create_string_buffer(piece) for _ in range(LAYOUT.m)]
    tables = ctypes.create_string_buffer(32 * LAYOUT.k * LAYOUT.m)
    library.ec_init_tables(LAYOUT.k, LAYOUT.m, b"".join(parity_matrix(LAYOUT)), tables)
    source_pointers = (ctypes.c_void_p * LAYOUT.k)(*map(ctypes.addressof, sources))
    output_pointers = (ctypes.c_void_p * LAYOUT.m)(*map(ctypes.addressof, outputs))

    def code(_alive: object = (sources, outputs)) -> None:
        library.ec_encode_data(piece, LAYOUT.k, LAYOUT.m, tables, source_pointers, output_pointers)

    return code


def main() -> None:
    """Measure coding and rebuilding."""
    tune_allocator()
    chunk = os.urandom(CHUNK)
    view = memoryview(chunk)
    piece = CHUNK // LAYOUT.k
    sources = [view[n * piece : (n + 1) * piece] for n in range(LAYOUT.k)]
    matrix = parity_matrix(LAYOUT)
    best = best_kernel()
    bare = bare_isal(best.path) if isinstance(best, IsalKernel) else None
    for kernel in available_kernels():
        compare(
            f"code 4+2, {kernel.name} (floor: bare ISA-L)",
            lambda kernel=kernel: kernel.apply(matrix, sources),
            bare,
            100 if kernel is best else 1,
        )
    compare(
        "code 4+2 and checksums (floor: bare ISA-L)",
        lambda: encode_chunk(EXTENT, LAYOUT, 0, chunk),
        bare,
        100,
    )
    pieces = dict(enumerate(encode_chunk(EXTENT, LAYOUT, 0, chunk).pieces))
    left = {index: pieces[index] for index in (1, 3, 4, 5)}
    compare(
        "rebuild 2 of 4+2 (floor: bare ISA-L)",
        lambda: rebuild_pieces(LAYOUT, left, [0, 2]),
        bare,
        100,
    )


if __name__ == "__main__":
    main()
