"""What a process asks of its disk is read back from strace, call by call."""

import textwrap

import pytest
from powerloss.disk import AllDropped, AllKept
from powerloss.strace import read_trace

AT_THE_END = 2**63


@pytest.fixture
def recorded(record_scripts, tmp_path):
    """Record a Python program that works in a folder `root` and may write notes to `notes`."""

    def run(*programs):
        root = tmp_path / "root"
        root.mkdir()
        head = f"import os\nroot, notes = {str(root)!r}, {str(tmp_path / 'notes')!r}\n"
        return record_scripts(root, "it", *(("-c", head + textwrap.dedent(program)) for program in programs))

    return run


def test_content_and_names_are_as_the_process_left_them(recorded):
    recording = recorded("""
        os.mkdir(root + "/folder")
        fd = os.open(root + "/folder/a", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        copy = os.dup(fd)
        os.pwrite(fd, b'quote " comma , newline \\n brace } zero \\0', 3)
        os.close(fd)
        os.posix_fallocate(copy, 0, 100)
        os.ftruncate(copy, 50)
        os.fdatasync(copy)
        os.rename(root + "/folder/a", root + "/b")
        os.pwrite(copy, b"after", 0)
        for path in ("/folder/c", "/d"):
            os.close(os.open(root + path, os.O_WRONLY | os.O_CREAT))
        os.unlink(root + "/d")
    """)
    image = recording.disk().after_crash(AT_THE_END, AllKept())
    text = b"after" + (b"\0" * 3 + b'quote " comma , newline \n brace } zero \0')[5:]
    assert image.files == {"b": text.ljust(50, b"\0"), "folder/c": b""}
    assert image.folders == {"folder"}
    assert recording.disk().after_crash(AT_THE_END, AllDropped()).files == {}


def test_a_flush_counts_only_for_what_ended_before_it(recorded):
    recording = recorded("""
        fd = os.open(root + "/a", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"safe", 0)
        os.fsync(fd)
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.pwrite(fd, b"lost", 0)
    """)
    assert recording.disk().after_crash(AT_THE_END, AllDropped()).files == {"a": b"safe"}
    assert recording.disk().after_crash(AT_THE_END, AllKept()).files == {"a": b"lost"}


def test_notes_stand_between_the_calls_around_them(recorded):
    recording = recorded("""
        import json
        fd = os.open(root + "/a", os.O_RDWR | os.O_CREAT)
        note = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in range(3):
            os.pwrite(fd, b"x", number)
            os.write(note, (json.dumps(["wrote", {"number": number}]) + "\\n").encode())
    """)
    lengths = [
        len(recording.disk().after_crash(note.moment, AllKept()).files["a"]) for note in recording.notes
    ]
    assert [note.fields["number"] for note in recording.notes] == [0, 1, 2]
    assert lengths == [1, 2, 3]


def test_threads_that_call_at_the_same_time_are_told_apart(recorded):
    recording = recorded("""
        import threading
        def work(name):
            fd = os.open(root + name, os.O_RDWR | os.O_CREAT)
            for number in range(50):
                os.pwrite(fd, name.encode(), 2 * number)
                os.fdatasync(fd)
            os.close(fd)
        threads = [threading.Thread(target=work, args=("/" + letter,)) for letter in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """)
    image = recording.disk().after_crash(AT_THE_END, AllKept())
    assert image.files == {letter: f"/{letter}".encode() * 50 for letter in "abcd"}


def test_the_next_process_goes_on_with_what_a_killed_one_left(recorded):
    recording = recorded(
        """
        fd = os.open(root + "/a", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"first", 0)
        os._exit(0)
        """,
        """
        fd = os.open(root + "/a", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"second", 5)
        os.fsync(fd)
        os.fsync(os.open(root, os.O_RDONLY))
        """,
    )
    assert recording.disk().after_crash(AT_THE_END, AllDropped()).files == {"a": b"firstsecond"}


def test_memory_that_is_mapped_for_writing_is_told(recorded):
    recording = recorded("""
        import mmap
        fd = os.open(root + "/a", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 4096)
        mmap.mmap(fd, 4096)
    """)
    assert recording.mapped == {"a"}


@pytest.mark.parametrize(
    "call",
    [
        "os.link(root + '/a', root + '/b')",
        "os.truncate(root + '/a', 1)",
        "os.write(fd, b'x')",
        "os.sync()",
        "os.sendfile(fd, fd, 0, 1)",
    ],
)
def test_a_call_that_the_model_does_not_know_is_an_error(recorded, call):
    with pytest.raises(AssertionError, match="model"):
        recorded(f"""
            fd = os.open(root + "/a", os.O_RDWR | os.O_CREAT)
            os.pwrite(fd, b"content", 0)
            {call}
        """)


def test_a_call_that_was_cut_off_by_a_kill_has_no_result(tmp_path):
    trace = tmp_path / "trace"
    lines = (
        r'7 1.000000001 pwrite64(3, "\x61", 1, 0 <unfinished ...>',
        "8 1.000000002 fsync(3) = 0 <0.000000005>",
        "7 1.000000009 +++ killed by SIGKILL +++",
    )
    trace.write_text("".join(f"{line}\n" for line in lines))
    cut, flush = read_trace(trace)
    assert (cut.name, cut.result, cut.began, cut.ended) == ("pwrite64", None, 10**9 + 1, 10**9 + 9)
    assert (flush.result, flush.ended) == (0, 10**9 + 7)
