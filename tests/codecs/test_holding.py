import numpy as np
import pytest
import twins

from ps_accordion.codecs import encode_holding
from ps_accordion.errors import CodecError

from .cases import CASES, SEED, buffer, gaussian

HELD = [(0, 100), (700, 300)]
ABLE = [case for case in CASES if case.build().zero_kept]
"""Codecs that send nothing for a zero."""


@pytest.mark.parametrize("case", ABLE, ids=str)
@pytest.mark.parametrize("rubbish", [0.0, 5.0, np.nan], ids=str)
def test_a_held_span_goes_as_zero_and_keeps_its_residual(case, rubbish):
    """Payload and residual are the twin's, whatever stands in the gradient there; the gradient is only read."""
    gradient, residual = gaussian(1000), gaussian(1000, 1)
    expected = twins.encode_holding(case.codec, case.level, gradient, residual, HELD, seed=SEED, values=case.values)
    for start, length in HELD:
        gradient[start : start + length] = rubbish
    before = gradient.copy()
    codec = case.build()
    out = buffer(codec, case.level, 1000)
    done = encode_holding(codec, gradient, residual, HELD, level=case.level, seed=SEED, out=out)
    assert out[: done.nbytes].tobytes() == expected.payload
    assert np.array_equal(residual, expected.rest)
    assert np.array_equal(gradient, before, equal_nan=True)


@pytest.mark.parametrize("case", ABLE, ids=str)
def test_what_is_not_finite_outside_the_held_spans_changes_no_residual(case):
    """None comes back, and the held residual is in its place."""
    gradient, residual = gaussian(1000), gaussian(1000, 1)
    gradient[500] = np.inf
    before = residual.copy()
    codec = case.build()
    out = buffer(codec, case.level, 1000)
    assert encode_holding(codec, gradient, residual, HELD, level=case.level, seed=SEED, out=out) is None
    assert np.array_equal(residual, before)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ABLE], ids=str)
def test_a_codec_that_sends_something_for_a_zero_is_refused(case):
    """What it sends would be missing in the residual of a span that nobody used."""
    codec = case.build()
    with pytest.raises(CodecError, match="cannot hold spans; expected fused keys to go dense"):
        encode_holding(
            codec, gaussian(1000), gaussian(1000, 1), HELD, level=case.level, seed=SEED, out=buffer(codec, case.level, 1000)
        )
