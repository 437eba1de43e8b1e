"""How the C library hands memory out and back.

Buffers of a few MiB come and go with every chunk. As glibc starts out, each is a mapping of its own: new
pages are faulted in and zeroed for every one, and given back to the system at once. Measured on 4 MiB
buffers this costs a third of the throughput of a transfer.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_MIB = 1024**2

_SETTINGS = (
    (_M_MMAP_THRESHOLD, 32 * _MIB),  # The most that glibc takes: buffers come from the heap, faulted in once.
    (_M_TRIM_THRESHOLD, 256 * _MIB),
    (_M_TOP_PAD, 16 * _MIB),
    (_M_ARENA_MAX, 1),  # Python's lock lets one thread allocate at a time; more arenas only waste memory.
)


def tune_allocator() -> bool:
    """Keep freed buffers for reuse; return False where the C library has no such settings (musl, macOS)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    taken = [mallopt(setting, value) for setting, value in _SETTINGS]
    return all(taken)
