import numpy as np
import pytest
import twins

from ps_accordion.codecs import lighter, norm, settle
from ps_accordion.errors import CodecError

from .cases import gaussian


@pytest.mark.parametrize("n", [1, 63, 64, 65, 4097])
def test_a_norm_is_the_twins_to_the_bit(n):
    """The order of the sum is fixed, so that the loss ledger and the clip factor are the same on every host."""
    for scale in (1e-30, 1.0, 1e37):
        x = gaussian(n) * np.float32(scale)
        assert norm(x) == twins.norm(x)
        assert norm(x) == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-12)


@pytest.mark.parametrize("rule", ["keep", "clip", "reset"])
@pytest.mark.parametrize("length", [0.0, 0.01, 50.0])
def test_a_rule_leaves_what_the_twin_leaves_and_says_what_it_threw_away(rule, length):
    """The residual and the stated loss agree to the bit, whether the residual is short, long or zero."""
    reference = gaussian(5000)
    residual = gaussian(5000, 1) * np.float32(length)
    expected, stated = twins.settle(rule, residual, reference, 0.5)
    before = residual.copy()
    assert settle(rule, residual, reference, scale=0.5) == stated
    assert np.array_equal(residual, expected)
    assert stated == pytest.approx(np.linalg.norm(before.astype(np.float64) - residual), rel=1e-12)


def test_a_clipped_residual_is_as_long_as_the_reference():
    """A residual of fifty gradients shrinks to one; a short one keeps its bits."""
    reference, long, short = gaussian(5000), gaussian(5000, 1) * np.float32(50), gaussian(5000, 2) * np.float32(0.5)
    lost = settle("clip", long, reference)
    assert norm(long) == pytest.approx(norm(reference), rel=1e-6)
    assert lost == pytest.approx(49 * norm(reference), rel=0.05)
    before = short.copy()
    assert settle("clip", short, reference) == 0.0
    assert np.array_equal(short, before)


def test_a_reference_that_is_not_finite_changes_nothing():
    """Such a round is skipped anyway, and a skip leaves residuals alone."""
    residual, reference = gaussian(100), gaussian(100)
    reference[3] = np.inf
    before = residual.copy()
    assert settle("clip", residual, reference) == 0.0
    assert np.array_equal(residual, before)


def test_lighter_means_that_more_is_sent():
    """The comparison is by bytes, so it works across codecs."""
    assert lighter(("topk", 0.04), ("topk", 0.005), 100_000)
    assert lighter(("dense", 16), ("topk", 0.04), 100_000)
    assert not lighter(("topk", 0.005), ("topk", 0.04), 100_000)
    assert not lighter(("topk", 0.04), ("topk", 0.04), 100_000)


def test_an_unknown_rule_is_refused():
    """The message lists the rules."""
    with pytest.raises(CodecError, match="among keep, clip, reset, got 'drain'"):
        settle("drain", gaussian(3), gaussian(3))
