import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nosync import DEVICES, NoSync, Synchronised, offences

from ps_accordion.codecs import RULES, Coding, device, encode_holding, get, norm, settle
from ps_accordion.codecs.device.switch import _in_halves
from ps_accordion.codecs.factors import apart
from ps_accordion.errors import CodecError

from .cases import CASES, SEED, Case, buffer, gaussian, vectors

ALIKE = [case for case in CASES if case.codec != "powersgd"]
"""Those whose twins write the bytes of the host."""
cases = pytest.mark.parametrize("case", CASES, ids=str)
devices = pytest.mark.parametrize("where", DEVICES)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Run torch on one thread: on a busy machine, its threads wait for each other longer than these vectors take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_host(case, gradient, residual, *, held=(), rule="keep"):
    """Return (payload, count, loss, residual afterwards), or None and the residual, as the host codec makes them."""
    codec, kept = case.build(), None if residual is None else residual.copy()
    loss = settle(rule, kept, gradient) if rule != "keep" else 0.0
    out = buffer(codec, case.level, gradient.size)
    encoded = encode_holding(codec, gradient, kept, held, level=case.level, seed=SEED, out=out)
    if encoded is None:
        return None, residual
    return (out[: encoded.nbytes].tobytes(), encoded.count, loss), kept


def on_device(case, gradient, residual, *, held=(), rule="keep", where="cpu"):
    """Return the same of the twin; `gradient` is a tensor."""
    twin = device.twin_of(case.build())
    kept = None if residual is None else torch.from_numpy(residual.copy()).to(where)
    n = gradient.numel()
    parcel = device.encode(twin, gradient.to(where), kept, level=case.level, seed=SEED, held=held, rule=rule)
    opened = device.open_parcel(twin, parcel.cpu().numpy(), elements=n, level=case.level)
    after = None if kept is None else kept.cpu().numpy()
    return (None if opened is None else (opened.payload.tobytes(), opened.count, opened.loss)), after


def check(case, gradient, residual, where="cpu", **options):
    """Fail unless both make the same bytes, the same residual, and decode to the same bits."""
    expected, left = on_host(case, gradient.to(torch.float32).numpy(), residual, **options)
    made, kept = on_device(case, gradient, residual, where=where, **options)
    assert made == expected
    assert (kept is None) == (left is None)
    assert kept is None or kept.tobytes() == left.tobytes()
    if expected is not None:
        check_decoding(case, expected[0], gradient.numel(), expected[1], where)


def check_decoding(case, payload, n, count, where):
    """Fail unless the twin decodes and adds up to the same bits, from read-only memory at an odd address."""
    codec, twin = case.build(), device.twin_of(case.build())
    coding = Coding(case.codec, case.level, n, count, SEED if codec.shared_seed else 0)
    frame = np.frombuffer(b"x" + payload, np.uint8)[1:]
    expected, out = np.full(n, np.nan, np.float32), torch.full((n,), float("nan"), device=where)
    codec.decode(frame, coding, expected)
    device.decode(twin, frame, coding, out)
    assert out.cpu().numpy().tobytes() == expected.tobytes()
    for weight in (np.float32(1), np.float32(0.3)):
        total = gaussian(n, 11)
        added = torch.from_numpy(total.copy()).to(where)
        codec.accumulate(frame, coding, weight, total)
        device.accumulate(twin, frame, coding, weight, added)
        assert added.cpu().numpy().tobytes() == total.tobytes()


@devices
@pytest.mark.parametrize("case", ALIKE, ids=str)
def test_a_twin_writes_the_bytes_and_the_residual_of_the_host(case, where):
    """Ties, zeros, denormals, the largest floats: payload, count, residual and what is decoded agree to the bit."""
    for n in (1, 63, 1000, 32_769, 70_000):
        for v in vectors(n).values():
            check(case, torch.from_numpy(v.copy()), gaussian(n, 7) * np.float32(np.abs(v).max() / 8), where)


@st.composite
def rounds(draw):
    """Draw a gradient as a tensor, a residual, held spans and a rule."""
    n = draw(st.integers(1, 70_000) | st.integers(1, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kinds = {
        "gaussian": lambda: rng.standard_normal(n),
        "tied": lambda: rng.integers(-3, 4, n),
        "sparse": lambda: rng.standard_normal(n) * (rng.random(n) < 0.003),
        "zero": lambda: np.zeros(n),
        "wide": lambda: rng.standard_normal(n) * np.exp2(rng.integers(-140, 120, n)),
        "any bits": lambda: rng.integers(0, 2**32, n, np.uint32).view(np.float32),
    }
    with np.errstate(all="ignore"):
        gradient, residual = (kinds[draw(st.sampled_from(sorted(kinds)))]().astype(np.float32) for _ in range(2))
    residual[~np.isfinite(residual)] = 1.5
    for bad in draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=1)):
        gradient[draw(st.integers(0, n - 1))] = bad
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    cuts = sorted(draw(st.lists(st.integers(0, n), min_size=4, max_size=4)))
    held = draw(st.sampled_from([[], [], [(cuts[0], cuts[1] - cuts[0]), (cuts[2], cuts[3] - cuts[2])]]))
    # Where spans are held, the host looks at all of the gradient to settle; such keys are small and never switch.
    rule = "keep" if held else draw(st.sampled_from(RULES))
    return torch.from_numpy(gradient).to(dtype), residual, held, rule


@devices
@settings(max_examples=150)
@given(
    case=st.sampled_from(ALIKE)
    | st.builds(
        Case, st.sampled_from(["threshold", "topk"]), st.floats(1e-6, 1.0), st.sampled_from(["fp16", "fp32", "int8", "packed"])
    ),
    drawn=rounds(),
)
def test_a_twin_agrees_with_the_host_on_anything(case, drawn, where):
    """Any length to 70,000, any numbers, half precision, held spans, switches: skipped alike, or the same to the bit."""
    gradient, residual, held, rule = drawn
    held = held if case.build().zero_kept else []
    check(case, gradient, residual, where, held=held, rule=rule)


@devices
@cases
def test_what_is_not_finite_leaves_the_residual_as_it_was(case, where):
    """Neither a switch rule nor the encoding has changed a bit of it."""
    gradient, residual = gaussian(5000), gaussian(5000, 6) * 100
    for rule in RULES:
        for bad in (np.nan, np.inf, -np.inf):
            gradient[1234] = bad
            made, kept = on_device(case, torch.from_numpy(gradient), residual, rule=rule, where=where)
            assert made is None, rule
            assert kept.tobytes() == residual.tobytes(), rule


@devices
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_low_rank_twins_multiply_in_an_order_of_their_own_and_keep_what_they_have_not_sent(rank, where):
    """The basis has the bits of the host, the product is that of the host to rounding, and what is kept is v - D to the bit."""
    rows, columns = 75, 48
    plain, n = get("powersgd").fitted(rows), rows * columns
    out = buffer(plain, rank, n)
    encoded = plain.encode(gaussian(n), np.zeros(n, np.float32), level=rank, seed=SEED, out=out)
    sent, coding = out[: encoded.nbytes], Coding("powersgd", float(rank), n, encoded.count, SEED)
    result = np.empty_like(sent)
    plain.sum_payloads([sent, sent], [np.float32(1)] * 2, np.float32(0.5), coding, result)
    for codec in (plain, plain.following(sent, coding), plain.following(result, coding)):
        for scale in (1.0, 2.0**-110, 2.0**120, 0.0):
            gradient, residual = gaussian(n, 1) * np.float32(scale), gaussian(n, 2) * np.float32(scale)
            codec.encode(gradient, residual.copy(), level=rank, seed=SEED, out=out)
            expected = apart(out[: encoded.nbytes], coding)
            twin, kept = device.twin_of(codec), torch.from_numpy(residual.copy()).to(where)
            parcel = device.encode(twin, torch.from_numpy(gradient).to(where), kept, level=rank, seed=SEED)
            opened = device.open_parcel(twin, parcel.cpu().numpy(), elements=n, level=rank)
            assert opened is not None
            assert opened.count == encoded.count
            codec.validate(opened.payload, coding)
            made = apart(opened.payload, coding)
            assert (made.side, made.basis.tobytes()) == (expected.side, expected.basis.tobytes())
            largest = float(np.abs(expected.product).max())
            assert np.allclose(made.product, expected.product, rtol=0, atol=1e-5 * largest)
            whole = np.empty(n, np.float32)
            codec.decode(opened.payload, coding, whole)
            assert kept.cpu().numpy().tobytes() == (gradient + residual - whole).tobytes()
            check_decoding(Case("powersgd", rank), opened.payload.tobytes(), n, opened.count, where)


@devices
def test_a_chunk_that_is_sent_whole_is_counted(where):
    """32,768 entries in a chunk do not fit 15 bits."""
    check(Case("topk", 1.0), torch.from_numpy(gaussian(100_000)), np.zeros(100_000, np.float32), where)


@devices
def test_dense_works_without_a_residual(where):
    """What is lost is lost; -0.0 is written as 0.0 on both sides."""
    gradient = torch.tensor([1.0, -0.0, 1e-9, -3.0])
    for case in (Case("dense", 32), Case("dense", 16)):
        check(case, gradient, None, where)


@devices
@pytest.mark.parametrize("rule", ["clip", "reset"])
def test_a_switch_rule_loses_what_it_loses_on_the_host(rule, where):
    """The norm of what is thrown away agrees to the bit, since both sum in the same order."""
    for n in (1, 64, 65, 5000):
        check(Case("topk", 0.1), torch.from_numpy(gaussian(n)), gaussian(n, 3) * 50, where, rule=rule)


@pytest.mark.parametrize("n", [1, 64, 65, 1000, 40_000])
def test_norms_in_halves_are_norms(n):
    """What takes the place of running sums where torch forbids them: equal to the last bits of float64."""
    v = gaussian(n)
    rows = np.zeros((-(-n // 64), 64))
    rows.reshape(-1)[:n] = v.astype(np.float64) ** 2
    assert float(_in_halves(torch.from_numpy(rows)).sum()) ** 0.5 == pytest.approx(norm(v), rel=1e-14)


def test_no_running_sum_of_floats_where_torch_forbids_them(monkeypatch):
    """It would end the training of whoever asked for deterministic algorithms, at the first switch."""
    vector = torch.zeros(1000, device="meta")
    monkeypatch.setattr(torch, "cumsum", lambda *_: pytest.fail("a running sum"))
    with pytest.raises(pytest.fail.Exception):
        device.norm(vector)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert device.norm(vector).shape == ()


def test_a_codec_without_a_twin_is_named():
    """A codec that only hosts have is refused before a gradient is touched."""

    class Homely(type(CASES[0].build())):
        name = "homely"

    known = "bf16, dense, dgc, eden, int, natural, onebit, powersgd, qsgd, quic_fl, random_block, random_k, signsgd, terngrad, "
    known += "threshold, topk"
    with pytest.raises(CodecError, match=f"codec homely has no form for accelerators: expected one of {known}"):
        device.twin_of(Homely())


@cases
def test_encoding_reads_nothing_back(case):
    """No scalar, mask or length is read, and nothing is copied: on the CPU, and where a copy to the host could be seen."""
    twin = device.twin_of(case.build())
    held = [(5, 10)] if twin.codec.zero_kept else []
    for kind in ("cpu", "meta"):
        gradient, residual = torch.zeros(40_000, device=kind), torch.zeros(40_000, device=kind)
        for rule in RULES:
            with NoSync():
                device.encode(twin, gradient, residual, level=case.level, seed=SEED, held=held, rule=rule)


@cases
def test_decoding_reads_nothing_back(case):
    """The payload goes to the device, and nothing comes back."""
    payload, count, _ = on_host(case, gaussian(40_000), np.zeros(40_000, np.float32))[0]
    twin, coding = device.twin_of(case.build()), Coding(case.codec, case.level, 40_000, count, SEED)
    with NoSync():
        device.decode(twin, np.frombuffer(payload, np.uint8), coding, torch.zeros(40_000, device="meta"))
        device.accumulate(twin, np.frombuffer(payload, np.uint8), coding, np.float32(1), torch.zeros(40_000, device="meta"))


@pytest.mark.parametrize("offence", offences())
def test_the_ban_sees_what_it_bans(offence):
    """Each way to read a tensor that somebody might plant in an encoder."""
    for kind in ("cpu", "meta"):
        with pytest.raises(Synchronised), NoSync():
            offences()[offence](torch.ones(5, device=kind))


@pytest.mark.parametrize("copy", [lambda x: x.cpu(), lambda x: x.to("cpu", non_blocking=True), lambda x: torch.empty(5).copy_(x)])
def test_the_ban_sees_copies_to_the_host(copy):
    """A parcel is bytes, not waited for, and only as many as were said."""
    with pytest.raises(Synchronised, match="copies"), NoSync(parcels=1):
        copy(torch.ones(5, device="meta"))
    parcel, memory = torch.zeros(5, dtype=torch.uint8, device="meta"), torch.zeros(5, dtype=torch.uint8)
    with NoSync(parcels=1) as seen:
        memory.copy_(parcel, non_blocking=True)
        with pytest.raises(Synchronised, match="after 1 parcels"):
            memory.copy_(parcel, non_blocking=True)
    assert seen.fetched == [5]


def test_an_encoder_with_a_planted_read_is_caught(monkeypatch):
    """The ban is there when the twins run, whatever they call."""
    twin = device.twin_of(CASES[0].build())
    pack = twin.pack
    monkeypatch.setattr(twin, "pack", lambda v, peak, payload, **options: (peak.item(), pack(v, peak, payload, **options))[1])
    with pytest.raises(Synchronised, match="reads what a tensor holds"), NoSync():
        device.encode(twin, torch.zeros(10), torch.zeros(10), level=32, seed=SEED)


def test_servers_and_codecs_do_not_load_torch():
    """A server starts in a second and takes tens of megabytes: torch would take several times that."""
    rooms = ["ps_accordion.codecs", "ps_accordion.server", "ps_accordion.server.shard", "ps_accordion.server.__main__"]
    program = f"import importlib, sys\nfor room in {rooms!r}: importlib.import_module(room)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


if torch.cuda.is_available():

    @pytest.mark.cuda
    @pytest.mark.parametrize("case", ALIKE, ids=str)
    def test_deterministic_algorithms_forbid_nothing_that_is_needed(case):
        """Users who ask for them get twins that go on working, switches included."""
        gradient, residual = torch.from_numpy(gaussian(40_000)), gaussian(40_000, 1) * 50
        torch.use_deterministic_algorithms(True)
        try:
            for rule in RULES:
                (payload, count, loss), _ = on_device(case, gradient, residual, rule=rule, where="cuda")
                (expected, entries, lost), _ = on_host(case, gradient.numpy(), residual, rule=rule)
                assert (payload, count) == (expected, entries)
                assert loss == pytest.approx(lost, rel=1e-12)
                check_decoding(case, payload, 40_000, count, "cuda")
        finally:
            torch.use_deterministic_algorithms(False)
