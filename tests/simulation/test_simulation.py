"""Thousands of kills in virtual time: no divergence, no hang, every round the sum of one well-defined set of members."""

import concurrent.futures
import multiprocessing
import os
from collections import Counter

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


@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_planted_bug_is_caught(name):
    """In a run that passes without it."""
    seed = SEED_OF[name]
    World(seed, Faults.rough()).run()
    with planted(name), pytest.raises(Exception):  # noqa: B017, PT011 - a check, or a role that breaks on what it gets
        World(seed, Faults.rough()).run()
