import numpy as np
import torch

from .cases import Case, decode, encode, gaussian

CASE = Case("bf16", 16)


def sent(v):
    """Return (what is sent for each of `v`, what is kept), as float32."""
    kept = np.zeros_like(v)
    coding, payload = encode(CASE, v, kept)
    return decode(CASE, coding, payload), kept


def test_numbers_round_as_torch_rounds_them_at_every_tie():
    """Every code of either sign, the middle to the next, and the floats on both sides of that middle."""
    codes = np.arange(0x80, 0x7F7F, dtype=np.uint32)  # torch may flush what is denormal
    exact = (codes << 16).view(np.float32)
    middle = ((codes << 16) + 0x8000).view(np.float32)
    for values in (exact, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))):
        for v in (values, -values):
            expected = torch.from_numpy(v).to(torch.bfloat16).to(torch.float32).numpy()
            assert np.array_equal(sent(v)[0], expected)


def test_what_would_round_to_infinity_is_the_largest_number_and_a_rest_that_comes_later():
    """The next round sends the rest: nothing is lost at the top of the range."""
    top = np.float32(255 * 2.0**120)
    v = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max, top], np.float32)
    made, kept = sent(v)
    assert made.tolist() == [top, -top, top]
    assert (made + kept).tolist() == v.tolist()
    again, _ = sent(kept)
    assert again[:2].tolist() == [float(np.float32(2.0**120)), -float(np.float32(2.0**120))]


def test_denormal_numbers_have_their_place():
    """Whole multiples of 2^-133 are sent as they are, anything else is off by half of that at most, and kept."""
    v = (np.arange(-300_000, 300_000, 7) * 2.0**-149).astype(np.float32)
    made, kept = sent(v)
    assert np.array_equal(made + kept, v)
    assert np.abs(kept.astype(np.float64)).max() <= 2.0**-134


def test_an_element_errs_by_a_share_of_itself_however_small_it_is():
    """Over 200 octaves in one vector, where halves with one scale reach 40."""
    v = gaussian(10_000) * np.exp2(np.random.default_rng(0).integers(-100, 100, 10_000)).astype(np.float32)
    made, _ = sent(v)
    assert (np.abs(made - v) <= np.abs(v) * 2.0**-8).all()
