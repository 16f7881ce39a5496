"""Thousands of kills in virtual time: no divergence, no hang, every round the sum of one well-defined set of members."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from bugs import BUGS, planted
from simulate import CODECS, passes, world_of
from suites import usually
from world import BEGIN, Faults, World

DISK_SEEDS = 24
REPLAY_SEEDS = 8
ELASTIC_SEEDS = 8
SEEDS = 300 - DISK_SEEDS - REPLAY_SEEDS - ELASTIC_SEEDS
"""Half of them drawn at random, mild and harsh, and half rough, where something dies all the time: 300 with the other kinds."""


def start(*words, **environment):
    """Start `simulate.py` with these words."""
    command = [sys.executable, str(Path(__file__).with_name("simulate.py")), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def run(count, *kinds):
    """Run seeds 0 to `count` - 1 on all cores, with these faults; return the sums of what happened, and what was found."""
    cores = os.cpu_count() or 1
    children = [start(count * core // cores, count * (core + 1) // cores, *kinds) for core in range(cores)]
    outputs = [child.communicate() for child in children]
    happened = sum((Counter(json.loads(out)) for out, _ in outputs if out), Counter())
    return happened, "".join(errors for _, errors in outputs)


@pytest.mark.timeout(600)
def test_no_seed_breaks_a_promise():
    """Messages lost, doubled and late; links cut; processes stalled and killed, at named points too; skips and changing plans."""
    happened, found = run(SEEDS)
    assert found == ""
    # The seeds are worth something only if much has gone wrong in them.
    assert happened["kills of workers"] > 2 * SEEDS
    assert happened["came in"] > SEEDS
    assert happened["stalls"] > SEEDS / 2
    assert happened["lost runs"] + happened["lost starts"] < SEEDS / 20


def test_servers_that_lose_their_disks_break_no_promise():
    """Each begins anew after the last result, without its residual: that is stated, and all replicas stay alike."""
    happened, found = run(DISK_SEEDS, "disks")
    assert found == ""
    assert happened["lost disks"] > DISK_SEEDS
    assert happened["lost runs"] + happened["lost starts"] + happened["lost results"] < DISK_SEEDS / 8


@pytest.mark.parametrize("first", CODECS)
def test_runs_of_mixed_codecs_break_no_promise(first):
    """Every codec beside another: with residuals, with noise that nobody keeps, with summed payloads; and the ledger balances."""
    seeds = range(CODECS.index(first), 4 * len(CODECS), len(CODECS))  # this is the first codec of each
    assert any(world_of(seed, "mixed").run()["sums compared"] for seed in seeds)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_many_runs_of_mixed_codecs_break_no_promise():
    """Other pairs, and other faults."""
    _, found = run(12 * len(CODECS), "mixed")
    assert found == ""


SPARSE = [("random_k", 0.2, 0.05, "cyclic", "fp16"), ("threshold", 1.0, 2.0, "independent", "packed")]


@pytest.mark.full
@pytest.mark.parametrize(("name", "light", "heavy", "coverage", "values"), SPARSE)
def test_sparse_runs_break_no_promise(name, light, heavy, coverage, values):
    """Places in turn whatever is skipped or lost on the way, and values that leave much behind."""
    options = {"codec_name": name, "codec_light": light, "codec_heavy": heavy}
    options |= {"codec_coverage": coverage, "codec_values": values}
    happened = sum((World(seed, Faults.rough(), options=options).run() for seed in range(4)), Counter())
    assert happened["sums compared"] > 0


def test_lost_residuals_are_made_again_where_workers_keep_their_pushes():
    """Bit for bit; where a worker died with what it had pushed, the loss is stated, and the ledger knows of it."""
    happened, found = run(REPLAY_SEEDS, "replay")
    assert found == ""
    assert happened["residuals replayed"] > REPLAY_SEEDS
    assert happened["lost runs"] + happened["lost starts"] + happened["lost results"] < REPLAY_SEEDS / 4


def test_workers_that_leave_lose_nothing_and_others_that_come_count():
    """With faults and without: what was handed over counts once, whoever dies in the middle, and no item is made of it."""
    happened, found = run(ELASTIC_SEEDS, "elastic")
    assert found == ""
    assert happened["left"] > ELASTIC_SEEDS
    assert happened["grown"] > ELASTIC_SEEDS / 2


FOUND = [
    (2383, "disks"),
    (2384, "disks"),
    (2963, "replay"),
    (3212, "replay"),
    (3413, "replay"),
    (3877, "elastic"),
    (3883, "elastic"),
    (5531, ""),
    (10436, ""),
]


@pytest.mark.parametrize(("seed", "kind"), FOUND)
def test_what_a_seed_has_found_stays_mended(seed, kind):
    """Seeds that failed once, among thousands: of the mends there are tests that need no luck, too."""
    assert world_of(seed, kind).run()["decided"] > 0


def test_a_seed_replays_exactly():
    """A failing seed must fail again."""
    one, other = World(3, Faults.rough()), World(3, Faults.rough())
    assert one.run() == other.run()
    assert one.applied == other.applied
    assert [(view.members, view.cuts) for view in one.views.values()] == [
        (view.members, view.cuts) for view in other.views.values()
    ]


def test_without_faults_nothing_is_lost():
    """One view, all rounds, every gradient."""
    world = World(1, Faults())
    assert world.run()["lost steps"] == 0
    assert list(world.views) == [1]


SEEDS_OF: dict[str, list[int]] = {
    "a_frozen_shard_goes_on": [5, 36],
    "a_joiner_gets_no_plan": [17, 20],
    "a_joiner_is_not_told_of_a_skip": [0, 1],
    "a_restarted_coordinator_forgets": [0],
    "a_round_is_never_undone": [0],
    "a_skip_always_changes_halves": [0],
    "a_skip_does_not_go_back": [0],
    "a_view_changes_members_only": [0],
    "one_empty_push_ends_the_round": [52, 135],
    "one_promise_is_enough": [0, 1],
    "promises_for_another_number_count": [25, 31],
    "pushes_of_dead_processes_count": [2, 11],
    "results_leave_before_they_are_written": [0, 1],
    "results_of_any_view_count": [0],
    "results_stay_over_a_view": [0],
    "skipped_pushes_are_not_taken_back": [0],
    "the_cut_is_after_the_highest_round": [0],
    "the_first_skip_decides": [0],
    "the_residual_is_overwritten_in_place": [0],
    "undo_forgets_the_residual": [0],
    "undo_goes_to_the_other_half": [0],
    "what_a_server_holds_frees_nothing": [4, 9],
    "who_comes_back_pushes_as_before": [25, 27],
    "who_comes_back_takes_nothing_back": [61, 90],
    "who_looks_on_hands_out_its_state": [19, 56],
}
"""Rough runs in which each bug is caught, and nothing without it; `simulate.py FIRST LAST rough BUG` finds others."""

DISK_SEEDS_OF: dict[str, list[int]] = {
    "a_blank_shard_answers": [0, 2],
    "a_lost_memory_goes_unnoticed": [0],
    "a_promised_worker_decides": [230],
    "the_cut_is_that_of_the_slowest": [10],
}
"""The same for runs in which servers lose their disks, too."""

REPLAY_SEEDS_OF: dict[str, list[int]] = {
    "a_copy_is_of_what_the_round_left": [0],
    "a_loss_is_forgotten_with_the_next_view": [15, 23],
    "a_replay_forgets_a_skip": [21, 22],
    "pushes_of_whoever_is_there_are_replayed": [2],
}
"""And where workers keep pushes of the last rounds, by which lost residuals are made again."""

ELASTIC_SEEDS_OF: dict[str, list[int]] = {
    "a_leaver_goes_before_its_round_counts": [0],
    "a_leaver_may_go_before_it_is_logged": [111, 115],
    "a_restarted_coordinator_forgets_who_left": [27, 51],
    "a_skipped_flush_is_not_sent_again": [10],
    "what_is_handed_over_stays_here_too": [0],
    "what_nobody_trains_with_is_thrown_away": [6],
    "who_is_new_has_no_weight": [1],
}
"""The same for runs in which workers leave and others come, too."""

SCRIPTED = {
    "a_late_greeting_takes_the_route": "server/test_relay.py::test_a_late_greeting_of_a_dead_process_takes_no_route_away",
    "a_shard_that_missed_a_view_is_believed": (
        "coordinator/test_views.py::test_a_shard_that_missed_a_view_is_not_believed_beyond_its_cut"
    ),
    "a_leaver_hands_out_no_state": "worker/test_leaving.py::test_who_hands_over_its_residual_still_hands_out_its_state",
    "a_lost_memory_is_one_only_if_it_says_so": (
        "coordinator/test_servers.py::test_a_shard_that_has_not_seen_the_view_that_restores_it_is_still_blank"
    ),
    "a_number_is_used_twice": "coordinator/test_views.py::test_a_worker_that_is_heard_again_before_the_view_stays",
    "a_plan_holds_at_once": "worker/test_round_views.py::test_a_plan_goes_with_the_result_that_carried_it",
    "a_promise_dies_with_its_process": "server/test_restart.py::test_a_promise_survives",
    "an_overtaken_proposal_is_abandoned": "coordinator/test_views.py::test_a_worker_that_is_heard_again_before_the_view_stays",
    "copies_stay_though_their_loss_was_stated": ("server/test_replaying.py::test_a_member_that_is_gone_takes_its_pushes_with_it"),
    "undo_keeps_the_plan": "server/test_buffers_and_plans.py::test_a_view_takes_the_plan_back_with_its_round",
    "who_comes_back_takes_all_back": "worker/test_round_views.py::test_who_comes_back_leaves_alone_what_was_counted",
    "who_was_removed_is_let_in_again": (
        "coordinator/test_views.py::test_a_removed_worker_is_told_and_comes_back_as_a_new_incarnation"
    ),
}
"""Schedules written by hand for bugs that random faults have not caught: too many things must come together."""


PINNED = [
    (kind, name, seed)
    for kind, seeds_of in (
        ("rough", SEEDS_OF),
        ("disks", DISK_SEEDS_OF),
        ("replay", REPLAY_SEEDS_OF),
        ("elastic", ELASTIC_SEEDS_OF),
    )
    for name, seeds in seeds_of.items()
    for seed in seeds
]
FIRST = {(kind, name): (kind, name, seed) for kind, name, seed in reversed(PINNED)}.values()
"""Of each bug the first; a second seed is there for the day on which the first has changed."""


@pytest.mark.parametrize(("kind", "name", "seed"), usually(PINNED, *FIRST))
def test_a_planted_bug_is_caught(kind, name, seed):
    """In a run that passes without it. One that takes several times as long with it hangs: that need not be waited for."""
    clean = world_of(seed, kind)
    clean.run()
    with planted(name):
        assert not passes(seed, kind, limit=3 * (clean.now - BEGIN) + 30)


@pytest.mark.parametrize("name", sorted(SCRIPTED))
def test_a_scripted_schedule_catches_what_chance_does_not(name):
    """A test that passes without the bug fails with it."""
    file, _, test = SCRIPTED[name].partition("::")
    path = Path(__file__).parent.parent / file
    spec = importlib.util.spec_from_file_location(f"scripted_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, test)()
    with planted(name), pytest.raises((AssertionError, ValueError, IndexError, KeyError, TypeError)):
        getattr(module, test)()


def test_every_planted_bug_is_caught_by_something():
    """A bug that nothing catches would say that the simulation proves less than it seems to."""
    pinned = {name for _, name, _ in PINNED}
    assert BUGS.keys() == pinned | SCRIPTED.keys()
    assert len(BUGS) >= 30
