"""Sums where the gradients lie: on a device the same norms as on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nosync import DEVICES, NoSync, Synchronised

from ps_accordion.errors import UsageError
from ps_accordion.layout import Layout, Tensor
from ps_accordion.regimes import parse_span
from ps_accordion.worker.sums import FULL_BELOW, DeviceSums, HostSums
from ps_accordion.worker.window import Report, WindowStatistics

LAYOUT = Layout(
    [Tensor("large", (300, 784), "float32"), Tensor("odd", (7, 11), "float32"), Tensor("bias", (40,), "float32")],
    num_shards=1,
    partition_elements=1 << 16,
)
devices = pytest.mark.parametrize("where", DEVICES)


def gradients(seed: int, scale: float = 1.0) -> list[np.ndarray]:
    """Return one random gradient a tensor."""
    random = np.random.default_rng(seed)
    return [(random.standard_normal(tensor.elements) * scale).astype(np.float32) for tensor in LAYOUT.tensors]


class Pair:
    """Statistics on the host and on a device, fed with the same rounds."""

    def __init__(self, span: str, where: str, dtype: torch.dtype = torch.float32) -> None:
        assert LAYOUT.tensors[0].elements > FULL_BELOW
        self.host = WindowStatistics(LAYOUT, parse_span(span))
        self.device = WindowStatistics(LAYOUT, parse_span(span), DeviceSums(LAYOUT, torch.device(where)))
        self._where, self._dtype = where, dtype

    def feed(self, round_: int, seed: int, *, used: tuple[int, ...] = (0, 1, 2), skipped: bool = False) -> Report | None:
        """Play a round with both; fail unless they report the same norms. Return what they say."""
        for tensor in used:
            vector = torch.from_numpy(gradients(seed)[tensor]).to(self._dtype)
            self.host.add(tensor, vector.to(torch.float32).numpy())
            self.device.add(tensor, vector.to(self._where))
        return self.check(*(each.finish_round(round_, skipped=skipped) for each in (self.host, self.device)))

    @staticmethod
    def check(expected: Report | None, made: Report | None) -> Report | None:
        """Fail unless two reports are the same, but for the last bit of a norm."""
        assert (expected is None) == (made is None)
        if expected is not None and made is not None:
            assert made._replace(norms=expected.norms, rate=0.0, loss=0.0) == expected._replace(rate=0.0, loss=0.0)
            assert made.norms.dtype == np.float32
            np.testing.assert_array_max_ulp(expected.norms, made.norms, 1)
        return made


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_are_the_hosts(where: str, dtype: torch.dtype) -> None:
    """Over windows with unused tensors and skipped rounds; sums have the same bits, and norms all but the last."""
    pair = Pair("3 steps", where, dtype)
    reports = [
        pair.feed(0, 0),
        pair.feed(1, 1, used=(0, 2)),
        pair.feed(2, 2),
        pair.feed(3, 3, skipped=True),
        pair.feed(4, 4, used=(1,)),
        pair.feed(5, 5, skipped=True),
    ]
    assert [report is not None for report in reports] == [False, False, True, False, False, True]
    assert reports[5] is not None
    assert reports[5].norms[0] == reports[5].norms[2] == 0.0


@devices
def test_sums_have_the_bits_of_the_host(where: str) -> None:
    """The same additions in the same order."""
    host, device = HostSums(LAYOUT), DeviceSums(LAYOUT, torch.device(where))
    for sums in (host, device):
        sums.clear()
    for seed in range(4):
        for tensor, vector in enumerate(gradients(seed)):
            host.stage(tensor, vector)
            device.stage(tensor, torch.from_numpy(vector).to(where))
        for sums in (host, device):
            sums.commit(range(3))
    device.norms()  # what is owed is added
    for expected, made in zip(host._sums, device._sums, strict=True):
        assert torch.equal(torch.from_numpy(expected), made.cpu())


@devices
def test_windows_of_epochs_and_rounds_of_skips(where: str) -> None:
    """A window that began late, or whose rounds were all skipped, has no norms; what is not finite leaves no trace."""
    pair = Pair("1 epoch", where)
    for statistics in (pair.host, pair.device):
        statistics.begin_epoch(0)
    pair.feed(0, 0)
    for tensor in range(3):
        bad = np.full(LAYOUT.tensors[tensor].elements, np.nan, np.float32)
        pair.host.add(tensor, bad)
        pair.device.add(tensor, torch.from_numpy(bad).to(where))
    for statistics in (pair.host, pair.device):
        statistics.finish_round(1, skipped=True)
    pair.feed(2, 2)
    first = pair.check(pair.host.begin_epoch(1), pair.device.begin_epoch(1))
    assert first is not None
    assert np.isfinite(first.norms).all()
    pair.feed(3, 3, skipped=True)
    second = pair.check(pair.host.begin_epoch(2), pair.device.begin_epoch(2))
    assert second is not None
    assert np.isnan(second.norms).all()


@devices
def test_norms_too_large_for_a_float_are_infinite(where: str) -> None:
    """As on the host: nothing warns or raises."""
    sums = DeviceSums(LAYOUT, torch.device(where))
    sums.clear()
    sums.stage(1, torch.full((77,), 3e38, device=where))
    sums.commit([1])
    assert sums.norms().tolist() == [0.0, np.inf, 0.0]


def test_only_norms_wait() -> None:
    """Staging, committing and clearing launch work; asking for norms reads one vector of them."""
    sums = DeviceSums(LAYOUT, torch.device("meta"))
    with NoSync():
        for _ in range(2):
            sums.clear()
            for tensor in (0, 1):
                sums.stage(tensor, torch.zeros(LAYOUT.tensors[tensor].elements, device="meta"))
            sums.commit([0, 1])
    with pytest.raises(Synchronised, match=r"copies torch.float64\[3\] to the host"), NoSync():
        sums.norms()


def test_what_is_no_whole_flat_tensor_is_refused() -> None:
    """Wrong length, type or layout in memory, and an array of the host."""
    sums = DeviceSums(LAYOUT, torch.device("cpu"))
    wrong = (
        torch.zeros(76),
        torch.zeros(77, dtype=torch.int32),
        torch.zeros(7, 11),
        torch.zeros(154)[::2],
        np.zeros(77, np.float32),
    )
    for each in wrong:
        with pytest.raises(UsageError, match=r"tensor 1 as a contiguous floating tensor of \[77\]"):
            sums.stage(1, each)
    with pytest.raises(UsageError, match=r"tensor 1 as contiguous float32\[77\]"):
        HostSums(LAYOUT).stage(1, torch.zeros(77))
