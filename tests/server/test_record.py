"""What a key keeps between rounds: two halves of a residual, and how to go back one round."""

from collections.abc import Callable

import numpy as np
import pytest
from machines import layout_of, settings_of

from ps_accordion.codecs import Changes
from ps_accordion.ledger import NO_TALLY
from ps_accordion.server.record import NO_CODING, Finished, Held, KeyRecord, Outcome
from ps_accordion.wire import messages as m

KEY = layout_of(settings_of()).keys[1]


def finish(record: KeyRecord, *, wrote: bool, skipped: bool = False, bound: int | None = None) -> None:
    """Finish the open round as a shard does."""
    start = record.start(skipped=skipped)
    after = 1 - start if wrote else start
    if wrote:
        record.target(start).fill(record.round + 2)
    kept = record.bound_before if skipped else record.bound
    outcome = Outcome(
        "DATA" if wrote else "SKIP", 1, NO_CODING, (), start, after, kept if bound is None else bound, 0.0, NO_TALLY
    )
    result = m.Result(0, KEY.number, record.round + 1, 1, outcome.kind, 1)
    record.plan_before, record.plan = record.plan, record.round + 2
    record.finish(Finished(result, ()), outcome, frozenset({record.round + 2}), skipped=skipped)


def test_a_fresh_record_has_a_zero_residual_and_no_memory() -> None:
    """Keys that never need a residual never take a megabyte for one."""
    record = KeyRecord(KEY)
    assert record.halves == [None, None]
    assert not record.residual().any()
    assert record.residual().shape == (KEY.elements,)
    finish(record, wrote=False)
    assert record.halves == [None, None]


def test_a_fold_never_writes_the_half_that_it_reads() -> None:
    """That half is the undo."""
    record = KeyRecord(KEY)
    for round_ in range(4):
        read = record.residual().copy()
        start = record.after
        finish(record, wrote=True)
        assert record.before == start
        assert record.after == 1 - start
        assert (record.residual() == round_ + 1).all()
        half = record.halves[start]
        assert not read.any() if half is None else np.array_equal(half, read)


@pytest.mark.parametrize("wrote", [True, False])
def test_undo_returns_to_where_the_round_began(wrote: bool) -> None:
    """Residual, plan, bound, round, epoch and who is current; no result is left, and pushes of the round after are gone."""
    record = KeyRecord(KEY)
    finish(record, wrote=True, bound=100)
    before = record.residual().copy()
    finish(record, wrote=wrote, bound=200)
    record.open[0] = Held(b"x", m.Push(0, KEY.number, 2, 0, 1, "SKIP", 1.0, 0, False), None)
    record.undo(1, previous_epoch=7)
    assert (record.round, record.epoch, record.result, record.plan, record.bound, record.open) == (0, 7, None, 1, 100, {})
    assert record.current == {1}
    assert np.array_equal(record.residual(), before)
    assert record.start(skipped=True) == record.start(skipped=False) == record.after


def test_a_view_that_takes_nothing_back_changes_nothing() -> None:
    """Its cut lies behind the last finished round."""
    record = KeyRecord(KEY)
    finish(record, wrote=True)
    result, after = record.result, record.after
    record.open[0] = held = Held(b"x", m.Push(0, KEY.number, 1, 0, 1, "SKIP", 1.0, 0, False), None)
    record.undo(1, previous_epoch=7)
    assert (record.round, record.epoch, record.result, record.after, record.open) == (0, 1, result, after, {0: held})


def test_two_rounds_cannot_be_taken_back() -> None:
    """There is one undo half: a view that asks for more is wrong, and must not be obeyed silently."""
    record = KeyRecord(KEY)
    finish(record, wrote=True)
    finish(record, wrote=True)
    with pytest.raises(AssertionError, match="may undo one round, not 2"):
        record.undo(0, previous_epoch=-1)


def test_bounds_follow_the_halves() -> None:
    """Which compression came last is forgotten with the round that used it, in a skip and in an undo alike."""
    record = KeyRecord(KEY)
    finish(record, wrote=True, bound=100)
    finish(record, wrote=True, bound=200)
    finish(record, wrote=True, skipped=True, bound=300)
    assert (record.bound_before, record.bound) == (100, 300)
    finish(record, wrote=False, skipped=True)
    assert (record.bound_before, record.bound) == (100, 100)


def test_what_changed_is_known_for_the_next_fold_alone() -> None:
    """Not where it begins at the other half, nor after anybody has asked for a half to write, or the record was restored."""
    record, changes = KeyRecord(KEY), Changes(np.zeros(0, np.uint32), np.zeros(0, np.float32), 0)
    for forget in (lambda: record.target(0), lambda: record.target(1), restored(record)):
        record.changes = (1, changes)
        assert record.changed(1) is changes
        assert record.changed(0) is None
        forget()
        assert record.changed(1) is None


def restored(record: KeyRecord) -> Callable[[], None]:
    """Return what restores a record of which nothing is left but a result."""
    return lambda: record.restore(Finished(m.Result(0, KEY.number, 3, 1, "DATA", 1), ()), bound=1, version=0)
