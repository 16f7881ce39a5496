import numpy as np
import twins

from ps_accordion.codecs import Coding
from ps_accordion.seeds import seed_for

from .cases import Case, decode, encode, gaussian


def test_a_block_wraps_around_and_everything_else_stays():
    """Over many seeds the block covers exactly its b elements, in order, across the end."""
    n, case, wrapped = 100, Case("random_block", 0.3), 0
    v = gaussian(n) + np.float32(100)
    for round_ in range(200):
        seed = seed_for(0, 0, 0, round_, 0)
        residual = np.zeros(n, np.float32)
        coding, payload = encode(case, v, residual, seed)
        at = twins.covered(n, 30, seed)
        wrapped += int(at[0] > at[-1])
        assert np.array_equal(np.frombuffer(payload, np.float32), v[at])
        assert not residual[at].any()
        assert np.count_nonzero(residual) == n - 30
        assert np.array_equal(np.flatnonzero(decode(case, coding, payload)), np.sort(at))
    assert 30 < wrapped < 90


def test_blocks_start_everywhere_equally_often():
    """Starts of consecutive rounds are uniform: no coordinate is forgotten."""
    starts = np.bincount([int(twins.covered(64, 1, seed_for(1, 0, 3, round_, 0))[0]) for round_ in range(6400)], minlength=64)
    chi_square = ((starts - 100) ** 2 / 100).sum()
    assert chi_square < 63 + 5 * np.sqrt(2 * 63)


def test_payloads_of_one_place_are_linear():
    """D(a + b) == D(a) + D(b), added entry by entry."""
    n, case = 1000, Case("random_block", 0.25)
    (coding, a), (_, b) = (encode(case, gaussian(n, i), np.zeros(n, np.float32)) for i in range(2))
    total = (a.view(np.float32) + b.view(np.float32)).view(np.uint8)
    assert isinstance(coding, Coding)
    assert np.array_equal(decode(case, coding, total), decode(case, coding, a) + decode(case, coding, b))
