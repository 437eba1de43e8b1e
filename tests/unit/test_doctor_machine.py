"""What the doctor makes of the machine itself."""

import resource

import pytest

from droppexd.coding.kernels import PortableKernel, best_kernel
from droppexd.config import Config
from droppexd.doctor.machine import (
    CodingSpeed,
    Memory,
    judge_clock_state,
    judge_coding,
    judge_memory,
    judge_open_files,
    judge_software,
    measure_coding,
    memory_needed,
    read_clock_state,
    read_memory,
    read_open_files,
)
from droppexd.doctor.verdicts import Level, error, ok, warning, worst
from droppexd.model import Role

MIB = 1024 * 1024


def levels(verdicts):
    return [verdict.level for verdict in verdicts]


def ticking(step_s):
    ticks = iter(range(10**6))
    return lambda: next(ticks) * step_s


def test_the_worst_of_all_counts():
    fine, odd, bad = ok("a", "b"), warning("a", "b", "c"), error("a", "b", "c")
    assert [worst(some) for some in ([], [fine], [fine, odd], [bad, odd, fine])] == [
        Level.OK,
        Level.OK,
        Level.WARNING,
        Level.ERROR,
    ]


def test_the_release_the_protocol_and_python_are_told():
    (verdict,) = judge_software()
    assert (verdict.level, verdict.check) == ("ok", "versions")
    assert "protocol 1, Python 3." in verdict.text


def test_coding_without_isal_is_a_warning_with_what_to_install():
    (slow,) = judge_coding(CodingSpeed("portable", "", 190_000_000))
    assert slow.level == "warning"
    assert "190 MB/s" in slow.text
    assert "PyECLib" in slow.advice
    (fast,) = judge_coding(CodingSpeed("isa-l", "libisal.so.2", 4_900_000_000))
    assert (fast.level, fast.advice) == ("ok", "")
    assert "libisal.so.2" in fast.text


def test_the_speed_is_that_of_whole_chunks_by_the_clock():
    # Two chunks of 4 MiB fit into what is measured: the clock ticks a tenth of a second a look.
    speed = measure_coding(PortableKernel(), ticking(0.1))
    assert (speed.kernel, speed.where) == ("portable", "")
    assert speed.bytes_per_s == pytest.approx(2 * 4 * MIB / 0.2)
    assert measure_coding(best_kernel(), ticking(1)).bytes_per_s == 4 * MIB


@pytest.mark.parametrize(
    ("most", "level"),
    [(-1, "ok"), (65536, "ok"), (1024, "ok"), (1023, "warning"), (256, "warning"), (255, "error")],
)
def test_few_open_files_are_told_of(most, level):
    (verdict,) = judge_open_files(most)
    assert verdict.level == level
    assert ("ulimit" in verdict.advice) == (level != "ok")


def test_the_limit_that_is_read_is_the_soft_one():
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert read_open_files() == (-1 if soft == resource.RLIM_INFINITY else soft)


def kernel_says(root, *, total_kib=8 * 1024 * 1024, group=None, overcommit="0"):
    for file, text in (
        ("proc/meminfo", f"MemFree: 1 kB\nMemTotal:       {total_kib} kB\n"),
        ("proc/sys/vm/overcommit_memory", f"{overcommit}\n"),
        ("sys/fs/cgroup/memory.max", group),
    ):
        if text is not None:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({}, Memory(8192 * MIB, strict=False)),
        ({"group": "max\n"}, Memory(8192 * MIB, strict=False)),
        ({"group": f"{512 * MIB}\n", "overcommit": "2"}, Memory(512 * MIB, strict=True)),
        ({"group": f"{9999 * MIB}\n"}, Memory(8192 * MIB, strict=False)),
    ],
)
def test_memory_is_what_the_machine_or_its_control_group_has(tmp_path, says, expected):
    kernel_says(tmp_path, **says)
    assert read_memory(tmp_path) == expected


def test_a_kernel_that_says_nothing_is_no_fault(tmp_path):
    assert read_memory(tmp_path) is None
    assert levels(judge_memory(None, 0)) == ["ok"]


def test_memory_that_is_too_little_or_handed_out_strictly_is_told_of():
    assert levels(judge_memory(Memory(8192 * MIB, strict=False), 512 * MIB)) == ["ok"]
    (little,) = judge_memory(Memory(256 * MIB, strict=False), 512 * MIB)
    assert little.level == "warning"
    assert "256 MiB" in little.text
    assert "512 MiB" in little.text
    assert levels(judge_memory(Memory(256 * MIB, strict=True), 512 * MIB)) == ["warning", "warning"]


def test_an_app_needs_its_buffers_besides():
    pool = Config(roles=(Role.POOL,))
    both = Config(roles=(Role.POOL, Role.APP), app_buffer=100 * MIB)
    assert memory_needed(both) - 2 * memory_needed(pool) == 200 * MIB


def test_a_clock_that_nobody_sets_is_a_warning():
    assert levels([*judge_clock_state(True), *judge_clock_state(None)]) == ["ok", "ok"]
    (verdict,) = judge_clock_state(False)
    assert verdict.level == "warning"
    assert "chrony" in verdict.advice


def test_the_kernel_can_be_asked_without_rights():
    assert read_clock_state() in (True, False, None)
