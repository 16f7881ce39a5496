"""Thousands of kills in virtual time: no divergence, no hang, every round the sum of one well-defined set of members."""

import concurrent.futures
import importlib.util
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import pytest
from bugs import BUGS, planted
from world import Faults, World

from ps_accordion.codecs import warm

SEEDS = 300
"""Of each kind half: drawn at random, mild and harsh; and rough ones, in which something dies all the time."""


def simulate(seed):
    """Run one seed; return what happened, or what was found."""
    try:
        return World(seed, Faults.rough() if seed % 2 else None).run()
    except Exception as error:  # whatever it is: the seed is what matters
        return f"seed {seed}: {type(error).__name__}: {error}"


def run(seeds):
    """Run seeds on all cores; return the sums of what happened, and what was found."""
    # Children of a fresh server process: this one may have threads of other tests.
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=warm) as pool:
        results = list(pool.map(simulate, seeds, chunksize=5))
    found = [result for result in results if isinstance(result, str)]
    return sum((result for result in results if isinstance(result, Counter)), Counter()), found


@pytest.mark.timeout(300)
def test_no_seed_breaks_a_promise():
    """Messages lost, doubled and late; links cut; processes stalled and killed, at named points too; skips and changing plans."""
    happened, found = run(range(SEEDS))
    assert found == []
    # The seeds are worth something only if much has gone wrong in them.
    assert happened["kills of workers"] > 2 * SEEDS
    assert happened["came in"] > SEEDS
    assert happened["stalls"] > SEEDS / 2
    assert happened["lost runs"] + happened["lost starts"] < SEEDS / 20


def test_a_seed_replays_exactly():
    """A failing seed must fail again."""
    one, other = World(3, Faults.rough()), World(3, Faults.rough())
    assert one.run() == other.run()
    assert one.applied == other.applied
    assert one.views == other.views


def test_without_faults_nothing_is_lost():
    """One view, all rounds, every gradient."""
    world = World(1, Faults())
    assert world.run()["lost steps"] == 0
    assert list(world.views) == [1]


SEED_OF: dict[str, int] = {}
"""A run in which each bug is caught, and nothing else is."""

SCRIPTED = {
    "a_late_greeting_takes_the_route": "server/test_relay.py::test_a_late_greeting_of_a_dead_process_takes_no_route_away",
    "a_number_is_used_twice": "coordinator/test_views.py::test_a_worker_that_is_heard_again_before_the_view_stays",
    "a_plan_holds_at_once": "worker/test_round_views.py::test_a_plan_goes_with_the_result_that_carried_it",
    "an_overtaken_proposal_is_abandoned": "coordinator/test_views.py::test_a_worker_that_is_heard_again_before_the_view_stays",
    "undo_keeps_the_plan": "server/test_shard.py::test_a_view_takes_the_plan_back_with_its_round",
    "who_was_removed_is_let_in_again": (
        "coordinator/test_views.py::test_a_removed_worker_is_told_and_comes_back_as_a_new_incarnation"
    ),
}
"""Schedules written by hand for bugs that random faults have not caught: too many things must come together."""


@pytest.mark.parametrize("name", sorted(SEED_OF))
def test_a_planted_bug_is_caught(name):
    """In a run that passes without it."""
    seed = SEED_OF[name]
    World(seed, Faults.rough()).run()
    with planted(name), pytest.raises(Exception):  # noqa: B017, PT011 - a check, or a role that breaks on what it gets
        World(seed, Faults.rough()).run()


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
    assert BUGS.keys() == SEED_OF.keys() | SCRIPTED.keys()
    assert len(BUGS) >= 30
