import json

import pytest

from ps_accordion.errors import PsAccordionError
from ps_accordion.launcher.summary import Regime, Switch, summarise


def _write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _row(round_, share, bytes_, **more):
    times = {"step_s": 0.1, "compute_s": 0.05, "encode_s": 0.01, "wait_s": 0.02, "decode_s": 0.01}
    moved = {"push_bytes": bytes_, "pull_bytes": bytes_, "dense_bytes": 1000}
    return {"layout": 0, "round": round_, "kind": "DATA", "critical_share": share} | times | moved | more


@pytest.fixture
def run_directory(tmp_path):
    """Give the directory of a run with three rounds and two workers."""
    directory = tmp_path / "run"
    directory.mkdir()
    rounds = [_row(0, 1.0, 100), _row(1, 0.5, 50, kind="SKIP"), _row(2, 0.0, 10), _row(0, 1.0, 9, layout=1)]
    _write(directory / "metrics-worker-0.jsonl", rounds)
    _write(directory / "metrics-worker-1.jsonl", rounds)
    plan = {"event": "plan", "layout": 0, "names": ["a", "b"]}
    _write(
        directory / "events-coordinator.jsonl",
        [
            {"event": "join"},
            plan | {"round": 0, "critical": [True, False], "reason": "norms"},
            plan | {"round": 1, "critical": [True, False], "reason": "norms"},
            plan | {"round": 2, "critical": [True, True], "reason": "rate"},
        ],
    )
    return directory


def test_bytes_are_a_workers_and_ratios_count_both_ways(run_directory):
    """Ratio = dense both ways / moved both ways, over the rounds of a regime."""
    summary = summarise(run_directory)
    assert summary.total == Regime(rounds=3, push_bytes=160, pull_bytes=160, dense_bytes=6000)
    assert {name: regime.ratio for name, regime in summary.regimes.items()} == {"critical": 10, "mixed": 20, "settled": 100}
    assert summary.skipped == 1


def test_a_switch_is_a_change_against_the_plan_before(run_directory):
    """Every run starts with all tensors critical; a plan that repeats the last one switches nothing."""
    assert summarise(run_directory).switches == (Switch(0, "b", False, "norms"), Switch(2, "b", True, "rate"))


def test_times_are_means_a_step_without_the_warm_up(run_directory):
    """The first rounds, in which everything is new, would hide where the time goes."""
    _write(run_directory / "metrics-worker-0.jsonl", [_row(0, 1.0, 1, wait_s=9.0), _row(1, 1.0, 1), _row(2, 1.0, 1)])
    summary = summarise(run_directory, warm_up=1)
    assert summary.step_seconds == pytest.approx(0.1)
    assert summary.parts == pytest.approx({"compute": 0.05, "wait": 0.02, "encode": 0.01, "decode": 0.01})


def test_a_directory_without_metrics_is_an_error(tmp_path):
    """Nothing is reported about nothing."""
    with pytest.raises(PsAccordionError, match="no worker finished a round"):
        summarise(tmp_path)
