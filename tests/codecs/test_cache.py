"""Where vectors are written past the cache: in large models, to the same bits, and nothing around them is touched."""

import numpy as np
import pytest

from ps_accordion.codecs import Coding, Hint, cache
from ps_accordion.codecs.workspace import zeros

from .cases import CASES, SEED, buffer, gaussian

N = cache.LONG + 1_237


@pytest.fixture
def small(monkeypatch):
    """Let this process have met no model yet."""
    monkeypatch.setattr(cache, "_from", cache.LONGER)


def test_a_large_model_has_shorter_vectors_go_past_the_cache(small):
    """Once it has been met; small ones before and after it change nothing."""
    cache.meet(cache.LARGE - 1)
    assert [cache.goes_past(n) for n in (cache.LONG, cache.LONGER - 1, cache.LONGER)] == [False, False, True]
    cache.meet(cache.LARGE)
    cache.meet(1)
    assert [cache.goes_past(n) for n in (cache.LONG - 1, cache.LONG)] == [False, True]


class Room:
    """A vector that begins anywhere in memory that is known."""

    def __init__(self, off):
        self.around = zeros(N + 32)
        self.around.fill(np.inf)
        self.vector = self.around[off : off + N]
        self.off = off

    def untouched(self):
        """Return whether nothing around the vector has been written."""
        return np.isinf(self.around[: self.off]).all() and np.isinf(self.around[self.off + N :]).all()


def rounds(case, off):
    """Return all that two rounds write: payloads, residuals, results, sums, each as bytes."""
    codec, made = case.build(), []
    kept, rest, answered, left, decoded, total = (Room(off) for _ in range(6))
    for room in (kept, answered):
        room.vector[:] = gaussian(N, 3)
    hints = Hint(), Hint()
    for seed in range(2):
        payload, reply = buffer(codec, case.level, N), buffer(codec, case.level, N)
        how = {"level": case.level, "seed": SEED + seed}
        encoded = codec.encode(gaussian(N, seed), kept.vector, **how, out=payload, rest=rest.vector, hint=hints[0])
        coding, payload = Coding(case.codec, case.level, N, encoded.count, SEED + seed), payload[: encoded.nbytes]
        codec.receive(payload, coding, decoded.vector)
        many = [payload] * 3, [coding] * 3, [np.float32(1), np.float32(0.5), np.float32(3)]
        codec.begin_all(*many, total.vector)
        made += [each.tobytes() for each in (payload, rest.vector, decoded.vector, total.vector)]
        codec.decode(payload, coding, decoded.vector)
        assert decoded.vector.tobytes() == made[-2]
        back = codec.reencode(total.vector, np.float32(0.2), answered.vector, left.vector, **how, out=reply, hint=hints[1])
        made += [reply[: back.nbytes].tobytes(), left.vector.tobytes()]
        kept, rest, answered, left = rest, kept, left, answered
    assert all(room.untouched() for room in (kept, rest, answered, left, decoded, total))
    return made


@pytest.mark.parametrize("off", [0, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_way_to_memory_changes_no_bit(case, off, small):
    """Wherever vectors begin, for all that workers and servers do."""
    near = rounds(case, off)
    cache.meet(cache.LARGE)
    assert cache.goes_past(N)
    assert rounds(case, off) == near
