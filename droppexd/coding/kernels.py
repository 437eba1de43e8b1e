"""Kernels apply a matrix of the code to whole pieces. All give the same bytes; they differ in speed.

Measured on one core, 4 MiB at 4+2: ISA-L 12 000 MB/s, portable 200 MB/s, reedsolo itself 1 MB/s.
ISA-L (Intel's storage library, `erasure_code.h`) is called through ctypes and refused unless it agrees
with the portable kernel. A kernel keeps nothing but caches and is safe to use from several threads.
"""

import ctypes
import importlib.util
import itertools
import logging
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from droppexd.coding.code import Matrix, multiplication_table
from droppexd.errors import InvalidRequest
from droppexd.packed import path_of

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

ISAL_SONAME = "libisal.so.2"

PACKED_ISAL = "libraries/libisal.so"
"""Where `scripts/build-binary` puts the wheel's copy in the one file."""

PORTABLE_BLOCK_BYTES = 32 * 1024
"""Bytes of each piece that the portable kernel takes at a time: the integers stay in the cache."""

GIL_RELEASE_BYTES = 256 * 1024
"""From this many source bytes on (~20 us of work) ISA-L runs without the interpreter lock.

Below, taking the lock again costs more than the work: up to the 5 ms switch interval beside a busy thread.
"""

TABLES_CACHED = 256
"""Expanded matrices remembered: 256 bytes at 4+2, 8 KiB at 32+8."""

_MAX_LENGTH = 2**31 - 1
"""ISA-L takes the length as a C int."""


class Kernel(Protocol):
    """Something that multiplies a matrix with pieces."""

    name: str

    def apply(self, matrix: Matrix, sources: Sequence[Buffer]) -> list[bytes]:
        """Return a new buffer for each row: the sum of the row's coefficients times the sources.

        The sources have one length and are only read. Raise InvalidRequest when their lengths differ, when
        there are more or fewer than the rows have coefficients, or when one is not contiguous.
        """
        ...


class PortableKernel:
    """Multiplies by table (`bytes.translate`) and adds by XOR of integers; needs nothing but Python."""

    name = "portable"

    def apply(self, matrix: Matrix, sources: Sequence[Buffer]) -> list[bytes]:
        """Return a new buffer for each row, as Kernel says."""
        if not matrix:
            return []
        _check_shape(matrix, len(sources))
        views = [flat_view(source) for source in sources]
        length = len(views[0])
        if any(len(view) != length for view in views):
            raise _unequal([len(view) for view in views])
        outputs: list[list[bytes]] = [[] for _ in matrix]
        for start in range(0, length, PORTABLE_BLOCK_BYTES):
            blocks = [bytes(view[start : start + PORTABLE_BLOCK_BYTES]) for view in views]
            for row, output in zip(matrix, outputs, strict=True):
                output.append(_combine(row, blocks))
        return [b"".join(output) for output in outputs]


def _combine(row: bytes, blocks: Sequence[bytes]) -> bytes:
    total = 0
    for coefficient, block in zip(row, blocks, strict=True):
        if coefficient == 0:
            continue
        product = block if coefficient == 1 else block.translate(multiplication_table(coefficient))
        total ^= int.from_bytes(product, "little")
    return total.to_bytes(len(blocks[0]), "little")


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of CPython's stable ABI (`Include/pybuffer.h`)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_PYBUF_SIMPLE = 0
"""Ask for plain contiguous bytes, not necessarily writable."""

# Addresses of read-only buffers: ctypes' own from_buffer wants writable ones. These hold the lock.
_get_buffer = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)(
    ("PyObject_GetBuffer", ctypes.pythonapi)
)
_release_buffer = ctypes.PYFUNCTYPE(None, ctypes.POINTER(_PyBuffer))(("PyBuffer_Release", ctypes.pythonapi))

# Bytes that are filled by the kernel before anybody sees them; CPython documents that with NULL they may be
# written to. Zeroing 2 MiB of parity first, as bytearray does, costs 40 us; coding them costs 340.
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_bytes_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))


class _Prepared(NamedTuple):
    """A matrix as ISA-L wants it, and what packs the pointers for it."""

    columns: int
    rows: int
    tables: bytes
    pack_sources: Callable[..., bytes]
    pack_outputs: Callable[..., bytes]


class IsalKernel:
    """Intel's ISA-L, which picks the widest vector instructions of the processor.

    `path` is a file name, or a soname that the system's loader finds. Raise OSError when it cannot be
    loaded, AttributeError when it is another library.
    """

    name = "isa-l"

    def __init__(self, path: str) -> None:
        encode_arguments = (ctypes.c_int,) * 3 + (ctypes.c_char_p,) * 3
        # The same function twice: CDLL gives up the interpreter lock during a call, PyDLL keeps it.
        unlocked, locked = ctypes.CDLL(path), ctypes.PyDLL(path)
        self._encode_long = unlocked.ec_encode_data
        self._encode_short = locked.ec_encode_data
        for function in (self._encode_long, self._encode_short):
            function.argtypes = encode_arguments
            function.restype = None
        self._init_tables = locked.ec_init_tables
        self._init_tables.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)
        self._init_tables.restype = None
        self._prepared = lru_cache(maxsize=TABLES_CACHED)(self._prepare)
        self.path = path

    def apply(self, matrix: Matrix, sources: Sequence[Buffer]) -> list[bytes]:
        """Return a new buffer for each row, as Kernel says."""
        if not matrix:
            return []
        columns, rows, tables, pack_sources, pack_outputs = self._prepared(matrix)
        if len(sources) != columns:
            raise _wrong_count(columns, len(sources))
        exported: list[_PyBuffer] = []
        try:
            for source in sources:
                view = _PyBuffer()
                _get_buffer(source, view, _PYBUF_SIMPLE)
                exported.append(view)
            length = exported[0].len
            for view in exported:
                if view.len != length:
                    raise _unequal([one.len for one in exported])
            if length > _MAX_LENGTH:
                raise InvalidRequest(f"pieces of {length} bytes are too long")
            if length == 0:
                return [b""] * rows
            outputs: list[bytes] = [_new_bytes(None, length) for _ in matrix]
            encode = self._encode_short if length * columns < GIL_RELEASE_BYTES else self._encode_long
            encode(
                length,
                columns,
                rows,
                tables,
                pack_sources(*[view.buf for view in exported]),
                pack_outputs(*map(_bytes_address, outputs)),
            )
        except BufferError as error:
            raise InvalidRequest(f"a piece is not contiguous: {error}") from error
        finally:
            for view in exported:
                _release_buffer(view)
        return outputs

    def _prepare(self, matrix: Matrix) -> _Prepared:
        rows, columns = len(matrix), len(matrix[0])
        _check_shape(matrix, columns)
        tables = ctypes.create_string_buffer(32 * columns * rows)
        self._init_tables(columns, rows, b"".join(matrix), tables)
        return _Prepared(
            columns, rows, tables.raw, struct.Struct(f"{columns}P").pack, struct.Struct(f"{rows}P").pack
        )


def flat_view(buffer: Buffer) -> memoryview:
    """Return a view of the buffer's bytes, without a copy; raise InvalidRequest if it is not contiguous."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise InvalidRequest("a buffer is not contiguous")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _check_shape(matrix: Matrix, columns: int) -> None:
    if columns == 0 or any(len(row) != columns for row in matrix):
        raise _wrong_count(len(matrix[0]), columns)


def _wrong_count(columns: int, sources: int) -> InvalidRequest:
    return InvalidRequest(f"{sources} pieces for a matrix with {columns} columns")


def _unequal(lengths: list[int]) -> InvalidRequest:
    return InvalidRequest(f"pieces of different lengths: {lengths}")


_CHECK_SHAPES = ((1, 1), (1, 2), (4, 2), (5, 3), (3, 4), (2, 5), (4, 13), (32, 8))
"""Sources and rows: ISA-L has a routine of its own for 1 to 6 rows and splits the rest."""
_CHECK_LENGTHS = (1, 15, 33, 63, 64, 271)
"""Its vectors have 16, 32 or 64 bytes, with other routines for what is shorter or left over."""
_CHECK_COEFFICIENTS = bytes.fromhex("8e02801dff00530137")
_CHECK_BYTES = bytes((7 * i * i + 31 * i + 1) % 251 for i in range(512))


def agrees(kernel: Kernel) -> bool:
    """Tell whether a kernel gives the portable kernel's bytes on small products of many shapes."""
    portable = PortableKernel()
    for columns, rows in _CHECK_SHAPES:
        cells = itertools.cycle(_CHECK_COEFFICIENTS)
        matrix = tuple(bytes(itertools.islice(cells, columns)) for _ in range(rows))
        for length in _CHECK_LENGTHS:
            sources = [_CHECK_BYTES[3 * column :][:length] for column in range(columns)]
            if kernel.apply(matrix, sources) != portable.apply(matrix, sources):
                return False
    return True


def isal_paths() -> Iterator[str]:
    """Yield where ISA-L may be: the system's own, then the copy inside PyECLib's wheel."""
    yield ISAL_SONAME
    packed = path_of(PACKED_ISAL)
    if packed is not None:
        yield packed
    # The wheel's folder is found without importing pyeclib, which would load all its backends.
    package = importlib.util.find_spec("pyeclib")
    for folder in (package and package.submodule_search_locations) or ():
        yield from sorted(map(str, Path(folder).parent.glob("[Pp]y[Ee][Cc][Ll]ib.libs/libisal*.so*")))


def load_isal(path: str) -> IsalKernel | None:
    """Return ISA-L from there, or None when it is absent or cannot be trusted."""
    try:
        kernel = IsalKernel(path)
    except (OSError, AttributeError) as error:
        logger.debug("no ISA-L at %s: %s", path, error)
        return None
    if not agrees(kernel):
        logger.warning("ISA-L at %s computes other bytes than the code; it is not used", path)
        return None
    return kernel


@lru_cache(maxsize=1)
def best_kernel() -> Kernel:
    """Return the fastest kernel of this machine, found at the first call."""
    return available_kernels()[0]


def available_kernels() -> list[Kernel]:
    """Return the kernels of this machine, the fastest first; the portable one is always there."""
    for path in isal_paths():
        kernel = load_isal(path)
        if kernel is not None:
            return [kernel, PortableKernel()]
    logger.warning("no ISA-L found: coding runs at ~200 MB/s; install PyECLib or the system's libisal")
    return [PortableKernel()]
