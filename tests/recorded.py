"""Runs of a whole ring that record everything, and what must be true of the records."""

import itertools

import numpy as np
from replay import Replay, plan_log
from ring import Ring

from ps_accordion.layout import Tensor

__all__ = [
    "CODECS",
    "ROUNDS",
    "TABLE",
    "assert_replay_agrees",
    "assert_replicas_agree",
    "gradient",
    "load_gradients",
    "run",
    "train",
    "used",
]

TABLE = [
    Tensor("first.weight", (90, 60), "float32"),
    Tensor("first.bias", (90,), "float32"),
    Tensor("branch.weight", (40, 50), "float32"),
    Tensor("branch.bias", (40,), "float32"),
    Tensor("small", (7, 3), "float32"),
]
ROUNDS = 20
CODECS = {
    "dense32": {"codec.name": "dense", "codec.light": 32, "codec.heavy": 16},
    "dense16": {"codec.name": "dense", "codec.light": 16, "codec.heavy": 16},
    "bf16": {"codec.name": "bf16"},
    "eden": {"codec.name": "eden"},
    "int": {"codec.name": "int"},
    "natural": {"codec.name": "natural"},
    "qsgd": {"codec.name": "qsgd"},
    "quic_fl": {"codec.name": "quic_fl"},
    "signsgd": {"codec.name": "signsgd"},
    "terngrad": {"codec.name": "terngrad"},
    "topk": {"codec.name": "topk", "codec.light": 0.1, "codec.heavy": 0.01},
    "dgc": {"codec.name": "dgc", "codec.light": 0.1, "codec.heavy": 0.01, "codec.momentum": 0.7},
    "topk32": {"codec.name": "topk", "codec.light": 0.1, "codec.heavy": 0.01, "codec.values": "fp32"},
    "onebit": {"codec.name": "onebit", "codec.light": 64, "codec.heavy": 1024},
    "powersgd": {"codec.name": "powersgd", "codec.light": 3, "codec.heavy": 1},
    "powersgd, topk": {
        "codec.light": 0.1,
        "codec.heavy": 0.01,
        "codec.tensors": '{"first.*" = {codec = "powersgd", light = 3, heavy = 1}}',
    },
    "random_block": {"codec.name": "random_block", "codec.light": 0.2, "codec.heavy": 0.05},
    "mixed": {
        "codec.light": 0.1,
        "codec.heavy": 0.01,
        "codec.tensors": '{"branch.bias" = "dense", "*.bias" = "dgc", "branch.*" = {codec = "int", heavy = 2}}',
    },
    "random_k, cyclic": {"codec.name": "random_k", "codec.light": 0.2, "codec.heavy": 0.05, "codec.coverage": "cyclic"},
    "blocks, cyclic": {"codec.name": "random_block", "codec.light": 0.2, "codec.heavy": 0.05, "codec.coverage": "cyclic"},
    "threshold, packed": {"codec.name": "threshold", "codec.light": 2.0, "codec.heavy": 3.0, "codec.values": "packed"},
    "topk, int8": {"codec.name": "topk", "codec.light": 0.1, "codec.heavy": 0.01, "codec.values": "int8"},
}


def gradient(rank, round_, tensor):
    """Return a gradient whose norm changes from window to window, so that the regime does too."""
    rng = np.random.default_rng((rank, round_, tensor))
    scale = 4.0 if (round_ // 2 + tensor) % 3 == 0 else 1.0
    return (scale * rng.standard_normal(TABLE[tensor].elements)).astype(np.float32)


def used(rank, round_, tensor):
    """Say which tensors a worker uses: now and then a branch only here, or nowhere."""
    name = TABLE[tensor].name
    if name.startswith("branch") and round_ % 5 == 3:
        return False
    return not (name == "branch.bias" and round_ % 4 == 1 and rank != 0)


def train(session, table=TABLE, rounds=ROUNDS, gradient=gradient, used=used, weight=None):
    """Exchange gradients for some rounds, tensors in another order in every round; return what was applied.

    Of buffers, which tensors are used is up to who leads.
    """
    applied = []
    decisions = []
    tracked = session.open_layout(table, decided=decisions.append)
    order = np.random.default_rng(session.rank)
    for round_ in range(rounds):
        vectors = [gradient(session.rank, round_, tensor) for tensor in range(len(table))]
        if weight is not None:
            tracked.weigh(weight(session.rank, round_))
        for tensor in order.permutation(len(table)).tolist():
            here = used(session.rank, round_, tensor) and (tracked.leads or not table[tensor].buffer)
            tracked.add(tensor, vectors[tensor], used=here)
        tracked.wait()
        decision = decisions[-1]
        mean = [vector.copy() for vector in vectors]
        for key in tracked.exchange.layout.keys:
            for position, part in enumerate(key.slices):
                if decision.kind == "SKIP" or not decision.used[key.number] >> position & 1:
                    mean[part.tensor][part.start : part.start + part.length] = np.nan
        applied.append((decision.kind, decision.used, mean))
    return tracked.exchange.layout, applied


def assert_replicas_agree(results):
    """Every worker applied the same bits, kinds and used bits in every round."""
    for other in results[1:]:
        for mine, theirs in zip(results[0][1], other[1], strict=True):
            assert mine[:2] == theirs[:2]
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(mine[2], theirs[2], strict=True))


def load_gradients(directory, workers, keys, round_):
    """Return what the workers encoded in one round."""
    found = {}
    for slot, key in itertools.product(range(workers), keys):
        file = directory / "record" / f"worker-{slot}" / f"gradient-0-{round_}-{key.number}.npz"
        if file.exists():
            with np.load(file) as data:
                found[slot, key.number] = data["gradient"], int(data["used"])
    return found


def assert_replay_agrees(directory, settings, layout, rounds=ROUNDS, weight=None):
    """Every result payload, and every residual at the end, has the bits of the replay. Returns the replay."""
    plans, carried = plan_log(directory)
    replay = Replay(layout, settings, plans, carried)
    for round_ in range(rounds):
        weights = [1.0 if weight is None else weight(slot, round_) for slot in range(settings.workers.count)]
        expected = replay.round(round_, load_gradients(directory, settings.workers.count, layout.keys, round_), weights)
        if expected is None:
            continue
        for slot, key in itertools.product(range(settings.workers.count), layout.keys):
            file = directory / "record" / f"worker-{slot}" / f"result-0-{round_}-{key.number}.npz"
            assert file.exists() == (key.number in expected), (round_, key.number)
            if key.number in expected:
                coding, payload = expected[key.number]
                with np.load(file) as data:
                    assert (str(data["codec"]), float(data["level"])) == (coding.codec, coding.level)
                    assert data["payload"].tobytes() == payload, (round_, slot, key.number)
    for (slot, number), residual in replay.worker.items():
        file = directory / "record" / f"worker-{slot}" / f"residual-0-{number}.npy"
        assert np.array_equal(np.load(file) if file.exists() else np.zeros_like(residual), residual), (slot, number)
    for number, residual in replay.server.items():
        server = layout.keys[number].shard // settings.servers.shards_per_server
        stored = np.load(directory / "record" / f"server-{server}" / f"residual-0-{number}.npy")
        assert np.array_equal(stored, residual), number
    return replay


def run(directory, workers, servers, codec, work=train, transport=None, **more):
    """Run a ring that records everything; return (results by rank, settings)."""
    overrides = {
        "workers.count": workers,
        "servers.count": servers,
        "layout.partition_elements": 4096,
        "regime.window": "2 steps",
        "regime.interval": 1,
        "seed": 7,
        "run.directory": str(directory),
        "run.record_gradients": True,
    }
    ring = Ring(overrides | CODECS[codec] | more, **({"transport": transport} if transport else {}))
    results = ring.run(work)
    assert set(ring.codes.values()) == {0}
    return results, ring.settings
