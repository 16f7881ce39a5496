import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from numba.core import config

from ps_accordion import codecs
from ps_accordion.codecs import Coding, kernels
from ps_accordion.codecs.base import Hint
from ps_accordion.codecs.kernels import half, sparse, vector
from ps_accordion.codecs.kernels._jit.library import _libraries
from ps_accordion.codecs.values import FORMS
from ps_accordion.codecs.workspace import borrow, take, zeros

from .cases import CASES, SEED, SPARSE, Case, buffer, environment, gaussian


def python(script, **changes):
    """Return what a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", script], env=environment(**changes), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_codecs_does_not_import_numba():
    """The coordinator and the command line stay light."""
    assert python("import sys, ps_accordion.codecs; print('numba' in sys.modules)") == ["False"]


def test_kernels_are_kept_under_the_users_cache_and_the_second_start_compiles_nothing(tmp_path):
    """Not in site-packages; and numba's setting for a user's own functions is what it was."""
    script = (
        "import sys\n"
        "import numpy as np\n"
        "from ps_accordion.codecs.kernels import half\n"
        "half.peak(np.zeros(3, np.uint16))\n"
        "print('numba' in sys.modules)\n"
        "from numba.core import config\n"
        "print(repr(config.CACHE_DIR))"
    )
    cache = {"XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    assert python(script, **cache) == ["True", "''"]
    assert python(script, **cache) == ["False", "''"]
    kept = [path.relative_to(tmp_path).parts for path in tmp_path.rglob("*") if path.is_file()]
    assert [parts[:2] for parts in kept] == [("ps-accordion", "numba")]
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_cache_that_cannot_be_written_is_said_once_and_numba_gets_no_other_place():
    """Without a directory kernels compile at every start; they never go into site-packages."""
    script = (
        "import warnings\n"
        "import numpy as np\n"
        "from ps_accordion.codecs.kernels import half, vector\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    print(half.peak(np.arange(3, dtype=np.uint16)), vector.peak(np.zeros(3, np.float32)))\n"
        "seen = [str(each.message) for each in seen]\n"
        "print(len(seen), 'set XDG_CACHE_HOME or NUMBA_CACHE_DIR' in seen[0])"
    )
    assert python(script, XDG_CACHE_HOME="/dev/null/none", NUMBA_CACHE_DIR="") == ["2", "0", "1", "True"]


def test_a_users_own_functions_keep_numbas_own_cache():
    """After our kernels are compiled, numba's configuration is untouched."""
    codecs.warm()
    expected = os.environ.get("NUMBA_CACHE_DIR", "")
    assert expected == config.CACHE_DIR

    @numba.njit
    def own(x):
        return x + 1

    assert own(1) == 2


def test_the_wrong_type_is_an_error_and_not_another_compilation():
    """Signatures are fixed: nothing compiles in the middle of training."""
    with pytest.raises(TypeError, match="No matching definition"):
        vector.peak(np.zeros(3, np.float64))


def test_every_half_decodes_as_numpy_decodes_it():
    """All 65,536 codes but infinities and NaN."""
    codes = np.arange(65_536, dtype=np.uint16)
    codes = codes[(codes & 0x7C00) != 0x7C00]
    out = np.empty(codes.size, np.float32)
    half.decode(codes, np.float32(1), out)
    assert np.array_equal(out.view(np.uint32), codes.view(np.float16).astype(np.float32).view(np.uint32))


def test_halves_round_as_numpy_rounds_them_at_every_tie():
    """Each half below 32752, the middle to the next, and the floats on both sides of that middle."""
    codes = np.arange(0x77FF, dtype=np.uint16)
    exact = codes.view(np.float16).astype(np.float32)
    middle = (exact + (codes + np.uint16(1)).view(np.float16).astype(np.float32)) / 2
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))
    for values in (exact, middle, below, above):
        for signed in (values, -values):
            out, rest = np.empty(signed.size, np.uint16), np.empty(signed.size, np.float32)
            half.encode(signed, np.float32(1), np.float32(1), out, rest)
            expected = signed.astype(np.float16)
            assert np.array_equal(out, expected.view(np.uint16))
            assert np.array_equal(rest, signed - expected.astype(np.float32))


def test_places_are_checked_without_believing_the_counts():
    """Counts that run past the places, places that fall, repeat or reach beyond the last chunk: all false."""

    def check(places, counts, elements):
        return sparse.check(np.array(places, np.uint16), np.array(counts, np.uint16), elements)

    assert check([0, 5, 0], [2, 1], 32_769)
    assert check([], [0], 5)
    assert not check([0, 5, 1], [2, 1], 32_769)
    assert not check([5, 5], [2], 10)
    assert not check([5, 4], [2], 10)
    assert not check([0], [2], 10)
    assert not check([0, 1], [1], 10)
    assert not check([32_768], [1, 0], 65_536)
    assert not check([1], [65_535], 10)


@pytest.mark.parametrize("n", [0, 1, 1000, 40_001, (1 << 17) + 5])
def test_sums_that_are_written_in_one_pass_have_the_bits_of_those_in_several(n):
    """Zeros with a sign and what is not finite included; the peak is that of what was written."""
    a, b = (np.random.default_rng(seed).standard_normal(n).astype(np.float32) for seed in (1, 2))
    a[::7], b[::7], b[::11], a[5::90] = -0.0, -0.0, 0.0, np.inf
    weight, other, scale = np.float32(0.3), np.float32(2.5), np.float32(0.1)
    with np.errstate(invalid="ignore"):
        total = np.float32(0) + weight * a
        expected = (total + other * b) * scale + np.float32(0)
    top = int((expected.view(np.uint32) & 0x7FFFFFFF).max(initial=0))
    for kernel, arguments in ((vector.both, (weight, a, other, b, scale)), (vector.added, (total, other, b, scale))):
        out = np.full(n, np.nan, np.float32)
        assert kernel(*arguments, out) == top
        assert out.tobytes() == expected.tobytes()
    for past in (False, True):
        out.fill(np.nan)
        assert vector.copied(a, np.full(vector.ROW, np.nan, np.float32), past, out) == vector.peak(a)
        assert out.tobytes() == a.tobytes()


def test_scratch_memory_is_reused_by_name_and_belongs_to_a_thread():
    """The same name gives the same memory, another name other memory."""
    a, b = borrow("one", 100, np.float32), borrow("one", 50, np.uint16)
    assert a.ctypes.data == b.ctypes.data
    assert borrow("two", 100, np.float32).ctypes.data != a.ctypes.data
    assert borrow("one", 0, np.float32).size == 0
    assert [vector.ctypes.data % 64 for vector in (a, take(10), zeros(10))] == [0, 0, 0]


@pytest.mark.parametrize("n", [1, 4097, (1 << 17) - 1, (1 << 17) + 5, (1 << 17) + (1 << 15) + 4])
@pytest.mark.parametrize("off", [0, 1, 15])
@pytest.mark.parametrize("past", [False, True])
def test_values_are_spread_to_their_places_wherever_a_vector_begins(n, off, past):
    """Zero elsewhere, and nothing around it is touched; past the cache it is written a line at a time."""
    room = np.full(n + 64, np.nan, np.float32)
    first = off + -room.ctypes.data // 4 % 16
    out, rng = room[first : first + n], np.random.default_rng(n)
    at = np.flatnonzero(rng.random(n) < 0.01)
    counts = np.array([np.count_nonzero(at >> 15 == chunk) for chunk in range(-(-n // (1 << 15)))], np.uint16)
    values, row = rng.standard_normal(at.size).astype(np.float32), np.full(vector.ROW, np.nan, np.float32)
    sparse.spread(values, (at & 32767).astype(np.uint16), counts, row, past, out)
    expected = np.zeros(n, np.float32)
    expected[at] = values
    assert out.tobytes() == expected.tobytes()
    assert np.isnan(room[:first]).all()
    assert np.isnan(room[first + n :]).all()
    a, b = gaussian(n), gaussian(n, 1)
    for scale in (np.float32(1), np.float32(0.3)):
        assert vector.sum_past(a, scale, b, row, past, out) == vector.peak(a * scale + b)
        assert out.tobytes() == (a * scale + b).tobytes()
    assert np.isnan(room[:first]).all()
    assert np.isnan(room[first + n :]).all()


def noting(names, name, entry):
    """Return the entry of a kernel that adds the name of its library to a set."""

    def run(*arguments):
        names.add(name)
        return entry(*arguments)

    return run


def everything(case, n):
    """Do all that workers and servers do with a codec, in two rounds."""
    codec, level = case.build(), case.level
    gradient, residual, new_residual, out = gaussian(n), np.zeros(n, np.float32), np.zeros(n, np.float32), np.empty(n, np.float32)
    hints = Hint(), Hint()
    for _ in range(2):
        payload = buffer(codec, level, n)
        encoded = codec.encode(gradient, residual, level=level, seed=SEED, out=payload, hint=hints[0])
        coding, payload = Coding(case.codec, level, n, encoded.count, SEED), payload[: encoded.nbytes]
        codec.validate(payload, coding)
        codec.decode(payload, coding, out)
        codec.peek(payload, coding, n // 2, out[: n // 4])
        if codec.noisy(level):
            codec.rounding(payload, coding, n // 2, gradient[n // 2 : n // 2 + n // 4].copy())
        codec.accumulate(payload, coding, np.float32(0.5), out)
        many = [payload] * 2, [coding] * 2, [np.float32(1)] * 2
        how = {"level": level, "seed": SEED, "out": buffer(codec, level, n), "scratch": out, "hint": hints[1]}
        assert codec.fold(*many, np.float32(0.5), residual, new_residual, **how)
        if codec.momentum:
            codec.mask(payload, coding, out)
        if codec.linear:
            codec.sum_payloads([payload] * 2, many[2], np.float32(0.5), coding, how["out"])
            codec.release(residual, coding, how["out"][: encoded.nbytes], new_residual)


def test_every_codec_names_the_kernels_that_it_runs(monkeypatch):
    """Neither more, which would be compiled for nothing, nor fewer, which would be compiled in the middle of a step."""
    kernels.warm()
    ran = set()
    for library in _libraries.values():
        for kernel in library.kernels:
            monkeypatch.setattr(kernel, "entry", noting(ran, library.name, kernel.entry))
    named, used = {}, {}
    for case in CASES + [Case(codec, 0.01, form) for codec in SPARSE for form in FORMS]:
        ran.clear()
        for n in (1, 1000, 70_000):
            everything(case, n)
        named[case.codec, case.values] = case.build().libraries()
        used.setdefault((case.codec, case.values), {"vector"}).update(ran)
    assert used == named
