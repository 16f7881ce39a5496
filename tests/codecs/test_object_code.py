import importlib.metadata
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from suites import usually

from ps_accordion import codecs
from ps_accordion.codecs.kernels import half, sparse, vector
from ps_accordion.codecs.kernels._jit import store
from ps_accordion.codecs.values import FORMS

from .cases import environment

FEW = {"dense": (16, 32), "onebit": (512,), "random_block": (0.1,), "topk": (0.01, 0.5)}
"""Codecs, and levels of theirs: between them they have every kind of argument and result."""
ALL = FEW | {
    **{"bf16": (16,), "dgc": (0.1,), "eden": (2,), "int": (4,), "natural": (8,), "powersgd": (3,), "qsgd": (2,), "quic_fl": (4,)},
    **{"random_k": (0.1,), "signsgd": (1,), "terngrad": (2,), "threshold": (2.0,)},
}
PAYLOADS = """
import hashlib, sys
import numpy as np
from ps_accordion import codecs
seen = hashlib.sha256()
gradient = np.random.default_rng(0).standard_normal({n}).astype(np.float32)
levels = {levels}
cases = [(codecs.get(name), level) for name in levels for level in levels[name]]
if "eden" in levels:
    cases += [(codecs.get("topk", values=form), 0.01) for form in ("int8", "packed")]
codecs.warm(cases)
for codec, level in cases:
    residual, out = np.zeros_like(gradient), np.zeros(codec.payload_bound(gradient.size, level) + 4, np.uint8)
    encoded = codec.encode(gradient, residual, level=level, seed=7, out=out)
    seen.update(out[: encoded.nbytes])
    seen.update(residual)
print("numba" in sys.modules, seen.hexdigest())
"""
PEAK = """
import sys
import numpy as np
from ps_accordion.codecs.kernels import half
try:
    half.peak(np.zeros(5))
except TypeError:  # Also where numba is loaded: it gives LLVM other things by the names of Python's errors.
    print(half.peak(np.arange(5, dtype=np.uint16)), "numba" in sys.modules)
"""


ENDING = """
import gc
import numpy as np
from ps_accordion.codecs.kernels import half
from ps_accordion.codecs.kernels._jit import native
half.peak(np.arange(5, dtype=np.uint16))
native.__dict__.clear()
gc.collect()
print(half.peak(np.arange(7, dtype=np.uint16)))
"""


def start(script, cache, **changes):
    """Start a fresh interpreter that keeps kernels in `cache`."""
    variables = environment(XDG_CACHE_HOME=str(cache), NUMBA_CACHE_DIR="", **changes)
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process):
    """Return the words that a process prints."""
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return printed.split()


def files(cache):
    """Return the files of object code in a cache, by library."""
    return {path.name.partition("-")[0]: path for path in Path(cache).rglob("*.kernels")}


@pytest.fixture(scope="module", params=usually(["few", "all"], "few"))
def first(request, tmp_path_factory):
    """Return a cache that one process has filled, what that process printed, and the codecs that it ran."""
    cache, levels = tmp_path_factory.mktemp("kept"), FEW if request.param == "few" else ALL
    return cache, output(start(PAYLOADS.format(n=70_000, levels=levels), cache)), levels


def test_kernels_outlive_the_module_that_has_loaded_them(first):
    """An interpreter that ends empties modules in any order: what a function points to must not go before it does."""
    cache, *_ = first
    assert output(start(ENDING, cache, PYTHONMALLOC="debug")) == ["6"]  # what is freed is overwritten


@pytest.fixture
def cache(first, tmp_path):
    """Return a copy of that cache, to be damaged."""
    return shutil.copytree(first[0], tmp_path / "cache")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Keep and read in a folder of this test, in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    store.keep("half", b"some code")
    assert store.read("half") == b"some code"
    return files(tmp_path)["half"]


def test_the_second_process_never_imports_numba_and_makes_the_same_bytes(first):
    """Payloads and residuals are the same where kernels were compiled and where they were loaded."""
    cache, (compiled, digest), levels = first
    assert compiled == "True"
    assert output(start(PAYLOADS.format(n=70_000, levels=levels), cache)) == ["False", digest]


def test_uncompiled_kernels_make_the_same_bytes(tmp_path, first):
    """`NUMBA_DISABLE_JIT=1` runs the Python of the loops, without numba, and keeps nothing."""
    compiled, interpreted = (
        start(PAYLOADS.format(n=2000, levels=first[2]), first[0]),
        start(PAYLOADS.format(n=2000, levels=first[2]), tmp_path, NUMBA_DISABLE_JIT="1"),
    )
    assert output(compiled) == output(interpreted)
    assert not list(tmp_path.iterdir())


def test_another_processor_makes_the_same_bytes(tmp_path, first):
    """One without the wide registers that some intrinsics have a way of their own for."""
    here, there = (
        start(PAYLOADS.format(n=70_000, levels=first[2]), first[0]),
        start(PAYLOADS.format(n=70_000, levels=first[2]), tmp_path, NUMBA_CPU_NAME="generic"),
    )
    assert output(here)[1] == output(there)[1]


def test_settings_of_numba_neither_use_nor_change_what_is_kept(cache):
    """Code with bounds checks is not kept as code without."""
    before = {path: path.read_bytes() for path in files(cache).values()}
    assert output(start(PEAK, cache, NUMBA_BOUNDSCHECK="1")) == ["4", "True"]
    assert {path: path.read_bytes() for path in files(cache).values()} == before
    assert {path.parent.name[:6] for path in cache.rglob("half.peak*.nbc")} <= {"numba-", "kernel"}
    assert output(start(PEAK, cache, NUMBA_NUM_THREADS="1")) == ["4", "False"]


def test_a_damaged_file_is_made_again(cache):
    """The process that finds it compiles; the next one loads."""
    path = files(cache)["half"]
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    assert output(start(PEAK, cache)) == ["4", "True"]
    assert len(path.read_bytes()) > len(good) // 2
    assert output(start(PEAK, cache)) == ["4", "False"]


def test_two_processes_that_start_together_compile_once(tmp_path):
    """One compiles, the other waits and loads; both compute, and only what is kept is left."""
    both = [start(PEAK, tmp_path) for _ in range(2)]
    assert sorted(map(output, both)) == [["4", "False"], ["4", "True"]]
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".kernels"]


def test_a_library_that_another_process_compiles_is_left_for_the_end(here):
    """Processes that start together share the work: whoever does not want to wait is told so, and goes on with another."""
    with store.turn("half", wait=True) as ours, store.turn("half", wait=False) as mine:
        assert (ours, mine) == (True, False)
        with store.turn("sparse", wait=False) as other:
            assert other
    with store.turn("half", wait=False) as mine:
        assert mine
    assert list(here.parent.iterdir()) == [here]


def test_only_what_is_used_is_compiled(first):
    """A new codec costs nobody anything who does not use it."""
    cache, _, levels = first
    forms = FORMS if levels is ALL else ["fp16"]
    used = [codecs.get(name, values=form) if name == "topk" else codecs.get(name) for name in levels for form in forms]
    assert sorted(files(cache)) == sorted(frozenset().union(*(codec.libraries() for codec in used)))


@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: c[:20], lambda c: c[:-1], lambda c: c + b"x", lambda c: b"x" + c[1:]]
)
def test_a_file_that_is_not_whole_is_not_read(here, damage):
    """Cut anywhere, longer, or something else."""
    here.write_bytes(damage(here.read_bytes()))
    assert store.read("half") is None


def test_each_byte_is_under_the_sum(here):
    """A flipped bit is seen wherever it is."""
    good = here.read_bytes()
    for at in range(len(good)):
        here.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert store.read("half") is None, at
    here.write_bytes(good)
    assert store.read("half") == b"some code"


def test_what_was_made_for_another_processor_or_version_is_not_read(here, monkeypatch):
    """Neither by its name nor, if somebody renames it, by its content."""
    import llvmlite.binding as llvm

    for part in (sys.version, np.__version__, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()):
        assert part.encode() in store._made_for()
    other = store._made_for().replace(llvm.get_host_cpu_name().encode(), b"another")
    monkeypatch.setattr(store, "_made_for", lambda: other)
    assert store.read("half") is None
    renamed = store._file("half")
    assert renamed != here
    here.rename(renamed)
    assert store.read("half") is None


def test_an_update_of_the_compiler_starts_afresh(monkeypatch):
    """The versions of numba and llvmlite are part of what code was made for; numba need not be imported to know its own."""
    import llvmlite

    version = importlib.metadata.version("numba")
    assert store._version_of_numba() == f"numba-{version}.dist-info"
    for part in (store._version_of_numba(), llvmlite.__version__):
        assert part in store._made_for().decode().splitlines()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
    assert store._version_of_numba() == version


def test_what_others_own_or_can_write_is_not_read(here, monkeypatch):
    """To load code is to run it."""
    for mode, believed in ((0o600, True), (0o640, True), (0o620, False), (0o602, False)):
        here.chmod(mode)
        assert (store.read("half") is not None) == believed, oct(mode)
    here.chmod(0o600)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert store.read("half") is None


def test_what_is_kept_is_only_ours(here):
    """Whatever the umask, nobody else can write the file or the folder, nor read them."""
    assert here.stat().st_mode & 0o777 == 0o600
    assert here.parent.stat().st_mode & 0o777 == 0o700


def test_keeping_fails_with_one_warning_and_leaves_nothing(here, monkeypatch):
    """A disk that is full, say."""
    monkeypatch.setattr(store, "_said", [])

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        store.keep("half", b"other code")
        store.keep("half", b"other code")
    assert len(seen) == 1
    assert "No space left on device" in str(seen[0].message)
    assert list(here.parent.iterdir()) == [here]
    assert store.read("half") == b"some code"


def unaligned(dtype, n):
    """Return zeros at an odd address."""
    return np.zeros(n * np.dtype(dtype).itemsize + 1, np.uint8)[1:].view(dtype)


def read_only(array):
    """Return the array, read-only."""
    array.flags.writeable = False
    return array


F32 = np.float32
WRONG = {
    "dtype": np.zeros(4, np.float64),
    "integers of that size": np.zeros(4, np.int32),
    "byte order": np.zeros(4, ">f4"),
    "dimensions": np.zeros((2, 2), F32),
    "no dimension": np.zeros((), F32),
    "strides": np.zeros(8, F32)[::2],
    "backwards": np.zeros(8, F32)[::-1],
    "list": [0.0, 0.0],
    "bytes": bytes(16),
    "memory": memoryview(np.zeros(4, F32)),
    "subclass": np.zeros(4, F32).view(np.recarray),
    "number": 1.0,
    "none": None,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_an_input_that_is_not_what_the_signature_says_is_refused(wrong):
    """The message says what was expected and what came, and nothing has been written."""
    out = np.full(4, 7, F32)
    with pytest.raises(TypeError, match=r"No matching definition: vector\.sum_into is \(float32\[n\], float32\[n\], writable"):
        vector.sum_into(np.zeros(4, F32), wrong, out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    "wrong", [*WRONG.values(), read_only(np.zeros(4, F32)), unaligned(F32, 4)], ids=[*WRONG, "read-only", "odd"]
)
def test_an_output_that_is_not_what_the_signature_says_is_refused(wrong):
    """An output must be writable and aligned as well."""
    before = wrong.copy() if isinstance(wrong, np.ndarray) else wrong
    with pytest.raises(TypeError, match=r"sum_into is .* called with \(float32\[4\], float32\[4\], "):
        vector.sum_into(np.ones(4, F32), np.ones(4, F32), wrong)
    assert not isinstance(wrong, np.ndarray) or np.array_equal(before, wrong)


def test_inputs_may_be_read_only_and_at_any_address():
    """As payloads are, in a frame that came."""
    a = unaligned(F32, 5)
    a[:] = range(5)
    out = np.zeros(5, F32)
    vector.sum_into(read_only(a), a, out)
    assert out.tolist() == [0, 2, 4, 6, 8]
    vector.peak(np.zeros(0, F32))


def test_the_number_of_arguments_is_checked():
    """Too few, too many, none, and names."""
    a = np.zeros(4, F32)
    for arguments in ((), (a, a)):
        with pytest.raises(TypeError, match="No matching definition"):
            vector.peak(*arguments)
    with pytest.raises(TypeError, match="keyword"):
        vector.peak(a=a)


def test_numbers_are_taken_from_python_and_numpy_and_nothing_else():
    """Whole numbers do not come from fractions, and do not wrap around."""
    total = np.ones(3, F32)
    for weight in (1, 1.0, F32(1), np.float64(1), np.int64(1), True):
        vector.add(weight, np.ones(3, F32), total)
    assert total.tolist() == [7, 7, 7]
    vector.add(-1.0, np.ones(3, F32), total)  # the number by which Python's C functions also say "error"
    assert total.tolist() == [6, 6, 6]
    for weight in ("1", None, 1j, b"1"):
        with pytest.raises(TypeError, match=r"vector\.add is \(float32, "):
            vector.add(weight, np.ones(3, F32), total)
    places, counts = np.zeros(1, np.uint16), np.ones(1, np.uint16)
    assert sparse.check(places, counts, np.int32(1)) is True
    assert sparse.check(places, counts, -1) is False
    for elements in (1.0, F32(1), "1", 1 << 63):
        with pytest.raises(TypeError, match=r"sparse\.check is "):
            sparse.check(places, counts, elements)


def test_results_are_plain_python():
    """A number, a truth, or nothing; the same object counts however often it is returned."""
    a = np.ones(4, F32)
    assert type(vector.peak(a)) is int
    assert type(vector.squares(a, np.zeros(64))) is float
    before = sys.getrefcount(None), sys.getrefcount(a), sys.getrefcount(a.dtype)
    assert all(vector.add(1.0, a, a) is None for _ in range(1000))
    after = sys.getrefcount(None), sys.getrefcount(a), sys.getrefcount(a.dtype)
    assert abs(after[0] - before[0]) < 100
    assert after[1:] == before[1:]


def test_a_kernel_keeps_the_name_and_the_words_of_its_function():
    """For `help` and for tracebacks."""
    assert half.peak.__name__ == "peak"
    assert half.peak.__doc__.startswith("Return the largest magnitude code")


def test_a_kernel_runs_without_the_gil():
    """Between the checks and the result: the code calls Python to let other threads go on, and to come back."""
    for library in ("half", "sparse", "vector"):
        code = store.read(library)
        assert code is None or (b"PyEval_SaveThread" in code and b"PyEval_RestoreThread" in code)
