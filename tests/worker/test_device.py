"""The coder on a device makes the pushes that the coder on the host makes, and makes the thread of backward wait for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from machines import gaussian, layout_of, settings_of
from nosync import DEVICES, NoSync, Seen, Synchronised, watched_by_torch

from ps_accordion.codecs import get
from ps_accordion.errors import UsageError
from ps_accordion.layout import Tensor
from ps_accordion.regimes import Choice
from ps_accordion.wire import messages as m
from ps_accordion.worker import device, recorded
from ps_accordion.worker.coder import KeyCoder, Pushed, coding_of
from ps_accordion.worker.device import DeviceCoder
from ps_accordion.worker.recorded import Part, Recordings
from ps_accordion.worker.streams import streams_of

CHOICES = [Choice("topk", 0.05), Choice("topk", 0.3), Choice("random_block", 0.1), Choice("dense", 16.0), Choice("dense", 32.0)]
FUSED, LARGE = 0, 1
devices = pytest.mark.parametrize("where", DEVICES)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: on a busy machine, its threads wait for each other longer than these vectors take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pair:
    """The coders of one key at one worker, on the host and on a device, fed with the same rounds."""

    def __init__(
        self, where: str, key: int = LARGE, dtype: torch.dtype = torch.float32, tensors: int = 0, **options: Any
    ) -> None:
        settings_ = settings_of(**options)
        table = [Tensor(f"weight {number}", (64, 32), "float32") for number in range(tensors)]
        self.key = layout_of(settings_, table or None).keys[key]
        self.host = KeyCoder(0, self.key, settings_, slot=1, incarnation=2)
        recordings = Recordings(self.key.elements, limit=8, warn=pytest.fail)
        self.device = DeviceCoder(0, self.key, settings_, slot=1, incarnation=2, recordings=recordings)
        self._where, self._dtype = where, dtype
        self._round = 0

    def parts(self, vector: np.ndarray) -> list[Part]:
        """Return the slices of a key's vector, as views of tensors that do not lie side by side."""
        cut = [torch.from_numpy(vector[part.offset : part.offset + part.length].copy()) for part in self.key.slices]
        return [(part, each.to(self._where, self._dtype)) for part, each in zip(self.key.slices, cut, strict=True)]

    def push(self, gradient: np.ndarray, *, choice: Choice = CHOICES[0], used: int | None = None, weight: float = 1.0) -> Pushed:
        """Encode a round with both; fail unless pushes and residuals are the same."""
        used = self.key.all_used if used is None else used
        rest: dict[str, Any] = {"round_": self._round, "previous_skipped": bool(self._round % 2), "weight": weight}
        self._round += 1
        parts = self.parts(gradient)
        pending = self.device.begin(parts, used=used, choice=choice, **rest)
        rounded = np.concatenate([part.to(torch.float32).cpu().numpy() for _, part in parts])
        expected = (
            self.host.encode(rounded, used=used, choice=choice, **rest)
            if used
            else Pushed(self.host.without_payload("UNUSED", **rest), None, 0.0)
        )
        made = pending.pushed()
        assert made.message == expected.message
        assert made.loss == expected.loss
        assert bytes_of(made.payload) == bytes_of(expected.payload)
        self.check()
        return made

    def take_back(self, pushed: Pushed) -> None:
        """Take a push back with both."""
        assert pushed.payload is not None
        self.host.take_back(pushed.message, pushed.payload)
        self.device.take_back(pushed.message, pushed.payload)

    def check(self) -> None:
        """Fail unless the residuals have the same bits, and the accounts the same sums."""
        residual = self.device.host_residual()
        assert bytes_of(residual) == bytes_of(self.host.residual)
        closed, expected = self.device.account.closed(residual), self.host.account.closed(self.host.residual)
        # What a switch threw away is a difference here, in which the vector's roundings are, too.
        assert closed == pytest.approx(expected, rel=1e-6, abs=0.1 * expected.slack)
        assert abs(closed.difference) <= closed.slack

    def decode(self, pushed: Pushed) -> None:
        """Decode a push as a result; fail unless the same bits come out, in the type of the gradients."""
        out = np.empty(self.key.elements, np.float32)
        assert pushed.payload is not None
        get(pushed.message.codec).decode(pushed.payload, coding_of(pushed.message), out)
        places = self.parts(np.full(self.key.elements, np.nan, np.float32))
        self.device.decode(result_of(pushed.message), np.frombuffer(pushed.payload.tobytes(), np.uint8), places)
        for (_, place), (_, expected) in zip(places, self.parts(out), strict=True):
            assert torch.equal(place, expected)


def bytes_of(array: np.ndarray | None) -> bytes | None:
    """Return an array's bytes, or None."""
    return None if array is None else array.tobytes()


def result_of(push: m.Push) -> m.Result:
    """Return a result that says what the push said."""
    return m.Result(
        push.layout, push.key, push.round, 1, "DATA", push.used,
        codec=push.codec, level=push.level, elements=push.elements, count=push.count, seed=push.seed, frames=push.frames,
    )  # fmt: skip


STEPS = st.lists(
    st.tuples(
        st.sampled_from(CHOICES),
        st.sampled_from(["counted", "counted", "skipped", "not finite", "unused"]),
        st.sampled_from([1.0, 0.5]),
        st.sampled_from([1.0, 1e-3, 1e3]),
    ),
    min_size=1,
    max_size=10,
)


ROUNDED = [(Choice("topk", 0.05), "skipped", 1.0, 1.0), (Choice("topk", 0.05), "skipped", 1.0, 1e-3)]


@devices
@settings(max_examples=40)
@example([*ROUNDED, (Choice("topk", 0.3), "counted", 1.0, 1.0)], "clip", "fp16")
@given(STEPS, st.sampled_from(["keep", "clip", "reset"]), st.sampled_from(["fp16", "fp32"]))
def test_rounds_go_as_on_the_host(where, steps, rule, values):
    """Changing codecs and levels, skips of our own and of others, switches: the same pushes, losses, residuals and aggregates."""
    pair = Pair(where, codec_residual_at_switch=rule, codec_values=values)
    for round_, (choice, event, weight, size) in enumerate(steps):
        gradient = gaussian(2048, round_) * np.float32(size)
        if event == "not finite":
            gradient[round_ * 7] = np.nan
        pushed = pair.push(gradient, choice=choice, used=0 if event == "unused" else None, weight=weight)
        if pushed.payload is not None:
            pair.decode(pushed)
            if event == "skipped":
                pair.take_back(pushed)
    pair.check()


@devices
def test_a_key_outside_the_account_is_pushed_too(where):
    """Also in the rounds in which nobody looks at its residual, and in those in which a switch would be accounted for."""
    pair = Pair(where, key=8, tensors=9, codec_residual_at_switch="clip")
    assert not pair.device.account.probe.counts
    for round_, choice in enumerate([CHOICES[0], CHOICES[0], CHOICES[1]]):
        pair.push(gaussian(2048, round_), choice=choice)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_slices_are_gathered_and_spread(where, dtype):
    """Unused slices hold anything, keep their residual, and get the aggregate; half precision is widened and rounded back."""
    pair = Pair(where, FUSED, dtype)
    second = pair.key.slices[1]
    for round_, used in enumerate([0b11, 0b01, 0b11, 0b10, 0b00, 0b11]):
        gradient = gaussian(17, round_)
        if used == 0b01:
            gradient[second.offset :] = np.nan
        pushed = pair.push(gradient, choice=Choice("dense", 16.0), used=used)
        if pushed.payload is not None:
            pair.decode(pushed)


@devices
def test_a_switch_to_lighter_compression_clips_once(where):
    """What a long heavy time has piled up is cut to the length of a gradient, and the ledger hears of it."""
    pair = Pair(where, codec_residual_at_switch="clip")
    for round_ in range(30):
        assert pair.push(gaussian(2048, round_), choice=Choice("topk", 0.001)).loss == 0.0
    assert pair.push(gaussian(2048, 30), choice=Choice("topk", 0.1)).loss > 10.0
    assert pair.push(gaussian(2048, 31), choice=Choice("topk", 0.1)).loss == 0.0


@devices
def test_a_switch_in_a_round_that_is_skipped_comes_again(where):
    """The residual is as before, and so is the bound that says what lighter means."""
    pair = Pair(where, codec_residual_at_switch="clip")
    for round_ in range(20):
        pair.push(gaussian(2048, round_), choice=Choice("topk", 0.001))
    bad = gaussian(2048, 20)
    bad[5] = np.inf
    assert pair.push(bad, choice=Choice("topk", 0.1)).message.kind == "SKIP"
    assert pair.push(gaussian(2048, 21), choice=Choice("topk", 0.1)).loss > 0.0


@devices
def test_a_payload_is_not_written_again(where):
    """It is kept and sent again byte for byte, while the next rounds are encoded."""
    pair = Pair(where)
    first = pair.push(gaussian(2048, 0))
    before = bytes_of(first.payload)
    for round_ in range(1, 5):
        pair.push(gaussian(2048, round_))
    assert bytes_of(first.payload) == before


@devices
def test_a_residual_may_not_be_there_yet(where):
    """Before the first round there is none; what is taken back makes one as soon as the device is known."""
    pair = Pair(where)
    pushed = pair.push(gaussian(2048, 0))
    fresh = Pair(where)
    assert fresh.device.host_residual() is None
    fresh.take_back(pushed)
    fresh.push(gaussian(2048, 1))


@devices
def test_gradients_can_be_recorded(where):
    """As the host would have seen them: float32, in the order of the key."""
    pair = Pair(where, FUSED, torch.bfloat16)
    vector = torch.from_numpy(gaussian(17)).to(torch.bfloat16).to(torch.float32).numpy()
    assert bytes_of(pair.device.host_gradient(pair.parts(vector))) == vector.tobytes()


def test_a_device_without_streams_is_refused_by_name():
    """Copying behind its back would be a race; the message says where models can be."""
    with pytest.raises(UsageError, match=r"expected gradients on the CPU or on a device with streams.*got one on meta"):
        streams_of(torch.device("meta"))


# ------------------------------------------------------------ nobody waits


@pytest.mark.parametrize("key", [FUSED, LARGE])
@pytest.mark.parametrize("rule", ["keep", "clip", "reset"])
def test_beginning_a_round_copies_one_parcel_and_waits_for_nothing(key, rule, monkeypatch):
    """With every codec, at a switch, with unused slices, and when a push is taken back first; what the ledger sees is in it."""
    seen, back = Seen(), Pair("cpu", key).push(gaussian(layout_of(settings_of()).keys[key].elements))
    for module in (device, recorded):
        monkeypatch.setattr(module, "streams_of", lambda _: seen)
    settings_ = settings_of(codec_residual_at_switch=rule)
    owner = layout_of(settings_).keys[key]
    coder = DeviceCoder(
        0, owner, settings_, slot=1, incarnation=2, recordings=Recordings(owner.elements, limit=4, warn=pytest.fail)
    )
    parts = [(part, torch.zeros(part.length, device="meta")) for part in owner.slices]
    for round_, choice in enumerate(CHOICES):
        coder.note_bound(1)
        coder.take_back(back.message, back.payload)
        seen.log.clear()
        with NoSync(parcels=1) as ban:
            pending = coder.begin(parts, round_=round_, used=0b1, choice=choice, previous_skipped=False)
        bound = get(choice.codec).payload_bound(owner.elements, choice.level)
        looks = 2 if rule == "keep" else 3  # a stretch of the gradient, and of the residual before and after
        assert ban.fetched == [16 + bound + looks * 4 * coder.account.probe.length]
        assert seen.log == ["mark"]
        # The parcel that was not copied is all zero, so it says that the vector was not finite.
        assert pending.pushed().message.kind == "SKIP"
        assert seen.log == ["mark", "wait"]


@devices
@pytest.mark.parametrize("choice", [Choice("topk", 0.05), Choice("dense", 32.0)])
def test_what_a_leaver_hands_over_is_that_of_the_host(where, choice):
    """With what a skipped round has returned, also where nothing was left; and then nothing is."""
    pair = Pair(where)
    last = pair.push(gaussian(2048), choice=choice)
    for again in (False, True):
        if again:
            for coder in (pair.host, pair.device):
                coder.take_back(last.message, last.payload)
        pushed = [coder.flush(round_=7, previous_skipped=again, weight=2.0) for coder in (pair.host, pair.device)]
        assert pushed[0].message == pushed[1].message
        assert (pushed[0].payload is None) == (choice.codec == "dense" and not again)
        assert pushed[0].payload is None or np.array_equal(pushed[0].payload, pushed[1].payload)
        assert pair.host.residual is None or not pair.host.residual.any()
        assert pair.device.host_residual() is None


def test_a_planted_read_is_caught(monkeypatch):
    """The ban covers all that `begin` does."""
    pair = Pair("cpu")
    residual_on = pair.device._residual_on
    monkeypatch.setattr(pair.device, "_residual_on", lambda where: (residual_on(where).sum().item(), residual_on(where))[1])
    with pytest.raises(Synchronised, match="reads what a tensor holds"), NoSync():
        pair.device.begin(pair.parts(gaussian(2048)), round_=0, used=1, choice=CHOICES[0], previous_skipped=False)


def test_an_unused_key_is_not_written_before_backward_is_done_with_it(monkeypatch):
    """Backward's stream may still fill a bucket with zeros when the aggregate of the others comes."""
    seen, pair, pushed = Seen(), Pair("cpu"), Pair("cpu").push(gaussian(2048))
    for module in (device, recorded):
        monkeypatch.setattr(module, "streams_of", lambda _: seen)
    places = pair.parts(gaussian(2048))
    pending = pair.device.begin(places, round_=0, used=0, choice=CHOICES[0], previous_skipped=False)
    assert pending.pushed().message.kind == "UNUSED"
    pair.device.decode(result_of(pushed.message), pushed.payload, places)
    assert seen.log == ["mark", "aside after a mark", "wait"]


if torch.cuda.is_available():

    @pytest.mark.cuda
    @pytest.mark.parametrize("choice", CHOICES, ids=str)
    def test_torch_itself_sees_no_synchronisation(choice):
        """On a GPU, torch refuses calls that wait while `begin` runs, which sees more than we list."""
        pair = Pair("cuda")
        pair.push(gaussian(2048, 2), choice=choice)  # what is loaded or allocated for the first time may wait
        pair.push(gaussian(2048, 3), choice=choice)
        pair.take_back(pair.push(gaussian(2048)))
        parts = pair.parts(gaussian(2048, 1))
        with watched_by_torch():
            pending = pair.device.begin(parts, round_=3, used=1, choice=choice, previous_skipped=False)
        assert pending.pushed().message.kind == "DATA"
