"""What shards wrote for a checkpoint goes on in shards that are cut otherwise, with the same bits."""

import msgspec
import numpy as np
import pytest
from machines import Member, layout_of, plan_bytes, sends, settings_of, view_of

from ps_accordion import checkpoint
from ps_accordion.checkpoint import LayoutAt, Manifest, Part
from ps_accordion.regimes import Choice
from ps_accordion.server.checkpoint import Residuals, save
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m

BOOT = 77
LIGHT = Choice("topk", 0.1)


class Shards:
    """All shards of a run with two workers, by which rounds go."""

    def __init__(self, servers, *, members=None, round_=0, restore=None):
        self.settings = settings_of(servers_count=servers, codec_residual_at_switch="clip")
        self.layout = layout_of(self.settings)
        self.members = members or [Member(slot, self.settings, self.layout) for slot in range(2)]
        self.shards = [Shard(number, BOOT, self.settings, restore=restore) for number in range(servers)]
        places = [(number, BOOT, "tcp://127.0.0.1:5000") for number in range(servers)]
        view = msgspec.structs.replace(view_of(self.settings, cuts=[(0, round_, -1)]), shards=places)
        for shard in self.shards:
            shard.on_view(view)
            shard.on_layout(0, self.layout)

    def round(self, round_, *, previous_skipped=False, skip=False):
        """Make a round; return the payload and plan of each key's result."""
        results = {}
        for key in self.layout.keys:
            for member in self.members:
                push, frames = member.data(key.number, round_, skipped=previous_skipped)
                if skip and key.number == 1:
                    push, frames = member.bare("SKIP", key.number, round_, skipped=previous_skipped)
                for send in sends(self.shards[key.shard].on_push(member.peer, push, list(frames)), m.Result):
                    results[key.number] = send.message.kind, [bytes(frame) for frame in send.payload]
        assert len(results) == len(self.layout.keys)
        return results


def saved(shards, root, round_, *, skipped=False):
    """Complete a checkpoint of the shards alone."""
    answers = [save(shard, m.Save(round_, [(0, round_, skipped)]), checkpoint.partial(root, round_)) for shard in shards.shards]
    assert [answer.error for answer in answers] == [""] * len(answers)
    parts = [Part(*part) for answer in answers for part in answer.parts]
    return checkpoint.commit(root, Manifest(round_, {}, [LayoutAt(0, round_, b"")], parts), keep=2)


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("skipped", [False, True])
def test_the_next_results_are_those_of_shards_that_were_not_stopped(tmp_path, servers, skipped):
    """Also where the last round was skipped by one key, after the others had left a residual that must not count."""
    first = Shards(2)
    first.round(0)
    first.round(1)
    first.round(2, skip=skipped)
    path = saved(first, tmp_path, 3, skipped=skipped)
    restored = Shards(servers, members=first.members, round_=3, restore=Residuals(path).restored)
    residuals = [[coder.host_residual() for coder in member.coders] for member in first.members]
    expected = [first.round(3, previous_skipped=skipped), first.round(4)]
    for member, before in zip(first.members, residuals, strict=True):
        for coder, residual in zip(member.coders, before, strict=True):
            coder.set_residual(np.zeros(coder.key.elements, np.float32) if residual is None else residual)
    assert [restored.round(3, previous_skipped=skipped), restored.round(4)] == expected
    for shard in restored.shards:  # of this run's ledger, what the checkpoint had is where it begins
        tally = shard.account()
        assert abs(tally.difference) <= tally.slack
        assert tally.came != 0


def test_a_plan_that_waits_goes_out_with_the_next_result(tmp_path):
    """One that was sent is not sent again."""
    first = Shards(1)
    first.shards[0].on_plan(0, 1, plan_bytes(1, LIGHT))
    first.round(0)
    first.shards[0].on_plan(0, 2, plan_bytes(2, LIGHT))
    path = saved(first, tmp_path, 1)
    restored = Shards(2, members=first.members, round_=1, restore=Residuals(path).restored)
    assert restored.round(1)[0][1][-1] == plan_bytes(2, LIGHT)
    assert len(restored.round(2)[0][1]) == 1


def test_a_shard_that_stands_elsewhere_writes_nothing(tmp_path):
    """The checkpoint is given up, with both rounds named."""
    first = Shards(1)
    first.round(0)
    answer = save(first.shards[0], m.Save(3, [(0, 3, False)]), tmp_path)
    assert "finished round 0 of layout 0, and the workers 2" in answer.error
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_has_lost_what_it_had_says_nothing_until_it_has_it_again(tmp_path):
    """It is asked again every second; an answer would be that the workers stand elsewhere, and end the attempt."""
    first = Shards(1)
    shard, request = Shard(0, BOOT, first.settings), m.Save(3, [(0, 3, False)])
    view = view_of(first.settings, cuts=[(0, 3, 1)])
    for happens in (lambda: None, lambda: shard.on_view(view), lambda: shard.on_layout(0, first.layout)):
        happens()
        assert save(shard, request, tmp_path) is None
    assert list(tmp_path.iterdir()) == []
