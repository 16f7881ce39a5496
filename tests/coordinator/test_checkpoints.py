"""The coordinator completes a checkpoint when every member and every shard has written its part, and never before."""

import numpy as np
from coordinating import Job, answers
from machines import sends
from msgspec import structs

from ps_accordion.checkpoint import LayoutAt, Manifest
from ps_accordion.coordinator.layouts import Resume
from ps_accordion.coordinator.machine import Coordinator
from ps_accordion.coordinator.planning import Planner
from ps_accordion.layout import Layout, Tensor
from ps_accordion.wire import messages as m

DIGEST = "0" * 32


def worker(slot, step=10, *, rounds=10, error="", attempt=0):
    files = [f"worker-{slot}.safetensors", *["model-0.safetensors", "training.safetensors"][: 2 * (slot == 0)]]
    return m.Saved(False, slot, slot + 1, step, [(0, rounds, False)], [(file, 9, DIGEST) for file in files], error, attempt)


def shard(number, step=10, error="", attempt=0):
    parts = [] if error else [(f"shard-{number}.safetensors", 9, DIGEST)]
    return m.Saved(True, number, 0, step, [(0, 10, False)], parts, error, attempt)


def job():
    return Job().started().declared()


def said(actions, slot):
    return [message for message in answers(actions, b"w%d" % slot) if isinstance(message, m.Kept)]


def all_saved(job):
    for slot in range(2):
        job.say(b"w%d" % slot, worker(slot))
    for number in range(2):
        job.say(b"s%d" % number, shard(number))


def test_shards_are_asked_when_all_workers_stand_still():
    """Before that a shard may still finish a round."""
    run = job()
    assert sends(run.say(b"w0", worker(0)), m.Save) == []
    asked = sends(run.say(b"w1", worker(1)), m.Save)
    assert [send.message for send in asked] == [m.Save(10, [(0, 10, False)])]
    assert set(asked[0].peers) == {b"s0", b"s1"}


def test_a_checkpoint_is_due_when_all_parts_are_there():
    """It names them all, and where the layout stands."""
    run = job()
    all_saved(run)
    due = run.machine.checkpoints.due
    assert [part.file for part in due.manifest.parts] == [
        "model-0.safetensors", "shard-0.safetensors", "shard-1.safetensors", "training.safetensors", "worker-0.safetensors",
        "worker-1.safetensors",
    ]  # fmt: skip
    assert due.manifest.layouts == [LayoutAt(0, 10, run.layout.table)]
    actions = run.machine.checkpoints.kept("there", 54, "", run.now)
    assert said(actions, 0) == said(actions, 1) == [m.Kept(10, "there", 54)]
    assert said(run.say(b"w1", worker(1)), 1) == [m.Kept(10, "there", 54)]  # the answer was lost


def test_a_shard_that_is_silent_is_asked_again():
    """Its answer may be lost, or its server was away."""
    run = job()
    for slot in range(2):
        run.say(b"w%d" % slot, worker(slot))
    run.say(b"s0", shard(0))
    assert sends(run.later(0.5), m.Save) == []
    assert len(sends(run.later(1.0), m.Save)) == 1


def test_who_cannot_write_ends_this_one_for_all():
    """All go on, and hear why."""
    for failure in (worker(1, error="disk full"), shard(1, error="disk full")):
        run = job()
        run.say(b"w0", worker(0))
        actions = run.say(b"w1", failure if not failure.shard else worker(1))
        if failure.shard:
            actions = run.say(b"s1", failure)
        assert said(actions, 0) == said(actions, 1) == [m.Kept(10, "", 0, "disk full")]
        assert run.machine.phase == "running"


def test_one_that_could_not_be_made_may_be_tried_again_at_the_same_step():
    """What is repeated or comes late of the first try hears its error, and does not count in the second."""
    run = job()
    run.say(b"w0", worker(0))
    run.say(b"w1", worker(1, error="disk full"))
    assert said(run.say(b"w0", worker(0)), 0) == [m.Kept(10, "", 0, "disk full")]
    assert said(run.say(b"w0", worker(0, attempt=1)), 0) == []
    assert said(run.say(b"w1", worker(1)), 1) == [m.Kept(10, "", 0, "disk full")]
    (ask,) = sends(run.say(b"w1", worker(1, attempt=1)), m.Save)
    assert ask.message == m.Save(10, [(0, 10, False)], 1)
    for number, late in ((0, 1), (1, 0)):
        run.say(b"s%d" % number, shard(number, attempt=1 - late))
        assert run.machine.checkpoints.due is None
    run.say(b"s0", shard(0, attempt=1))
    assert run.machine.checkpoints.due is not None
    actions = run.machine.checkpoints.kept("there", 54, "", run.now)
    assert said(actions, 0) == [m.Kept(10, "there", 54, attempt=1)]
    assert said(run.say(b"w0", worker(0, attempt=2)), 0) == [m.Kept(10, "there", 54, attempt=2)]


def test_workers_at_different_steps_are_told():
    """They would wait for each other for ever."""
    run = job()
    run.say(b"w0", worker(0, 10))
    (kept,) = said(run.say(b"w1", worker(1, 12, rounds=12)), 0)
    assert "worker 0 at 10, worker 1 at 12" in kept.error


def test_a_worker_that_waits_in_the_next_round_ends_it():
    """It waits in `join`, or has no checkpoint at this step: nobody would ever begin that round."""
    run = job()
    run.say(b"w0", worker(0))
    waiting = m.Alive(1, 2, 1, [(0, 9, 0)], True, False, waits=[0])
    assert said(run.say(b"w1", waiting), 0) == []  # its last results are on their way
    waiting = m.Alive(1, 2, 1, [(0, 10, 0)], True, False, waits=[0])
    (kept,) = said(run.say(b"w1", waiting), 0)
    assert "worker 1 waits in round 10" in kept.error
    assert "is leaving" in kept.error


def test_none_is_made_that_no_job_could_go_on_from():
    """A worker has left, or one has come in addition: those that began have parts in the checkpoints before, which stay."""
    for members in ([(0, 1)], [(0, 1), (1, 2), (2, 3)]):
        run = job()
        run.machine.views.view = structs.replace(run.machine.view, members=members)
        actions = run.say(b"w0", worker(0))
        assert "a job can only go on from one of workers 0 to 1" in said(actions, 0)[0].error
        assert (sends(actions, m.Save), run.machine.checkpoints.due, run.machine.phase) == ([], None, "running")


def test_a_run_that_goes_on_begins_its_rounds_where_they_were():
    """The first view says so; another model is refused with both shapes."""
    fresh = Job()
    table = bytes(fresh.layout.table)
    manifest = Manifest(10, fresh.settings.terms(), [LayoutAt(0, 10, table)], [])
    fresh.machine = Coordinator(fresh.settings, fresh.now, resume=Resume(manifest, {}))
    fresh.started()
    assert fresh.machine.view.cuts == [(0, 10, -1)]
    other = Job()
    other.machine = Coordinator(other.settings, other.now, resume=Resume(manifest, {}))
    other.started()
    wrong = Layout([Tensor("weight", (7, 7), "float32")], num_shards=2, partition_elements=2048)
    other.declare(0, wrong)
    assert other.machine.phase == "aborted"
    assert "holds another model than the checkpoint" in other.machine.over.reason
    assert "(7, 7)" in other.machine.over.reason


def test_a_planner_goes_on_as_if_nothing_had_been():
    """The same reports make the same plans, versions and reasons, whether it was saved in between or not."""
    run = Job(regime_policy="accordion", regime_window="2 steps", regime_interval=1)
    whole, cut = (Planner.for_layout(0, run.layout, run.settings) for _ in range(2))
    rng = np.random.default_rng(3)
    reports = [(window, slot, rng.uniform(0.5, 2, len(run.layout.tensors))) for window in range(6) for slot in range(2)]
    for position, (window, slot, norms) in enumerate(reports):
        for planner in (whole, cut):
            planner.report(
                slot, window=window, round_=2 * window + 1, norms=norms.astype(np.float32), rate=0.1 / (1 + window // 2),
                loss=1.0, members=[0, 1],
            )  # fmt: skip
        if position == 6:
            state, cut = cut.state(), Planner.for_layout(0, run.layout, run.settings)
            cut.restore(state)
        assert (whole.plan, whole.state()["policy"]) == (cut.plan, cut.state()["policy"])
    assert whole.plan.version > 3
