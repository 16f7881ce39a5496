"""Training on a device: the same bits as on the host, and a backward that waits for nothing."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import STEPS, Network, loss_of, same, state, train
from nosync import NoSync, Seen, Synchronised, watched_by_torch
from ring import Ring
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ps_accordion.codecs.device import registry as twins
from ps_accordion.errors import CodecError, RunAborted, UsageError
from ps_accordion.worker import DistributedModel, Session, device, recorded, tracked
from ps_accordion.worker.device_exchange import DeviceExchange
from ps_accordion.worker.host_exchange import HostExchange
from ps_accordion.worker.sums import DeviceSums

CODECS = {
    "dense": {"codec.name": "dense", "codec.light": 32},
    "topk": {"codec.name": "topk", "codec.light": 0.1},
    "random_block": {"codec.name": "random_block", "codec.light": 0.25},
}
BASE = {"servers.count": 2, "layout.partition_elements": 1024, "regime.policy": "static"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    # Where torch notes the model whose forward runs. Forwards in several threads leave one of them there.
    DistributedDataParallel._active_ddp_module = None


class Product(nn.Module):
    """Two parameters, of whose gradients one is what is put in, and the other is 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones(40, 50)) for _ in range(2))

    def forward(self, factor: float) -> torch.Tensor:
        """Return a number."""
        return (self.first * factor).sum() + (self.second * 3).sum()


def train_scaled(session: Session) -> list[torch.Tensor]:
    """Train with a loss scale that overflows once in one worker."""
    model = DistributedModel(Network(), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=3)  # no power of two
    session.track(optimizer, scaler=scaler)
    before = session.counters.skipped_rounds
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step, session.rank)
        scaler.scale(loss * float("inf") if step == 4 and session.rank == 0 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert session.counters.skipped_rounds == before + 1
    return [*state(model), torch.tensor(scaler.get_scale())]


def train_uneven(session: Session) -> list[torch.Tensor]:
    """Train with fewer batches in worker 1, twice, and with gradients that add up under no_sync."""
    model = DistributedModel(Network(), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    session.track(optimizer)
    for epoch in range(2):
        with model.join():
            for step in range(4 - session.rank):
                optimizer.zero_grad()
                with model.no_sync():
                    loss_of(model, 10 * epoch + step, session.rank + 2).backward()
                loss_of(model, 10 * epoch + step, session.rank).backward()
                optimizer.step()
    return state(model)


def train_all(session: Session) -> dict[str, list[torch.Tensor]]:
    """Train many models one after another; return what each came to."""
    branches = {"find_unused_parameters": True}
    first = {"branches": train(session, Network(), bad=(0, 5), **branches)}
    if session.settings.codec.name != "topk":
        return first
    return first | {
        "gradients apart from buckets": train(session, Network(), bad=(1,), gradient_as_bucket_view=False, **branches),
        "batch-norm": train(session, Network(norm=True), bad=(4,)),
        "bfloat16": train(session, Network().to(torch.bfloat16), bad=(6,)),
        "loss scale": train_scaled(session),
        "uneven": train_uneven(session),
    }


def run(codec: str, work: Callable[[Session], Any], workers: int = 2, **more: Any) -> list[Any]:
    """Run `work` in every worker."""
    return Ring(BASE | CODECS[codec] | {"workers.count": workers} | more).run(work)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bool]], None]:
    """Return a function that says which workers take the CPU for a device that encodes by itself."""
    return lambda which: monkeypatch.setattr(tracked, "on_device", lambda where: where is not None and which())


@pytest.mark.parametrize("codec", CODECS)
def test_a_device_trains_as_the_host_does(codec: str, devices: Callable[[Callable[[], bool]], None]) -> None:
    """The same parameters and buffers to the bit after 8 steps, in every worker, also if only one of them has a device."""
    kinds: set[tuple[int, type]] = set()

    def work(session: Session) -> dict[str, list[torch.Tensor]]:
        results = train_all(session)
        kinds.update((session.rank, type(each.exchange)) for each in session._exchanges)
        return results

    expected, *others = run(codec, work)
    assert {kind for _, kind in kinds} == {HostExchange}
    kinds.clear()
    devices(lambda: threading.current_thread().name == "worker 1")
    others += run(codec, work)
    assert kinds == {(0, HostExchange), (1, DeviceExchange)}
    for made in others:
        for name, tensors in expected.items():
            assert same(tensors, made[name]), name


def test_both_workers_on_devices_leave_the_records_of_the_host(
    devices: Callable[[Callable[[], bool]], None], tmp_path: Path
) -> None:
    """Gradients, results and residuals, file by file: what a replay needs."""

    def records(name: str) -> dict[str, list[bytes]]:
        directory = tmp_path / name
        options = {"run.directory": str(directory), "run.record_gradients": True}
        run("topk", lambda session: train(session, Network(norm=True), find_unused_parameters=True), **options)
        files = sorted((directory / "record").glob("worker-*/*.np*"))
        return {without_incarnation(str(path.relative_to(directory))): contents(path) for path in files}

    def without_incarnation(name: str) -> str:
        return re.sub(r"(push-.*)-\d+", r"\1", name)  # it follows from who joined first

    def contents(path: Path) -> list[bytes]:
        loaded = np.load(path)
        return [loaded.tobytes()] if path.suffix == ".npy" else [loaded[name].tobytes() for name in sorted(loaded.files)]

    expected = records("host")
    devices(lambda: True)
    made = records("device")
    assert expected.keys() == made.keys()
    for name, content in expected.items():
        assert content == made[name], name
    assert any("residual" in name for name in expected)


def test_a_finite_gradient_of_a_skipped_round_comes_with_the_next(devices: Callable[[Callable[[], bool]], None]) -> None:
    """Its key was encoded and pushed before another one turned out not to be finite; nothing of it is lost."""
    devices(lambda: True)

    def work(session: Session) -> list[torch.Tensor | None]:
        model = DistributedModel(Product(), session=session)
        seen = []
        for factor in (float("nan"), 1.0):
            model.zero_grad()
            model(factor).backward()
            seen.append(model.module.second.grad)
        return seen

    skipped, then = run("topk", work, workers=1, **{"codec.light": 1.0})[0]
    assert skipped is None
    assert torch.equal(then, torch.full((40, 50), 6.0))


# ------------------------------------------------------------ nobody waits


def absent(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Let `meta` stand for a device with streams."""
    seen = Seen()
    for module in (device, recorded, tracked):
        monkeypatch.setattr(module, "streams_of", lambda _: seen)
    return seen


@pytest.mark.parametrize("codec", CODECS)
def test_a_backward_copies_one_parcel_a_key_and_waits_for_nothing(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the loss to the last bucket, statistics and loss scale included, on a device that is not there."""
    seen = absent(monkeypatch)
    threads: set[str] = set()
    monkeypatch.setattr(seen, "synchronize", lambda: threads.add(threading.current_thread().name))

    def work(session: Session) -> tuple[list[int], list[int]]:
        with torch.device("meta"):
            module = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 300))
        model = DistributedModel(module, session=session, init_sync=False)
        scaler = torch.amp.GradScaler("cpu")
        session.track(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
        coders = model._gradients.tracked.exchange.coders
        loss = scaler.scale(model(torch.zeros(8, 20, device="meta")).sum())
        with NoSync(parcels=len(coders)) as ban:
            loss.backward()
        assert session.counters.rounds == 1
        for coder in coders:
            coder.residual = None  # the account at the end would look at it, and nothing can be copied of it
        return sorted(ban.fetched), sorted(coder.key.elements for coder in coders)

    fetched, elements = run(codec, work, workers=1, **{"layout.partition_elements": 1 << 16})[0]
    assert sum(elements) == 20 * 300 + 300 + 300 * 300 + 300
    assert len(fetched) == len(elements) > 2
    assert threads == {"ps-accordion-codec-0"}


def test_a_planted_read_ends_the_backward(devices: Callable[[Callable[[], bool]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds pass under the ban; one read of a number, deep in the statistics, does not."""
    devices(lambda: True)
    stage = DeviceSums.stage

    def reading(self: DeviceSums, tensor: int, gradient: torch.Tensor) -> None:
        stage(self, tensor, gradient * gradient.abs().max().item())

    def work(session: Session) -> None:
        model = DistributedModel(Network(norm=True), session=session)
        for step in range(4):
            model.zero_grad()
            loss = loss_of(model, step, 0)
            if step == 3:
                monkeypatch.setattr(DeviceSums, "stage", reading)
            with NoSync():
                loss.backward()
            assert session.counters.rounds == step + 1

    with pytest.raises((Synchronised, RunAborted), match="_local_scalar_dense"):
        run("topk", work, workers=1)


# ------------------------------------------------------------ what cannot be trained


def test_a_model_without_values_is_refused_by_name() -> None:
    """There is nothing to start from."""

    def work(session: Session) -> None:
        DistributedModel(nn.Linear(4, 4, device="meta"), session=session)

    with pytest.raises((UsageError, RunAborted), match="'weight' lies on the device meta"):
        run("topk", work, workers=1)


def test_a_device_without_streams_is_refused_when_the_model_is_wrapped() -> None:
    """Not in the middle of the first backward."""

    def work(session: Session) -> None:
        DistributedModel(nn.Linear(4, 4, device="meta"), session=session, init_sync=False)

    with pytest.raises((UsageError, RunAborted), match="expected gradients on the CPU or on a device with streams"):
        run("topk", work, workers=1)


def test_a_codec_without_a_twin_is_refused_when_the_model_is_wrapped(
    devices: Callable[[Callable[[], bool]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names those that have one."""
    devices(lambda: True)
    monkeypatch.delitem(twins._CLASSES, "topk")
    with pytest.raises(
        (CodecError, RunAborted), match="codec topk has no form for accelerators: expected one of bf16, dense, dgc, eden, int"
    ):
        run("topk", lambda session: DistributedModel(Network(), session=session), workers=1)


if torch.cuda.is_available():

    @pytest.mark.cuda
    def test_torch_itself_sees_no_synchronisation_in_a_backward() -> None:
        """On a GPU, torch refuses calls that wait while the buckets are handed over, which sees more than we list."""

        def work(session: Session) -> int:
            model = DistributedModel(Network().to("cuda"), session=session)
            hand_over = model._gradients.hand_over
            strict = False

            def watched(bucket: Any) -> Any:
                with watched_by_torch() if strict else nullcontext():
                    return hand_over(bucket)

            model._gradients.hand_over = watched  # type: ignore[method-assign]
            for step in range(4):
                strict = step > 1  # what is loaded or allocated for the first time may wait
                model.zero_grad()
                loss_of(model, step, 0).backward()
            return session.counters.rounds

        assert run("topk", work, workers=1) == [4]
