import numpy as np
import pytest
import rotated
import torch

from ps_accordion.codecs import device, get
from ps_accordion.codecs.kernels import hadamard
from ps_accordion.codecs.noise import noise_key
from ps_accordion.codecs.workspace import zeros
from ps_accordion.errors import CodecError, PayloadError

from .cases import SEED, Case, decode, encode, gaussian


def lost(level, v, seed=SEED):
    """Return ||v - D(C(v))||^2 / ||v||^2."""
    kept = np.zeros_like(v)
    encode(Case("eden", level), v, kept, seed)
    return float(np.square(kept, dtype=np.float64).sum() / np.square(v, dtype=np.float64).sum())


@pytest.mark.parametrize(("level", "expected"), [(1, 0.363), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_the_error_is_that_of_the_best_levels_for_normal_numbers_whatever_the_vector_is(level, expected):
    """As published; no more of heavy tails, sparse or positive numbers: a rotation makes them normal, or better."""
    rng, n = np.random.default_rng(0), 1 << 16
    assert lost(level, gaussian(n)) == pytest.approx(expected, rel=0.03)
    for v in (rng.standard_t(2, n), gaussian(n, 1) * (rng.random(n) < 0.1), rng.random(n)):
        assert lost(level, v.astype(np.float32)) < 1.03 * expected


@pytest.mark.parametrize("level", [2, 4])
def test_host_device_and_twin_agree_at_the_levels_that_other_tests_leave_out(level):
    """Payload, residual and what is decoded, of a whole tile and a part of one."""
    v, before = gaussian(20_000, 1), gaussian(20_000, 2)
    kept, expected = before.copy(), rotated.pack(level, v + before, SEED)
    coding, payload = encode(Case("eden", level), v, kept)
    assert (payload.tobytes(), kept.tobytes()) == (expected[0], expected[1].tobytes())
    made = decode(Case("eden", level), coding, payload)
    assert made.tobytes() == rotated.decode(level, 20_000, payload.tobytes()).tobytes()
    twin, residual, out = device.twin_of(get("eden")), torch.from_numpy(before), torch.empty(20_000)
    parcel = device.encode(twin, torch.from_numpy(v), residual, level=level, seed=SEED).numpy()
    opened = device.open_parcel(twin, parcel, elements=20_000, level=level)
    device.decode(twin, opened.payload, coding, out)
    assert (opened.payload.tobytes(), residual.numpy().tobytes()) == (payload.tobytes(), kept.tobytes())
    assert out.numpy().tobytes() == made.tobytes()


def test_an_element_alone_is_sent_as_it_is():
    """Its rotation has one magnitude, and so a size of its own fits it exactly."""
    v = np.zeros(16_384, np.float32)
    v[77] = -3.0
    assert lost(1, v) < 1e-12


def test_rotations_of_two_seeds_err_in_other_ways():
    """The mean over workers takes errors away, as far as they are not alike."""
    v, kept = gaussian(1 << 15), [np.zeros(1 << 15, np.float32) for _ in range(2)]
    for seed, rest in enumerate(kept):
        encode(Case("eden", 1), v, rest, seed)
    noise = [rest - v * (rest @ v) / (v @ v) for rest in kept]
    assert abs(np.corrcoef(*noise)[0, 1]) < 5 / (1 << 15) ** 0.5


def test_the_transform_is_that_of_the_textbook_and_its_own_inverse():
    """Sixteen columns of 1,024, against the matrix; done twice, it multiplies by 1,024."""
    matrix = np.array([[1.0]])
    for _ in range(10):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    v, once, past = gaussian(2 * hadamard.TILE), zeros(2 * hadamard.TILE), zeros(2 * hadamard.TILE)
    work = np.empty(hadamard.ROOM + 16, np.float32)
    hadamard.rotate(v, *noise_key(SEED), work, False, once)
    hadamard.rotate(v, *noise_key(SEED), work, True, past)
    assert once.tobytes() == past.tobytes()
    for start in (0, hadamard.TILE):
        tile = slice(start, start + hadamard.TILE)
        turned = rotated.turned(v[tile].reshape(-1, 16), start, SEED)
        assert np.allclose(matrix @ turned, once[tile].reshape(-1, 16), atol=1e-3)
        assert once[tile].tobytes() == rotated.transformed(turned).tobytes()
        back = rotated.turned(rotated.transformed(once[tile].reshape(-1, 16)), start, SEED)
        assert np.allclose(back.reshape(-1), 1024 * v[tile], atol=1e-2)


def test_what_is_too_large_waits_and_stays_finite():
    """Of magnitudes from 2^126 on nothing is sent, or what is kept might be infinite; below, some of it in each round."""
    signs = np.where(np.arange(5000) % 3 == 0, 1, -1).astype(np.float32)
    for size, least, most in ((np.finfo(np.float32).max, 0, 0), (2.0**126, 0, 0), (2.0**125, 2.0**-8, 2.0**-5)):
        v = signs * np.float32(size)
        kept = np.zeros_like(v)
        coding, payload = encode(Case("eden", 1), v, kept)
        assert np.isfinite(kept).all()
        made = decode(Case("eden", 1), coding, payload).astype(np.float64)
        assert least <= made @ signs / (5000 * float(size)) <= most


@pytest.mark.parametrize("level", [0, 5, 2.5, float("nan")])
def test_a_level_is_one_to_four_bits(level):
    """The message names them."""
    with pytest.raises(CodecError, match="1, 2, 3 or 4"):
        get("eden").check_level(level)


def test_a_payload_is_refused_for_each_thing_that_can_be_wrong():
    """Length, count, level, and sizes that no encoder writes."""
    coding, good = encode(Case("eden", 2), gaussian(100), np.zeros(100, np.float32))
    codec = get("eden")
    codec.validate(good, coding)
    for size in (np.nan, np.inf, -1.0, -0.0, 2.0**115):
        bad = good.copy()
        bad[12:16].view(np.float32)[:] = size
        with pytest.raises(PayloadError, match=r"sizes from 0 to 2\^114"):
            codec.validate(bad, coding)
    for payload, header in ((good[:-1], coding), (good, coding._replace(count=99)), (good, coding._replace(level=7.0))):
        with pytest.raises(PayloadError, match=r"100 entries in 104 bytes|expected a level"):
            codec.validate(payload, header)
