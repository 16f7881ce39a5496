"""What a worker keeps of past rounds is what a replay needs, and no more."""

from machines import BOOT, Member, layout_of, sends, settings_of, view_of

from ps_accordion.wire import messages as m
from ps_accordion.worker.retained import Retained

SETTINGS = settings_of(workers_count=3)
LAYOUT = layout_of(SETTINGS)


def decided(retained, round_, epoch):
    """Decide a round by results of view `epoch`."""
    for key in LAYOUT.keys:
        retained.note(m.Result(0, key.number, round_, epoch, "UNUSED", 0), ())
    member = Member(0, SETTINGS, LAYOUT)
    retained.decided(round_, {key.number: (member.bare("UNUSED", key.number, round_)[0], None) for key in LAYOUT.keys})


def test_views_stay_as_long_as_a_round_needs_them():
    """Their numbers skip those that were never made; a result may be of a view long before the one that it is decided in."""
    retained = Retained(0, LAYOUT, rounds=2)
    views = {p: view_of(SETTINGS, p=p, slots=slots, restore=[(0, BOOT)]) for p, slots in [(1, [0, 1]), (4, [0, 2]), (9, [0])]}

    def offered():
        (send,) = sends(retained.offers(views[9], {}, who=(0, 1), server_of={0: "server 0"}))
        return send.message.rounds, [epoch for epoch, _ in send.message.views]

    for view in views.values():
        retained.seen(view)
    decided(retained, 0, 1)
    assert offered() == ([(0, 1)], [1])
    decided(retained, 1, 4)
    assert offered() == ([(0, 1), (1, 4)], [1, 4])
    decided(retained, 2, 4)
    assert offered() == ([(1, 4), (2, 4)], [4])
    assert sorted(retained._views) == [4, 9]
