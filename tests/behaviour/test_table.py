"""The behaviour table: what a script sees under DistributedDataParallel, it sees under ours, row by row.

All rows run once under each, at the same time, in real processes: two ranks over gloo, two workers with two servers and the codec
that changes nothing (dense, float32). Then one test a row compares.
"""

import re
from pathlib import Path

import pytest
import torch
from behaviour.runs import start_ours, start_theirs
from behaviour.table import ATTACHED, LONGER, ROWS, TRAINING
from behaviour.wrap import LOCAL, REPLICA
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ps_accordion import config
from ps_accordion.worker import DistributedModel
from ps_accordion.worker.alone import Alone
from ps_accordion.worker.group import group_of_one

pytestmark = pytest.mark.timeout(300)  # the first test waits for all rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from-ddp.md"
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-5, 1e-6)}
"""(relative, absolute) by format: sums of a few float32 numbers in another order. Others: what torch takes for one rounding."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run every row under both; return (theirs, ours)."""
    folder = tmp_path_factory.mktemp("table")
    with start_theirs(folder / "theirs") as theirs, start_ours(folder / "ours") as ours:
        theirs.wait()
        ours.wait()
        yield theirs, ours


def assert_same(ours, theirs, *, by_rank=False):
    """Compare two lists of notes by rank, to float tolerance; what ranks have in common with rank 0's, if not `by_rank`."""
    for mine, other in zip(ours, theirs, strict=True):
        names = {name for name in mine if not name.startswith(REPLICA)}
        assert names == {name for name in other if not name.startswith(REPLICA)}
        for name in sorted(names):
            rtol, atol = TOLERANCE.get(mine[name].dtype, (None, None))
            # Where ranks of theirs differ, as in buffers before the next forward, rank 0 is right.
            expected = other if by_rank or name.startswith(LOCAL) else theirs[0]
            torch.testing.assert_close(
                mine[name], expected[name], rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_replicas_agree(notes):
    """Compare what ranks have in common, bit for bit."""
    first, *others = [{name: tensor for name, tensor in of.items() if not name.startswith(LOCAL)} for of in notes]
    for other in others:
        assert other.keys() == first.keys()
        differing = [name for name, tensor in first.items() if not torch.equal(tensor, other[name])]
        assert differing == []


@pytest.mark.parametrize("row", [row for row in ROWS if row not in TRAINING])
def test_gradients_and_parameters_are_those_of_ddp_and_replicas_have_the_same_bits(runs, row):
    """Ten steps of one feature: every gradient and the final state."""
    theirs, ours = (run.notes(row) for run in runs)
    assert ours[0]
    assert_same(ours, theirs)
    assert_replicas_agree(ours)


@pytest.mark.parametrize("row", TRAINING)
def test_whole_trainings_reach_the_loss_that_ddp_reaches(runs, row):
    """From the same seeds, within a thousandth; and what they learn is worth the name."""
    theirs, ours = (run.notes(row) for run in runs)
    assert_replicas_agree(ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[LOCAL + "loss"] < 0.6 * mine[LOCAL + "first"]
        torch.testing.assert_close(mine[LOCAL + "loss"], other[LOCAL + "loss"], rtol=1e-3, atol=0)


def test_all_processes_end_well(runs):
    """Exit code 0 everywhere."""
    theirs, ours = runs
    assert theirs.codes == [0, 0], theirs.trouble()
    assert ours.codes == [0], ours.trouble()


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("direction", ["from DDP", "to DDP"])
def test_state_dicts_of_either_load_into_the_other(runs, direction, prefix):
    """With the prefix that wrappers add, and without it as from `model.module`."""
    module = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.Linear(64, 30))
    theirs, ours = (run.notes("state_dict")[0] for run in runs)
    saved = {name.removeprefix("state."): tensor for name, tensor in ours.items() if name.startswith("state.")}
    if direction == "from DDP":
        saved = {name: theirs[f"state.{name}"] for name in saved}
    saved = {prefix + name.removeprefix("module."): tensor for name, tensor in saved.items()}
    with Alone(config.load(environment={})) as session:
        if direction == "from DDP":
            model = DistributedModel(module, session=session)
        else:
            model = DistributedDataParallel(module, process_group=group_of_one())
        (model if prefix or direction == "from DDP" else model.module).load_state_dict(saved)
        loaded = model.state_dict() if prefix else model.module.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_the_page_for_those_who_come_from_ddp_names_every_row():
    """And none that does not exist."""
    text = PAGE.read_text(encoding="utf-8")
    named = {name for cell in re.findall(r"\| ([^|]*) \|$", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(ROWS)


@pytest.mark.parametrize("row", ATTACHED)
def test_our_hook_on_a_models_own_ddp_changes_nothing(runs, row):
    """`attach`: gradients go through our servers, all else through the script's own group, such as buffers."""
    theirs, ours = runs[0].notes(row), runs[1].notes(row, "attached")
    assert_same(ours, theirs, by_rank=True)
    common = [{name: tensor for name, tensor in of.items() if "running" not in name} for of in ours]
    assert_replicas_agree(common)


@pytest.mark.full
def test_compressed_trainings_reach_about_the_loss_of_ddp(tmp_path):
    """Top-k of 10 % both ways, after 400 steps: above it by at most 5 % of what there was to gain; the same bits everywhere."""
    topk = ("--codec", "topk", "--light", "0.1", "--policy", "static")
    with start_theirs(tmp_path / "dense", list(LONGER)) as dense, start_ours(tmp_path / "topk", list(LONGER), topk) as compressed:
        dense.wait()
        compressed.wait()
        for row in LONGER:
            theirs, ours = dense.notes(row), compressed.notes(row)
            assert_replicas_agree(ours)
            for mine, other in zip(ours, theirs, strict=True):
                gained = other[LOCAL + "first"] - other[LOCAL + "loss"]
                assert mine[LOCAL + "loss"] < other[LOCAL + "loss"] + 0.05 * gained, row
