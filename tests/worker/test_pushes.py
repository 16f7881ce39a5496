"""What a worker has pushed is asked after until answered, sent again where missing, held back where much is under way."""

import numpy as np
from machines import Member, layout_of, sends, settings_of, view_of
from rounds import NOW, Job, take_in

from ps_accordion.wire import messages as m
from ps_accordion.worker.pushes import server_name
from ps_accordion.worker.rounds import Rounds


def test_asking_backs_off():
    """After 1, 2, 4, 8, 10 and then every 10 times `timeouts.resend`; a key with a result is not asked after."""
    job = Job(timeouts_resend=0.5)
    results = job.push()
    job.rounds.on_result(*results[1], NOW)
    asked = []
    for step in range(4000):
        now = NOW + step * 0.01
        for send in job.rounds.tick(now):
            assert send.message == m.Ask(0, 0, 0, 1, [0, 2])
            assert send.peers == ("server 0",)
            asked.append(round(now - NOW, 2))
    np.testing.assert_allclose(asked[:8], [0.5, 1.5, 3.5, 7.5, 12.5, 17.5, 22.5, 27.5], atol=0.02)


def test_nothing_is_asked_before_it_is_pushed():
    """A slow backward is not a loss."""
    assert Job().rounds.tick(NOW + 1000) == []


def test_what_may_lie_behind_other_results_is_not_asked_after():
    """Only `timeouts.resend` after the last result of the same server; a server without a result, or back, is asked in time."""
    job = Job(servers_count=2, timeouts_resend=1.0, layout_partition_elements=1024)
    results = job.push()
    of = {shard: [key.number for key in job.layout.keys if key.shard == shard] for shard in (0, 1)}
    first = of[0][0]
    job.rounds.on_result(*results[first], NOW + 0.5)
    (ask,) = sends(job.rounds.tick(NOW + 1))
    assert (ask.peers, set(ask.message.keys)) == (("server 1",), set(of[1]))
    assert job.rounds.tick(NOW + 1.25) == []
    assert set(sends(job.rounds.tick(NOW + 1.5))[0].message.keys) == set(of[0]) - {first}

    job.rounds.on_result(*results[of[1][0]], NOW + 2)
    job.rounds.ask_again("server 1", NOW + 2.25)  # whatever lay behind it is lost with the connection
    (ask,) = sends(job.rounds.tick(NOW + 2.25))
    assert (ask.peers, set(ask.message.keys)) == (("server 1",), set(of[1][1:]))


def test_each_server_is_asked_for_its_own_keys():
    """At most 256 at once."""
    settings = settings_of(servers_count=2, servers_shards_per_server=2, layout_partition_elements=1024)
    layout = layout_of(
        settings, [*layout_of(settings).tensors, type(layout_of(settings).tensors[0])("big", (1024, 1100), "float32")]
    )
    rounds = Rounds(0, layout, settings)
    rounds.view = view_of(settings)
    member = Member(0, settings, layout)
    for key in layout.keys:
        rounds.pushed(member.bare("UNUSED", key.number, 0)[0], None, NOW)
    asks = rounds.tick(NOW + 1)
    assert sorted(key for ask in asks for key in ask.message.keys) == list(range(len(layout.keys)))
    assert max(len(ask.message.keys) for ask in asks) == m.MAX_ASKED
    for ask in asks:
        assert {server_name(layout.keys[key].shard, settings) for key in ask.message.keys} == set(ask.peers)
    assert {name for ask in asks for name in ask.peers} == {"server 0", "server 1"}


def test_a_missing_push_is_sent_again_byte_for_byte():
    """The same header and the same memory; not what has a result, was not pushed, or belongs to another round."""
    job = Job()
    results = job.push()
    take_in(job.rounds, *results[0])
    first = job.rounds.pushes.sent[1]
    again = job.rounds.on_missing(m.Missing(0, 0, [0, 1, 9]), NOW + 3)
    assert [send.message for send in again] == [first.push]
    assert np.shares_memory(np.frombuffer(again[0].payload[0], np.uint8), first.payload)
    assert job.rounds.on_missing(m.Missing(0, 1, [1, 2]), NOW) == []
    assert sends(job.rounds.tick(NOW + 1.5))[0].message.keys == [2]  # what was just sent again is not asked after yet


def test_a_shard_that_lacks_a_push_has_answered():
    """Who was asked less and less often, because it was slow, is asked as often as at first again."""
    job = Job(timeouts_resend=0.5)
    job.push()
    for step in range(1000):
        job.rounds.tick(NOW + step * 0.01)
    job.rounds.on_missing(m.Missing(0, 0, [0, 1, 2]), NOW + 10)
    assert job.rounds.tick(NOW + 10.4) == []
    assert sends(job.rounds.tick(NOW + 10.5))[0].message.keys == [0, 1, 2]


def test_more_than_a_server_may_have_under_way_waits_and_is_not_asked_after():
    """It goes when a result has come, or when the server holds what was sent, and only waits for others."""
    job = Job(servers_credit=1, timeouts_resend=0.5)
    of = job.layout.keys_of_shard(0)
    member = Member(0, job.settings, job.layout)

    def pushed(key):
        message, frames = member.data(key.number, 0)
        return [send.message.key for send in job.rounds.pushed(message, np.frombuffer(frames[0], np.uint8), NOW)]

    first, second, third = (key.number for key in of)
    assert [pushed(key) for key in of] == [[first], [], []]
    assert job.rounds.waits  # all is encoded, and a promise may speak of it
    assert sends(job.rounds.tick(NOW + 0.5))[0].message.keys == [first]
    assert job.rounds.on_missing(m.Missing(0, 0, [], []), NOW + 0.5) == []
    (again,) = job.rounds.on_missing(m.Missing(0, 0, [first], []), NOW + 0.5)
    assert again.message.key == first  # lost: it is under way still
    assert [send.message.key for send in job.rounds.on_missing(m.Missing(0, 0, [], [first]), NOW + 1)] == [second]
    assert job.rounds.released(NOW + 1) == []
    assert sends(job.rounds.tick(NOW + 1.5))[0].message.keys[-1] == second
    job.rounds.on_result(m.Result(0, second, 0, 1, "UNUSED", 0, 0, "", 0.0, 0, 0, 0, [], 0), [], NOW + 2)
    assert [send.message.key for send in job.rounds.released(NOW + 2)] == [third]


def test_a_server_with_a_new_connection_is_asked_at_once():
    """After what it has not answered, and no other server."""
    job = Job(servers_count=2)
    results = job.push()
    job.rounds.on_result(*results[0], NOW)
    assert job.rounds.tick(NOW) == []
    job.rounds.ask_again("server 0", NOW)
    (ask,) = sends(job.rounds.tick(NOW))
    assert ask.peers == ("server 0",)
    assert set(ask.message.keys) == {key.number for key in job.layout.keys if key.shard == 0} - {0}
