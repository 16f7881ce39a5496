"""dgc is topk that forgets momentum where something was sent; what it folds and how is topk's."""

import numpy as np
import pytest

from ps_accordion.codecs import Codec, Coding, get
from ps_accordion.codecs.dgc import DGC
from ps_accordion.codecs.topk import TopK
from ps_accordion.codecs.values import FORMS
from ps_accordion.errors import CodecError

from .cases import SEED, Case, buffer, decode, encode, gaussian


@pytest.mark.parametrize("values", FORMS)
@pytest.mark.parametrize("n", [1, 1000, 4097, 70_000])
def test_momentum_is_forgotten_where_what_was_sent_is_not_zero_and_nowhere_else(values, n):
    """In every format; a value that was rounded to zero has sent nothing, and waits with its momentum."""
    case, velocity = Case("dgc", 0.3, values), gaussian(n, 1)
    v = gaussian(n) * np.exp2(np.random.default_rng(n).integers(-30, 1, n)).astype(np.float32)
    v[n // 2] = 1e6
    for vector in (v, np.zeros(n, np.float32)):
        coding, payload = encode(case, vector, np.zeros(n, np.float32))
        expected = np.where(decode(case, coding, payload) == 0, velocity, 0)
        for mask in (DGC.mask, Codec.mask):
            masked = velocity.copy()
            mask(case.build(), payload, coding, masked)
            assert masked.tobytes() == expected.tobytes()


def test_its_payloads_are_those_of_topk_by_another_name():
    """And a server adds them up as sparsely."""
    n = 40_000
    mine, its = get("dgc"), get("topk")
    assert mine.libraries() == its.libraries() | {"momentum"}
    folded = []
    for codec in (mine, its):
        out = buffer(codec, 0.01, n)
        payloads = [encode(Case(codec.name, 0.01), gaussian(n, member), np.zeros(n, np.float32)) for member in range(3)]
        residual = gaussian(n, 9)
        done = codec.fold(
            [payload for _, payload in payloads], [coding for coding, _ in payloads], [np.float32(1)] * 3, np.float32(1 / 3),
            residual, residual.copy(), level=0.01, seed=SEED, out=out, scratch=np.empty(n, np.float32),
        )  # fmt: skip
        assert done is not None
        folded.append((out[: done.encoded.nbytes].tobytes(), done.changes is not None))
    assert folded[0] == folded[1]


def test_a_codec_that_is_derived_from_topk_is_added_up_densely_unless_it_says_otherwise():
    """It may add its entries in a way of its own, which a sparse fold would pass by."""

    class Doubled(TopK):
        name = "doubled"

        def accumulate(self, payload, coding, weight, total):
            super().accumulate(payload, coding, np.float32(2) * weight, total)

    n, codec = 40_000, Doubled()
    out, residual = buffer(codec, 0.01, n), np.zeros(n, np.float32)
    coding, payload = encode(Case("topk", 0.01), gaussian(n), np.zeros(n, np.float32))
    done = codec.fold(
        [payload], [coding], [np.float32(1)], np.float32(1), residual, residual.copy(),
        level=0.01, seed=SEED, out=out, scratch=np.empty(n, np.float32),
    )  # fmt: skip
    answer = Coding("topk", 0.01, n, done.encoded.count, 0)
    assert np.array_equal(
        decode(Case("topk", 0.01), answer, out[: done.encoded.nbytes]), 2 * decode(Case("topk", 0.01), coding, payload)
    )


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_a_momentum_that_would_grow_for_ever_is_refused(momentum):
    """With the legal range."""
    with pytest.raises(CodecError, match=r"^dgc: expected a momentum from 0 to below 1, got"):
        get("dgc", momentum=momentum)


def test_without_momentum_it_has_none():
    """Then nothing is built up, and nothing is masked: it is topk."""
    assert get("dgc", momentum=0.0).momentum == 0
    assert get("dgc").momentum == 0.9
    assert get("topk").momentum == 0
