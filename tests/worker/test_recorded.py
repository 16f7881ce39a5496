"""Recordings make the parcels and residuals that encoding makes operation by operation, for all keys of a kind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from machines import gaussian
from nosync import DEVICES, NoSync
from recordings import CASES, N, never, results, rounds

from ps_accordion.codecs import Coding, get
from ps_accordion.codecs.device import twin_of
from ps_accordion.layout import Slice
from ps_accordion.worker import recorded
from ps_accordion.worker.recorded import Recordings
from ps_accordion.worker.streams import Host, Mark, Recording, Streams, streams_of

SINGLY = ("powersgd",)
"""What the host makes of the last result is part of what is launched."""
devices = pytest.mark.parametrize("where", DEVICES)


class Recorder:
    """Streams whose recordings are counted. The CPU records here: it calls what was recorded again, on the memory of that time.

    Attributes:
        made: How many recordings were made.
        log: Marks that were made and followed.
        fails: What a device says that cannot record; empty where it can.
    """

    def __init__(self) -> None:
        self.made = 0
        self.log: list[str] = []
        self.fails = ""
        self.failed = False
        self.records = False

    def streams_of(self, device: torch.device) -> Streams:
        """Return the streams of a device; other devices than a GPU do everything at once, as the CPU does."""
        streams = streams_of(device) if device.type == "cuda" else Host()
        record, mark, follow = streams.recorded, streams.mark, streams.follow

        def recorded(work: Callable[[], torch.Tensor]) -> Recording | None:
            if self.failed:
                return None
            if self.fails:
                self.failed = True
                raise RuntimeError(self.fails)
            self.made += 1
            if device.type == "cuda":
                return record(work)
            self.records = True
            with suppress(RuntimeError):  # unlike a device that records, the CPU does it, with what the memory happens to hold
                work()
            self.records = False
            return SimpleNamespace(launch=work)

        def marked() -> Mark:
            assert not self.records, "a mark that is made while a device records cannot be followed afterwards"
            self.log.append("mark")
            return mark()

        def followed(last: Mark) -> None:
            self.log.append("follow")
            follow(last)

        for name, change in {"recorded": recorded, "mark": marked, "follow": followed}.items():
            setattr(streams, name, change)
        return streams


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Let every device record, the CPU too."""
    recorder = Recorder()
    monkeypatch.setattr(recorded, "streams_of", recorder.streams_of)
    return recorder


@devices
@pytest.mark.parametrize("codec", CASES)
def test_recordings_make_what_single_operations_make(codec: str, where: str, again: Recorder) -> None:
    """With another seed, gradient and residual each time, of two keys in turn, in each floating type, and not finite."""
    rounds(Recordings(N, limit=4, warn=never), codec, where)
    assert again.made == (0 if codec in SINGLY else 1)


@devices
@pytest.mark.parametrize("codec", CASES)
def test_recordings_decode_as_single_operations_do(codec: str, where: str, again: Recorder) -> None:
    """Other results each time, other sizes of values among them, to one slice and to several, also of half precision."""
    results(Recordings(N, limit=4, warn=never), codec, where)
    assert again.made == (0 if codec in ("eden", "quic_fl", "random_block", "random_k") else 1)


def test_only_the_thread_that_encodes_records(again: Recorder) -> None:
    """Decoding goes on beside backward, which may draw random numbers; what a recording is made from is a copy."""
    recordings, known = Recordings(N, limit=4, warn=never), get("onebit")
    v = gaussian(N, 1)
    payload = np.zeros(known.payload_bound(N, 512), np.uint8)
    encoded = known.encode(v, np.zeros(N, np.float32), level=512, seed=0, out=payload)
    assert encoded is not None
    coding, out = Coding("onebit", 512, N, encoded.count, 0), torch.zeros(N)
    expected = torch.zeros(N)
    known.decode(payload, coding, expected.numpy())
    for round_ in range(6):
        given = payload.copy()
        recordings.decode(twin_of(known), given, coding, [(Slice(0, 0, N, 0), out)])
        given[:] = 255
        assert torch.equal(out, expected)
        if round_ == 3:
            assert again.made == 0
            recordings.record()
    assert again.made == 1


def test_memory_that_is_not_there_is_said_and_training_goes_on(again: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording needs memory of its own: without it each operation is launched by itself."""
    said: list[str] = []
    recordings = Recordings(N, limit=4, warn=said.append)

    def empty(*shape: Any, **how: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(recorded, "torch", SimpleNamespace(**{**vars(torch), "empty": empty}))
    rounds(recordings, "topk", "cpu")
    (text,) = said
    assert "got: out of memory" in text
    assert again.made == 0


def test_what_has_not_been_launched_to_the_end_has_not_been_met(again: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads may decode the first results of a kind at once: what a device loads for them cannot be recorded."""
    recordings, known = Recordings(N, limit=4, warn=never), get("onebit")
    twin = twin_of(known)
    payload = np.zeros(known.payload_bound(N, 512), np.uint8)
    encoded = known.encode(gaussian(N, 1), np.zeros(N, np.float32), level=512, seed=0, out=payload)
    assert encoded is not None
    coding, out = Coding("onebit", 512, N, encoded.count, 0), [(Slice(0, 0, N, 0), torch.zeros(N))]
    launch, made = twin.decode, list[int]()

    def launching(*arguments: Any) -> None:
        if not made:  # the first is still being launched when another thread has gone all the way, and backward records
            made.append(0)
            recordings.decode(twin, payload, coding, out)
            recordings.record()
            made[0] = again.made
        launch(*arguments)

    monkeypatch.setattr(twin, "decode", launching)
    recordings.decode(twin, payload, coding, out)
    assert made == [0]
    recordings.decode(twin, payload, coding, out)
    recordings.record()
    assert again.made == 1


@devices
@pytest.mark.parametrize("codec", ["topk", "threshold", "dgc"])
def test_results_that_lack_entries_are_no_kind(codec: str, where: str, again: Recorder) -> None:
    """How many they lack is another number each time: recordings would crowd each other out."""
    results(Recordings(N, limit=4, warn=never), codec, where, sparse=True)
    assert again.made == 0


def test_decoding_shares_nothing_with_encoding(again: Recorder) -> None:
    """Both go on at the same time, on streams of their own."""
    recordings = Recordings(N, limit=4, warn=never)
    rounds(recordings, "topk", "cpu")
    results(recordings, "topk", "cpu")
    desks = [*recordings._encoding.values(), *recordings._decoding.values()]
    assert len({desk.vectors(1)[0].data_ptr() for desk in desks}) == again.made == 2


@devices
def test_kinds_have_recordings_of_their_own(where: str, again: Recorder) -> None:
    """Codec, level and length make a kind; a shorter key works on the front of the memory that all share."""
    recordings = Recordings(N, limit=9, warn=never)
    for _ in range(2):
        for codec, levels in {"topk": (0.01, 1.0), "onebit": (512, 1024)}.items():
            for level in levels:
                for n in (N, 1000):
                    rounds(recordings, codec, where, level=level, n=n)
    assert again.made == 2 * 2 * 2


def test_what_was_used_longest_ago_makes_way(again: Recorder) -> None:
    """With room for two, a third kind costs the first its recording, which is made again when it is wanted again."""
    recordings = Recordings(N, limit=2, warn=never)
    for level, made in ((0.1, 1), (0.2, 2), (0.1, 2), (0.3, 3), (0.1, 3), (0.2, 4)):
        rounds(recordings, "topk", "cpu", level=level)
        assert again.made == made


def test_what_cannot_be_recorded_is_said_once_and_launched_singly(again: Recorder) -> None:
    """The warning names the codec, the device, and what that said; the bits are the same."""
    said: list[str] = []
    again.fails = "operation not permitted when stream is capturing"
    recordings = Recordings(N, limit=4, warn=said.append)
    for codec in ("topk", "onebit"):
        rounds(recordings, codec, "cpu")
        results(recordings, codec, "cpu")
    (text,) = said
    assert text.startswith("expected to record what codec topk launches on cpu, got: operation not permitted")
    assert again.made == 0


def test_the_cpu_has_nothing_to_record() -> None:
    """To call the same again costs no more: keys of buffers, which lie on the host, are encoded as they are."""
    rounds(Recordings(N, limit=4, warn=never), "dense", "cpu")


def test_deterministic_algorithms_are_launched_singly(again: Recorder) -> None:
    """Somebody may ask for them between two steps, and what was recorded before is other work."""
    recordings = Recordings(N, limit=4, warn=never)
    rounds(recordings, "onebit", "cpu")
    launched = len(again.log)
    torch.use_deterministic_algorithms(True)
    try:
        rounds(recordings, "onebit", "cpu")
        rounds(recordings, "topk", "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert (again.made, len(again.log)) == (1, launched)
    rounds(recordings, "onebit", "cpu")
    assert (again.made, len(again.log)) == (1, launched + 2 * 10)


def test_what_comes_next_follows_what_came_before(again: Recorder) -> None:
    """All share one memory, and may come on several streams."""
    rounds(Recordings(N, limit=4, warn=never), "topk", "cpu", count=3)
    # The first two of six encodings were single; the memory is there, and may be written, from the first mark on, and so is
    # what belongs to the recording from the second on.
    assert again.log == ["mark", *["follow", "mark"] * (1 + 4)]


def test_nobody_waits(again: Recorder) -> None:
    """Not the first time, not to record, and not later."""
    recordings, twin = Recordings(N, limit=4, warn=never), twin_of(get("qsgd"))
    gradient, residual = torch.zeros(N, device="meta"), torch.zeros(N, device="meta")
    for seed in range(4):
        with NoSync():
            recordings.record()
            recordings.encode(twin, gradient, residual, level=8, seed=seed)
    assert again.made == 1
