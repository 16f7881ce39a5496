"""Several codecs in one model, chosen by name, in a whole run with real processes."""

import re

import pytest
from launched import launch
from recorded import assert_replay_agrees
from replay import plan_log

from ps_accordion.config import load
from ps_accordion.layout import Layout, Tensor
from ps_accordion.selection import matrices

TABLE = [
    Tensor("0.weight", (60, 90), "float32"),
    Tensor("0.bias", (60,), "float32"),
    Tensor("2.weight", (40, 60), "float32"),
    Tensor("2.bias", (40,), "float32"),
]
ROWS = '"2.bias" = "dense", "2.*" = {codec = "int", heavy = 2}, "0.*" = {codec = "%s", light = %r, heavy = %r}'
FIRST = [("topk", 0.1, 0.01), ("powersgd", 4.0, 1.0)]
"""The codec of the first tensor and its levels: in two partitions, or whole."""
FLAGS = {"regime.window": "2 steps", "regime.interval": 1, "run.record_gradients": "true", "layout.partition_elements": 4096}
TRAIN = """
HEAVY, LIGHT = {(0, %r), (2, 2.0)}, {(0, %r), (2, 8.0)}

with connect() as session:
    model = DistributedModel(nn.Sequential(nn.Linear(90, 60), nn.ReLU(), nn.Linear(60, 40)), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rounds = session.exchanges[0].exchange.rounds
    for scale, wanted in ((1, HEAVY), (8, LIGHT), (8, HEAVY)):
        seen = set()
        while not wanted <= seen:
            torch.manual_seed(1000 * rank + rounds.round)
            optimizer.zero_grad()
            (scale * model(torch.randn(64, 90)).square().mean()).backward()
            optimizer.step()
            seen |= {(tensor, rounds.plan.choices[tensor].level) for tensor in (0, 2)} if rounds.plan is not None else set()
    print("rounds", rounds.round)
"""
"""Until plans have turned both tensors heavy, light, and heavy again; they come with the results, in the same round to all."""


@pytest.mark.full
@pytest.mark.parametrize(("first", "light", "heavy"), FIRST)
def test_a_model_with_three_codecs_has_the_bits_of_a_replay(tmp_path, first, light, heavy):
    """Topk or powersgd for one tensor, int for the other, biases exact; both ways, and each turns between levels of its own."""
    rows = ROWS % (first, light, heavy)
    flags = [part for name, value in FLAGS.items() for part in ("--set", f"{name}={value}")]
    code, said = launch(tmp_path, TRAIN % (heavy, light), "--codec", "onebit", "--set", f"codec.tensors={{{rows}}}", *flags)
    assert code == 0, said
    assert "decides about no tensor" not in said
    (rounds,) = set(re.findall(r"\] rounds (\d+)", said))
    settings = load(tmp_path / "run" / "config.toml", environment={})
    layout = Layout(TABLE, num_shards=1, partition_elements=4096, matrices=matrices(settings.codec))
    assert [key.rows for key in layout.keys if key.tensor == 0 and not key.small] == ([60] if first == "powersgd" else [0, 0])
    assert_replay_agrees(tmp_path / "run", settings, layout, rounds=int(rounds))
    plans, carried = plan_log(tmp_path / "run")
    in_force = {choice for version in carried.values() for choice in plans[version].items()}
    levels = {("0.weight", first): (light, heavy), ("2.weight", "int"): (8.0, 2.0)}
    assert in_force == {(tensor, (codec, level)) for (tensor, codec), both in levels.items() for level in both}
