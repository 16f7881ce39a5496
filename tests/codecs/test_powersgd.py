import numpy as np
import pytest
import thin

from ps_accordion.codecs import Coding, Push, fold, get
from ps_accordion.codecs.factors import LEFT, RIGHT
from ps_accordion.codecs.kernels import lowrank
from ps_accordion.errors import CodecError, PayloadError

from .cases import SEED, buffer, gaussian

ROWS, COLUMNS = 60, 85
N = ROWS * COLUMNS
MATRIX = get("powersgd").fitted(ROWS)


def push(codec, gradient, residual, rank, seed=SEED):
    """Return (coding, payload) of a worker; `residual` is updated."""
    out = buffer(codec, rank, gradient.size)
    encoded = codec.encode(gradient, residual, level=rank, seed=seed, out=out)
    payload = np.frombuffer(out[: encoded.nbytes].tobytes(), np.uint8)
    coding = Coding("powersgd", float(rank), gradient.size, encoded.count, seed)
    codec.validate(payload, coding)
    return coding, payload


def folded(pushes, residual=None, codec=MATRIX, weights=None, rule="keep"):
    """Return (coding, payload, residual that is left) of a server; None for one that nothing was written to."""
    weights = weights or [1.0] * len(pushes)
    n = pushes[0][0].elements
    new, out = np.full(n, np.nan, np.float32), buffer(codec, 64, n)
    done = fold(
        [Push(weight, *each) for weight, each in zip(weights, pushes, strict=True)], residual, new, elements=n,
        total_weight=sum(weights), seed_reply=SEED + 1, scratch=np.empty(n, np.float32), out=out,
        codecs={"powersgd": codec}, rule=rule,
    )  # fmt: skip
    payload = np.frombuffer(out[: done.nbytes].tobytes(), np.uint8)
    codec.validate(payload, done.coding)
    return done.coding, payload, new if done.wrote else None


def decoded(coding, payload, codec=MATRIX):
    """Return D(payload)."""
    out = np.full(coding.elements, np.nan, np.float32)
    codec.decode(payload, coding, out)
    return out


def is_orthonormal(payload, rank, n=N):
    """Return whether the basis of a payload is orthonormal to float32."""
    _, vectors = thin.basis_of(rank, n, payload.tobytes())
    wide = vectors.astype(np.float64)
    return np.allclose(wide @ wide.T, np.eye(len(wide)), atol=1e-6)


def low_rank(seed, rank=3, noise=0.01):
    """Return float32[N], a matrix of a rank and some noise."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((ROWS, rank)) @ rng.standard_normal((rank, COLUMNS))
    return (matrix + noise * rng.standard_normal((ROWS, COLUMNS))).astype(np.float32).reshape(-1)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_members_of_one_basis_are_added_up_undecoded_to_the_bits_of_the_twin(rank):
    """From both sides of the matrix by turns, weighted, with a residual of an earlier codec and without one."""
    codec, rows = MATRIX, []
    for turn in range(4):
        pushes = [push(codec, gaussian(N, 10 * turn + slot), gaussian(N, 90 + slot), rank) for slot in range(3)]
        weights = [1.0, 2.0, 0.5]
        for residual in (None, gaussian(N, 50)):
            coding, payload, left = folded(pushes, residual, weights=weights)
            triples = [(weight, *each) for weight, each in zip(weights, pushes, strict=True)]
            expected, rest = thin.summed(triples, np.float32(1 / 3.5), residual)
            assert payload.tobytes() == expected
            assert (left is None) == (rest is None)
            assert left is None or left.tobytes() == rest.tobytes()
            assert is_orthonormal(payload, rank)
            mean = sum(np.float64(weight) * decoded(*each) for weight, each in zip(weights, pushes, strict=True)) / 3.5
            whole = mean if residual is None else mean + residual - left
            assert np.allclose(decoded(coding, payload), whole, atol=1e-5)
        rows.append(thin.basis_of(rank, N, payload.tobytes())[0])
        codec = codec.following(payload, coding)
    assert rows == [LEFT, RIGHT, LEFT, RIGHT]


@pytest.mark.parametrize("past", [0, 1])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 70), (3, 5), (4, 17), (5, 64), (7, 130), (9, 4099), (33, 97)])
def test_rows_and_vectors_that_meet_in_registers_have_the_bits_of_one_after_another(rows, columns, rank, past):
    """Whatever is left over of fours and sixteens, through the cache and past it: the order of additions is the format."""
    a, b = gaussian(rows * columns), gaussian(rows * columns, 1)
    left, right = gaussian(rank * rows, 2), gaussian(rank * columns, 3)
    lanes, scratch = np.empty(lowrank.LANES, np.float32), np.empty(columns, np.float32)
    matrix = (a + b).reshape(rows, columns)
    peak = np.abs(matrix).max().view(np.int32)

    v, product, made = np.empty_like(a), np.empty_like(left), np.full(4 * columns, np.nan, np.float32)
    assert lowrank.step_across(a, b, right, rank, product, v, past, lanes, scratch, made) == peak
    expected = thin.across(matrix, right.reshape(rank, columns))
    assert product.tobytes() == expected.tobytes()
    assert v.tobytes() == (matrix - thin.product(expected, right.reshape(rank, columns))).tobytes()
    lowrank.across((a + b), right, rank, product, lanes)
    assert product.tobytes() == expected.tobytes()

    product, made = np.empty_like(right), np.full(4 * lowrank.BLOCK, np.nan, np.float32)
    assert lowrank.step_down(a, b, left, rank, product, v, past, made) == peak
    expected = thin.down(matrix, left.reshape(rank, rows))
    assert product.tobytes() == expected.tobytes()
    assert v.tobytes() == matrix.tobytes()
    lowrank.down(v, left, rank, product)
    assert product.tobytes() == expected.tobytes()
    lowrank.subtract(v, left, product, rank, scratch)
    assert v.tobytes() == (matrix - thin.product(left.reshape(rank, rows), expected)).tobytes()


@pytest.mark.parametrize("rule", ["keep", "clip", "reset"])
def test_a_residual_of_zeros_is_no_other_thing_than_none(rule):
    """A server that has been restored may hold zeros where another holds nothing, and a rank may have grown just then."""
    pushes = [push(MATRIX, gaussian(N, slot), gaussian(N, 90 + slot), 4) for slot in range(2)]
    coding, payload, left = folded(pushes, rule=rule)
    other_coding, other, zeros = folded(pushes, np.zeros(N, np.float32), rule=rule)
    assert (coding, payload.tobytes(), left) == (other_coding, other.tobytes(), None)
    assert not zeros.any()


def test_members_of_different_bases_are_decoded_and_added_and_nothing_is_lost():
    """As when one of them has not seen the last result: the sum is right, and what the answer lacks stays at the server."""
    first, payload, _ = folded([push(MATRIX, gaussian(N, slot), np.zeros(N, np.float32), 4) for slot in range(2)])
    pushes = [push(MATRIX.following(payload, first), gaussian(N, 2), gaussian(N, 3), 4)]
    pushes.append(push(MATRIX, gaussian(N, 4), gaussian(N, 5), 4))
    coding, payload, left = folded(pushes)
    mean = (decoded(*pushes[0]) + decoded(*pushes[1])) * np.float32(0.5)
    assert np.allclose(decoded(coding, payload) + left, mean, atol=1e-5)
    assert np.linalg.norm(left) < 0.8 * np.linalg.norm(mean)
    assert is_orthonormal(payload, 4)


def test_members_of_different_ranks_are_an_error():
    """They hold different plans."""
    pushes = [push(MATRIX, gaussian(N), np.zeros(N, np.float32), rank) for rank in (2, 3)]
    with pytest.raises(CodecError, match="members drew different"):
        folded(pushes)


def test_the_basis_turns_towards_what_gradients_have_most_of():
    """After a few rounds of the same gradient, without feedback, as little is lost as by the best matrix of that rank."""
    v, codec = low_rank(0, rank=3, noise=0.1), MATRIX
    singular = np.linalg.svd(v.reshape(ROWS, COLUMNS).astype(np.float64), compute_uv=False)
    lost = []
    for _ in range(6):
        rest = np.zeros(N, np.float32)
        each = push(codec, v, rest, 3)
        lost.append(np.linalg.norm(rest))
        coding, payload, _ = folded([each, each])
        codec = codec.following(payload, coding)
    assert lost[0] > 0.8 * np.linalg.norm(v)
    assert lost[-1] == pytest.approx(np.linalg.norm(singular[3:]), rel=1e-3)


def test_feedback_makes_up_for_what_a_round_leaves_out_at_any_rank():
    """Over rounds of changing rank, results and what is left add up to the mean of all gradients, to rounding."""
    codec, residuals = MATRIX, [np.zeros(N, np.float32) for _ in range(2)]
    came, went = np.zeros(N), np.zeros(N)
    for turn, rank in enumerate([4, 4, 1, 1, 8, 8, 3, 2, 2, 64, 5, 5]):
        gradients = [gaussian(N, 2 * turn + slot) for slot in range(2)]
        came += sum(each.astype(np.float64) for each in gradients) / 2
        pushes = [push(codec, gradient, rest, rank) for gradient, rest in zip(gradients, residuals, strict=True)]
        coding, payload, left = folded(pushes)
        assert left is None
        went += decoded(coding, payload)
        codec = codec.following(payload, coding)
    kept = sum(each.astype(np.float64) for each in residuals) / 2
    assert np.allclose(came, went + kept, atol=2e-5)


def test_a_change_of_rank_keeps_the_first_vectors_of_the_basis():
    """Fewer are the first ones, to the bit; more are the first ones, to rounding, and drawn ones, alike for all."""
    coding, payload, _ = folded([push(MATRIX, low_rank(1), np.zeros(N, np.float32), 4)] * 2)
    codec, (side, old) = MATRIX.following(payload, coding), thin.basis_of(4, N, payload.tobytes())
    fewer, _ = (push(codec, gaussian(N), np.zeros(N, np.float32), 2)[1] for _ in range(2))
    assert thin.basis_of(2, N, fewer.tobytes())[0] == side
    assert np.array_equal(thin.basis_of(2, N, fewer.tobytes())[1], old[:2])
    more, again = (push(codec, gaussian(N, turn), np.zeros(N, np.float32), 9)[1] for turn in range(2))
    wider = thin.basis_of(9, N, more.tobytes())[1]
    assert np.allclose(wider[:4], old, atol=1e-6)
    assert is_orthonormal(more, 9)
    assert wider.tobytes() == thin.basis_of(9, N, again.tobytes())[1].tobytes()


def test_a_sum_without_enough_directions_makes_no_nan():
    """Gram-Schmidt as published divides by zero on a column of zeros; here it is drawn anew, and stands for nothing."""
    one_hot = np.zeros(N, np.float32)
    one_hot[7] = 2.0
    for v, rank in ((one_hot, 4), (np.ones(N, np.float32), 8), (low_rank(2, rank=2, noise=0.0), 6)):
        rest = np.zeros(N, np.float32)
        each = push(MATRIX, v, rest, rank)
        coding, payload, _ = folded([each, each])
        assert is_orthonormal(payload, rank)
        assert np.allclose(decoded(coding, payload), v - rest, atol=1e-5)


def test_where_nothing_was_sent_the_basis_stays():
    """A gradient of zeros says nothing of where to look."""
    coding, payload, _ = folded([push(MATRIX, low_rank(3), np.zeros(N, np.float32), 4)] * 2)
    codec = MATRIX.following(payload, coding)
    zeros = push(codec, np.zeros(N, np.float32), np.zeros(N, np.float32), 4)
    _, after, _ = folded([zeros, zeros])
    assert thin.basis_of(4, N, after.tobytes())[0] == thin.basis_of(4, N, payload.tobytes())[0]
    assert thin.basis_of(4, N, after.tobytes())[1].tobytes() == thin.basis_of(4, N, payload.tobytes())[1].tobytes()
    assert not decoded(coding, after).any()


def test_what_is_too_small_waits_and_what_is_too_large_goes_in_several_rounds():
    """No product loses its digits, and none is infinite."""
    v, rest = gaussian(N) * np.float32(2.0**-120), np.zeros(N, np.float32)
    coding, payload = push(MATRIX, v, rest, 4)
    assert not decoded(coding, payload).any()
    assert np.array_equal(rest, v)
    v = np.full(N, np.finfo(np.float32).max, np.float32)
    rest = np.zeros(N, np.float32)
    coding, payload = push(MATRIX, v, rest, 4)
    assert np.isfinite(decoded(coding, payload)).all()
    assert decoded(coding, payload).any()
    assert np.isfinite(folded([(coding, payload)] * 4)[1].view(np.float32)).all()


def test_the_shape_decides_the_price():
    """A codec that is fitted to a key knows its matrix; one that is not takes it for nearly square, and reads any."""
    assert MATRIX.payload_bound(N, 4) == 8 + 4 * 4 * (ROWS + COLUMNS)
    assert MATRIX.payload_bound(N, 64) == 8 + 4 * ROWS * (ROWS + COLUMNS)
    assert get("powersgd").payload_bound(1 << 20, 2) == 8 + 4 * 2 * 2048
    tall = get("powersgd").fitted(N // 5)
    coding, payload = push(tall, gaussian(N), np.zeros(N, np.float32), 3)
    assert np.array_equal(decoded(coding, payload, tall), decoded(coding, payload, get("powersgd")))
    with pytest.raises(PayloadError, match=f"expected {ROWS} rows, got {N // 5}"):
        MATRIX.validate(payload, coding)
    with pytest.raises(CodecError, match="7 does not divide"):
        get("powersgd").fitted(7).payload_bound(N, 4)


def test_a_payload_is_refused_for_each_thing_that_can_be_wrong():
    """Every check has a payload that only it refuses."""
    coding, good = push(MATRIX, gaussian(N), np.zeros(N, np.float32), 4)
    basis = 8 + 4 * 4 * ROWS

    def refuse(match, at=None, value=0, header=coding, payload=good):
        bad = payload.copy()
        if at is not None:
            bad[at : at + np.asarray(value).nbytes] = np.asarray(value).reshape(1).view(np.uint8)
        with pytest.raises(PayloadError, match=match):
            MATRIX.validate(bad, header)

    refuse("header of 8 bytes", payload=good[:7])
    refuse("expected 60 rows, got 0", 0, np.uint32(0))
    refuse("expected 60 rows, got 85", 0, np.uint32(COLUMNS))
    refuse("left .* or the right", 4, np.uint32(2))
    refuse("elements up to 1", basis, np.float32(1.5))
    refuse("elements up to 1", basis, np.float32(np.nan))
    refuse("another of up to", 8, np.float32(2.0**121))
    refuse("another of up to", 8, np.float32(np.inf))
    refuse("expected 580 entries in 2328 bytes", payload=good[:-4])
    refuse("expected 580 entries", header=coding._replace(count=579))
    refuse("expected 290 entries", header=coding._replace(level=2.0))
    refuse("whole number from 1 to 64", header=coding._replace(level=float("nan")))
