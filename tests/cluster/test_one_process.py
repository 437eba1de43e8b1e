"""Controller, pool and app in one process: the smallest cluster there is."""

import pytest


@pytest.fixture
def alone(new_process):
    process = new_process(
        "alone", ["controller", "pool", "app"], "--pool-reserve", "16MiB", "--controller-delete-grace", "1s"
    )
    process.start()
    return process


@pytest.fixture
def run_droppex(alone, droppex_command):
    def run(*arguments, code=0):
        return droppex_command("--app", alone.addresses["app"], *arguments, code=code)

    return run


def test_one_pool_takes_and_gives_files_and_says_loudly_that_nothing_may_be_lost(
    alone, run_droppex, content, tmp_path
):
    files = {"large": content(5_000_000), "small": content(1000)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        said = run_droppex("put", str(tmp_path / name), f"kept/{name}").stdout
        assert "1+0" in said
        assert "survives no loss" in said
    alone.kill()
    alone.start()
    for name, data in files.items():
        run_droppex("get", f"kept/{name}", str(tmp_path / "back"), "--force")
        assert (tmp_path / "back").read_bytes() == data
    said = run_droppex("status", "--check", code=1).stdout
    assert "2 files would not survive the loss of one more pool" in said
    assert alone.terminate() == 0
