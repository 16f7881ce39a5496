"""A worker's rounds: decided with every key in hand, alike whatever order results come in."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import BOOT, BUFFERED, Member, layout_of, plan_bytes, sends, settings_of, view_of

from ps_accordion.errors import TooManySkips, UsageError, WireError
from ps_accordion.regimes import Choice
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m
from ps_accordion.worker.pushes import server_name
from ps_accordion.worker.rounds import Decide, Decode, Rounds

KEYS = (0, 1, 2)
NOW = 50.0


class Job:
    """One worker of two, with real shards and a second member behind the results."""

    def __init__(self, *, table=None, **options) -> None:
        self.settings = settings_of(**options)
        self.layout = layout_of(self.settings, table)
        self.members = [Member(slot, self.settings, self.layout) for slot in (0, 1)]
        self.shards = [Shard(number, BOOT, self.settings) for number in range(self.settings.num_shards)]
        self.rounds = Rounds(0, self.layout, self.settings)
        self.rounds.view = view_of(self.settings)
        for shard in self.shards:
            shard.on_layout(0, self.layout)
            shard.on_view(self.rounds.view)

    def push(self, *, kinds=("DATA",) * 5, theirs=("DATA",) * 5) -> dict:
        """Push every key of the round, a kind a key; return the results, by key: (message, frames)."""
        round_, skipped, results = self.rounds.round, self.rounds.previous_skipped, {}
        for key in self.layout.keys:
            shard = self.shards[key.shard]
            for member, kind in zip(self.members, (kinds[key.number], theirs[key.number]), strict=True):
                if kind == "DATA":
                    choice = self.rounds.choice(key)
                    message, frames = member.data(key.number, round_, skipped=skipped, choice=choice)
                else:
                    message, frames = member.bare(kind, key.number, round_, skipped=skipped)
                if member.slot == 0:
                    payload = np.frombuffer(frames[0], np.uint8) if frames else None
                    (send,) = self.rounds.pushed(message, payload, NOW)
                    message, frames = send.message, send.payload
                actions = shard.on_push(b"", message, [bytes(frame) for frame in frames])
            (send,) = sends(actions, m.Result)
            results[key.number] = send.message, [bytes(frame) for frame in send.payload]
        return results

    def hand_in(self, results: dict, order=None) -> Decide | None:
        """Hand results in, decode each at once, and decide; only the last may decide the round."""
        decision = None
        for key in results if order is None else order:
            assert decision is None
            take_in(self.rounds, *results[key])
            decision = self.rounds.decide()
        return decision

    def play(self, **kinds) -> Decide | None:
        """Play a whole round."""
        return self.hand_in(self.push(**kinds))


def take_in(rounds: Rounds, message: m.Result, frames, now: float = NOW) -> Decode | None:
    """Hand in a result as the session does: what is to be decoded is decoded at once."""
    decode = rounds.on_result(message, frames, now)
    if decode is not None:
        rounds.decoded(decode)
    return decode


def received(decode: Decode) -> np.ndarray:
    """Return what a codec thread makes of a result."""
    out = np.empty(decode.result.elements, np.float32)
    decode.codec.receive(decode.payload, decode.coding, out)
    return out


def changed(result, **fields):
    message, frames = result
    return m.Result(**({name: getattr(message, name) for name in message.__struct_fields__} | fields)), frames


@pytest.mark.parametrize("order", list(itertools.permutations(KEYS)), ids=str)
@pytest.mark.parametrize(
    "theirs", [("DATA",) * 3, ("DATA", "SKIP", "DATA"), ("SKIP", "DATA", "DATA"), ("UNUSED",) * 3], ids="-".join
)
def test_the_order_of_results_does_not_matter(order, theirs):
    """The round is decided with the last key, the same way; a SKIP that is seen early decides nothing."""
    job = Job()
    decision = job.hand_in(job.push(theirs=theirs), order)
    assert decision is not None
    assert (decision.round, decision.kind) == (0, "SKIP" if "SKIP" in theirs else "DATA")
    assert (job.rounds.round, job.rounds.previous_skipped) == (1, "SKIP" in theirs)


def test_a_result_is_decoded_before_it_decides():
    """All results are there, but one is still being decoded: the gradient's memory is not ready yet."""
    job = Job()
    results = job.push()
    decodes = [job.rounds.on_result(*results[key], NOW) for key in KEYS]
    assert [decode.key for decode in decodes] == list(KEYS)
    for decode in decodes:
        assert job.rounds.decide() is None
        job.rounds.decoded(decode)
    assert job.rounds.decide().kind == "DATA"


def test_a_skipped_round_gives_back_what_was_pushed():
    """The payloads of this worker's DATA pushes, as they were sent; nothing of a round that counts."""
    job = Job()
    results = job.push(kinds=("DATA", "SKIP", "DATA"))
    sent = {key: job.rounds.pushes.sent[key].payload for key in (0, 2)}
    decision = job.hand_in(results)
    assert [(push.key, push.kind) for push, _ in decision.take_back] == [(0, "DATA"), (2, "DATA")]
    assert all(payload is sent[push.key] for push, payload in decision.take_back)
    assert job.play().take_back == ()


def test_what_anybody_used_is_told_for_each_key():
    """The used bits of the results, in order of the keys: parameters that nobody used keep no gradient."""
    job = Job()
    decision = job.play(kinds=("UNUSED", "DATA", "UNUSED"), theirs=("DATA", "UNUSED", "UNUSED"))
    assert decision.used == (0b11, 0b1, 0b0)


def test_results_that_do_not_count_are_ignored():
    """Of another round, under another view, of a key that was not pushed; and everything before a view."""
    job = Job()
    results = job.push()
    for strange in ({"round": 1}, {"round": -1}, {"epoch": 2}, {"epoch": 0}, {"key": 3}, {"key": 1 << 31}):
        assert job.rounds.on_result(*changed(results[1], **strange), NOW) is None
    job.rounds.view = None
    assert job.rounds.on_result(*results[1], NOW) is None
    job.rounds.view = view_of(job.settings)
    assert job.hand_in(results).kind == "DATA"
    before = job.rounds.round
    for key in KEYS:  # all of them again, late
        assert job.rounds.on_result(*results[key], NOW) is None
    assert job.rounds.decide() is None
    assert job.rounds.round == before


@pytest.mark.parametrize("late", KEYS)
def test_results_that_come_twice_count_once(late):
    """Two copies of two results are not four keys; the copy is not decoded over the first."""
    job = Job()
    results = job.push()
    for key in set(KEYS) - {late}:
        assert take_in(job.rounds, *results[key]) is not None
        assert take_in(job.rounds, *results[key]) is None
    assert job.rounds.decide() is None
    take_in(job.rounds, *results[late])
    assert job.rounds.decide() is not None


def test_a_round_before_the_cut_counts_under_the_epoch_that_the_view_names():
    """After a view, round `cut - 1` counts as `previous_epoch` finished it, and rounds from the cut on as the view did."""
    job = Job()
    results = job.push()
    job.rounds.view = view_of(job.settings, p=5, cuts=[(0, 1, 3)])
    assert job.rounds.on_result(*changed(results[1], epoch=5), NOW) is None
    assert job.rounds.on_result(*changed(results[1], epoch=3), NOW) is not None
    job.rounds.view = view_of(job.settings, p=5, cuts=[(0, 0, 3)])
    assert job.rounds.on_result(*changed(results[0], epoch=3), NOW) is None
    assert job.rounds.on_result(*changed(results[0], epoch=5), NOW) is not None


# ---------------------------------------------------------------- asking and repeating


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


# ---------------------------------------------------------------- plans


LIGHT, HEAVY = Choice("topk", 0.1), Choice("topk", 0.01)


def carry(job: Job, version: int, plan: bytes) -> None:
    job.shards[job.layout.keys[0].shard].on_plan(0, version, plan)


@pytest.mark.parametrize("theirs", ["DATA", "SKIP", "UNUSED"])
def test_a_plan_holds_from_the_next_round_on(theirs):
    """Not in the round that brings it, even when its result comes first; and also when that round is skipped."""
    job = Job()
    carry(job, 4, plan_bytes(4, HEAVY))
    results = job.push(kinds=[theirs] * 3, theirs=[theirs] * 3)
    take_in(job.rounds, *results[0])
    assert (job.rounds.plan_version, job.rounds.choice(job.layout.keys[1])) == (0, LIGHT)
    decision = job.hand_in(results, (1, 2))
    assert decision.kind == ("SKIP" if theirs == "SKIP" else "DATA")
    assert (job.rounds.plan_version, job.rounds.choice(job.layout.keys[1])) == (4, HEAVY)
    assert job.rounds.choice(job.layout.keys[0]) == Choice("dense", 16.0)  # small tensors are not ruled by plans


def test_a_plan_that_has_expired_gives_way_to_the_light_level():
    """It holds in its last round, and not in the one after."""
    job = Job()
    carry(job, 1, plan_bytes(1, HEAVY, expires_round=2))
    choices = []
    for _ in range(4):
        choices.append(job.rounds.choice(job.layout.keys[1]))
        job.play()
    assert choices == [LIGHT, HEAVY, HEAVY, LIGHT]
    assert job.rounds.plan_version == 1


@pytest.mark.parametrize(("values", "codec"), [("fp16", "topk"), ("fp32", "dense")])
def test_a_choice_is_priced_with_the_job_s_options(values, codec):
    """At 40 % entries of 6 bytes are more than dense at 16 bits, and those of 4 are less."""
    job = Job(codec_light=0.4, codec_values=values)
    assert job.rounds.choice(job.layout.keys[1]).codec == codec


def test_a_choice_is_dense_where_dense_is_no_larger():
    """A plan may name a level at which compression costs more than it saves."""
    job = Job(codec_light=0.9)
    assert job.rounds.choice(job.layout.keys[1]) == Choice("dense", 16.0)


def test_exact_sums_are_exact_for_small_tensors_too():
    """Who asks for dense float32 does not want halves anywhere."""
    job = Job(codec_name="dense", codec_light=32.0, codec_heavy=16.0)
    assert job.rounds.choice(job.layout.keys[0]) == Choice("dense", 32.0)
    assert Job(codec_small_bits=32).rounds.choice(job.layout.keys[0]) == Choice("dense", 32.0)


def test_a_plan_for_another_model_is_an_error():
    """So is one whose length is not what the header says."""
    job = Job()
    carry(job, 1, plan_bytes(1, HEAVY))
    message, frames = job.push()[0]
    for bad in ([*frames[:-1], b"\x99"], frames[:-1], [*frames, b"x"]):
        with pytest.raises(WireError, match="plan"):
            job.rounds.on_result(message, bad, NOW)
    with pytest.raises(WireError, match="plan"):
        job.rounds.on_result(changed((message, frames), plan=2)[0], [frames[0], b"\x99\x01"], NOW)


# ---------------------------------------------------------------- skips and the end


def test_too_many_skips_in_a_row_stop_the_run():
    """Exactly at the limit, with the rounds and the limit named; a round that counts begins the count anew."""
    job = Job(skip_limit=3)
    bad = {"theirs": ("DATA", "SKIP", "DATA")}
    for kinds in (bad, bad, {}, bad, bad):
        job.play(**kinds)
    assert job.rounds.skipped_in_a_row == 2
    with pytest.raises(TooManySkips, match=r"rounds 3 to 5 were all skipped.*skip.limit = 3"):
        job.play(**bad)


def test_a_limit_of_one_stops_at_the_first_skip():
    """The smallest limit there is."""
    with pytest.raises(TooManySkips, match=r"rounds 0 to 0"):
        Job(skip_limit=1).play(kinds=("SKIP", "SKIP", "SKIP"))


def test_a_finished_worker_goes_on_until_all_have():
    """EMPTY beside the others' data decides ordinary rounds; all EMPTY is the end, and after it nothing moves."""
    job = Job()
    for _ in range(3):
        assert job.play(kinds=("EMPTY",) * 3).kind == "DATA"
    results = job.push(kinds=("EMPTY",) * 3, theirs=("EMPTY",) * 3)
    decision = job.hand_in(results)
    assert (decision.round, decision.kind, decision.take_back) == (3, "END", ())
    assert (job.rounds.ended, job.rounds.round) == (True, 3)
    assert job.rounds.decide() is None
    assert job.rounds.on_result(*results[0], NOW) is None
    assert job.rounds.tick(NOW + 1000) == []


ALL = {kind: (kind,) * 5 for kind in ("DATA", "UNUSED", "SKIP", "JOINED", "EMPTY")}
"""A kind for every key."""


@pytest.mark.parametrize("theirs", ["JOINED", "EMPTY"])
def test_a_round_in_which_all_wait_is_a_join(theirs):
    """Nothing is applied or taken back, the next round is open, and then training goes on as before."""
    job = Job()
    job.play()
    for _ in range(2):
        decision = job.play(kinds=ALL["JOINED"], theirs=ALL["DATA"])
        assert (decision.kind, decision.used) == ("DATA", (0b11, 1, 1))
    decision = job.play(kinds=ALL["JOINED"], theirs=ALL[theirs])
    assert (decision.round, decision.kind, decision.used, decision.take_back) == (3, "JOIN", (0, 0, 0), ())
    assert (job.rounds.round, job.rounds.ended, job.rounds.previous_skipped) == (4, False, False)
    assert job.play(theirs=ALL["DATA" if theirs == "JOINED" else "EMPTY"]).kind == "DATA"
    assert job.play(kinds=ALL["EMPTY"], theirs=ALL["EMPTY"]).kind == "END"


def test_a_join_after_a_skipped_round_passes_the_skip_on_and_ends_the_count():
    """Its pushes say that the round before was skipped, the next ones that the JOIN was not."""
    job = Job(skip_limit=2)
    assert job.play(theirs=ALL["SKIP"]).kind == "SKIP"
    results = job.push(kinds=ALL["JOINED"], theirs=ALL["JOINED"])
    assert all(sent.push.previous_skipped for sent in job.rounds.pushes.sent.values())
    assert job.hand_in(results).kind == "JOIN"
    assert (job.rounds.previous_skipped, job.rounds.skipped_in_a_row) == (False, 0)
    assert job.play(theirs=ALL["SKIP"]).kind == "SKIP"
    assert job.play().kind == "DATA"


def test_a_worker_that_waits_sees_the_others_skips():
    """It counts them, so that all give up in the same round."""
    job = Job(skip_limit=2)
    assert job.play(kinds=ALL["JOINED"], theirs=ALL["SKIP"]).take_back == ()
    with pytest.raises(TooManySkips, match="rounds 0 to 1"):
        job.play(kinds=ALL["JOINED"], theirs=ALL["SKIP"])


def test_the_lead_is_the_donor_first_and_then_whom_results_name():
    """Every worker knows it alike: it says whose buffers count, and from whom others may fetch."""
    job = Job()
    rounds = Rounds(0, job.layout, job.settings)
    assert rounds.lead == -1
    rounds.view = view_of(job.settings, slots=[1], donor=1)
    assert rounds.lead == 1
    leads = [job.rounds.lead]
    for mine, theirs in (("DATA", "DATA"), ("JOINED", "UNUSED"), ("JOINED", "SKIP"), ("JOINED", "JOINED"), ("SKIP", "DATA")):
        job.play(kinds=ALL[mine], theirs=ALL[theirs])
        leads.append(job.rounds.lead)
    assert leads == [0, 0, 1, 1, 1, 0]


def test_a_worker_that_left_with_the_last_state_is_told():
    """Others wait in join() for steps that it made alone: without it they could not go on, and would wait in vain."""
    job = Job()
    job.play(theirs=ALL["JOINED"])
    with pytest.raises(UsageError, match=r"worker 0 has left its session, and others wait in join\(\)"):
        job.play(kinds=ALL["EMPTY"], theirs=ALL["JOINED"])
    leaver = Job()
    leaver.play(theirs=ALL["JOINED"])
    leaver.rounds.leaving = True
    with pytest.raises(UsageError, match=r"worker 0 is leaving, by leave\(\) or SIGTERM, and others wait in join\(\)"):
        leaver.play(kinds=ALL["EMPTY"], theirs=ALL["JOINED"])
    both = Job()
    both.play()
    assert both.play(kinds=ALL["EMPTY"], theirs=ALL["JOINED"]).kind == "JOIN"  # worker 1 made the same steps
    assert both.rounds.lead == 1


# ---------------------------------------------------------------- batches and buffers


def test_the_batch_grows_and_shrinks_with_the_plan():
    """One batch before a plan holds, in the round that brings it, and after it has expired; workers change in the same round."""
    job = Job()
    carry(job, 1, plan_bytes(1, HEAVY, expires_round=3, batch_multiplier=8))
    batches = []
    for kinds in ("DATA", "SKIP", "JOINED", "DATA", "DATA"):
        batches.append(job.rounds.batch_multiplier)
        job.play(kinds=ALL[kinds], theirs=ALL[kinds])
    assert batches == [1, 8, 8, 8, 1]


def test_a_plan_comes_with_a_join_too():
    """It is in force when training goes on."""
    job = Job()
    carry(job, 1, plan_bytes(1, HEAVY))
    assert job.play(kinds=ALL["JOINED"], theirs=ALL["JOINED"]).plan is None
    assert job.rounds.choice(job.layout.keys[1]) == HEAVY
    assert job.play(kinds=ALL["JOINED"], theirs=ALL["JOINED"]).plan.version == 1


def test_buffers_are_exact_whatever_the_plan_says():
    """All workers must have the same bits as the lead."""
    job = Job(table=BUFFERED, codec_small_bits=16)
    carry(job, 1, plan_bytes(1, HEAVY, tensors=len(BUFFERED)))
    for _ in range(2):
        choices = {key.number: job.rounds.choice(key) for key in job.layout.keys}
        assert [choices[key.number] for key in job.layout.keys if key.buffer] == [Choice("dense", 32.0)] * 2
        job.play(theirs=("UNUSED", "UNUSED", "DATA", "DATA", "DATA"))
    assert choices[3] == HEAVY


def test_buffers_of_a_skipped_round_are_not_taken_back():
    """They are values, not something to be added to those of the next round; the gradients of that round are."""
    job = Job(table=BUFFERED)
    decision = job.play(theirs=("UNUSED", "UNUSED", "DATA", "SKIP", "DATA"))
    assert decision.kind == "SKIP"
    assert [push.key for push, _ in decision.take_back] == [2, 3, 4]


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "fields",
    [
        {"elements": 2047},
        {"elements": 1 << 31},
        {"used": 2},
        {"count": 3},
        {"count": 1 << 31},
        {"frames": [1]},
        {"frames": []},
        {"codec": "zip"},
        {"codec": "dense"},
        {"level": 0.0},
        {"level": 1e300},
        {"level": float("nan")},
    ],
    ids=str,
)
def test_a_result_that_does_not_fit_is_an_error(fields):
    """Sizes come from the layout: nothing is decoded that disagrees with it."""
    job = Job()
    with pytest.raises(WireError):
        received(job.rounds.on_result(*changed(job.push()[1], **fields), NOW))


@given(st.integers(0, 1 << 14), st.integers(1, 255))
def test_a_damaged_payload_is_an_error_or_safe(position, flip):
    """The checksum has been passed by then; a server that goes wrong must still not make a worker read wild memory."""
    job = Job()
    message, (frame,) = job.push()[1]
    damaged = bytearray(frame)
    damaged[position % len(damaged)] ^= flip
    try:
        decode = job.rounds.on_result(message, [bytes(damaged)], NOW)
        received(decode)
    except WireError:
        return
    assert decode.payload.nbytes == len(frame)


# ---------------------------------------------------------------- all together, over a bad network


class World:
    """Workers and shards with a network between them that loses, doubles and reorders, and a clock."""

    STEPS = ((4, 3, 2), (1, 3, 0))
    """Steps that each worker has data for, before the first join and before the second; then all finish, worker 2 at once."""

    def __init__(self, seed: int, *, loss: float, double: float, **options) -> None:
        self.settings = settings_of(workers_count=3, servers_count=2, timeouts_resend=0.2, **options)
        self.layout = layout_of(self.settings)
        self.draw = random.Random(seed)
        self.loss, self.double = loss, double
        self.shards = [Shard(number, BOOT, self.settings) for number in range(2)]
        view = view_of(self.settings)
        for shard in self.shards:
            shard.on_layout(0, self.layout)
            shard.on_view(view)
            shard.on_plan(0, 1, plan_bytes(1, HEAVY))
        self.members = [Member(slot, self.settings, self.layout) for slot in range(3)]
        self.rounds = [Rounds(0, self.layout, self.settings) for _ in range(3)]
        for rounds in self.rounds:
            rounds.view = view
        self.pushed = [-1, -1, -1]
        self.joins, self.steps = [0, 0, 0], [0, 0, 0]
        self.log: list[list] = [[], [], []]
        self.now = 0.0
        self.flying: list[tuple] = []

    def send(self, source: int | None, actions) -> None:
        """Give messages to the network."""
        for each in sends(actions):
            for peer in each.peers:
                frames = [bytes(frame) for frame in each.payload]
                copies = (self.draw.random() >= self.loss) + (self.draw.random() < self.double)
                self.flying += [(source, peer, each.message, frames)] * copies

    def push_round(self, slot: int) -> None:
        """Push every key of a worker's round: some of it not used, some not finite, and nothing when it has no data."""
        rounds, member = self.rounds[slot], self.members[slot]
        self.pushed[slot] = round_ = rounds.round
        join = self.joins[slot]
        finished = join == len(self.STEPS) or (slot == 2 and join == 1)
        waits = not finished and self.steps[slot] >= self.STEPS[join][slot]
        self.steps[slot] += 1
        for key in self.layout.keys:
            if finished or waits:
                kind = "EMPTY" if finished else "JOINED"
            elif (slot + key.number + round_) % 5 == 0:
                kind = "UNUSED"
            else:
                kind = "SKIP" if (slot, round_, key.number) in ((1, 2, 1), (0, 3, 1)) else "DATA"
            if kind == "DATA":
                message, frames = member.data(key.number, round_, skipped=rounds.previous_skipped, choice=rounds.choice(key))
            else:
                weight = 0.0 if slot == 0 else 2.5  # what a missing gradient counts for is up to the worker
                message, frames = member.bare(kind, key.number, round_, skipped=rounds.previous_skipped, weight=weight)
            payload = np.frombuffer(frames[0], np.uint8) if frames else None
            self.send(slot, rounds.pushed(message, payload, self.now))

    def deliver(self) -> None:
        """Hand over one message, any of those that fly."""
        source, peer, message, frames = self.flying.pop(self.draw.randrange(len(self.flying)))
        if source is not None:
            shard, back = self.shards[int(peer.split()[1])], b"%d" % source
            self.send(None, shard.on_push(back, message, frames) if isinstance(message, m.Push) else shard.on_ask(back, message))
            return
        slot = int(peer)
        if isinstance(message, m.Missing):
            self.send(slot, self.rounds[slot].on_missing(message, self.now))
            return
        assert isinstance(message, m.Result)
        rounds = self.rounds[slot]
        if not rounds.ended and message.round == rounds.round:
            take_in(rounds, message, frames, self.now)
            results = dict(rounds._results)
            decision = rounds.decide()
            if decision is not None:
                entry = [(key, results[key].kind, results[key].used, results[key].count) for key in sorted(results)]
                self.log[slot].append((decision.round, decision.kind, decision.used, entry, rounds.lead, rounds.plan_version))
                if decision.kind == "JOIN":
                    self.joins[slot], self.steps[slot] = self.joins[slot] + 1, 0
                for push, payload in decision.take_back:
                    self.members[slot].coders[push.key].take_back(push, payload)

    def play(self) -> "World":
        """Play until every worker has seen the end."""
        while not all(rounds.ended for rounds in self.rounds):
            assert self.now < 600, "it hangs"
            for slot, rounds in enumerate(self.rounds):
                if not rounds.ended and self.pushed[slot] < rounds.round:
                    self.push_round(slot)
                if not rounds.ended:
                    self.send(slot, rounds.tick(self.now))
            for _ in range(self.draw.randrange(6)):
                if self.flying:
                    self.deliver()
            self.now += 0.02
        return self

    def bits(self) -> list[bytes]:
        """Return every residual, at the workers and at the shards."""
        mine = [coder.residual.tobytes() for member in self.members for coder in member.coders if coder.residual is not None]
        return mine + [record.residual().tobytes() for shard in self.shards for _, record in sorted(shard.records.items())]


@pytest.mark.parametrize("codec", ["topk", "random_block"])
def test_a_bad_network_changes_no_bit(codec):
    """A fifth lost, a tenth doubled, all reordered; with skips, unused keys, a plan, joins, and a worker that finishes early.

    Every worker decides the same rounds in the same way, nobody hangs, and every residual has the same bits in the end.
    """
    clean = World(0, loss=0.0, double=0.0, codec_name=codec).play()
    assert clean.log[0] == clean.log[1] == clean.log[2]
    kinds = [kind for _, kind, *_ in clean.log[0]]
    assert kinds == ["DATA", "DATA", "SKIP", "SKIP", "JOIN", "DATA", "DATA", "DATA", "JOIN", "END"]
    assert [lead for *_, lead, _ in clean.log[0]] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert clean.log[0][-1][-1] == 1  # the plan has arrived
    for seed in range(8):
        bad = World(seed, loss=0.2, double=0.1, codec_name=codec).play()
        assert bad.log == clean.log
        assert bad.bits() == clean.bits()


class Lent:
    """What lies in the memory of a server that may write over it."""

    stands = True


def test_what_was_overwritten_while_it_was_decoded_counts_as_lost():
    """The result is asked for again, and no blank shard gets what is left of it."""
    job, loan = Job(), Lent()
    results = job.push()
    for key in KEYS:
        decode = job.rounds.on_result(*results[key], NOW, loan if key == 1 else None)
        loan.stands = key != 1
        job.rounds.decoded(decode, stands=decode.stands)
    assert job.rounds.decide() is None
    assert 1 not in job.rounds._results
    (ask,) = sends(job.rounds.tick(NOW + 100), m.Ask)
    assert ask.message.keys == [1]
    take_in(job.rounds, *results[1])
    assert job.rounds.decide().kind == "DATA"


def test_results_that_no_longer_stand_are_given_to_nobody():
    """A blank shard would go on after something else."""
    job, loan = Job(), Lent()
    results = job.push()
    for key in KEYS:
        job.rounds.decoded(job.rounds.on_result(*results[key], NOW, loan if key == 1 else None))
    job.rounds.decide()
    view = view_of(job.settings, p=2, cuts=[(0, 1, 1)], restore=[(0, BOOT)])

    def restored() -> list[int]:
        given = job.rounds.retained.restores(view, 1, 0, who=(0, 1), server_of={0: "server 0"})
        return [send.message.result.key for send in given]

    assert restored() == [0, 1, 2]
    loan.stands = False
    assert restored() == [0, 2]
