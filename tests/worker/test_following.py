"""What a key's codecs go on from: the last result that counts, here, at a worker that joins, and in a checkpoint."""

import numpy as np
import pytest
from machines import gaussian, layout_of, settings_of

from ps_accordion.codecs.base import Coding
from ps_accordion.errors import WireError
from ps_accordion.layout import Tensor
from ps_accordion.regimes import Choice
from ps_accordion.wire.framing import MAX_FRAME, frame_lengths
from ps_accordion.worker.coder import KeyCoder, coding_of

RANK = Choice("powersgd", 2.0)


def coder(slot: int = 0, shape: tuple[int, ...] = (48, 64), **options) -> KeyCoder:
    """Return the coder of a matrix."""
    settings = settings_of(codec_name="powersgd", codec_light=2.0, codec_heavy=1.0, **options)
    (key,) = layout_of(settings, [Tensor("weight", shape, "float32")]).keys
    return KeyCoder(0, key, settings, slot=slot, incarnation=1)


def push(of: KeyCoder, round_: int) -> tuple[Coding, np.ndarray]:
    """Return what a worker pushes in a round."""
    gradient = gaussian(of.key.elements, 100 * round_ + of.key.number)
    pushed = of.encode(gradient, round_=round_, used=1, choice=RANK, previous_skipped=False)
    assert pushed.payload is not None
    return coding_of(pushed.message), pushed.payload.copy()


def answer(of: KeyCoder, coding: Coding, payload: np.ndarray) -> tuple[np.ndarray, Coding]:
    """Return a result: the mean of twice the same push."""
    out = np.empty_like(payload)
    done = of.codecs.find("powersgd").sum_payloads([payload] * 2, [np.float32(1)] * 2, np.float32(0.5), coding, out)
    assert done is not None
    return out, coding


def test_a_result_is_gone_on_from_once_its_round_counts():
    """Before it does, or where it does not, nothing has changed."""
    of, other = coder(), coder()
    result = answer(of, *push(of, 0))
    push(other, 0)
    of.codecs.result(*result)
    assert of.codecs.start is None
    of.codecs.decided(applied=False)
    assert push(of, 1)[1].tobytes() == push(other, 1)[1].tobytes()
    of.codecs.result(*result)
    of.codecs.decided(applied=True)
    assert push(of, 2)[1][4:8].view(np.uint32) == 0
    assert push(other, 2)[1][4:8].view(np.uint32) == 1


def test_a_result_that_a_view_has_taken_back_leaves_no_trace():
    """The one that comes in its place is gone on from."""
    of, other = coder(), coder()
    first, second = answer(of, *push(of, 0)), answer(other, *push(other, 7))
    of.codecs.result(*first)
    of.codecs.result(*second)
    of.codecs.decided(applied=True)
    assert of.codecs.start is not None
    assert of.codecs.start.payload == second[0].tobytes()


def test_whoever_is_handed_the_last_result_pushes_on_the_same_basis():
    """As a worker that joins, or a run that is taken up."""
    of, joiner = coder(), coder(slot=1)
    of.codecs.result(*answer(of, *push(of, 0)))
    of.codecs.decided(applied=True)
    assert of.codecs.start is not None
    joiner.codecs.go_on(of.codecs.start)
    pushes = [push(each, 1) for each in (of, joiner)]
    assert of.codecs.find("powersgd").addable([payload for _, payload in pushes], pushes[0][0])


def test_a_result_of_another_key_is_refused():
    """A donor with another model, or a damaged checkpoint."""
    of, other = coder(), coder(shape=(64, 48))
    other.codecs.result(*answer(other, *push(other, 0)))
    other.codecs.decided(applied=True)
    assert other.codecs.start is not None
    with pytest.raises(WireError, match="key 0 cannot go on from the result that was handed over: powersgd: expected 48 rows"):
        of.codecs.go_on(other.codecs.start)


def test_a_payload_that_is_longer_than_a_frame_travels_in_several():
    """All of a large matrix, as a worker hands it over when it leaves: the header lists the frames."""
    of = coder(shape=(1024, 1280))
    push(of, 0)
    handed_over = of.flush(round_=1, previous_skipped=False, weight=1.0)
    assert handed_over.payload is not None
    assert handed_over.message.frames == frame_lengths(handed_over.payload.nbytes) == [MAX_FRAME, 4 * 1024 * 1280 - MAX_FRAME]
