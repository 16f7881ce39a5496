"""The formats in which sparse values are written: what each loses, and that the residual has it."""

import numpy as np
import pytest

from ps_accordion.codecs import get
from ps_accordion.errors import PayloadError

from .cases import Case, decode, encode, gaussian


def sent(case, v):
    """Return (coding, payload, what it stands for, residual)."""
    residual = np.zeros_like(v)
    coding, payload = encode(case, v, residual)
    return coding, payload, decode(case, coding, payload), residual


@pytest.mark.parametrize(("form", "size"), [("fp16", 4), ("fp32", 6), ("int8", 3), ("packed", 2)])
def test_an_entry_has_the_size_that_its_format_says(form, size):
    """One more entry costs so many bytes, two where a byte is padded."""
    codec = get("topk", values=form)
    assert codec.payload_bound(1 << 20, 0.5) - codec.payload_bound(1 << 20, 0.25) == size << 18


def test_bytes_are_rounded_to_nearest_and_the_rest_is_exact():
    """At most half a step, which is at most 1/128 of the largest; the largest may lose a whole one."""
    v = gaussian(5000) * np.exp2(np.random.default_rng(0).integers(-20, 20, 5000)).astype(np.float32)
    _, _, decoded, residual = sent(Case("topk", 0.5, "int8"), v)
    step = np.exp2(np.floor(np.log2(np.abs(v).max())) - 6)
    assert np.array_equal(decoded + residual, v)
    was_sent = decoded != 0
    assert np.abs(residual[was_sent]).max() <= step
    assert np.array_equal(decoded / step, np.rint(decoded / step))


@pytest.mark.parametrize("peak", [1e-44, 1e-38, 1e-30, 1.0, 1.4142135, 1.9999999, 3.4e38])
def test_packed_values_are_the_nearest_powers_of_two_and_the_rest_is_exact(peak):
    """Over seven octaves below the largest; what is smaller waits and is not rounded up, denormals neither."""
    v = (np.float32(peak) * np.geomspace(1e-4, 1, 4000)).astype(np.float32)
    _, _, decoded, residual = sent(Case("topk", 1.0, "packed"), v)
    assert np.array_equal(decoded + residual, v)
    assert (np.abs(residual) <= v).all()
    was_sent = decoded != 0
    ratio = decoded[was_sent].astype(np.float64) / v[was_sent]
    assert np.all((ratio >= 0.5**0.5 * (1 - 1e-6)) & (ratio <= 2**0.5 * (1 + 1e-6)) | (v[was_sent] > 2.0**127))
    least = max(min(v[-1] / 128, 2.0**120) * 0.5**0.5, 2.0**-126)
    assert was_sent[v >= least * (1 + 1e-6)].all()
    assert not was_sent[v < least * (1 - 1e-6)].any()


def test_an_outlier_holds_others_up_for_one_round_only():
    """A thousand times the rest: it is sent alone, exactly, and all others the next time."""
    v = np.sign(gaussian(1000)) * np.float32(1.5)
    v[77] = 1536.0
    coding, _, decoded, residual = sent(Case("topk", 1.0, "packed"), v)
    assert (coding.count, decoded[77], residual[77]) == (1, 1536.0, 0.0)
    coding, _ = encode(Case("topk", 1.0, "packed"), np.zeros_like(v), residual)
    assert coding.count == 999


def test_packed_entries_byte_by_byte():
    """Preamble, unit, words, counts: for whoever writes another implementation."""
    v = np.zeros(5000, np.float32)
    v[[3, 4095, 4999]] = 1.0, -100.0, 0.6
    assert sent(Case("topk", 1.0, "packed"), v)[1].tobytes().hex(" ", 2) == "0300 0000 0000 483f 0300 ffff 8703 0200 0100"


def test_bytes_byte_by_byte():
    """1.0, -3.0 and 0.5 in units of 2^-5; a zero behind an odd number of bytes."""
    v = np.array([1.0, -3.0, 0.5], np.float32)
    assert sent(Case("topk", 1.0, "int8"), v)[1].tobytes().hex(" ", 2) == "0200 fbff 20a0 1000 0000 0100 0200 0300"


def test_what_no_encoder_writes_is_refused():
    """A byte of -128, a pad that is not zero, a unit that is denormal or too large, indices that do not rise."""

    def refuse(case, match, at, value):
        v = gaussian(101)
        coding, payload, _, _ = sent(case, v)
        bad = payload.copy()
        bad[at : at + np.asarray(value).nbytes] = np.asarray(value).reshape(1).view(np.uint8)
        with pytest.raises(PayloadError, match=match):
            get("topk").validate(bad, coding)

    octets, packed = Case("topk", 0.1, "int8"), Case("topk", 0.1, "packed")
    refuse(octets, "11 bytes from -127 to 127", 4, np.uint8(0x80))
    refuse(octets, "a zero behind an odd number", 15, np.uint8(1))
    refuse(octets, "exponent -126 to 121", 2, np.int16(122))
    for unit in (0.0, -1.0, 1e-40, 2.0**121, np.inf, np.nan):
        refuse(packed, "a unit from 2\\^-126 to 2\\^120", 4, np.float32(unit))
    refuse(packed, "rising within chunks of 4096", 8, np.uint16(100))
    refuse(packed, "value preamble", 2, np.int16(1))
