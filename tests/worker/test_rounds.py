"""A worker's rounds: decided with every key in hand, alike whatever order results come in."""

import itertools

import pytest
from machines import BUFFERED, plan_bytes, view_of
from rounds import HEAVY, KEYS, LIGHT, NOW, Job, changed, take_in

from ps_accordion.errors import TooManySkips, UsageError, WireError
from ps_accordion.regimes import Choice
from ps_accordion.worker.rounds import Rounds


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


# ---------------------------------------------------------------- plans


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
