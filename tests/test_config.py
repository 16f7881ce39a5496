"""Settings: where they come from, which are refused, and what is said then."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion.compression import LEVELS
from ps_accordion.config import (
    LARGEST_KEY,
    RunSettings,
    ServerSettings,
    Settings,
    Timeouts,
    flatten,
    job_of,
    load,
    render,
)
from ps_accordion.errors import ConfigError
from ps_accordion.patterns import TensorCodecs
from ps_accordion.sources import ENVIRONMENT_PREFIX, environment_name, nearest

LEAVES = flatten(Settings())


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    """Return a function that writes a config file and returns its path."""

    def write(text: str) -> Path:
        file = tmp_path / "job.toml"
        file.write_text(text)
        return file

    return write


def test_without_any_source_the_defaults_hold() -> None:
    """A job needs no configuration."""
    assert Settings() == load(environment={})


def test_later_sources_win(toml: Any) -> None:
    """TOML < environment < command line, setting by setting."""
    file = toml("seed = 1\n[workers]\ncount = 3\nthreads = 3\n[servers]\ncount = 3\n")
    settings = load(
        file,
        environment={"PS_ACCORDION_WORKERS_COUNT": "4", "PS_ACCORDION_SERVERS_COUNT": "4", "HOME": "/nowhere"},
        overrides={"servers.count": 5},
    )
    assert (settings.seed, settings.workers.threads, settings.workers.count, settings.servers.count) == (1, 3, 4, 5)


def test_the_process_environment_is_read_when_no_other_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load()` in a role sees what the launcher set."""
    monkeypatch.setenv("PS_ACCORDION_CODEC_NAME", "dense")
    assert load().codec.name == "dense"


def test_every_setting_has_one_environment_name() -> None:
    """No two settings meet in one variable, although dots and underscores both become underscores."""
    assert len({environment_name(name) for name in LEAVES}) == len(LEAVES)
    assert environment_name("servers.shards_per_server") == "PS_ACCORDION_SERVERS_SHARDS_PER_SERVER"


@pytest.mark.parametrize("variable", ["CONFIG", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RESTART", "CRASH_AT"])
def test_variables_that_say_which_process_this_is_are_no_settings(variable: str) -> None:
    """They share the prefix, change nothing, and are no setting's name."""
    name = ENVIRONMENT_PREFIX + variable
    assert name not in map(environment_name, LEAVES)
    assert load(environment={name: "anything"}) == Settings()


@pytest.mark.parametrize("name", LEAVES)
def test_every_setting_can_be_given_as_text(name: str) -> None:
    """What `str` shows of a value sets that value, from the environment and from a flag."""
    table = TensorCodecs.read({"*.bias": "dense", "[a-c].*": {"codec": "mine", "light": 0.1}})
    other = {bool: True, int: 3, float: 0.25, str: "fp32", TensorCodecs: table.filled(LEVELS)}[type(LEAVES[name])]
    other = {
        "codec.bucket": 1024,
        "codec.coverage": "cyclic",
        "codec.small_bits": 32,
        "codec.residual_at_switch": "reset",
        "regime.signal": "released",
        "servers.lane": "off",
        "timeouts.dead": 25.0,
        "layout.partition_elements": 4096,
    }.get(name, other)
    # A codec that this file does not know has no levels of its own.
    follow = {"codec.light": 0.0, "codec.heavy": 0.0} if name == "codec.name" else {}
    assert flatten(load(environment={environment_name(name): str(other)})) == LEAVES | {name: other} | follow
    assert flatten(load(environment={}, overrides={name: str(other)})) == LEAVES | {name: other} | follow
    assert flatten(load(environment={}, overrides={name: other})) == LEAVES | {name: other} | follow


@pytest.mark.parametrize(("text", "value"), [("1", True), ("Yes", True), ("on", True), ("FALSE", False), ("0", False)])
def test_yes_and_no_may_be_written_as_people_do(text: str, value: bool) -> None:
    """The environment has no type for a truth value."""
    assert load(environment={"PS_ACCORDION_INSECURE": text}).insecure is value


def test_a_number_stays_text_where_text_is_expected() -> None:
    """A run directory named 2024 is not a number."""
    assert load(environment={"PS_ACCORDION_RUN_DIRECTORY": "2024"}).run.directory == "2024"


@pytest.mark.parametrize(
    ("text", "named", "suggestion"),
    [
        ("[workers]\ncoutn = 3\n", "key 'workers.coutn'", "workers.count"),
        ("[worker]\ncount = 3\n", "section 'worker'", "'workers'"),
        ("count = 3\n", "key 'count'", "count"),
        ("workers = 3\n", "key 'workers'", "workers.count"),
        ("[servers.count]\nx = 1\n", "servers.count", "a whole number"),
    ],
)
def test_an_unknown_key_in_a_file_is_refused_with_a_suggestion(toml: Any, text: str, named: str, suggestion: str) -> None:
    """The message names the file, the key as it stands there, and the nearest that exists."""
    file = toml(text)
    with pytest.raises(ConfigError) as caught:
        load(file, environment={})
    for part in (str(file), named, suggestion):
        assert part in str(caught.value)


def test_an_unknown_variable_is_refused_with_a_suggestion() -> None:
    """A double underscore or a typing error must not be ignored in silence."""
    with pytest.raises(
        ConfigError, match=r"PS_ACCORDION_SERVERS__COUNT is not .*did you mean 'PS_ACCORDION_SERVERS_COUNT'.*unset"
    ):
        load(environment={"PS_ACCORDION_SERVERS__COUNT": "3"})


def test_an_unknown_flag_is_refused_with_a_suggestion() -> None:
    """The command line is named as the source."""
    with pytest.raises(ConfigError, match=r"command line: .*'codec\.lihgt'.*did you mean 'codec\.light'"):
        load(environment={}, overrides={"codec.lihgt": 0.1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers.count", "0"),
        ("workers.count", "two"),
        ("workers.count", "2.0"),
        ("workers.count", ""),
        ("workers.threads", "-1"),
        ("seed", "-1"),
        ("seed", str(1 << 63)),
        ("insecure", "perhaps"),
        ("codec.values", "fp8"),
        ("codec.bucket", "500"),
        ("codec.small_bits", "8"),
        ("codec.light", "nan"),
        ("codec.heavy", "inf"),
        ("regime.threshold", "inf"),
        ("regime.threshold", "nan"),
        ("regime.threshold", "0"),
        ("regime.rate_drop", "1"),
        ("timeouts.join", "inf"),
        ("timeouts.join", "-inf"),
        ("timeouts.grace", "0"),
        ("layout.partition_elements", str((1 << 20) + 1)),
    ],
)
def test_an_illegal_value_is_refused_from_text(name: str, value: str) -> None:
    """Where it came from, which setting, what came and what the default is are all said."""
    for source, arguments in (
        (f"environment variable {environment_name(name)}", {"environment": {environment_name(name): value}}),
        ("command line", {"environment": {}, "overrides": {name: value}}),
    ):
        with pytest.raises(ConfigError) as caught:
            load(**arguments)
        assert str(caught.value).startswith(f"{source}: {name} = ")
        assert f"leave it out for {LEAVES[name]!r}" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        'workers.count = "2"',
        "workers.count = 2.0",
        "workers.count = true",
        "codec.light = true",
        'codec.light = "0.1"',
        "codec.light = nan",
        "insecure = 1",
        'insecure = "yes"',
        "run.directory = 2024",
        "codec.name = 1979-05-27",
    ],
)
def test_a_value_of_another_type_in_a_file_is_refused(toml: Any, line: str) -> None:
    """TOML has types: nothing is guessed from a value of the wrong one."""
    with pytest.raises(ConfigError, match=re.escape(line.split(" ")[0])):
        load(toml(line), environment={})


def test_a_whole_number_is_a_float(toml: Any) -> None:
    """`dead = 20` is what people write."""
    settings = load(toml("[timeouts]\ndead = 20\n"), environment={})
    assert settings.timeouts.dead == 20.0
    assert isinstance(settings.timeouts.dead, float)


def test_a_rule_between_settings_names_both_and_where_they_come_from(toml: Any) -> None:
    """A process must be able to miss a heartbeat without being taken for dead."""
    file = toml("[timeouts]\ndead = 5\n")
    with pytest.raises(ConfigError, match=r"timeouts\.dead \(5 s\) .*timeouts\.heartbeat \(3 s\)") as caught:
        load(file, environment={}, overrides={"timeouts.heartbeat": 3})
    assert str(caught.value).startswith(f"{file}, command line: ")
    assert load(file, environment={}, overrides={"timeouts.heartbeat": 2.5}).timeouts == Timeouts(dead=5, heartbeat=2.5)


def test_a_file_that_does_not_exist_says_where_it_was_looked_for(tmp_path: Path) -> None:
    """A relative path means little without the directory it was tried from."""
    with pytest.raises(ConfigError, match=r"'nowhere\.toml' does not exist \(looked from /"):
        load("nowhere.toml", environment={})


@pytest.mark.parametrize("content", [b"[workers\n", b"a = \xff", b"seed = 1\nseed = 2\n"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    """The parser's own words tell the line."""
    file = tmp_path / "job.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"job\.toml' is not readable TOML: "):
        load(file, environment={})


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    """An error of the system is an error of the configuration."""
    with pytest.raises(ConfigError, match="is not readable"):
        load(tmp_path, environment={})


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LEGAL = st.builds(
    Settings,
    seed=st.integers(0, (1 << 63) - 1),
    insecure=st.booleans(),
    run=st.builds(RunSettings, directory=TEXT, record_gradients=st.booleans(), trace=st.booleans()),
    timeouts=st.builds(
        Timeouts,
        join=st.floats(0, 86_400, exclude_min=True),
        dead=st.floats(10, 86_400),
        heartbeat=st.floats(0, 5, exclude_min=True),
    ),
)


@given(settings=LEGAL)
def test_what_is_rendered_reads_back_equal(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The resolved configuration in a run directory starts the same run again, whatever characters and numbers are in it."""
    file = tmp_path_factory.getbasetemp() / "rendered.toml"
    file.write_text(render(settings), encoding="utf-8", newline="")
    assert settings == load(file, environment={})


def test_what_is_rendered_names_every_setting() -> None:
    """A later version's defaults must not change an old run."""
    text = render(Settings())
    for name in LEAVES:
        section, _, last = name.rpartition(".")
        assert re.search(rf"^{last} = |^\[{section}\.{last}\]$", text, re.MULTILINE)


def test_settings_cannot_be_changed() -> None:
    """Settings are frozen, all the way down."""
    settings = Settings()
    for section, name in ((settings, "seed"), (settings.workers, "count")):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(section, name, 3)


def test_the_terms_of_a_job_replace_a_member_s_own() -> None:
    """What all must agree on comes from the coordinator; the rest stays this process's own."""
    job = load(environment={}, overrides={"seed": 5, "codec.light": 0.5, "skip.limit": 2, "workers.count": 7})
    mine = load(environment={}, overrides={"timeouts.grace": 1.0, "seed": 6, "run.directory": "here"})
    together = mine.with_terms(job.terms())
    assert together.terms() == job.terms()
    assert (together.timeouts.grace, together.run.directory) == (1.0, "here")
    assert mine.seed == 6


def test_terms_hold_what_changes_results_and_nothing_local() -> None:
    """Addresses, directories and waiting times are each process's own business."""
    assert {"seed", "workers.count", "codec.name", "regime.window", "layout.partition_elements"} <= Settings().terms().keys()
    assert not {"run.directory", "servers.bind", "coordinator.address", "insecure", "timeouts.dead"} & Settings().terms().keys()


DENSE = {"codec.name": "dense", "codec.light": 32.0}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, LARGEST_KEY),
        (DENSE, LARGEST_KEY // 4),
        (DENSE | {"codec.light": 16.0}, LARGEST_KEY // 2),
        ({"codec.name": "bf16"}, LARGEST_KEY // 2),
        ({"codec.name": "int"}, LARGEST_KEY),
        (DENSE | {"coordinator.address": "ipc://here/c"}, LARGEST_KEY),
        (DENSE | {"layout.partition_elements": 4096}, 4096),
    ],
)
def test_the_largest_key_is_chosen_where_nobody_sets_it(overrides: dict, expected: int) -> None:
    """What goes over a network as it is has smaller keys; and all processes know the number, not only that it is chosen."""
    settings = load(environment={}, overrides=overrides)
    assert settings.partition_elements == expected == settings.terms()["layout.partition_elements"]
    assert Settings().with_terms(settings.terms()).partition_elements == expected
    assert load(environment={}, overrides=flatten(settings)).partition_elements == expected


def test_a_largest_key_below_the_smallest_is_refused() -> None:
    """0 is no size, so it may be said."""
    with pytest.raises(ConfigError, match=r"layout.partition_elements is 1023: expected 1024 or more, or 0"):
        load(environment={}, overrides={"layout.partition_elements": 1023})
    assert load(environment={}, overrides={"layout.partition_elements": 0}) == Settings()


def test_a_joiner_states_what_it_was_told_and_nothing_else() -> None:
    """A default is no opinion, not even where a codec's own level stands in for 0; a given value is one, even the default."""
    assert Settings().explicit_terms() == {}
    told = load(environment={"PS_ACCORDION_CODEC_NAME": "topk"}, overrides={"seed": 0, "run.directory": "here"})
    assert told.explicit_terms() == {"seed": 0, "codec.name": "topk"}
    assert told.with_terms({"seed": 5}).explicit_terms() == told.terms() | {"seed": 5}


def test_some_values_are_replaced_and_the_rest_stays() -> None:
    """The launcher chooses addresses; a value that is not legal says who chose it."""
    settings = load(environment={}, overrides={"seed": 3})
    assert settings.replaced({"servers.bind": "ipc:///s"}, source="me") == Settings(
        seed=3, servers=ServerSettings(bind="ipc:///s")
    )
    with pytest.raises(ConfigError, match=r"^me: servers\.bind = 1 is not legal: expected text; "):
        settings.replaced({"servers.bind": 1}, source="me")


@pytest.mark.parametrize("name", ["insecure", "run.directory", "servers.bind", "codec", "codec.name.x", "", "sed"])
def test_a_term_that_is_none_is_refused(name: str) -> None:
    """The coordinator has no say in where a process listens or writes, and cannot crash it with a strange name."""
    with pytest.raises(ConfigError, match=f"coordinator sent {name!r}"):
        Settings().with_terms({name: True})


@pytest.mark.parametrize(
    "terms", [{"seed": "1"}, {"workers.count": 0}, {"codec.light": float("nan")}, {"codec.name": None}, {"codec.name": ["x"]}]
)
def test_a_term_with_an_illegal_value_is_refused(terms: dict[str, Any]) -> None:
    """Values from a socket are checked like any other."""
    with pytest.raises(ConfigError, match=r"^the coordinator: "):
        Settings().with_terms(terms)


def test_a_suggestion_is_only_made_when_something_is_near() -> None:
    """A wrong hint is worse than none."""
    assert nearest("cuont", ["count", "bind"]) == " (did you mean 'count'?)"
    assert nearest("zzz", ["count", "bind"]) == ""


def test_jobs_are_told_apart_by_terms_and_place() -> None:
    """The same for every process of a job, whatever else it was told; another for other terms, or another run directory."""
    job = load(environment={}, overrides={"run.directory": "/a"})
    same = load(environment={}, overrides={"run.directory": "/a", "timeouts.dead": "20", "coordinator.address": "ipc:///c"})
    assert job_of(job) == job_of(same)
    others = [{"run.directory": "/b"}, {"run.directory": "/a", "seed": "1"}, {"run.directory": "/a", "workers.count": "3"}]
    assert len({job_of(job), *(job_of(load(environment={}, overrides=other)) for other in others)}) == 4
