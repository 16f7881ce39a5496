"""What a worker says again to a shard that has lost its memory: often enough for a lossy link, seldom enough for a slow one."""

from types import SimpleNamespace

import numpy as np
import pytest
from machines import BOOT, Member, layout_of, sends, settings_of, view_of

from ps_accordion.wire import messages as m
from ps_accordion.worker.restoring import Restoring
from ps_accordion.worker.rounds import Rounds

RESEND = 1.0


@pytest.fixture
def restoring():
    """Return the part of a worker that has decided round 0, in a view in which the only shard is blank."""
    settings = settings_of(servers_replay_rounds=4, timeouts_resend=RESEND)
    layout = layout_of(settings)
    member, rounds = Member(0, settings, layout), Rounds(0, layout, settings)
    view = view_of(settings, cuts=[(0, 1, 0)], restore=[(0, BOOT)])
    rounds.retained.seen(view)
    for key in layout.keys:
        rounds.retained.note(m.Result(0, key.number, 0, 0, "UNUSED", 0), ())
    pushes = {key.number: member.data(key.number, 0) for key in layout.keys}
    rounds.retained.decided(0, {key: (push, np.frombuffer(frames[0], np.uint8)) for key, (push, frames) in pushes.items()})
    rounds.round = 1
    membership = SimpleNamespace(settings=settings, view=view, member=True, slot=0, incarnation=1)
    return Restoring(membership, {0: SimpleNamespace(number=0, layout=layout, rounds=rounds, behind=False)})


def test_a_push_that_is_asked_for_again_and_again_is_sent_less_and_less_often(restoring):
    """At once; then it may be on its way. Another push has a time of its own, and a view starts all times anew."""
    restoring.on_view(0.0)
    times = [ten / 10 for ten in range(160)]
    recall = m.Recall(0, [(1, 0)])
    assert [now for now in times if restoring.on_recall("server 0", recall, now)] == [0.0, 0.5, 1.5, 3.5, 7.5, 15.5]
    (send,) = restoring.on_recall("server 0", m.Recall(0, [(1, 0), (2, 0)]), 15.9)
    assert send.message.push.key == 2
    restoring.on_view(16.0)
    assert len(restoring.on_recall("server 0", m.Recall(0, [(1, 0), (2, 0)]), 16.0)) == 2


def test_results_are_repeated_less_and_less_often_and_offers_every_time(restoring):
    """An offer is a few words, by which a shard asks again for what is lost; results are as long as a round."""
    said = {0.0: restoring.on_view(0.0)} | {now / 2: restoring.tick(now / 2) for now in range(1, 33)}
    assert [now for now, actions in said.items() if sends(actions, m.Restore)] == [0.0, 1.0, 3.0, 7.0, 15.0]
    assert [now for now, actions in said.items() if sends(actions, m.Offer)] == list(range(17))
    assert sends(restoring.on_view(16.5), m.Restore)
    assert sends(restoring.tick(17.5), m.Restore)
