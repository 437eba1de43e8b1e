"""Configuration: one table of options, whatever way they are given."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from droppexd.config import (
    OPTIONS,
    Config,
    describe_problems,
    flags_of,
    is_loopback,
    key_of,
    parse_duration,
    parse_size,
    variable_of,
)
from droppexd.errors import ConfigError
from droppexd.model import Layout, Role

EXAMPLE = Path(__file__).parents[2] / "droppex.toml.example"


def load(environment=None, file=None, **flags):
    return Config.load(flags, environment or {}, file, hostname=lambda: "host")


def problems_of(environment=None, file=None, **flags):
    with pytest.raises(ConfigError) as caught:
        load(environment, file, **flags)
    return caught.value.problems


@pytest.fixture
def write(tmp_path):
    def write_file(text):
        file = tmp_path / "droppex.toml"
        file.write_text(text)
        return file

    return write_file


# -- the example -----------------------------------------------------------------------------------


def uncommented_example():
    """Return the example with every option taken out of its comment."""
    return re.sub(r"^# ([a-z_]+ = .*)$", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)


def test_the_example_is_valid_as_it_is_and_sets_nothing():
    sections = tomllib.loads(EXAMPLE.read_text())
    assert sections == {"controller": {}, "catalog": {}, "app": {}, "pool": {}, "keys": {}}
    assert load(file=EXAMPLE, roles=["app"]) == load(roles=["app"])


def test_the_example_shows_every_option_and_no_other():
    shown = set()
    for key, value in tomllib.loads(uncommented_example()).items():
        shown |= {(key, inner) for inner in value} if isinstance(value, dict) else {("", key)}
    assert shown == {key_of(name) for name in OPTIONS}


def test_the_example_shows_the_defaults():
    document = tomllib.loads(uncommented_example())
    defaults = Config()
    for name, option in OPTIONS.items():
        section, key = key_of(name)
        shown = document[section][key] if section else document[key]
        assert option.parse(shown) == getattr(defaults, name), name


def test_the_example_explains_every_option():
    lines = EXAMPLE.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"# [a-z_]+ = ", line):
            assert re.match(r"# [A-Z]", lines[number - 1]) or lines[number - 1].startswith("# "), line


# -- where values come from ------------------------------------------------------------------------


def test_a_flag_wins_over_the_environment_and_that_over_the_file(write):
    file = write('name = "file"\nzone = "file"\nlayout = "2+1"\nroles = ["app"]\n')
    config = load({"DROPPEX_NAME": "variable", "DROPPEX_ZONE": "variable"}, file, name="flag")
    assert (config.name, config.zone, config.layout) == ("flag", "variable", Layout(2, 1))


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_option_can_be_given_in_all_three_ways(name, write):
    texts = {
        "roles": "pool",
        "controllers": "tcp://localhost:1",
        "layout": "3+2",
        "log_level": "debug",
        "controller_heartbeat": "1s",
        "keys_own": "/k",
        "bucket": "file:///mnt/share/droppex.json",
        "bucket_key": "ab" * 32,
        "cluster": "ab" * 16,
        "catalog_engine": "etcd",
        "catalog_endpoints": "https://10.0.0.1:2379",
    }
    option = OPTIONS[name]
    text = texts.get(
        name,
        {"ADDRESS": "tcp://localhost:77", "DURATION": "50s", "SIZE": "77 MiB", "N": "2"}.get(
            option.metavar, "/x"
        ),
    )
    base = {"controller_data": "/d", "pool_data": "/p", "roles": ["controller"]}
    if name.startswith("keys"):
        base |= {"keys_own": ["/k"], "keys_cluster": "/k", "keys_members": "/k"}
    if name.startswith("bucket"):
        base |= {"bucket": "https://example.org/droppex.json", "bucket_key": "00" * 32}
    if name.startswith("catalog"):
        base |= {"catalog_engine": "etcd", "catalog_endpoints": ["http://127.0.0.1:2379"]}
        base |= {"catalog_etcd_cert": "/c", "catalog_etcd_key": "/k"}
    wanted = option.parse([text] if option.repeatable else text)
    by_flag = load(**(base | {name: text}))
    base.pop(name, None)
    by_variable = load({variable_of(name): text}, **base)
    section, key = key_of(name)
    value = f'["{text}"]' if option.repeatable else f'"{text}"'
    by_file = load(file=write(f"[{section}]\n{key} = {value}\n" if section else f"{key} = {value}\n"), **base)
    assert getattr(by_flag, name) == getattr(by_variable, name) == getattr(by_file, name) == wanted


def test_flags_and_variables_are_distinct():
    flags = [flag for name in OPTIONS for flag in flags_of(name)]
    assert len(set(flags)) == len(flags)
    assert {"--role", "--controller", "--master", "--layout", "--pool-listen"} <= set(flags)
    assert variable_of("pool_listen") == "DROPPEX_POOL_LISTEN"


def test_lists_can_stand_in_a_variable():
    config = load({"DROPPEX_CONTROLLERS": "tcp://127.0.0.1:1, tcp://localhost:2"}, roles=["app"])
    assert config.controllers == ("tcp://127.0.0.1:1", "tcp://localhost:2")


def test_variables_of_others_are_left_alone():
    assert load({"DROPPEX_APP": "nonsense", "DROPPEX_CONFIG": "x"}, roles=["app"]).roles == (Role.APP,)


def test_paths_in_a_file_start_at_its_folder(write, tmp_path):
    file = write('data = "here"\n[keys]\nown = ["k1", "/k2"]\ncluster = "c"\nmembers = "m"\n')
    config = load(file=file, roles=["pool"])
    assert config.folder(Role.POOL) == tmp_path / "here"
    assert config.keys_own == (str(tmp_path / "k1"), "/k2")


# -- what follows from what ------------------------------------------------------------------------


def test_a_single_role_uses_the_folder_itself_and_several_have_one_each():
    assert load(roles=["pool"], data="/d").folder(Role.POOL) == Path("/d")
    config = load(roles=["controller", "app", "pool"], data="/d")
    assert config.folder(Role.CONTROLLER) == Path("/d/controller")
    assert config.folder(Role.POOL) == Path("/d/pool")


def test_a_flag_for_any_role_beats_the_file_for_this_role(write):
    file = write('[pool]\ndata = "/file"\nlisten = "tcp://127.0.0.1:1"\n')
    config = load(file=file, roles=["pool"], data="/flag", listen="tcp://127.0.0.1:2")
    assert (config.pool_data, config.pool_listen) == ("/flag", "tcp://127.0.0.1:2")
    assert load(roles=["pool"], data="/d", pool_data="/p").pool_data == "/p"


def test_name_and_machine_default_to_the_host():
    config = load(roles=["app"])
    assert (config.name, config.machine) == ("host", "host")
    assert load(roles=["app"], machine="nas").name == "nas"


def test_a_process_that_is_the_controller_asks_itself_unless_told_otherwise():
    assert load(roles=["controller", "pool"], data="/d").controllers == ()
    assert load(roles=["pool"], data="/d").controllers == ("tcp://127.0.0.1:7700",)
    told = load(roles=["controller", "pool"], data="/d", controllers=["tcp://127.0.0.1:9"])
    assert told.controllers == ("tcp://127.0.0.1:9",)


# -- what is wrong ---------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(write):
    file = write(
        'rolse = ["pool"]\nlayout = "4+x"\n[pool]\nreserve = "lots"\nlisten = 5\n[ap]\nlisten = ""\n'
    )
    problems = problems_of({"DROPPEX_ZONE": "a\nb"}, file, controllers=["here"], listen="tcp://10.0.0.1:1")
    text = "\n".join(problems)
    for expected in (
        "rolse: there is no such option; did you mean roles?",
        "layout: layout '4+x'",
        "pool.reserve: 'lots' is not a size",
        "pool.listen: 5 is not an address",
        "ap: there is no such option; did you mean app?",
        "DROPPEX_ZONE",
        "--controller: 'here' is not an address",
        "no role",
        "tcp://10.0.0.1:1",
    ):
        assert expected in text
    assert len(problems) == 9
    assert describe_problems(problems).startswith("9 problems:\n  ")


def test_a_scrub_has_some_bandwidth(write):
    config = load(file=write('[pool]\nscrub_limit = "5MB"\nscrub_every = "7d"\n'), roles=["pool"], data="/d")
    assert (config.pool_scrub_limit, config.pool_scrub_every) == (5_000_000, 7 * 86400.0)
    (problem,) = problems_of(file=write("[pool]\nscrub_limit = 999\n"), roles=["pool"], data="/d")
    assert "pool.scrub_limit: 999 a second is too little" in problem


def test_a_key_in_the_wrong_table_is_pointed_at_the_right_one(write):
    (problem,) = problems_of(file=write("[app]\nreserve = 1\n"), roles=["app"])
    assert "did you mean pool.reserve?" in problem


def test_a_file_that_is_not_there_or_no_toml_is_one_clear_problem(write, tmp_path):
    (problem,) = problems_of(file=tmp_path / "absent.toml", roles=["app"])
    assert problem.endswith("absent.toml: No such file or directory")
    (problem,) = problems_of(file=write("= 1"), roles=["app"])
    assert "not valid TOML" in problem


def test_a_role_that_stores_needs_a_folder_of_its_own():
    assert len(problems_of(roles=["controller", "app", "pool"])) == 2
    (problem,) = problems_of(roles=["controller", "pool"], controller_data="/x", pool_data="/x")
    assert "cannot share" in problem


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:1", "tcp://*:1", "tcp://nas:1", "tcp://[::]:1"])
def test_without_keys_only_loopback_is_listened_on(address):
    problems = problems_of(roles=["pool"], data="/d", listen=address)
    assert any("needs keys" in problem for problem in problems)


def test_without_keys_no_other_machine_is_connected_to():
    (problem,) = problems_of(roles=["app"], controllers=["tcp://10.0.0.1:7700"])
    assert "needs keys" in problem


def test_listening_everywhere_needs_an_address_to_tell_others():
    keys = {"keys_own": ["k"], "keys_cluster": "c", "keys_members": "m"}
    (problem,) = problems_of(roles=["pool"], data="/d", listen="tcp://*:7702", **keys)
    assert "--pool-advertise" in problem
    load(roles=["pool"], data="/d", listen="tcp://*:7702", pool_advertise="tcp://nas:7702", **keys)


def test_keys_are_needed_together():
    (problem,) = problems_of(roles=["app"], keys_own=["k"])
    assert "together" in problem


def test_several_roles_cannot_share_an_address():
    (problem,) = problems_of(roles=["app", "pool"], data="/d", listen="tcp://127.0.0.1:5")
    assert "--app-listen, --pool-listen" in problem


@pytest.mark.parametrize(
    "flags",
    [
        {"layout": "4+0"},
        {"layout": "33+1"},
        {"layout": 42},
        {"controllers": []},
        {"controllers": ["tcp://127.0.0.1:0"]},
        {"controllers": "tcp://127.0.0.1:70000"},
        {"roles": ["client"]},
        {"log_level": "loud"},
        {"controller_heartbeat": "0s"},
        {"controller_heartbeat": "6s"},
        {"app_buffer": "1 MiB"},
        {"name": "x" * 200},
        {"name": 5},
        {"data": "a\0b"},
    ],
)
def test_a_value_that_cannot_be_is_refused(flags):
    assert len(problems_of(**({"roles": ["app"]} | flags))) == 1


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(roles=["app"]).name = "other"


# -- quantities ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("5m", 300),
        ("1.5 h", 5400),
        ("2d", 172800),
        ("250ms", 0.25),
        ("7", 7),
        (3, 3),
        (0.5, 0.5),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1 GiB", 1024**3),
        ("64MB", 64_000_000),
        ("512k", 524288),
        ("1.5 MiB", 1572864),
        ("100", 100),
        ("3B", 3),
        (0, 0),
        ("2T", 2 * 1024**4),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("value", ["", "s", "-1s", "1x", "1 s s", True, -1, None, [1]])
def test_what_is_no_quantity_is_refused(value):
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(value)
    with pytest.raises(ValueError, match="not a size"):
        parse_size(value)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.8.0.1:1", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://*:1", False),
        ("tcp://127.0.0.1.example.org:1", False),
        ("tcp://10.0.0.1:1", False),
    ],
)
def test_loopback(address, loopback):
    assert is_loopback(address) is loopback


# -- the catalogue ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"catalog_engine": "etcd"}, "name the members of etcd"),
        ({"catalog_endpoints": ["http://127.0.0.1:1"]}, 'set catalog.engine = "etcd"'),
        ({"catalog_engine": "etcd", "catalog_endpoints": ["http://10.0.0.1:1"]}, "needs https"),
        ({"catalog_engine": "etcd", "catalog_endpoints": ["127.0.0.1:1"]}, "not an endpoint"),
        ({"catalog_engine": "etcd", "catalog_endpoints": ["https://a:70000"]}, "not an endpoint"),
        ({"catalog_engine": "mysql"}, "none of sqlite, etcd"),
        ({"catalog_etcd_prefix": "a b"}, "not a prefix"),
        (
            {
                "catalog_engine": "etcd",
                "catalog_endpoints": ["https://a:1"],
                "catalog_etcd_cert": "/c",
            },
            "needed together",
        ),
        (
            {
                "catalog_engine": "etcd",
                "catalog_endpoints": ["https://a:1"],
                "catalog_etcd_lease": "1s",
            },
            "between 2 seconds",
        ),
    ],
)
def test_what_does_not_fit_with_the_engine_is_told(options, problem):
    with pytest.raises(ConfigError, match=problem):
        load(roles=["controller"], data="/d", **options)


def test_a_controller_that_joins_is_asked_first_and_not_itself():
    joining = load(roles=["controller"], data="/d", master=["tcp://127.0.0.1:7799"])
    assert joining.controllers == joining.master == ("tcp://127.0.0.1:7799",)
    pool = load(roles=["pool"], data="/d", master=["tcp://127.0.0.1:2"], controllers=["tcp://127.0.0.1:1"])
    assert pool.controllers == ("tcp://127.0.0.1:2", "tcp://127.0.0.1:1")
    with pytest.raises(ConfigError, match="is this controller itself"):
        load(roles=["controller"], data="/d", master=["tcp://127.0.0.1:7700"])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bucket": "https://example.org/x"}, "bucket needs bucket_key"),
        ({"bucket_key": "00" * 32}, "of no use without bucket"),
        ({"bucket": "http://example.org/x", "bucket_key": "00" * 32}, "neither https"),
        ({"bucket": "droppex.json", "bucket_key": "00" * 32}, "neither https"),
        ({"bucket": "file://host/x", "bucket_key": "00" * 32}, "neither https"),
        ({"bucket": "file:///x", "bucket_key": "00"}, "64 hexadecimal"),
    ],
)
def test_a_bucket_is_a_place_and_a_key(options, problem):
    with pytest.raises(ConfigError, match=problem):
        load(roles=["app"], **options)


def test_a_bucket_is_enough_to_find_the_controllers():
    config = load(roles=["app"], controllers=[], bucket="file:///x", bucket_key="00" * 32)
    assert config.controllers == ()
    with pytest.raises(ConfigError, match="name at least one controller"):
        load(roles=["app"], controllers=[])
