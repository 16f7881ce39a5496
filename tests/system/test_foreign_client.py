"""A client that knows only what docs/wire.md says takes part in a run: so the document is enough."""

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ring import Ring

from ps_accordion.codecs import registry
from ps_accordion.codecs.base import Coding
from ps_accordion.layout import Layout, Tensor
from ps_accordion.regimes.base import Choice, Plan
from ps_accordion.regimes.plan import encode_plan
from ps_accordion.seeds import SHARED, seed_for
from ps_accordion.wire import framing
from ps_accordion.wire import messages as m

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
CLIENT = ROOT / "examples" / "foreign_client.py"
ROUNDS, ELEMENTS = 12, 5
SECONDS = 60
"""More than it takes on a busy machine; the roles give up sooner when it hangs."""


class MixedRing(Ring):
    """A ring whose worker of the highest rank is the foreign client, in a process of its own."""

    bits = 16

    def _worker(self, rank, work, results):
        if rank < self.settings.workers.count - 1:
            return super()._worker(rank, work, results)
        options = {"slot": rank, "rounds": ROUNDS, "elements": ELEMENTS, "bits": self.bits}
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-I", str(CLIENT), self.settings.coordinator.address, *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        results[rank] = [json.loads(line) for line in done.stdout.splitlines()]
        return 0


def run(bits, work=None, **overrides):
    """Run a ring with the foreign client in it; return what each worker returned."""
    ring = MixedRing({"workers.count": 1, "servers.count": 1, "servers.shards_per_server": 2, **overrides})
    ring.bits = bits
    results = ring.run(work)
    assert set(ring.codes.values()) == {0}
    return results


def gradient(round_):
    """Return the gradient that the client makes up for a round."""
    return np.array([math.sin(round_ + index) for index in range(ELEMENTS)], np.float32)


def means(lines):
    """Return what came back, float32[rounds, elements], once every round is seen to be there and applied."""
    assert [(line["round"], line["kind"]) for line in lines] == [(round_, "DATA") for round_ in range(ROUNDS)]
    return np.array([line["mean"] for line in lines], np.float32)


def test_the_client_imports_nothing_of_ours():
    """What it proves is proved without our code."""
    nodes = list(ast.walk(ast.parse(CLIENT.read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not any(isinstance(node, ast.ImportFrom) for node in nodes)
    assert imported - sys.stdlib_module_names == {"msgpack", "xxhash", "zmq"}


def test_alone_it_gets_its_own_float32_gradients_back():
    """A single worker's mean at 32 bits is its gradient, to the bit; the roles end well."""
    assert np.array_equal(means(run(32)[0]), [gradient(round_) for round_ in range(ROUNDS)])


def test_alone_at_16_bits_nothing_is_lost():
    """What rounding left out of one round comes with a later one: the sums agree but for the last residuals."""
    got = means(run(16)[0])
    sent = np.array([gradient(round_) for round_ in range(ROUNDS)])
    assert not np.array_equal(got, sent)
    assert got.sum(0) == pytest.approx(sent.sum(0), abs=2 * 2**-11)


@pytest.mark.parametrize("bits", [16, 32])
def test_beside_one_of_our_workers_both_get_the_same_mean(bits):
    """The foreign client and a session of ours share layout, rounds and END; both apply the same bits."""

    def work(session):
        applied = []
        for round_ in range(ROUNDS - 3):  # finished earlier: from then on it pushes EMPTY
            tensor = torch.from_numpy(2 * gradient(round_))
            applied.append(session.push_pull(tensor, name="example").numpy().copy())
        return applied

    ours, lines = run(bits, work, **{"workers.count": 2, "servers.count": 2, "codec.small_bits": bits})
    theirs = means(lines)
    assert np.array_equal(theirs[: ROUNDS - 3], ours)
    assert theirs[0] == pytest.approx(1.5 * gradient(0), rel=2**-10)
    # The weight of a worker that has finished is 0: the mean is over who is left.
    assert theirs[-1] == pytest.approx(gradient(ROUNDS - 1), rel=0.01)


def test_the_document_lists_the_fields_of_every_message_in_order():
    """Tags and fields in docs/wire.md are those of the messages."""
    told = {}
    for section in DOCUMENT.split("\n#### ")[1:]:
        told[section.partition("`")[2].partition("`")[0]] = re.findall(
            r"^\| `(\w+)` \|", section.partition("\n#")[0], re.MULTILINE
        )
    kinds = [getattr(m, name) for name in m.__all__]
    tags = {kind.__struct_config__.tag: list(kind.__struct_fields__) for kind in kinds if isinstance(kind, type)}
    del tags[None]  # the base of all messages
    assert told == tags


def test_the_example_push_is_one():
    """The bytes in docs/wire.md are what our own code sends for that push."""
    frames = []
    for block in re.findall(r"^```text\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE):
        frames.append(bytes.fromhex("".join(line[:30].strip() for line in block.splitlines())))
    push, payload = framing.unpack(frames)
    assert push == m.Push(0, 0, 7, 1, 2, "DATA", 1.0, 1, False, "dense", 16.0, 3, 3, 0, [10])
    assert framing.pack(push, payload) == frames
    out, codec = np.empty(3, np.float32), registry.get("dense")
    coding = Coding("dense", 16.0, 3, 3, 0)
    array = np.frombuffer(frames[1], np.uint8)
    codec.validate(array, coding)
    codec.decode(array, coding, out)
    assert out.tolist() == [1.0, -3.0, 0.5]


def test_the_other_examples_are_what_our_code_gives():
    """Layout, seed and plan in docs/wire.md."""
    shapes = {"first.weight": (600, 600), "first.bias": (600,), "out.weight": (10, 600), "out.bias": (10,)}
    table = [Tensor(name, shape, "float32") for name, shape in shapes.items()]
    table.append(Tensor("*buffers*", (1220,), "float32", buffer=True))
    layout = Layout(table, num_shards=2, partition_elements=1 << 18)
    assert f"`{layout.digest}`" in DOCUMENT
    for key in layout.keys:
        slices = [f"`{table[part.tensor].name}` {part.start} to {part.start + part.length - 1}" for part in key.slices]
        assert f"| {key.number} | {', '.join(slices)} | {key.shard} |" in DOCUMENT
    whole = Layout(table, num_shards=2, partition_elements=1 << 18, matrices=lambda name: name == "first.weight")
    assert f"`{whole.digest}`" in DOCUMENT
    assert [(key.rows, key.elements, key.shard) for key in whole.keys[2:]] == [(0, 6000, 1), (600, 360_000, 0)]
    assert f"`{seed_for(7, 0, 3, 11, SHARED):#x}`" in DOCUMENT
    choices = Choice("topk", 0.04), Choice("topk", 0.005)
    plan = encode_plan(Plan(3, choices, (True, False), 2500, reason="a check"))
    assert plan.hex(" ") in " ".join(DOCUMENT.split())
