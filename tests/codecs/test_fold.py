import numpy as np
import pytest
import twins

from ps_accordion.codecs import Codec, Coding, Hint, Push, fold, keep, lightest, suite
from ps_accordion.errors import CodecError

from .cases import CASES, SEED, Case, encode, gaussian

N = 40_001
SUITE = suite(values="fp32")


def pushes_of(*cases, weights=None, seed=SEED, n=N):
    """Return one push a case, each of its own vector."""
    made = [encode(case, gaussian(n, 20 + i), np.zeros(n, np.float32), seed) for i, case in enumerate(cases)]
    weights = weights or [1.0] * len(cases)
    return [Push(weight, coding, payload) for weight, (coding, payload) in zip(weights, made, strict=True)]


def run(pushes, residual, total_weight=None, values="fp16", n=N, **options):
    """Return what the fold made: (Folded, payload bytes, new residual)."""
    new = np.full(n, np.nan, np.float32)
    out = np.full(4 * n + 64, 0xA5, np.uint8)
    done = fold(
        pushes,
        residual,
        new,
        elements=n,
        total_weight=total_weight or sum(push.weight for push in pushes),
        seed_reply=SEED + 1,
        scratch=np.full(n, np.nan, np.float32),
        out=out,
        codecs=suite(values=values),
        **options,
    )
    return done, None if done is None else out[: done.nbytes].tobytes(), new


MIXES = {
    "one dense": [Case("dense", 32)],
    "two dense": [Case("dense", 32)] * 2,
    "three dense": [Case("dense", 32)] * 3,
    "dense of both widths": [Case("dense", 32), Case("dense", 16)],
    "bf16 and dense": [Case("bf16", 16), Case("dense", 16), Case("bf16", 16)],
    "eden of several widths, and topk": [Case("eden", 1), Case("eden", 4), Case("topk", 0.01)],
    "quic_fl of several widths": [Case("quic_fl", 8), Case("quic_fl", 2), Case("quic_fl", 4)],
    "quic_fl and eden": [Case("quic_fl", 4), Case("eden", 4)],
    "three signsgd": [Case("signsgd", 1)] * 3,
    "signsgd of two levels, and onebit": [Case("signsgd", 1), Case("signsgd", 4), Case("onebit", 512)],
    "three topk": [Case("topk", 0.01)] * 3,
    "topk of different levels and formats": [Case("topk", 0.001), Case("topk", 0.05, "fp32"), Case("topk", 0.01)],
    "topk and dense": [Case("topk", 0.01), Case("dense", 16), Case("topk", 0.01)],
    "three onebit": [Case("onebit", 512)] * 3,
    "onebit of two levels, and topk": [Case("onebit", 512), Case("onebit", 16384), Case("topk", 0.01)],
    "onebit of two levels": [Case("onebit", 16384), Case("onebit", 512)],
    "random blocks": [Case("random_block", 0.1)] * 3,
    "random places": [Case("random_k", 0.1)] * 3,
    "thresholds of different heights and formats": [Case("threshold", 2.5, "packed"), Case("threshold", 3.0, "int8")],
    "int of different widths": [Case("int", 2), Case("int", 8), Case("int", 4)],
    "qsgd": [Case("qsgd", 4)] * 3,
    "natural and terngrad": [Case("natural", 8), Case("terngrad", 2)],
    "qsgd and lighter int": [Case("qsgd", 2), Case("int", 4)],
    "a random block and topk": [Case("random_block", 0.1), Case("topk", 0.01)],
    "topk and a heavier random block": [Case("topk", 0.2), Case("random_block", 0.01)],
}


@pytest.mark.parametrize("held", [(), [(10, 30), (39_000, 1_001)]], ids=["all used", "held"])
@pytest.mark.parametrize("rule", ["keep", "clip", "reset"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["fresh", "residual"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_fold_agrees_with_the_numpy_twin_to_the_bit(mix, with_residual, rule, held):
    """Coding, payload, new residual and loss are the twin's, for every mix of codecs, weights, held spans and switch rule."""
    pushes = pushes_of(*MIXES[mix], weights=[1.0, 0.25, 3.0][: len(MIXES[mix])])
    residual = gaussian(N, 8) * np.float32(5) if with_residual else None
    before = None if residual is None else residual.copy()
    total_weight = sum(push.weight for push in pushes) + 1.5
    done, payload, new = run(pushes, residual, total_weight, held=held, rule=rule)
    expected = twins.fold(pushes, residual, elements=N, total_weight=total_weight, seed_reply=SEED + 1, held=held, rule=rule)
    assert done.coding == expected.coding
    assert payload == expected.payload
    assert done.lost == expected.lost
    if done.wrote:
        assert np.array_equal(new, expected.new_residual)
    else:
        assert not expected.new_residual.any()
        assert residual is None
    assert residual is None or np.array_equal(before, residual)


@pytest.mark.parametrize("n", [1, 1000, 70_001])
def test_folding_only_what_has_changed_agrees_with_the_numpy_twin_over_many_rounds(n):
    """Signs of zeros included: members overlap, cancel, stay away and underflow; what changed is known, or forgotten.

    The residual begins with -0.0, which a sum with zero takes away, and which a sum with an underflow does not.
    """
    halves = [np.where(gaussian(n, 7) < 0, np.float32(-0.0), gaussian(n, 6)), np.full(n, np.nan, np.float32)]
    hint, changes, knew = Hint(), None, 0
    for round_ in range(12):
        pushes = []
        for member in range(3):
            v = gaussian(n, round_) + (gaussian(n, 100 * round_ + member) if round_ % 3 else 0) * np.float32(0.5)
            if round_ % 4 == 3 or round_ == 0:
                v *= np.float32(1e-38 if round_ else -1e-44)
            weight = [1.0, 0.25, 1e-3][member] if round_ % 5 else 1.0
            if member == 1 and round_ % 5 == 0:
                v = -v if round_ else v
            values = "fp32" if round_ in (0, 3, 5) else "fp16"
            case = Case("topk", 0.01 if n > 1000 else 1 / n, values)
            if member < 2 or round_ % 2:
                pushes.append(Push(weight, *encode(case, v, np.zeros(n, np.float32))))
        total_weight = sum(push.weight for push in pushes) + 2.5
        before, target = halves[round_ % 2], halves[1 - round_ % 2]
        expected = twins.fold(pushes, before, elements=n, total_weight=total_weight, seed_reply=SEED)
        out = np.full(4 * n + 64, 0xA5, np.uint8)
        knew += changes is not None
        done = fold(
            *(pushes, before, target),
            elements=n, total_weight=total_weight, seed_reply=SEED, scratch=np.full(n, np.nan, np.float32), out=out,
            hint=hint, changes=changes,
        )  # fmt: skip
        assert (done.coding, out[: done.nbytes].tobytes()) == (expected.coding, expected.payload)
        assert target.tobytes() == expected.new_residual.tobytes()
        changes = done.changes if round_ != 6 else None
        if changes is not None:
            again = before.copy()
            again[changes.places] = changes.values
            assert again.tobytes() == target.tobytes()
    assert knew >= 6 * (n > 1)


def test_the_reply_takes_the_lightest_level_pushed_unless_told():
    """Members of different levels get the best of them back; a shard may choose another."""
    pushes = pushes_of(Case("topk", 0.01), Case("topk", 0.05))
    assert run(pushes, None)[0].coding.level == 0.05
    done, payload, _ = run(pushes, None, reply=("dense", 32))
    assert (done.coding.codec, done.coding.level) == ("dense", 32)
    assert payload == twins.fold(pushes, None, elements=N, total_weight=2.0, reply=("dense", 32)).payload


def test_the_number_format_of_the_reply_is_the_servers_option():
    """Pushes say their own format; the reply is written in the one that the job configures."""
    pushes = pushes_of(Case("topk", 0.01), Case("topk", 0.01))
    _, payload, _ = run(pushes, None, values="fp32")
    assert payload == twins.fold(pushes, None, elements=N, total_weight=2.0, values="fp32").payload


def test_blocks_of_one_place_are_summed_undecoded_to_the_same_bits():
    """D(sum of payloads) == sum of D(payloads): a random block needs no residual at the server."""
    pushes = pushes_of(*[Case("random_block", 0.1)] * 3, weights=[1.0, 2.0, 0.5])
    done, payload, new = run(pushes, None)
    assert not done.wrote
    assert np.isnan(new).all()
    total = np.zeros(N, np.float32)
    for push in pushes:
        total += np.float32(push.weight) * twins.decode(push.coding, push.payload)
    assert np.array_equal(twins.decode(done.coding, payload), total * np.float32(1 / 3.5))


def test_a_summed_block_takes_the_residual_of_an_earlier_codec_with_it():
    """What topk left on the covered coordinates leaves with the block, and the rest stays."""
    pushes = pushes_of(*[Case("random_block", 0.1)] * 2)
    residual = gaussian(N, 2)
    done, payload, new = run(pushes, residual)
    at = twins.covered(N, done.coding.count, SEED)
    assert done.wrote
    assert not new[at].any()
    untouched = np.ones(N, bool)
    untouched[at] = False
    assert np.array_equal(new[untouched], residual[untouched])
    without = twins.fold(pushes, None, elements=N, total_weight=2.0)
    expected = twins.decode(without.coding, without.payload)[at] + residual[at]
    assert np.array_equal(twins.decode(done.coding, payload)[at], expected)


@pytest.mark.parametrize("change", ["seed", "level"])
def test_blocks_of_different_places_are_an_error_that_names_the_difference(change):
    """Adding them would be wrong without anybody noticing."""
    case = Case("random_block", 0.1)
    other = case._replace(level=0.2) if change == "level" else case
    pushes = pushes_of(case) + pushes_of(other, seed=SEED + (change == "seed"))
    with pytest.raises(CodecError, match=r"push 0 is random_block at level 0\.1 .* push 1 is random_block at level 0\.[12]"):
        run(pushes, None)


def test_a_sum_that_is_not_finite_is_reported():
    """Finite payloads may add up to infinity, decoded or not, with a residual or without."""
    big = np.full(10, 3e38, np.float32)
    for case in (Case("dense", 32), Case("topk", 1.0, "fp32"), Case("random_block", 1.0)):
        pushes = [Push(1.0, *encode(case, big, np.zeros(10, np.float32)))]
        assert run(pushes * 2, None, n=10)[0] is None
        assert run(pushes, big, n=10)[0] is None
        assert run(pushes, None, n=10)[0] is not None


def test_members_without_data_count_in_the_mean():
    """Two members, one of them without a gradient here: half the other's."""
    pushes = pushes_of(Case("dense", 32))
    _, payload, _ = run(pushes, None, total_weight=2.0)
    assert np.array_equal(np.frombuffer(payload, np.float32), gaussian(N, 20) * np.float32(0.5))


def test_a_fold_without_data_is_a_mistake_of_the_caller():
    """Shards answer such rounds with UNUSED and never fold them."""
    with pytest.raises(ValueError, match="expected pushes with data"):
        run([], None, total_weight=1.0)


CHANGING = [("topk", 0.01), ("topk", 0.1), ("random_block", 0.05), ("dense", 16), ("topk", 0.002), ("dense", 32)]


@pytest.mark.parametrize("rule", ["keep", "clip", "reset"])
def test_what_was_pushed_is_applied_or_in_a_residual_or_itemised_over_fifty_changing_steps(rule):
    """Two workers, one server, float64 books: sum of gradients = applied + residuals + losses, and the loss is as stated."""
    n, weights = 3000, (1.0, 2.0)
    worker = [np.zeros(n, np.float32) for _ in weights]
    server = np.zeros(n, np.float32)
    pushed, applied, lost = np.zeros(n), np.zeros(n), np.zeros(n)
    share = np.array(weights) / sum(weights)
    last = CHANGING[0]
    rules = twins.settle
    for step in range(50):
        choice = CHANGING[step // 4 % len(CHANGING)]
        lighter = twins.lighter(choice, last, n)
        last = choice
        pushes = []
        for rank, weight in enumerate(weights):
            gradient = gaussian(n, 100 * step + rank)
            pushed += share[rank] * gradient
            if lighter:
                after, stated = rules(rule, worker[rank], gradient)
                thrown = worker[rank].astype(np.float64) - after
                lost += share[rank] * thrown
                assert stated == pytest.approx(np.linalg.norm(thrown), rel=1e-12)
                worker[rank] = after
            pushes.append(Push(weight, *encode(Case(*choice), gradient, worker[rank], SEED + step)))
        own = rule if lighter else "keep"
        before = server
        done, payload, new = run(pushes, server, n=n, rule=own)
        assert (done.coding.codec, done.coding.level) == lightest([choice], n)
        if own != "keep":
            total = sum(np.float32(push.weight) * twins.decode(push.coding, push.payload) for push in pushes)
            after, stated = rules(own, before, total.astype(np.float32), float(np.float32(1 / 3)))
            assert done.lost == stated
            lost += before.astype(np.float64) - after
        server = new
        applied += twins.decode(done.coding, payload)
    kept = share[0] * worker[0] + share[1] * worker[1] + server
    assert np.abs(kept).sum() > 0 or rule == "reset"
    assert np.abs(pushed - (applied + kept + lost)).max() < 1e-4
    assert (np.abs(lost).max() > 0) == (rule != "keep")


@pytest.mark.parametrize("with_residual", [False, True], ids=["fresh", "residual"])
def test_what_is_kept_is_the_mean_and_the_residual_to_the_bit(with_residual):
    """As in a fold, but for the result: each operation rounded by itself, in the order of the pushes."""
    pushes = pushes_of(Case("dense", 32), Case("dense", 32), weights=[1.0, 2.5])
    residual = gaussian(N, 5) if with_residual else None
    new, scratch = np.full(N, np.nan, np.float32), np.full(N, np.nan, np.float32)
    assert keep(pushes, residual, new, total_weight=4.5, scratch=scratch)
    total = np.zeros(N, np.float32)
    for push in pushes:
        total = total + np.float32(push.weight) * twins.decode(push.coding, push.payload.tobytes())
    expected = total * np.float32(1.0 / 4.5) + (np.float32(0) if residual is None else residual)
    assert np.array_equal(new, expected)


def test_what_is_not_finite_is_not_kept():
    """Each part is, and the sum is not."""
    huge, new = np.full(N, 3e38, np.float32), np.empty(N, np.float32)
    pushes = [Push(1.0, Coding("dense", 32.0, N, N, 0), huge.view(np.uint8))]
    assert not keep(pushes, huge, new, total_weight=1.0, scratch=np.empty(N, np.float32))


def test_a_scale_beyond_all_numbers_is_seen_where_nothing_was_sent():
    """Zero times infinity is no number, in the sum of sparse pushes as in the dense one: the round is skipped."""
    codec, n = suite()["topk"], 1000
    coding, payload = encode(Case("topk", 0.01), np.zeros(n, np.float32), np.zeros(n, np.float32))
    pushes = [Push(1e-39, coding, payload)]
    done = fold(
        pushes, np.ones(n, np.float32), np.empty(n, np.float32), elements=n, total_weight=1e-39, seed_reply=SEED,
        scratch=np.empty(n, np.float32), out=np.empty(codec.payload_bound(n, 0.01), np.uint8),
    )  # fmt: skip
    assert done is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_that_are_not_finite_are_found_in_silence(case):
    """Whoever wants warnings to be errors, too: the round is skipped, and nothing else happens."""
    codec, n = case.build(), 1000
    coding, payload = encode(case, gaussian(n), np.zeros(n, np.float32))
    for weights in ([np.float32(3e38)] * 2, [np.float32(np.inf), np.float32(1)]):
        total = np.zeros(n, np.float32)
        codec.begin_all([payload] * 2, [coding] * 2, weights, total)
        if case.codec not in ("signsgd", "threshold") or np.isinf(weights[0]):
            assert not np.isfinite(total).all()


@pytest.mark.parametrize("n", [1, 1000, 32_769, 70_001])
@pytest.mark.parametrize("alike", [True, False], ids=["one seed", "seeds of their own"])
@pytest.mark.parametrize("case", [*CASES, Case("topk", 0.02, "int8"), Case("topk", 0.02, "packed")], ids=str)
def test_members_that_are_summed_together_have_the_bits_of_one_after_another(case, alike, n):
    """However many, with any weights, whatever the memory held, and of vectors of very different magnitudes."""
    codec, payloads, codings = case.build(), [], []
    for member in range(5):
        v = gaussian(n, member) * np.float32(10.0 ** (7 * member - 20))
        coding, payload = encode(case, v, np.zeros(n, np.float32), SEED if alike else SEED + member)
        payloads.append(payload)
        codings.append(coding)
    weights = [np.float32(weight) for weight in (1, 0.3, 2.0**-100, -2.5, 1e20)]
    for members in (1, 2, 5):
        columns = payloads[:members], codings[:members], weights[:members]
        expected, total = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
        Codec.begin_all(codec, *columns, expected)
        codec.begin_all(*columns, total)
        assert total.tobytes() == expected.tobytes()
