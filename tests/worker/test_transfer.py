"""The initial state of a model reaches every worker, through losses, and only into an equal model."""

import random

import numpy as np
import pytest
from machines import settings_of

from ps_accordion.errors import LayoutError
from ps_accordion.wire import messages as m
from ps_accordion.worker import transfer
from ps_accordion.worker.transfer import Donor, Joiner, StateBytes

SIZES = [3, 0, transfer.PART_BYTES - 3, 1, 2 * transfer.PART_BYTES + 7, 5]


def model(fill: int | None, sizes=SIZES) -> list[np.ndarray]:
    """Return the tensors of a model: random bytes, or all `fill`."""
    draw = np.random.default_rng(1)
    return [draw.integers(0, 256, size, np.uint8) if fill is None else np.full(size, fill, np.uint8) for size in sizes]


def joiner_of(arrays, description: str = "m", **options) -> Joiner:
    return Joiner(0, StateBytes(arrays, description), settings_of(servers_count=2, **options), (1, 2), donor=0)


def test_parts_put_together_are_the_state() -> None:
    """Also where parts begin and end inside a tensor, and where a tensor is empty."""
    state = StateBytes(model(None), "m")
    assert state.nbytes == sum(SIZES)
    assert state.parts == 4
    parts = [state.read(part) for part in range(state.parts)]
    assert b"".join(part.tobytes() for part in parts) == b"".join(array.tobytes() for array in model(None))
    assert max(part.nbytes for part in parts) <= transfer.PART_BYTES


def test_what_is_read_is_a_copy() -> None:
    """The donor trains on while the part is being sent."""
    arrays = model(None)
    state = StateBytes(arrays, "m")
    part = state.read(0)
    before = part.tobytes()
    arrays[0][:] = 0
    assert part.tobytes() == before


@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_a_joiner_ends_up_with_the_donors_bytes(loss: float) -> None:
    """In whatever order parts come, though requests and answers get lost; every part through its server in turn."""
    draw = random.Random(3)
    sizes = [transfer.PART_BYTES * 11 + 100]
    theirs, mine = model(None, sizes), model(7, sizes)
    donor, joiner = Donor(0, StateBytes(theirs, "m")), joiner_of(mine)
    now, peers = 0.0, set()
    while not joiner.complete:
        now += transfer.ASK_AGAIN_S / 4
        assert now < 100
        answers = []
        asks = joiner.tick(now)
        assert len(asks) <= transfer.IN_FLIGHT
        for ask in asks:
            peers.update(ask.peers)
            if draw.random() >= loss:
                answers += donor.on_get(b"server", ask.message)
        draw.shuffle(answers)
        for answer in answers:
            if draw.random() >= loss:
                joiner.on_state(answer.message, np.frombuffer(answer.payload[0], np.uint8))
    assert mine[0].tobytes() == theirs[0].tobytes()
    assert peers == {"server 0", "server 1"}
    assert joiner.tick(now + 100) == []


def test_no_more_is_asked_for_than_may_be_in_flight() -> None:
    """And nothing twice before it is late."""
    joiner = joiner_of(model(0, [transfer.PART_BYTES * 20]))
    assert [ask.message.part for ask in joiner.tick(0.0)] == list(range(8))
    assert joiner.tick(0.5) == []
    assert [ask.message.part for ask in joiner.tick(1.0)] == list(range(8))


def test_a_part_that_comes_twice_is_written_once() -> None:
    """A late copy must not undo what training has done since."""
    theirs, mine = model(None, [10]), model(7, [10])
    (answer,) = Donor(0, StateBytes(theirs, "m")).on_get(b"s", m.Get(1, 2, 0, 0, 0))
    joiner = joiner_of(mine)
    data = np.frombuffer(answer.payload[0], np.uint8)
    joiner.on_state(answer.message, data)
    assert joiner.complete
    mine[0][:] = 9
    joiner.on_state(answer.message, data)
    assert (mine[0] == 9).all()


def test_a_different_model_is_refused_with_both_digests() -> None:
    """Other names or shapes, or another number of parts; nothing is written."""
    mine = model(7, [10])
    joiner = joiner_of(mine)
    for state in (StateBytes(model(None, [10]), "another"), StateBytes(model(None, [3 * transfer.PART_BYTES]), "m")):
        (answer,) = Donor(0, state).on_get(b"s", m.Get(1, 2, 0, 0, 0))
        with pytest.raises(LayoutError, match=rf"digest {state.digest} at worker 0, .* at worker 1"):
            joiner.on_state(answer.message, np.frombuffer(answer.payload[0], np.uint8))
    with pytest.raises(LayoutError, match="9 bytes there and 10 here"):
        joiner.on_state(m.State(0, 0, 1, StateBytes(mine, "m").digest, [9]), np.zeros(9, np.uint8))
    assert (mine[0] == 7).all()


def test_parts_that_there_are_not_are_not_answered() -> None:
    """Nor written."""
    donor = Donor(0, StateBytes(model(None), "m"))
    assert donor.on_get(b"s", m.Get(1, 2, 0, 0, 4)) == []
    joiner = joiner_of(model(0, [10]))
    joiner.on_state(m.State(0, 3, 1, StateBytes(model(0, [10]), "m").digest, [10]), np.zeros(10, np.uint8))
    assert not joiner.complete


def test_a_model_without_any_byte_has_one_empty_part() -> None:
    """So that its joiner completes like any other."""
    (answer,) = Donor(0, StateBytes([], "m")).on_get(b"s", m.Get(1, 2, 0, 0, 0))
    assert answer.message.parts == 1
    joiner = joiner_of([])
    joiner.on_state(answer.message, np.zeros(0, np.uint8))
    assert joiner.complete
