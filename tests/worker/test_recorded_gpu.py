"""Recordings on a GPU, beside threads that work on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recordings import CASES, N, never, results, rounds

from ps_accordion.codecs import get
from ps_accordion.codecs.device import encode, twin_of
from ps_accordion.worker import streams
from ps_accordion.worker.recorded import Recordings
from ps_accordion.worker.streams import Accelerator

if torch.cuda.is_available():

    @pytest.fixture
    def busy() -> Iterator[None]:
        """Let another thread allocate, copy and wait on a stream of its own, as codec threads do."""
        done = threading.Event()

        def work() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not done.is_set():
                    there = torch.empty(1 << 16, dtype=torch.uint8, pin_memory=True).to("cuda", non_blocking=True)
                    mark: Any = torch.cuda.Event(blocking=True)
                    mark.record()
                    mark.synchronize()
                    del there

        thread = threading.Thread(target=work)
        thread.start()
        yield
        done.set()
        thread.join()

    @pytest.mark.cuda
    @pytest.mark.usefixtures("busy")
    def test_threads_may_work_while_one_records() -> None:
        """What they launch, allocate and wait for is none of the recording, and does not spoil it."""
        for codec in CASES:
            rounds(Recordings(N, limit=4, warn=never), codec, "cuda")
            results(Recordings(N, limit=4, warn=never), codec, "cuda")

    @pytest.mark.cuda
    def test_work_that_waits_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
        """The device says so, nothing more is recorded, and all else goes on."""
        said: list[str] = []
        recordings, twin = Recordings(N, limit=4, warn=said.append), twin_of(get("topk"))
        pack: Callable[..., Any] = twin.pack

        def waiting(v: torch.Tensor, *arguments: Any, **rest: Any) -> Any:
            v.sum().item()
            return pack(v, *arguments, **rest)

        monkeypatch.setattr(twin, "pack", waiting)
        gradient, residual = torch.ones(N, device="cuda"), torch.zeros(N, device="cuda")
        try:
            for seed in range(3):
                recordings.record()
                recordings.encode(twin, gradient, residual, level=0.01, seed=seed)
            rounds(recordings, "onebit", "cuda")
            torch.cuda.empty_cache()
            torch.rand(N, device="cuda").sum().item()
        finally:
            streams._FAILED.clear()
        assert len(said) == 1
        rounds(Recordings(N, limit=4, warn=never), "topk", "cuda")

    @pytest.mark.cuda
    def test_whoever_draws_random_numbers_gets_those_of_always() -> None:
        """Before a recording, while it is made, by another thread, after it, and between launches of it."""
        n, device = 1000, torch.device("cuda", torch.cuda.current_device())
        drawn, ran = torch.empty(4, n, device=device), torch.zeros(1, device=device)
        accelerator = Accelerator(device)

        def draw(i: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.rand(n, out=drawn[i])
                torch.cuda.current_stream().synchronize()

        def work() -> torch.Tensor:
            thread = threading.Thread(target=draw, args=(1,))
            thread.start()
            thread.join()
            return ran.add_(1)

        torch.manual_seed(3)
        expected = torch.stack([torch.rand(n, device=device) for _ in range(4)])
        torch.manual_seed(3)
        draw(0)
        recording = accelerator.recorded(work)
        assert recording is not None
        draw(2)
        recording.launch()
        draw(3)
        torch.cuda.synchronize()
        assert torch.equal(drawn, expected)
        assert ran.item() == 1

    @pytest.mark.cuda
    def test_no_other_stream_is_that_of_recordings() -> None:
        """Torch hands out some 32 streams of a priority again and again: work on none of ours may come into a recording."""
        device = torch.device("cuda", torch.cuda.current_device())
        recorder, others = Accelerator(device), [Accelerator(device) for _ in range(64)]
        ran = torch.zeros(1, device="cuda")
        assert recorder.recorded(lambda: ran.add_(1)) is not None
        for other in others:
            with other.aside(None):
                assert torch.cuda.current_stream() != recorder._recorder

    @pytest.mark.cuda
    def test_streams_take_turns() -> None:
        """Encodings from several streams share one memory, each behind the one before."""
        n = 1 << 20
        recordings, twin = Recordings(n, limit=4, warn=never), twin_of(get("topk"))
        three = [torch.cuda.Stream() for _ in range(3)]
        keys = [torch.randn(n, device="cuda") for _ in three]
        kept, expected = ([torch.zeros_like(key) for key in keys] for _ in range(2))
        made: list[list[torch.Tensor]] = [[] for _ in three]
        torch.cuda.synchronize()
        for _ in range(20):
            for i, stream in enumerate(three):
                with torch.cuda.stream(stream):
                    recordings.record()
                    made[i].append(recordings.encode(twin, keys[i], kept[i], level=0.01, seed=0))
        torch.cuda.synchronize()
        for i, key in enumerate(keys):
            for parcel in made[i]:
                assert torch.equal(parcel, encode(twin, key, expected[i], level=0.01, seed=0))
            assert torch.equal(kept[i], expected[i])
