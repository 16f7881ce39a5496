"""The sums of the ledger with codecs that round at random: nothing is kept, noise is an item, and what is wrong still shows."""

import numpy as np
import pytest
from machines import gaussian, layout_of, settings_of

from ps_accordion.codecs import Push, fold, registry
from ps_accordion.ledger import NO_TALLY, Probe
from ps_accordion.regimes import Choice
from ps_accordion.seeds import mix64
from ps_accordion.server import accounts
from ps_accordion.worker.coder import KeyCoder, coding_of

N = 2048
NOISY = [Choice("qsgd", 8.0), Choice("qsgd", 4.0), Choice("qsgd", 2.0), Choice("natural", 8.0), Choice("terngrad", 2.0)]
NOISY += [Choice("quic_fl", 8.0), Choice("quic_fl", 4.0)]
ROUNDS = 100


def coder():
    """Return a worker's coder of a key of 2,048 elements, all of which are watched."""
    settings = settings_of()
    return KeyCoder(0, layout_of(settings).keys[1], settings, slot=1, incarnation=2)


def push(of, choice, round_, vector=None):
    vector = gaussian(N, round_) if vector is None else vector
    pushed = of.encode(vector, round_=round_, used=of.key.all_used, choice=choice, previous_skipped=False)
    return pushed.message, pushed.payload


def hides(choice):
    """Return whether the noise of an element may be as large as the element: with 2 bits, and where a column of 128 shares it."""
    return choice.level == 2 or choice == Choice("quic_fl", 4.0)


def balance(tally):
    return abs(tally.difference) <= tally.slack and tally.even


@pytest.mark.parametrize("choice", NOISY, ids=str)
def test_gradients_are_pushes_and_noise_that_is_even(choice):
    """Over a hundred rounds, one in ten taken back, others with a codec that leaves a residual behind."""
    of = coder()
    for round_ in range(ROUNDS):
        with_residual = round_ % 10 == 3
        message, payload = push(of, Choice("topk", 0.05) if with_residual else choice, round_)
        if round_ % 10 == 7:
            of.take_back(message, payload)
    tally = of.account.closed(of.residual)
    assert balance(tally)
    assert tally.spread > 0
    assert (tally.lost != 0) == (choice.codec == "terngrad")  # which clips
    # Without the item the sums would be far apart: it is not that slack hides the noise.
    assert abs(tally.came - tally.went - tally.kept) > 10 * tally.slack


@pytest.mark.parametrize("choice", NOISY, ids=str)
def test_a_payload_of_another_vector_does_not_balance(choice):
    """A gradient that was doubled before it was encoded, or its sign turned: once in a hundred rounds.

    Where noise hides one round (with 2 bits a doubled vector is rounded to numbers that are its neighbours, too), it goes on;
    then it is no noise any more.
    """
    for wrong in (np.float32(2), np.float32(-1)):
        of, twin = coder(), coder()
        for round_ in range(ROUNDS):
            bad = round_ == 41 or (round_ > 41 and hides(choice))
            message, payload = push(twin, choice, round_, wrong * gaussian(N, round_) if bad else None)
            codec = registry.get(choice.codec)
            of.account.pushed(codec, payload, coding_of(message), gaussian(N, round_))
        assert not balance(of.account.closed(None))


@pytest.mark.parametrize("choice", NOISY, ids=str)
def test_a_push_that_is_noted_as_taken_back_but_is_not_does_not_balance(choice):
    """Its mass is in no residual: the noise of its round does not cover it."""
    of = coder()
    for round_ in range(ROUNDS):
        message, payload = push(of, choice, round_)
        if round_ == 7:
            of.account.taken_back(registry.get(choice.codec), payload, coding_of(message))
    assert not balance(of.account.closed(of.residual))


def test_rounding_that_always_goes_towards_zero_is_not_even():
    """Each element is at a neighbour of its value, so the sums balance; their noise is what chance does not explain."""
    of = coder()
    codec = registry.get("qsgd")
    for round_ in range(ROUNDS):
        vector = gaussian(N, round_)
        message, payload = push(coder(), Choice("qsgd", 8.0), round_, vector)
        unit = np.repeat(payload[4 : 4 + 16].view(np.float32), 512)
        payload[20:] = (np.trunc(vector / unit) + 128).clip(1, 255).astype(np.uint8)
        of.account.pushed(codec, payload, coding_of(message), vector)
    tally = of.account.closed(None)
    assert abs(tally.difference) <= tally.slack
    assert not tally.even


def rounds_at_a_server(choice, planted=None):
    """Fold two workers' pushes a round; return the account. A planted bug is a change of what is folded in the 42nd round.

    Where noise hides one round, it is planted in all later ones, too.
    """
    key = layout_of(settings_of()).keys[1]
    probe, tally, workers = Probe(0, key), NO_TALLY, (coder(), coder())
    codecs = registry.suite()
    residual = None
    for round_ in range(ROUNDS):
        pushes = []
        for slot, of in enumerate(workers):
            message, payload = push(of, choice, round_, gaussian(N, 2 * round_ + slot))
            pushes.append(Push(1.0, coding_of(message), payload.copy()))
        bad = planted is not None and (round_ == 41 or (round_ > 41 and hides(choice)))
        folded = planted(pushes) if bad else pushes
        out = np.empty(codecs[choice.codec].payload_bound(N, choice.level), np.uint8)
        done = fold(
            folded,
            residual,
            None,
            elements=N,
            total_weight=2.0,
            seed_reply=mix64(round_),
            scratch=np.empty(N, np.float32),
            out=out,
        )
        result = done.coding, out[: done.nbytes]
        tally = accounts.counted(probe, tally, pushes, 2.0, result, (residual, None), codecs=codecs, unused=(), lost=done.lost)
    return tally


@pytest.mark.parametrize("choice", NOISY, ids=str)
def test_means_are_results_and_noise_that_is_even(choice):
    """At a server that keeps no residual."""
    tally = rounds_at_a_server(choice)
    assert balance(tally)
    assert tally.spread > 0


@pytest.mark.parametrize("choice", NOISY, ids=str)
@pytest.mark.parametrize("planted", [lambda pushes: [pushes[0], *pushes], lambda pushes: pushes[1:]], ids=["doubled", "dropped"])
def test_a_push_that_is_doubled_or_dropped_in_one_fold_does_not_balance(choice, planted):
    """What comes out is no rounding of the mean."""
    assert not balance(rounds_at_a_server(choice, planted))
