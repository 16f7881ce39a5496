"""Codecs of other distributions: found by their entry points, and named with their owner when they are broken."""

import sys
from importlib import metadata

import numpy as np
import own_codec
import pytest
import torch
from nosync import NoSync

from ps_accordion import codecs
from ps_accordion.codecs import Coding, device, plugins, registry
from ps_accordion.compression import CodecSettings
from ps_accordion.errors import CodecError, PayloadError
from ps_accordion.selection import check, codecs_of, levels_of, used

from .cases import SEED, buffer, gaussian, vectors

TOPK = {plugins.CODECS: {"topk": "own:Own"}}
LEVELS = (2, 7, 64, 65536)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a folder on the path whose distributions are the only ones that are looked at."""
    monkeypatch.syspath_prepend(str(tmp_path))
    found = lambda group: tuple(  # noqa: E731
        point for each in metadata.distributions(path=[str(tmp_path)]) for point in each.entry_points.select(group=group)
    )
    monkeypatch.setattr(plugins, "_points", found)
    yield tmp_path
    for name in {file.stem for file in tmp_path.glob("*.py")}:
        sys.modules.pop(name, None)


def peaks(folder):
    own_codec.install(folder)
    return registry.get("peaks")


def encoded(codec, v, residual, level):
    """Return (coding, payload as it comes from a socket); the residual is updated."""
    out = buffer(codec, level, v.size)
    done = codec.encode(v, residual, level=level, seed=SEED, out=out)
    assert (out[done.nbytes + 4 :] == 0xA5).all()
    payload = np.frombuffer(out[: done.nbytes].tobytes(), np.uint8)
    return Coding(codec.name, level, v.size, done.count, 0), payload


def test_a_declared_codec_is_there_by_name_and_not_before_it_is_named(installed):
    """Its metadata is enough to list it; its module is imported when a job asks for it, never for a name in a header."""
    own_codec.install(installed)
    assert "peaks" in codecs.names()
    assert "peaks" not in sys.modules
    assert "peaks" not in codecs_of(CodecSettings())
    settings = CodecSettings(name="int", tensors={"*": {"codec": "peaks", "heavy": 9}})
    assert codecs_of(settings)["peaks"] == registry.get("peaks")
    assert [(codec.name, level) for codec, level in used(settings)] == [
        *(("dense", 16.0), ("dense", 32.0), ("int", 4.0), ("int", 8.0), ("peaks", 9.0), ("peaks", 64.0)),
    ]
    assert levels_of("peaks") == (64.0, 512.0)
    check(settings)
    codecs.warm(used(settings))


def test_the_codec_of_the_page_keeps_the_contract(installed):
    """What a reader copies is right: sums to the bit, weights, peeks, the server's side, and no harm from any bytes."""
    codec, rng = peaks(installed), np.random.default_rng(1)
    for level in LEVELS:
        for n in (1, 2, 1000, 10_007):
            for name, v in vectors(n).items():
                residual = np.zeros(n, np.float32)
                coding, payload = encoded(codec, v, residual, level)
                codec.validate(payload, coding)
                out = np.full(n, np.nan, np.float32)
                codec.decode(payload, coding, out)
                assert np.array_equal(out + residual, v), name
                stretch = np.empty(n // 3 + 1, np.float32)
                codec.peek(payload, coding, n // 3, stretch[: n - n // 3])
                assert np.array_equal(stretch[: n - n // 3], out[n // 3 :][: stretch.size]), name
        v = gaussian(1000)
        coding, payload = encoded(codec, v, np.zeros(1000, np.float32), level)
        new, reply = np.empty(1000, np.float32), buffer(codec, level, 1000)
        codec.reencode(v.copy(), np.float32(1), None, new, level=level, seed=SEED, out=reply)
        assert reply[: payload.size].tobytes() == payload.tobytes()
        for _ in range(200):
            hostile = payload.copy()
            hostile[rng.integers(hostile.size, size=3)] = rng.integers(256, size=3, dtype=np.uint8)
            wrong = coding._replace(count=coding.count + int(rng.integers(-1, 2)), elements=1000 + int(rng.integers(-1, 2)))
            try:
                codec.validate(hostile[: hostile.size - int(rng.integers(2))], wrong)
            except PayloadError:
                continue
            codec.decode(hostile, wrong, np.empty(wrong.elements, np.float32))


@pytest.mark.parametrize("level", LEVELS)
def test_its_device_twin_has_the_bytes_and_the_residual_of_the_host(installed, level):
    """Found by the second group, and the host waits for nothing."""
    codec = peaks(installed)
    twin, n = device.twin_of(codec), 100_003
    v, kept, residual = gaussian(n), torch.zeros(n), np.zeros(n, np.float32)
    coding, payload = encoded(codec, v, residual, level)
    gradient = torch.from_numpy(v)
    with NoSync():
        parcel = device.encode(twin, gradient, kept, level=level, seed=SEED)
    opened = device.open_parcel(twin, parcel.numpy(), elements=n, level=level)
    assert (opened.payload.tobytes(), opened.count) == (payload.tobytes(), coding.count)
    assert np.array_equal(kept.numpy(), residual)
    mine, theirs = torch.full((n,), 0.25), np.full(n, 0.25, np.float32)
    device.accumulate(twin, payload, coding, np.float32(0.3), mine)
    codec.accumulate(payload, coding, np.float32(0.3), theirs)
    assert np.array_equal(mine.numpy(), theirs)
    device.decode(twin, payload, coding, mine)
    codec.decode(payload, coding, theirs)
    assert np.array_equal(mine.numpy(), theirs)


BROKEN = {
    "has no such module": ("", r"'own' of other 2\.0 \(ps_accordion\.codecs: own:Own\) cannot be loaded: ModuleNotFoundError"),
    "fails when imported": ("1 / 0", r"'own' of other 2\.0 .* cannot be loaded: ZeroDivisionError: division by zero; repair"),
    "has no such class": ("Other = 1", r"'own' of other 2\.0 .* cannot be loaded: AttributeError"),
    "is no class": ("Own = 5", r"'own' of other 2\.0 .*: expected a class on ps_accordion\.codecs\.base\.Codec, got 5"),
    "is another class": ("class Own: pass", r"expected a class on ps_accordion\.codecs\.base\.Codec, got <class"),
    "lacks methods": (
        "from ps_accordion.codecs.packing import PackingCodec as Own",
        r"expected all methods of ps_accordion\.codecs\.base\.Codec, accumulate, check_level, .*validate are missing",
    ),
    "has another name": ("from ps_accordion.codecs.topk import TopK as Own", "expected a class whose name is 'own', got 'topk'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_distribution_that_is_broken_is_named_with_what_it_lacks(installed, what):
    """And it touches no job that does not name it."""
    text, said = BROKEN[what]
    own_codec.distribution(installed, {plugins.CODECS: {"own": "own:Own"}})
    if text:
        (installed / "own.py").write_text(text, encoding="utf-8")
    check(CodecSettings())
    with pytest.raises(CodecError, match=said):
        check(CodecSettings(name="own", light=1.0, heavy=1.0))


def test_a_name_that_is_taken_is_refused_with_both_owners(installed):
    """By one of ours, or by another distribution's; nobody is silently the second."""
    own_codec.distribution(installed, TOPK)
    with pytest.raises(CodecError, match=r"the name 'topk' .* is declared by other 2\.0, and by ps-accordion itself; expected"):
        codecs.names()
    check(CodecSettings())  # ours is ours
    (installed / "other-2.0.dist-info" / "entry_points.txt").unlink()
    for name in ("one", "two"):
        own_codec.distribution(installed, {plugins.CODECS: {"own": "own:Own"}}, name=name)
    with pytest.raises(
        CodecError, match=r"'own' .* is declared by (one|two) 2\.0, and by (one|two) 2\.0; expected a name of its own"
    ):
        registry.get("own")


def test_a_name_that_no_header_can_carry_is_refused(installed):
    """A header has 64 bytes for it."""
    own_codec.distribution(installed, {plugins.CODECS: {"o" * 65: "own:Own"}})
    with pytest.raises(
        CodecError, match=r"other 2\.0 declares 'o+' in entry point group ps_accordion\.codecs; expected a name of 1"
    ):
        codecs.names()


def test_a_codec_without_levels_needs_them_from_the_job(installed):
    """Nothing is guessed: what 0 stands for, only the codec can say."""
    own_codec.install(installed)
    page = (installed / "peaks.py").read_text(encoding="utf-8")
    (installed / "peaks.py").write_text(page.replace("= (64.0, 512.0)", "= None"), encoding="utf-8")
    for settings in (CodecSettings(name="peaks"), CodecSettings(name="peaks", light=8.0)):
        with pytest.raises(CodecError, match="codec peaks has no levels of its own: expected light and heavy to be set"):
            check(settings)
    check(CodecSettings(name="peaks", light=8.0, heavy=64.0))


def test_a_codec_that_is_not_installed_is_named_with_what_to_do():
    """It is no slip of the keyboard: there is nothing near it."""
    with pytest.raises(
        CodecError, match=r"got 'zzz'; one of another distribution must be installed wherever a process of the job runs"
    ):
        check(CodecSettings(name="zzz"))
