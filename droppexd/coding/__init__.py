"""The code that reedsolo defines, the kernels that apply it, and chunks to pieces with checksums."""

from droppexd.coding.chunks import (
    EncodedChunk,
    chunk_checksum,
    encode_chunk,
    extent_digest,
    piece_checksum,
    rebuild_pieces,
)
from droppexd.coding.code import Matrix, parity_matrix, rebuild_matrix
from droppexd.coding.kernels import (
    Buffer,
    IsalKernel,
    Kernel,
    PortableKernel,
    available_kernels,
    best_kernel,
)

__all__ = [
    "Buffer",
    "EncodedChunk",
    "IsalKernel",
    "Kernel",
    "Matrix",
    "PortableKernel",
    "available_kernels",
    "best_kernel",
    "chunk_checksum",
    "encode_chunk",
    "extent_digest",
    "parity_matrix",
    "piece_checksum",
    "rebuild_matrix",
    "rebuild_pieces",
]
