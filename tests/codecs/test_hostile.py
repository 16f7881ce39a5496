import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from suites import usually

from ps_accordion.codecs import get
from ps_accordion.codecs.kernels import _jit
from ps_accordion.codecs.registry import DEFAULT
from ps_accordion.errors import PayloadError

from .cases import Case, encode, environment, gaussian
from .hostile import LEVELS_OF

PLACES = "random_k threshold topk"
"""Those whose payloads say where in a vector to write."""
OTHERS = " ".join(sorted(LEVELS_OF.keys() - set(PLACES.split())))


def test_no_codec_is_spared():
    """A new one is attacked, too."""
    assert set(LEVELS_OF) == set(DEFAULT)


@pytest.mark.parametrize("names", usually([PLACES, OTHERS], PLACES), ids=["places", "others"])
def test_no_bytes_make_a_decoder_leave_its_arrays(names):
    """Two thousand mutated payloads a codec, with bounds checks compiled in: each is refused, or decodes to finite numbers."""
    directory = _jit.cache_directory()
    assert directory is not None
    # Numba does not tell code with checks from code without: they must not share a cache.
    checked = environment(NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(directory / "boundscheck"))
    script = Path(__file__).with_name("hostile.py")
    done = subprocess.run(
        [sys.executable, str(script), "2000", *names.split()], env=checked, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, (refused, accepted) in json.loads(done.stdout).items():
        assert refused + accepted == 2000, name
        assert refused > 500, name
        assert accepted > 50, name


def test_a_topk_payload_is_refused_for_each_thing_that_can_be_wrong():
    """Every check has a payload that only it refuses."""
    coding, good = encode(Case("topk", 0.1, "fp32"), gaussian(100), np.zeros(100, np.float32))
    codec = get("topk")
    codec.validate(good, coding)
    places = 4 + 4 * coding.count

    def refuse(match, at=None, value=0, header=coding, payload=good):
        bad = payload.copy()
        if at is not None:
            bad[at : at + np.asarray(value).nbytes] = np.asarray(value).reshape(1).view(np.uint8)
        with pytest.raises(PayloadError, match=match):
            codec.validate(bad, header)

    refuse("value preamble", 0, np.uint8(4))
    refuse("value preamble", 1, np.uint8(1))
    refuse("value preamble", 2, np.int16(1))
    refuse("finite float32", 4, np.float32(np.nan))
    refuse("rising within chunks", places, np.uint16(99))
    refuse("rising within chunks", places + 2 * coding.count - 2, np.uint16(100))
    refuse("rising within chunks", places + 2 * coding.count, np.uint16(9))
    refuse("rising within chunks", places + 2 * coding.count, np.uint16(11))
    refuse("expected at most 10 of 100", header=coding._replace(count=9))
    refuse("expected at most 5 of 100", header=coding._replace(level=0.05))
    refuse("expected a level in", header=coding._replace(level=float("nan")))
    refuse("expected at most 10", payload=good[:-1])
    refuse("preamble of 4 bytes", payload=good[:3])


def test_halves_that_no_encoder_writes_are_refused():
    """Infinity, NaN and what would decode to infinity at the largest exponent; exponents out of range."""
    coding, good = encode(Case("dense", 16), gaussian(10), np.zeros(10, np.float32))
    codec = get("dense")
    codec.validate(good, coding)
    for at, value in ((4, 0x7C00), (6, 0xFC00), (8, 0x7E00), (10, 0x7800), (2, 114), (2, 0x10000 - 127)):
        bad = good.copy()
        bad[at : at + 2] = np.array([value], np.uint16).view(np.uint8)
        with pytest.raises(PayloadError, match=r"halves of at most 32752|exponent -126 to 113"):
            codec.validate(bad, coding)


def test_payloads_that_may_be_read_where_others_write_are_safe_whatever_becomes_of_them():
    """They were validated, and are anything by now: decoded and added, they give some number for each element, and no error."""
    levels = {(name, level) for name, codec in DEFAULT.items() for level in LEVELS_OF[name] if codec.takes_any(level)}
    assert levels == {("dense", 32), ("bf16", 16)}
    draw = np.random.default_rng(3)
    for name, level in levels:
        codec, n = get(name), 4099
        coding, good = encode(Case(name, level), gaussian(n), np.zeros(n, np.float32))
        anything = draw.integers(0, 256, good.size, np.uint8)
        anything.flags.writeable = False
        codec.fits(anything, coding)
        room = np.full(n + 2, 7.0, np.float32)
        out, part = room[1:-1], room[11:21]
        codec.decode(anything, coding, out)
        decoded = out.copy()
        codec.peek(anything, coding, 10, part)
        assert part.tobytes() == decoded[10:20].tobytes()
        with np.errstate(all="ignore"):
            codec.begin(anything, coding, np.float32(0.5), out)
            codec.accumulate(anything, coding, np.float32(2.0), out)
        assert room[0] == room[-1] == 7.0
        with pytest.raises(PayloadError, match="finite"):
            codec.receive(anything, coding, out)
        codec.receive(good, coding, out)
        expected = np.empty(n, np.float32)
        codec.decode(good, coding, expected)
        assert out.tobytes() == expected.tobytes()
