"""The initial state of a model reaches every worker, through losses, and only into an equal model."""

import random

import numpy as np
import pytest
from machines import settings_of

from ps_accordion.errors import LayoutError, WireError
from ps_accordion.wire import messages as m
from ps_accordion.worker import transfer
from ps_accordion.worker.transfer import START, Blob, Donor, Joiner, StateBytes

SIZES = [3, 0, transfer.PART_BYTES - 3, 1, 2 * transfer.PART_BYTES + 7, 5]


def model(fill: int | None, sizes=SIZES) -> list[np.ndarray]:
    """Return the tensors of a model: random bytes, or all `fill`."""
    draw = np.random.default_rng(1)
    return [draw.integers(0, 256, size, np.uint8) if fill is None else np.full(size, fill, np.uint8) for size in sizes]


def joiner_of(arrays, description: str = "m", **options) -> Joiner:
    return Joiner(0, START, StateBytes(arrays, description), settings_of(servers_count=2, **options), (1, 2), donor=0)


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
    donor, joiner = Donor(0, START, StateBytes(theirs, "m")), joiner_of(mine)
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


def test_the_next_part_is_asked_for_when_one_has_come() -> None:
    """Late ones first, and nothing that is there already."""
    state = model(0, [transfer.PART_BYTES * 11])
    donor, joiner = Donor(0, START, StateBytes(state, "m")), joiner_of(model(1, [transfer.PART_BYTES * 11]))

    def come(part: int) -> None:
        (given,) = donor.on_get(b"s", m.Get(1, 2, 0, 0, START, part))
        joiner.on_state(given.message, np.frombuffer(given.payload[0], np.uint8))

    assert [ask.message.part for ask in joiner.tick(0.0)] == list(range(8))
    come(3)
    assert [ask.message.part for ask in joiner.tick(0.1)] == [8]
    come(9)
    come(0)
    come(1)
    assert [ask.message.part for ask in joiner.tick(1.0)] == [2, 4, 5, 6, 7, 10]
    for part in (2, 4, 5, 6, 7, 8, 10):
        come(part)
    assert joiner.complete
    assert joiner.tick(5.0) == []


def test_a_part_that_comes_twice_is_written_once() -> None:
    """A late copy must not undo what training has done since."""
    theirs, mine = model(None, [10]), model(7, [10])
    (answer,) = Donor(0, START, StateBytes(theirs, "m")).on_get(b"s", m.Get(1, 2, 0, 0, START, 0))
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
        (answer,) = Donor(0, START, state).on_get(b"s", m.Get(1, 2, 0, 0, START, 0))
        with pytest.raises(LayoutError, match=rf"digest {state.digest} at worker 0, .* at worker 1"):
            joiner.on_state(answer.message, np.frombuffer(answer.payload[0], np.uint8))
    with pytest.raises(LayoutError, match="9 bytes there and 10 here"):
        joiner.on_state(m.State(0, -1, 0, 1, StateBytes(mine, "m").digest, [9]), np.zeros(9, np.uint8))
    assert (mine[0] == 7).all()


def test_parts_that_there_are_not_are_not_answered() -> None:
    """Nor written."""
    donor = Donor(0, START, StateBytes(model(None), "m"))
    assert donor.on_get(b"s", m.Get(1, 2, 0, 0, START, 4)) == []
    joiner = joiner_of(model(0, [10]))
    joiner.on_state(m.State(0, -1, 3, 1, StateBytes(model(0, [10]), "m").digest, [10]), np.zeros(10, np.uint8))
    assert not joiner.complete


def test_a_model_without_any_byte_has_one_empty_part() -> None:
    """So that its joiner completes like any other."""
    (answer,) = Donor(0, START, StateBytes([], "m")).on_get(b"s", m.Get(1, 2, 0, 0, START, 0))
    assert answer.message.parts == 1
    joiner = joiner_of([])
    joiner.on_state(answer.message, np.zeros(0, np.uint8))
    assert joiner.complete


# ---------------------------------------------------------------- the state after a join

AFTER = 41
"""Round of the join."""


def blob_joiner(blob: Blob, round_: int = AFTER) -> Joiner:
    return Joiner(0, round_, blob, settings_of(servers_count=2), (1, 2), donor=0)


def random_bytes(size: int, seed: int = 2) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def answer(donor: Donor, part: int, round_: int = AFTER) -> tuple[m.State, np.ndarray]:
    """Return what a donor says to a question, as it arrives: in memory that is soon used again."""
    (send,) = donor.on_get(b"server", m.Get(1, 2, 0, 0, round_, part))
    return send.message, np.frombuffer(bytearray(send.payload[0]), np.uint8)


@pytest.mark.parametrize(
    "size",
    [0, 1, transfer.PART_BYTES, transfer.PART_BYTES + 1, 11 * transfer.PART_BYTES + 5],
    ids=["empty", "a byte", "a part", "a part and a byte", "many parts"],
)
def test_a_blob_says_itself_how_long_it_is(size: int) -> None:
    """A joiner asks for the first part, learns how many there are, and gets them all, in any order and with losses."""
    draw, data, got = random.Random(4), random_bytes(size), Blob()
    donor, joiner = Donor(0, AFTER, Blob(data)), blob_joiner(got)
    assert [ask.message for ask in joiner.tick(0.0)] == [m.Get(1, 2, 0, 0, AFTER, 0)]
    assert joiner.progress == (1, 1)
    now = 0.0
    while not joiner.complete:
        now += transfer.ASK_AGAIN_S / 3
        assert now < 100
        asks = joiner.tick(now)
        assert len(asks) <= transfer.IN_FLIGHT
        draw.shuffle(asks)
        for ask in asks:
            if draw.random() >= 0.2:
                message, part = answer(donor, ask.message.part)
                joiner.on_state(message, part)
                part[:] = 0  # the frame's memory is used again
    assert got.bytes() == data
    assert got.parts == max(1, -(-size // transfer.PART_BYTES))
    assert joiner.progress == ()


def test_parts_may_come_before_they_were_asked_for() -> None:
    """The relay hands a part to all who asked; the last one may come first."""
    data, got = random_bytes(3 * transfer.PART_BYTES - 1), Blob()
    donor, joiner = Donor(0, AFTER, Blob(data)), blob_joiner(got)
    for part in (2, 0, 1):
        joiner.on_state(*answer(donor, part))
    assert joiner.complete
    assert got.bytes() == data


def test_damage_that_no_checksum_saw_is_an_error() -> None:
    """The digest is over the whole: a part from another blob of the same length is found."""
    got = Blob()
    donor, joiner = Donor(0, AFTER, Blob(random_bytes(transfer.PART_BYTES + 9))), blob_joiner(got)
    message, data = answer(donor, 0)
    joiner.on_state(message, data)
    message, data = answer(donor, 1)
    data[3] ^= 1
    joiner.on_state(message, data)
    assert joiner.complete
    with pytest.raises(WireError, match="came with another digest than it was sent with"):
        got.bytes()


@pytest.mark.parametrize("size", [transfer.PART_BYTES + 9, 2 * transfer.PART_BYTES + 9], ids=["other bytes", "another length"])
def test_parts_of_two_blobs_are_not_put_together(size: int) -> None:
    """A donor that changes its mind in between would hand out half of one state and half of another."""
    joiner = blob_joiner(Blob())
    joiner.on_state(*answer(Donor(0, AFTER, Blob(random_bytes(transfer.PART_BYTES + 9))), 0))
    with pytest.raises(WireError, match="parts of the state that worker 0 sends to worker 1 do not belong together"):
        joiner.on_state(*answer(Donor(0, AFTER, Blob(random_bytes(size, 9))), 1))


def test_answers_to_an_earlier_question_are_ignored() -> None:
    """A late part of the initial state, or of the state after the join before, is not of this one."""
    got = Blob()
    data = random_bytes(transfer.PART_BYTES + 9)
    joiner = blob_joiner(got)
    for round_ in (START, AFTER - 1, AFTER + 1):
        joiner.on_state(*answer(Donor(0, round_, Blob(random_bytes(7))), 0, round_))
    assert joiner.progress == (1, 1)
    donor = Donor(0, AFTER, Blob(data))
    for part in (0, 1):
        joiner.on_state(*answer(donor, part))
    assert got.bytes() == data


def test_a_donor_answers_for_its_own_state_only() -> None:
    """Who asks for another round asks again until this worker has come to the end of that join."""
    donor = Donor(0, AFTER, Blob(b"state"))
    assert [donor.on_get(b"s", m.Get(1, 2, 0, 0, round_, 0)) for round_ in (START, AFTER - 1, AFTER + 1)] == [[], [], []]
    assert donor.on_get(b"s", m.Get(1, 2, 0, 0, AFTER, 1)) == []
    assert Donor(0, START, StateBytes([], "m")).on_get(b"s", m.Get(1, 2, 0, 0, AFTER, 0)) == []
