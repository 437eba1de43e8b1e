"""What kernels take and refuse, and which one is chosen."""

import array
import logging
import platform
import random
import sys

import pytest

from droppexd.coding import kernels
from droppexd.coding.chunks import encode_chunk
from droppexd.coding.code import parity_matrix
from droppexd.coding.kernels import (
    GIL_RELEASE_BYTES,
    PortableKernel,
    agrees,
    available_kernels,
    best_kernel,
    load_isal,
)
from droppexd.errors import InvalidRequest
from droppexd.model import ExtentId, Layout

PARITY = parity_matrix(Layout(4, 2))


@pytest.fixture(params=available_kernels(), ids=lambda kernel: kernel.name)
def kernel(request):
    return request.param


@pytest.fixture
def fresh_choice():
    """Let the test choose a kernel anew, and forget its choice afterwards."""
    best_kernel.cache_clear()
    yield
    best_kernel.cache_clear()


class WrongKernel(PortableKernel):
    """One bit of one byte is off, in long pieces only."""

    name = "wrong"

    def apply(self, matrix, sources):
        outputs = super().apply(matrix, sources)
        if outputs and len(outputs[0]) > 64:
            outputs[-1] = outputs[-1][:-1] + bytes([outputs[-1][-1] ^ 1])
        return outputs


def test_every_kind_of_buffer_gives_the_same_bytes(kernel):
    pieces = [random.Random(seed).randbytes(1000) for seed in range(4)]
    writable = bytearray(pieces[1])
    within = memoryview(b"before" + pieces[2] + b"after")[6:1006]
    words = memoryview(array.array("I", pieces[3]))
    assert len(words) == 250
    mixed = [pieces[0], writable, within, words]
    assert kernel.apply(PARITY, mixed) == kernel.apply(PARITY, pieces)


def test_sources_are_let_go_afterwards_also_after_an_error(kernel):
    pieces = [bytearray(10) for _ in range(4)]
    kernel.apply(PARITY, pieces)
    pieces[3].append(1)  # A bytearray that is still exported raises BufferError here.
    with pytest.raises(InvalidRequest, match="different lengths"):
        kernel.apply(PARITY, pieces)
    pieces[0].append(1)


def test_sources_are_not_copied_into_the_result_or_changed(kernel):
    pieces = [bytearray(b"abcd") for _ in range(4)]
    kernel.apply(PARITY, pieces)
    assert pieces == [bytearray(b"abcd")] * 4


def test_outputs_are_new_buffers_each_time(kernel):
    pieces = [b"x" * 5000] * 4
    first, second = kernel.apply(PARITY, pieces), kernel.apply(PARITY, pieces)
    assert first == second
    assert len({id(output) for output in (*first, *second)}) == 4


def test_single_bytes_do_not_share_an_object(kernel):
    # CPython keeps one object for each single byte; writing into that would change every b"\0" there is.
    assert kernel.apply((bytes([1]), bytes([2])), [b"\x80"]) == [b"\x80", b"\x1d"]
    assert [bytes([value])[0] for value in range(256)] == list(range(256))


def test_a_buffer_that_is_not_contiguous_is_refused(kernel):
    pieces = [b"12345678", b"12345678", memoryview(b"1234567890123456")[::2], b"12345678"]
    with pytest.raises(InvalidRequest, match="not contiguous"):
        kernel.apply(PARITY, pieces)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_the_wrong_number_of_sources_is_refused(kernel, count):
    with pytest.raises(InvalidRequest, match=f"{count} pieces for a matrix with 4 columns"):
        kernel.apply(PARITY, [b"piece"] * count)


def test_a_matrix_with_uneven_rows_is_refused(kernel):
    with pytest.raises(InvalidRequest, match="pieces for a matrix"):
        kernel.apply((b"\1\2", b"\1\2\3"), [b"piece"] * 2)


def test_no_rows_and_no_bytes_are_fine(kernel):
    assert kernel.apply((), []) == []
    assert kernel.apply((), [b"piece"]) == []
    assert kernel.apply(PARITY, [b""] * 4) == [b"", b""]


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_with_and_without_the_interpreter_lock_the_bytes_are_the_same(kernel, difference):
    length = GIL_RELEASE_BYTES // 2 + difference
    pieces = [random.Random(seed).randbytes(length) for seed in range(2)]
    matrix = parity_matrix(Layout(2, 2))
    assert kernel.apply(matrix, pieces) == PortableKernel().apply(matrix, pieces)


def test_a_kernel_with_other_bytes_does_not_agree(kernel):
    assert agrees(kernel)
    assert not agrees(WrongKernel())


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="PyECLib brings ISA-L for x86-64 Linux"
)
def test_isal_is_found_where_pyeclib_is_installed_without_importing_it():
    assert best_kernel().name == "isa-l"
    assert "pyeclib" not in sys.modules


def test_without_isal_the_portable_kernel_gives_the_same_chunk(monkeypatch, fresh_choice, caplog):
    data = random.Random(1).randbytes(100_001)
    expected = encode_chunk(ExtentId(1, 2), Layout(4, 2), 0, data)
    best_kernel.cache_clear()
    monkeypatch.setattr(kernels, "isal_paths", lambda: iter(["libnowhere.so.2"]))
    assert best_kernel().name == "portable"
    assert encode_chunk(ExtentId(1, 2), Layout(4, 2), 0, data) == expected
    assert "no ISA-L found" in caplog.text


def test_without_pyeclib_only_the_system_is_searched(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _name: None)
    assert list(kernels.isal_paths()) == ["libisal.so.2"]


def test_a_file_that_is_no_library_is_passed_over(tmp_path):
    path = tmp_path / "libisal.so.2"
    path.write_bytes(b"no library")
    assert load_isal(str(path)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="names a library of Linux")
def test_another_library_is_passed_over():
    assert load_isal("libc.so.6") is None


def test_a_library_that_computes_other_bytes_is_refused_aloud(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "IsalKernel", lambda _path: WrongKernel())
    with caplog.at_level(logging.WARNING):
        assert load_isal("libisal.so.2") is None
    assert "computes other bytes" in caplog.text
