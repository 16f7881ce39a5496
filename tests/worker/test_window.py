"""Statistics that a worker takes of its gradients, window by window."""

import math
import tracemalloc

import numpy as np
import pytest

from ps_accordion.errors import UsageError
from ps_accordion.layout import Layout, Tensor
from ps_accordion.regimes import parse_span
from ps_accordion.worker.sums import FULL_BELOW, RUN, SAMPLED
from ps_accordion.worker.window import WindowStatistics

SMALL = Layout(
    [Tensor("w", (40, 50), "float32"), Tensor("b", (40,), "float32")],
    num_shards=1,
    partition_elements=1024,
)


def gradients(layout, seed):
    """Return one random gradient a tensor."""
    random = np.random.default_rng(seed)
    return [random.standard_normal(tensor.elements).astype(np.float32) for tensor in layout.tensors]


def feed(statistics, round_, parts, **options):
    """Play one round; None stands for a tensor that was not used."""
    for tensor, part in enumerate(parts):
        if part is not None:
            statistics.add(tensor, part)
    return statistics.finish_round(round_, **options)


def test_norms_are_of_the_vector_sum():
    """Gradients are summed as vectors over the window, and then measured."""
    statistics = WindowStatistics(SMALL, parse_span("3 steps"))
    rounds = [gradients(SMALL, seed) for seed in range(6)]
    reports = [feed(statistics, r, parts, rate=0.1 * (r + 1), loss=float(r)) for r, parts in enumerate(rounds)]
    assert [report is not None for report in reports] == [False, False, True, False, False, True]
    for window, report in enumerate(reports[2::3]):
        members = rounds[3 * window : 3 * window + 3]
        expected = [np.linalg.norm(np.sum(parts, axis=0, dtype=np.float64)) for parts in zip(*members, strict=True)]
        np.testing.assert_allclose(expected, report.norms, rtol=1e-6)
        assert (window, 3 * window + 2, np.float32) == (report.window, report.round, report.norms.dtype)
        assert (pytest.approx(0.1 * (3 * window + 3)), 3 * window + 1) == (report.rate, report.loss)


def test_opposite_gradients_cancel():
    """A sum of norms would be 2 here; the norm of the sum is 0."""
    statistics = WindowStatistics(SMALL, parse_span("2 steps"))
    parts = gradients(SMALL, 1)
    feed(statistics, 0, parts)
    assert feed(statistics, 1, [-part for part in parts]).norms.tolist() == [0.0, 0.0]


def test_a_skipped_round_adds_nothing():
    """What a skipped round held, NaN too, leaves no trace; the round still counts towards the window."""
    rounds = [gradients(SMALL, seed) for seed in range(3)]
    rounds[1][0][7] = np.nan
    clean, disturbed = (WindowStatistics(SMALL, parse_span("3 steps")) for _ in range(2))
    feed(clean, 0, rounds[0], loss=1.0)
    clean.finish_round(1)
    feed(disturbed, 0, rounds[0], loss=1.0)
    assert feed(disturbed, 1, rounds[1], loss=99.0, skipped=True) is None
    expected, report = feed(clean, 2, rounds[2], loss=2.0), feed(disturbed, 2, rounds[2], loss=2.0)
    np.testing.assert_array_equal(expected.norms, report.norms)
    assert report.loss == 1.5


def test_a_window_of_skipped_rounds_has_no_statistics():
    """Norm 0 would say that nothing changed; NaN says that nothing is known."""
    statistics = WindowStatistics(SMALL, parse_span("1 step"))
    report = feed(statistics, 0, gradients(SMALL, 0), skipped=True)
    assert np.isnan(report.norms).all()
    assert math.isnan(report.loss)


def test_an_unused_tensor_has_norm_zero():
    """A tensor without a gradient in any round adds nothing, and what it held in a window before is gone."""
    statistics = WindowStatistics(SMALL, parse_span("1 step"))
    parts = gradients(SMALL, 0)
    feed(statistics, 0, parts)
    report = feed(statistics, 1, [parts[0], None])
    assert report.norms[1] == 0.0
    assert report.norms[0] == pytest.approx(np.linalg.norm(parts[0]))


def test_large_tensors_are_sampled_without_bias():
    """The norm of 300 x 784 elements from 16 Ki of them is right to 2 %, and to 8 % if it sits in a third of the columns."""
    shape = (300, 784)
    layout = Layout([Tensor("w", shape, "float32")], num_shards=1, partition_elements=1 << 18)
    assert layout.elements > FULL_BELOW
    random = np.random.default_rng(0)
    flat = random.standard_normal(shape)
    striped = flat * (np.arange(784) % 28 < 14)
    one_third = flat * (np.arange(784) < 261)
    for values, error in ((flat, 0.02), (striped, 0.02), (one_third, 0.08)):
        statistics = WindowStatistics(layout, parse_span("1 step"))
        part = values.astype(np.float32).ravel()
        report = feed(statistics, 0, [part])
        assert report.norms[0] == pytest.approx(np.linalg.norm(part), rel=error)


def test_samples_are_fixed_runs_spread_over_the_tensor():
    """One run in each of 256 equal parts, the same at every worker."""
    elements = 1_000_003
    layout = Layout([Tensor("w", (1, elements), "float32")], num_shards=1, partition_elements=1 << 18)
    watched = []
    for _ in range(2):
        statistics = WindowStatistics(layout, parse_span("1 step"))
        feed(statistics, 0, [np.arange(elements, dtype=np.float32)])
        watched.append(statistics._sums.staged[0].astype(np.int64))
    np.testing.assert_array_equal(*watched)
    runs = watched[0].reshape(-1, RUN)
    assert len(runs) == SAMPLED // RUN
    assert (np.diff(runs, axis=1) == 1).all()
    # A part is 61 or 62 blocks of 64 elements here.
    assert (np.diff(runs[:, 0]) > 0).all()
    assert (runs[:, 0] // (elements // len(runs)) - np.arange(len(runs)) <= 1).all()


def test_windows_of_epochs_end_where_an_epoch_begins():
    """Two epochs a window: the report comes when the third begins, for what was finished before."""
    statistics = WindowStatistics(SMALL, parse_span("2 epochs"))
    assert statistics.waits_for_epoch
    parts = gradients(SMALL, 0)
    assert statistics.begin_epoch(0) is None
    assert not statistics.waits_for_epoch
    assert feed(statistics, 0, parts, rate=0.1) is None
    assert statistics.begin_epoch(1) is None
    assert feed(statistics, 1, parts, rate=0.2) is None
    report = statistics.begin_epoch(2)
    assert (report.window, report.round, report.rate) == (0, 1, 0.2)
    np.testing.assert_allclose([2 * np.linalg.norm(part) for part in parts], report.norms, rtol=1e-6)
    feed(statistics, 2, parts)
    assert statistics.begin_epoch(3) is None
    assert statistics.begin_epoch(3) is None, "beginning the same epoch again changes nothing"
    report = statistics.begin_epoch(4)
    np.testing.assert_allclose([np.linalg.norm(part) for part in parts], report.norms, rtol=1e-6)
    with pytest.raises(UsageError, match="epoch 3 was begun after 4"):
        statistics.begin_epoch(3)


def test_epochs_do_not_matter_to_windows_of_steps():
    """A training loop may always say where its epochs begin."""
    statistics = WindowStatistics(SMALL, parse_span("2 steps"))
    parts = gradients(SMALL, 0)
    assert statistics.begin_epoch(0) is None
    feed(statistics, 0, parts)
    assert statistics.begin_epoch(1) is None
    assert feed(statistics, 1, parts).window == 0


def test_who_joins_late_reports_no_statistics_for_that_window():
    """Windows have the same numbers at every worker; half a window is not a window."""
    parts = gradients(SMALL, 0)
    late = WindowStatistics(SMALL, parse_span("10 steps"))
    reports = [report for r in range(25, 40) if (report := feed(late, r, parts))]
    assert [report.window for report in reports] == [2, 3]
    assert np.isnan(reports[0].norms).all()
    assert np.isfinite(reports[1].norms).all()
    late = WindowStatistics(SMALL, parse_span("2 epochs"))
    late.begin_epoch(5)
    feed(late, 0, parts)
    assert np.isnan(late.begin_epoch(6).norms).all()


def test_norms_too_large_for_a_float_are_infinite():
    """An overflow becomes infinity, which the policy takes for missing; nothing warns or raises."""
    statistics = WindowStatistics(SMALL, parse_span("1 step"))
    report = feed(statistics, 0, [np.full(2000, 3e38, dtype=np.float32), None])
    assert report.norms.tolist() == [math.inf, 0.0]


def test_a_gradient_that_is_not_a_whole_flat_tensor_is_refused():
    """Wrong length, type or layout in memory is a mistake of the caller, said at once."""
    statistics = WindowStatistics(SMALL, parse_span("1 step"))
    for wrong in (np.zeros(1999, np.float32), np.zeros(2000), np.zeros((40, 50), np.float32), np.zeros(4000, np.float32)[::2]):
        with pytest.raises(UsageError, match=r"float32\[2000\]"):
            statistics.add(0, wrong)


def test_a_step_allocates_nothing_that_grows_with_the_tensors():
    """Watching 2.1 million elements takes no more than a few kilobytes of passing memory a step."""
    layout = Layout([Tensor(f"w{i}", (512, 1024), "float32") for i in range(4)], num_shards=1, partition_elements=1 << 18)
    statistics = WindowStatistics(layout, parse_span("100 steps"))
    parts = gradients(layout, 0)
    feed(statistics, 0, parts)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    feed(statistics, 1, parts)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 20_000
