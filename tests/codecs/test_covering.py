"""Codecs that draw shared places: which elements go when, round after round."""

import numpy as np
import pytest
import twins

from ps_accordion.codecs import get
from ps_accordion.codecs.covering import push_seed
from ps_accordion.errors import CodecError
from ps_accordion.seeds import mix64, seed_for, unmix64

from .cases import Case, decode, encode, gaussian

JOB = {"job": 5, "layout": 0, "key": 3}


def places(name, n, level, seed):
    """Return the places that a payload covers, as the twin draws them, having checked that they are the codec's."""
    at = twins.drawn(n, level, seed) if name == "random_k" else twins.covered(n, get(name).length(n, level), seed)
    decoded = decode(Case(name, level), *encode(Case(name, level), np.ones(n, np.float32), np.zeros(n, np.float32), seed))
    assert np.array_equal(np.flatnonzero(decoded), np.sort(at))
    return at


def seeds(name, n, level, rounds, coverage="cyclic"):
    """Return the seeds of some rounds, as workers make them."""
    codec = get(name, coverage=coverage)
    return [push_seed(codec, n, level, **JOB, round_=round_, slot=0) for round_ in rounds]


def test_a_seed_can_be_made_for_any_draw():
    """`unmix64` is the inverse of `mix64`, both ways."""
    for value in [0, 1, 2**64 - 1, *map(int, np.random.default_rng(0).integers(0, 2**64, 100, np.uint64))]:
        assert mix64(unmix64(value)) == unmix64(mix64(value)) == value


def test_random_k_sends_one_element_of_each_stretch_each_equally_often():
    """The distribution that is promised: 1 / m each, one a stretch, a shorter last stretch with its share; m from the level."""
    n, m, rounds = 1003, 10, 1000
    seen, together = np.zeros(n), 0
    for seed in seeds("random_k", n, 0.1, range(rounds), "independent"):
        at = twins.drawn(n, 0.1, seed)
        assert np.array_equal(np.unique(at // m), np.arange(at.size))
        seen[at] += 1
        together += (at[:100] % m == np.roll(at[:100] % m, 1)).sum()
    expected, spread = rounds / m, rounds / m * (1 - 1 / m)
    assert abs(((seen - expected) ** 2 / spread).sum() - n) < 5 * np.sqrt(2 * n)
    assert abs(together / (100 * rounds) - 1 / m) < 5 * np.sqrt(0.09 / (100 * rounds))
    codec = get("random_k")
    assert [codec.stretch(1000, level) for level in (1.0, 0.6, 0.3, 0.01, 1e-3, 1e-9)] == [1, 2, 3, 100, 1000, 1000]
    places("random_k", n, 0.1, 7)


@pytest.mark.parametrize(("n", "level"), [(1000, 0.1), (1003, 0.1), (1003, 0.3), (5, 0.01), (1, 0.5), (97, 1.0)])
def test_any_cycle_of_rounds_covers_every_element_exactly_once(n, level):
    """random_k: m rounds, wherever they begin; the round number in the seed is 32 bits, and that is enough for any job."""
    m = get("random_k").stretch(n, level)
    for first in (0, 1, 12_345, 2**32 - m):
        covered = np.concatenate([places("random_k", n, level, s) for s in seeds("random_k", n, level, range(first, first + m))])
        assert np.array_equal(np.sort(covered), np.arange(n))


@pytest.mark.parametrize(("n", "level"), [(1000, 0.1), (1003, 0.1), (1003, 0.37), (5, 0.01), (97, 1.0)])
def test_blocks_in_turn_follow_each_other_without_a_gap(n, level):
    """random_block: any n elements that are sent one after another are all elements, each once."""
    rounds = range(77, 77 + 3 * -(-n // get("random_block").length(n, level)))
    sent = np.concatenate([places("random_block", n, level, seed) for seed in seeds("random_block", n, level, rounds)])
    assert np.array_equal(np.diff(sent) % n, np.ones(sent.size - 1) % n)
    assert np.array_equal(np.sort(sent[:n]), np.arange(n))


@pytest.mark.parametrize("name", ["random_block", "random_k"])
def test_after_a_skipped_round_and_a_change_of_level_nobody_waits_longer_than_a_cycle_more(name):
    """What a skipped round had sent has its turn a cycle later; a cycle of the new level covers all, from its first round on."""
    n, codec = 1000, get(name)
    light, heavy = 0.1, 0.04
    cycle = {level: -(-n // codec.length(n, level)) for level in (light, heavy)}
    skipped = 5
    last = np.full(n, -1)
    for round_ in range(100):
        level = light if round_ < 40 else heavy
        if round_ != skipped:
            last[places(name, n, level, *seeds(name, n, level, [round_]))] = round_
        if round_ == skipped + cycle[light] - 1:
            assert (last < 0).sum() <= codec.length(n, light)
        if round_ >= 2 * cycle[light]:
            assert round_ - last.min() <= cycle[light] + cycle[heavy]
        if round_ >= 40 + cycle[heavy]:
            assert round_ - last.min() < cycle[heavy]


@pytest.mark.parametrize("name", ["random_block", "random_k"])
def test_seeds_are_shared_by_members_and_not_by_keys(name):
    """All workers draw alike, whatever the coverage; another key, job or layout draws otherwise."""
    for coverage in ("independent", "cyclic"):
        codec = get(name, coverage=coverage)
        one = push_seed(codec, 100_003, 0.1, **JOB, round_=9, slot=0)
        assert push_seed(codec, 100_003, 0.1, **JOB, round_=9, slot=1) == one
        others = [push_seed(codec, 100_003, 0.1, **(JOB | change), round_=9, slot=0) for change in ({"key": 4}, {"job": 6})]
        assert len({one, *others}) == 3
    assert seeds(name, 1000, 0.1, [3], "independent") == [seed_for(5, 0, 3, 3, 0)]
    assert push_seed(get("qsgd"), 1000, 8, **JOB, round_=3, slot=2) == seed_for(5, 0, 3, 3, 3)


def test_a_coverage_that_does_not_exist_is_refused():
    """The message says what does."""
    with pytest.raises(CodecError, match="random_k: expected coverage to be 'independent' or 'cyclic', got 'once'"):
        get("random_k", coverage="once")


def test_payloads_of_random_k_are_linear():
    """D(a + b) == D(a) + D(b), added entry by entry."""
    n, case = 1003, Case("random_k", 0.1)
    (coding, a), (_, b) = (encode(case, gaussian(n, i), np.zeros(n, np.float32)) for i in range(2))
    total = (a.view(np.float32) + b.view(np.float32)).view(np.uint8)
    assert np.array_equal(decode(case, coding, total), decode(case, coding, a) + decode(case, coding, b))
