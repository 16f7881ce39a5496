"""Momentum before compression: what goes into a push, what of it is forgotten, and what leaves it alone; on host and device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import twins
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import gaussian, layout_of, settings_of
from nosync import DEVICES, NoSync, watched_by_torch

from ps_accordion.codecs import get
from ps_accordion.layout import Tensor
from ps_accordion.regimes import Choice
from ps_accordion.selection import Selection
from ps_accordion.worker.coder import KeyCoder, Pushed, coding_of
from ps_accordion.worker.device import DeviceCoder
from ps_accordion.worker.recorded import Recordings

DGC, DENSE, HALF = Choice("dgc", 0.05), Choice("dense", 32.0), Choice("dense", 16.0)
FUSED, LARGE = 0, 1
TABLE = [Tensor("weight", (64, 32), "float32"), Tensor("bias", (10,), "float32"), Tensor("scale", (7,), "float32")]
M = np.float32(0.9)
devices = pytest.mark.parametrize("where", DEVICES)


class Pair:
    """The coders of one key on the host and on a device, fed with the same rounds, beside arithmetic in numpy."""

    def __init__(self, where: str = "cpu", key: int = LARGE, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        options = {"codec_name": "dgc", "codec_residual_at_switch": "keep"} | options
        job = settings_of(**options)
        layout = layout_of(job, TABLE)
        self.key, self._where, self._dtype = layout.keys[key], where, dtype
        momenta = Selection(job.codec, layout).momenta(self.key)
        self.momenta = [((part.offset, part.length), each) for part, each in zip(self.key.slices, momenta, strict=True) if each]
        self.host = KeyCoder(0, self.key, job, slot=1, incarnation=2, momenta=momenta)
        self.device = DeviceCoder(
            0,
            self.key,
            job,
            slot=1,
            incarnation=2,
            recordings=Recordings(self.key.elements, limit=4, warn=pytest.fail),
            momenta=momenta,
        )
        self.velocity = np.zeros(self.key.elements, np.float32)
        self.residual = np.zeros(self.key.elements, np.float32)
        self._round = 0

    def push(self, gradient: np.ndarray, choice: Choice = DGC, used: int | None = None) -> Pushed:
        """Encode a round thrice; fail unless pushes, residuals and velocities agree to the bit."""
        used = self.key.all_used if used is None else used
        rest: dict[str, Any] = {"round_": self._round, "previous_skipped": False, "used": used, "choice": choice}
        self._round += 1
        whole = torch.from_numpy(gradient).to(self._dtype)
        parts = [(part, whole[part.offset : part.offset + part.length].to(self._where)) for part in self.key.slices]
        pending = self.device.begin(parts, **rest)
        rounded = whole.to(torch.float32).numpy()
        made, pushed = pending.pushed(), self.host.encode(rounded, **rest)
        assert made.message == pushed.message
        held = [(part.offset, part.length) for part in self.key.elements_of(used)]
        handed_in, following = twins.advance(self.velocity, rounded, self.momenta, held)
        packed = twins.encode_holding(choice.codec, choice.level, handed_in, self.residual, held)
        assert (packed is None) == (pushed.message.kind == "SKIP")
        if packed is not None:
            assert made.payload is not None
            assert pushed.payload is not None
            assert made.payload.tobytes() == pushed.payload.tobytes() == packed.payload
            sent = twins.decode(coding_of(pushed.message), packed.payload)
            self.velocity = np.where(sent != 0, np.float32(0), following) if choice.codec == "dgc" else following
            self.residual = packed.rest
        self.check()
        return pushed

    def take_back(self, pushed: Pushed) -> None:
        """Take back in all three."""
        assert pushed.payload is not None
        self.host.take_back(pushed.message, pushed.payload)
        self.device.take_back(pushed.message, pushed.payload)
        self.residual = self.residual + twins.decode(coding_of(pushed.message), pushed.payload)
        self.check()

    def check(self) -> None:
        """Fail unless what is kept is the same everywhere."""
        for mine, its, known in (
            (self.host.host_residual(), self.device.host_residual(), self.residual),
            (self.host.host_velocity(), self.device.host_velocity(), self.velocity),
        ):
            zero = np.zeros_like(known)
            assert (zero if mine is None else mine).tobytes() == (zero if its is None else its).tobytes() == known.tobytes()


def sent(pushed: Pushed) -> np.ndarray:
    assert pushed.payload is not None
    out = np.empty(pushed.message.elements, np.float32)
    get(pushed.message.codec).decode(pushed.payload, coding_of(pushed.message), out)
    return out


@devices
def test_a_push_has_momentum_and_forgets_it_where_something_was_sent(where):
    """Algorithm 4 of the paper, round by round; elsewhere the velocity goes on, and the residual collects it."""
    pair = Pair(where)
    for round_ in range(12):
        before = pair.velocity
        push = pair.push(gradient := gaussian(2048, round_))
        went = sent(push) != 0
        assert not pair.velocity[went].any()
        assert np.array_equal(pair.velocity[~went], (before * M + gradient)[~went])
        assert 0 < went.sum() <= 103


@devices
def test_what_is_sent_as_dense_has_momentum_and_keeps_it(where):
    """Nothing waits then, so nothing is stale: the sum of the pushes is what an optimizer with momentum would have added up."""
    pair, velocity = Pair(where), np.zeros(2048, np.float32)
    for round_ in range(5):
        velocity = velocity * M + gaussian(2048, round_)
        assert np.array_equal(sent(pair.push(gaussian(2048, round_), DENSE)), velocity + np.float32(0))


@devices
def test_each_tensor_of_a_fused_key_has_the_momentum_of_its_row(where):
    """One has some and the other none, and a slice that is not used keeps its velocity, whatever stands in its place."""
    pair = Pair(where, FUSED, codec_tensors={"scale": "topk"}, codec_small_bits=32)
    first, second = (slice(part.offset, part.offset + part.length) for part in pair.key.slices)
    moving, still = (first, second) if pair.momenta[0][0][0] == first.start else (second, first)
    assert len(pair.momenta) == 1
    moving_bit = 1 if moving is first else 2
    one, two, three = (gaussian(17, seed) for seed in range(3))
    pair.push(one, DENSE)
    two[moving] = np.nan
    kept = pair.velocity.copy()
    assert np.array_equal(sent(pair.push(two, DENSE, used=3 - moving_bit))[still], two[still])
    assert pair.velocity.tobytes() == kept.tobytes()
    pushed = sent(pair.push(three, DENSE))
    assert np.array_equal(pushed[moving], one[moving] * M + three[moving])
    assert np.array_equal(pushed[still], three[still])


@devices
@pytest.mark.parametrize("choice", [DGC, DENSE, HALF], ids=str)
def test_what_is_not_finite_leaves_velocity_and_residual_as_they_were(where, choice):
    """A gradient that is not, and one that only becomes it with momentum."""
    pair = Pair(where)
    pair.push(np.full(2048, 2e38, np.float32) * np.sign(gaussian(2048)), DENSE)
    pair.push(gaussian(2048, 1))
    velocity, residual = pair.velocity.tobytes(), pair.residual.tobytes()
    at = int(np.abs(pair.velocity).argmax())
    for bad in (np.nan, np.inf, np.copysign(np.float32(3e38), pair.velocity[at])):
        gradient = gaussian(2048, 2)
        gradient[at] = bad
        assert pair.push(gradient, choice).message.kind == "SKIP"
        assert (pair.velocity.tobytes(), pair.residual.tobytes()) == (velocity, residual)


@devices
def test_a_push_that_is_taken_back_returns_to_the_residual_and_leaves_the_velocity(where):
    """What was handed in has advanced it, and what was masked stays so: nothing is counted twice."""
    pair = Pair(where)
    pair.push(gaussian(2048))
    handed_in = gaussian(2048, 1) + pair.velocity * M
    before = pair.residual.copy()
    push = pair.push(gaussian(2048, 1))
    pair.take_back(push)
    assert np.array_equal(pair.residual, before + handed_in)
    assert not pair.velocity[sent(push) != 0].any()
    pair.push(gaussian(2048, 2))


def test_a_flush_hands_over_the_residual_and_nothing_of_the_velocity():
    """What is still in it has not been handed in: no ledger waits for it."""
    pair = Pair()
    pair.push(gaussian(2048))
    flushed = pair.host.flush(round_=1, previous_skipped=False, weight=1.0)
    assert sent(flushed).tobytes() == pair.residual.tobytes()
    closed = pair.host.account.closed(pair.host.host_residual())
    assert abs(closed.difference) <= closed.slack


def test_the_account_has_what_was_handed_in():
    """Momentum included: gradients = pushed + residual is true of the velocity, on host and device alike."""
    pair = Pair()
    handed_in = 0.0
    for round_ in range(4):
        handed_in += pair.host.account.mass(pair.velocity * M + gaussian(2048, round_))
        pair.push(gaussian(2048, round_))
    for coder in (pair.host, pair.device):
        closed = coder.account.closed(coder.host_residual())
        assert closed.came == pytest.approx(handed_in)
        assert abs(closed.difference) <= closed.slack


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gradients_of_other_types_count_as_float32(dtype):
    """As everywhere."""
    pair = Pair(dtype=dtype)
    for round_ in range(3):
        pair.push(gaussian(2048, round_))


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from([DGC, Choice("dgc", 0.3), DENSE, HALF]), st.booleans()), max_size=8),
    seed=st.integers(0, 99),
)
def test_host_device_and_numpy_agree_over_any_rounds(steps, seed):
    """Over changing levels and codecs, with pushes that are taken back."""
    pair = Pair()
    for round_, (choice, skipped) in enumerate(steps):
        pushed = pair.push(gaussian(2048, seed, round_), choice)
        if skipped:
            pair.take_back(pushed)


@devices
def test_the_thread_of_backward_waits_for_nothing(where):
    """Momentum and mask are launched like everything else."""
    pair = Pair(where)
    pair.push(gaussian(2048))
    gradient = [(pair.key.slices[0], torch.from_numpy(gaussian(2048, 1)).to(where))]
    with NoSync() if where == "cpu" else watched_by_torch():
        pending = pair.device.begin(gradient, round_=1, used=1, choice=DGC, previous_skipped=False)
    assert pending.pushed().message.kind == "DATA"


def test_a_velocity_that_is_set_is_gone_on_from_to_the_bit():
    """As a checkpoint does it, with another coder."""
    one, other = Pair(), Pair()
    for round_ in range(3):
        one.push(gaussian(2048, round_))
    for mine, its in ((one.host, other.host), (one.device, other.device)):
        its.set_residual(mine.host_residual())
        its.set_velocity(mine.host_velocity())
    other.velocity, other.residual = one.velocity, one.residual
    assert one.push(gaussian(2048, 3)).payload.tobytes() == other.push(gaussian(2048, 3)).payload.tobytes()
