import numpy as np
import pytest
import rotated
import torch

from ps_accordion.codecs import Push, device, fold, get
from ps_accordion.codecs.covering import push_seed
from ps_accordion.errors import CodecError, PayloadError
from ps_accordion.seeds import SHARED, mix64, seed_for

from .cases import SEED, Case, decode, encode, gaussian

N = 1 << 16


def seeds(count):
    """Return seeds of so many members of one round: alike in the upper half."""
    return [SEED >> 32 << 32 | mix64(i) & 0xFFFFFFFF for i in range(count)]


def pushes_of(level, vectors, weights=None, seeds_of=None):
    """Return one push a vector."""
    made = [
        encode(Case("quic_fl", level), v, None, seed) for v, seed in zip(vectors, seeds_of or seeds(len(vectors)), strict=True)
    ]
    return [Push(weight, *each) for weight, each in zip(weights or [1.0] * len(made), made, strict=True)]


def folded(pushes, residual=None, new=None, seed=SEED + 1, **options):
    """Return (Folded, payload) of all members' mean."""
    n = pushes[0].coding.elements
    out = np.empty(4 * n + 4096, np.uint8)
    done = fold(
        pushes, residual, new, elements=n, total_weight=sum(push.weight for push in pushes), seed_reply=seed,
        scratch=np.empty(n, np.float32), out=out, **options,
    )  # fmt: skip
    return done, out[: done.nbytes]


def share(error, v):
    """Return ||error||^2 / ||v||^2."""
    return float(np.square(error, dtype=np.float64).sum() / np.square(v, dtype=np.float64).sum())


@pytest.mark.parametrize(("level", "expected"), [(2, 0.68), (4, 0.0232), (8, 7.9e-5)])
def test_the_error_does_not_depend_on_what_the_vector_is(level, expected):
    """A rotation makes normal numbers of heavy tails, or better ones of sparse or positive numbers."""
    rng = np.random.default_rng(0)
    vectors = (gaussian(N), rng.standard_t(2, N), gaussian(N, 1) * (rng.random(N) < 0.1), rng.random(N))
    for i, v in enumerate(vectors):
        v = v.astype(np.float32)
        coding, payload = encode(Case("quic_fl", level), v, None)
        assert share(decode(Case("quic_fl", level), coding, payload) - v, v) < (1.03 if i else 1.05) * expected, i


@pytest.mark.parametrize("level", [8, 4, 2])
def test_what_is_decoded_is_the_vector_in_the_mean_over_seeds(level):
    """Of 400 seeds: each element within five deviations and a half of its mean, and so is the projection on the vector."""
    n, rounds = 1000, 400
    v = np.where(np.arange(n) % 50 == 3, 20, 1).astype(np.float32) * gaussian(n)
    errors = np.empty((rounds, n))
    for i in range(rounds):
        coding, payload = encode(Case("quic_fl", level), v, None, mix64(i))
        errors[i] = decode(Case("quic_fl", level), coding, payload) - v
    deviation = errors.std(0) / rounds**0.5
    assert (np.abs(errors.mean(0)) < 5.5 * deviation).all()
    along = errors @ v
    assert abs(along.mean()) < 5.5 * along.std() / rounds**0.5


def test_noise_of_members_is_not_alike_though_they_rotate_alike():
    """So the mean of eight has an eighth of it, of the same vector, too."""
    v = gaussian(N)
    decoded = [decode(Case("quic_fl", 4), push.coding, push.payload) for push in pushes_of(4, [v] * 8)]
    assert share(np.mean(decoded, 0) - v, v) == pytest.approx(0.0232 / 8, rel=0.1)


@pytest.mark.parametrize("level", [8, 4, 2])
@pytest.mark.parametrize("n", [1, 17, 20_000])
def test_host_device_and_twin_agree_at_every_level(level, n):
    """Payload and what is decoded, of whole tiles and parts of one; of members of several levels, what a server answers."""
    v = gaussian(n, 1)
    coding, payload = encode(Case("quic_fl", level), v, None)
    assert payload.tobytes() == rotated.pack_alike(level, v, SEED)
    made = decode(Case("quic_fl", level), coding, payload)
    assert made.tobytes() == rotated.decode_alike(level, n, payload.tobytes()).tobytes()
    twin, out = device.twin_of(get("quic_fl")), torch.empty(n)
    parcel = device.encode(twin, torch.from_numpy(v), None, level=level, seed=SEED).numpy()
    opened = device.open_parcel(twin, parcel, elements=n, level=level)
    device.decode(twin, opened.payload, coding, out)
    assert (opened.payload.tobytes(), out.numpy().tobytes()) == (payload.tobytes(), made.tobytes())


def test_a_server_answers_the_mean_and_transforms_nothing(monkeypatch):
    """Its answer decodes to the mean but for one rounding; neither kernel that has a transform runs."""
    vectors = [gaussian(N, i) for i in range(3)]
    pushes = pushes_of(8, vectors, weights=[1.0, 2.0, 0.5])
    parts = [np.float32(push.weight) * decode(Case("quic_fl", 8), push.coding, push.payload) for push in pushes]
    mean = sum(parts) / np.float32(3.5)
    kernels = codec_kernels()
    for name in ("rotate", "restore"):
        monkeypatch.setattr(kernels, name, lambda *_: pytest.fail("a transform"))
    done, answer = folded(pushes)
    monkeypatch.undo()
    assert not done.wrote
    assert answer[:8].tobytes() == pushes[0].payload[:8].tobytes()
    assert share(decode(Case("quic_fl", 8), done.coding, answer) - mean, mean) == pytest.approx(7.9e-5, rel=0.05)


def codec_kernels():
    """Return the kernels of the codec."""
    from ps_accordion.codecs.kernels import quic_fl

    return quic_fl


def test_a_residual_that_is_left_from_elsewhere_goes_with_the_first_answer():
    """It is decoded then; afterwards zeros are as good as no residual, whatever happens to residuals at a switch."""
    pushes, left, new = pushes_of(8, [gaussian(N)]), gaussian(N, 5), np.full(N, np.nan, np.float32)
    done, answer = folded(pushes, left, new)
    v = gaussian(N) + left
    assert done.wrote
    assert not new.any()
    assert share(decode(Case("quic_fl", 8), done.coding, answer) - v, v) == pytest.approx(2 * 7.9e-5, rel=0.5)
    _, expected = folded(pushes)
    for rule in ("keep", "clip", "reset"):
        done, answer = folded(pushes, new, np.full(N, np.nan, np.float32), rule=rule)
        assert (answer.tobytes(), done.lost) == (expected.tobytes(), 0.0)


def test_members_that_rotate_in_other_ways_are_decoded():
    """Nothing is wrong with them, and nothing is added that does not belong together."""
    vectors = [gaussian(N, i) for i in range(2)]
    done, answer = folded(pushes_of(8, vectors, seeds_of=[1 << 32, 2 << 32]))
    mean = (vectors[0] + vectors[1]) / 2
    assert share(decode(Case("quic_fl", 8), done.coding, answer) - mean, mean) < 3 * 7.9e-5


def test_a_sum_that_is_not_finite_is_reported():
    """Rotated sums, and what a scale makes of them."""
    pushes = pushes_of(8, [np.full(100, 2.0**110, np.float32)] * 2, weights=[1e30, 1e30])
    out = np.empty(1000, np.uint8)
    for total_weight in (2e30, 1.0):
        done = fold(
            pushes, None, None, elements=100, total_weight=total_weight, seed_reply=1, scratch=np.empty(100, np.float32), out=out
        )
        assert done is None


def test_the_upper_half_of_a_seed_is_that_of_all_and_the_lower_that_of_a_worker():
    """A rotation is new in every round and for every key, and nobody else rounds alike."""
    where = {"job": 5, "layout": 0, "key": 3}
    one, two, later = (
        push_seed(get("quic_fl"), 100, 8, **where, round_=round_, slot=slot) for slot, round_ in ((0, 9), (1, 9), (0, 10))
    )
    assert one >> 32 == two >> 32 == seed_for(5, 0, 3, 9, SHARED) >> 32 != later >> 32
    assert one & 0xFFFFFFFF == seed_for(5, 0, 3, 9, 1) & 0xFFFFFFFF != two & 0xFFFFFFFF


def test_what_is_too_large_is_not_sent_and_what_is_small_is_right_in_the_mean():
    """A column from 2^117 on is zero, and the ledger has it as clipped; an element alone is exact, a denormal one in the mean."""
    codec = get("quic_fl")
    v = gaussian(5000)
    v[::16] *= np.float32(2.0**123)
    coding, payload = encode(Case("quic_fl", 8), v, None)
    made, clipped = decode(Case("quic_fl", 8), coding, payload), v.copy()
    distance = codec.rounding(payload, coding, 0, clipped)
    assert not made[::16].any()
    assert not clipped[::16].any()
    assert np.array_equal(np.delete(clipped, np.s_[::16]), np.delete(v, np.s_[::16]))
    assert (np.abs(clipped - made) <= distance).all()
    assert codec.rounding(payload, coding, 4000, v[:0]).size == 0
    for alone in (np.float32(-3.7), np.float32(2.0**-126)):
        one = np.array([alone])
        assert decode(Case("quic_fl", 2), *encode(Case("quic_fl", 2), one, None))[0] == alone
    small = np.array([2.0**-128], np.float32)
    mean = np.mean([decode(Case("quic_fl", 2), *encode(Case("quic_fl", 2), small, None, seed)) for seed in range(2000)])
    assert mean == pytest.approx(2.0**-128, rel=0.2)


@pytest.mark.parametrize("level", [1, 3, 16, float("nan")])
def test_a_level_is_eight_four_or_two_bits(level):
    """The message names them."""
    with pytest.raises(CodecError, match="8, 4 or 2"):
        get("quic_fl").check_level(level)


def test_a_payload_is_refused_for_each_thing_that_can_be_wrong():
    """Length, count, level, and sizes that no encoder writes."""
    coding, good = encode(Case("quic_fl", 4), gaussian(100), None)
    codec = get("quic_fl")
    codec.validate(good, coding)
    for size in (np.nan, np.inf, -1.0, -0.0, 2.0**118):
        bad = good.copy()
        bad[12:16].view(np.float32)[:] = size
        with pytest.raises(PayloadError, match=r"sizes from 0 to 2\^117"):
            codec.validate(bad, coding)
    for payload, header in ((good[:-1], coding), (good, coding._replace(count=99)), (good, coding._replace(level=7.0))):
        with pytest.raises(PayloadError, match=r"100 entries in 136 bytes|expected a level"):
            codec.validate(payload, header)
