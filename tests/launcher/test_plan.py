"""The command that predicts a job: what it prints, what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from ps_accordion.errors import ConfigError
from ps_accordion.launcher.commands import plan

KINDS = ("worker codec", "worker sockets", "worker zeromq", "server shards", "server sockets", "server zeromq")


@pytest.fixture
def coefficients(tmp_path):
    """A file with all that a plan with topk 0.01 needs."""
    ops = dict.fromkeys(("encode_feedback", "decode", "fold2", "fold8", "answer8"), 1.0)
    rows = [
        {"codec": codec, "op": op, "level": level, "n": 10**6, "ms": ms, "vs_memcpy": 2.0}
        for codec, level in (("topk", 0.01), ("dense", 16.0), ("dense", 32.0))
        for op, ms in ops.items()
    ]
    sizes = {"elements": 1 << 22, "workers": 2, "servers": 2, "shards_per_server": 1, "baseline": "gloo all_reduce"}
    for codec, level, nbytes, ms in (("topk", 0.01, 336_000, 20.0), ("dense", 32.0, 33_600_000, 80.0)):
        pushed = {"codec": codec, "level": level, "bytes_a_worker": nbytes, "ms": 9.0, "cpu_ms": dict.fromkeys(KINDS, ms)}
        rows.append(sizes | pushed)
    file = tmp_path / "coefficients.json"
    file.write_text(json.dumps({"machine": {"cores": 2}, "rows": rows}))
    return file


def test_a_plan_says_what_a_step_takes_and_what_to_run(command, tmp_path, coefficients):
    """Candidates, the recommendation, what is busy, memory by what it is for; the same in the file."""
    flags = ("--workers", "8", "--bandwidth", "1Gbit", "--level", "0.01", "--compute", "90ms", "--parameters", "25000000")
    cores = ("--worker-cores", "8", "--server-cores", "8")
    code, output, error = command("plan", *flags, *cores, "--coefficients", str(coefficients), "--json", "plan.json")
    assert (code, error) == (0, "")
    words = (
        "coefficients.json, 17 rows",
        "◀ recommended",
        "25.0 M parameters",
        "recommended",
        "server sockets",
        "memory of a server",
        "limited by",
    )
    assert [word for word in words if word not in output] == []
    assert "measuring" not in output
    figures = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert [row["servers"] for row in figures["rows"] if row["shards_per_server"] == 1] == [1, 2, 4, 8]
    chosen = figures["predicted"]
    assert {key: chosen[key] for key in figures["recommended"]} == figures["recommended"]
    assert chosen["ms"] > chosen["compute_ms"] > 90
    assert chosen["server_memory_bytes"]["residuals"] > 0
    assert set(chosen) == set(figures["rows"][0])


def test_a_plan_is_made_for_the_servers_that_are_asked_for(tmp_path, coefficients):
    """And still says what it would recommend."""
    file = tmp_path / "plan.json"
    given = {"workers": 4, "bandwidth": "1Gbit", "level": 0.01, "servers": 3, "coefficients": [coefficients]}
    assert plan.plan(**given, json_file=file) == 0
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert (figures["predicted"]["servers"], figures["predicted"]["shards_per_server"]) == (3, 1)
    assert figures["recommended"]["servers"] != 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bandwidth": "10"}, "--bandwidth: expected a rate such as 10Gbit"),
        ({"delay": "5"}, "--delay: expected a time such as 20ms"),
        ({"workers": 0}, "--workers 0: expected at least 1"),
        ({"servers": -1}, "--servers -1: expected at least 0"),
        ({"codec": "topkk"}, "--codec or --level: .*topkk"),
        ({"level": 7.0}, "--codec or --level: .*7"),
        ({"model": "alexnet"}, "expected resnet50, bert-base, or a file"),
        ({"coefficients": [Path("nowhere.json")]}, "nowhere.json': No such file"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(changes, said):
    """Before anything is measured, with what came and where from."""
    with pytest.raises(ConfigError, match=said):
        plan.plan(**{"workers": 4, "bandwidth": "1Gbit"} | changes)


def test_a_file_of_something_else_is_no_file_of_coefficients(tmp_path):
    """Its name, and the commands that write one."""
    file = tmp_path / "other.json"
    file.write_text('{"rows": 3}')
    with pytest.raises(ConfigError, match=r"other\.json': expected a file that `ps-accordion bench codecs --json FILE`"):
        plan.plan(workers=4, bandwidth="1Gbit", coefficients=[file])
