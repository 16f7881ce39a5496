"""Bugs that are planted in the real state machines, to see that the simulation catches them.

Each is a change of one method, as somebody could make it by mistake. `SEEDS` has a run that each fails in, and passes without.
"""

import contextlib
from dataclasses import replace
from unittest import mock

import msgspec
from msgspec import structs

from ps_accordion.coordinator.history import History
from ps_accordion.coordinator.machine import Coordinator
from ps_accordion.coordinator.membership import Membership
from ps_accordion.coordinator.views import Views
from ps_accordion.server.folding import Folds
from ps_accordion.server.memory import ShardMemory, ShardState
from ps_accordion.server.record import KeyRecord
from ps_accordion.server.relay import Relay
from ps_accordion.server.replaying import Replays
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Record, Send
from ps_accordion.worker.coder import KeyCoder
from ps_accordion.worker.exchange import Exchange
from ps_accordion.worker.rounds import Decide, Rounds

__all__ = ["BUGS", "planted"]

BUGS = {}


def bug(owner, name):
    """Register a replacement of `owner.name`; it gets the real one first."""

    def register(function):
        BUGS[function.__name__] = (owner, name, function)
        return function

    return register


@contextlib.contextmanager
def planted(name):
    """Have one bug for as long as this lasts."""
    owner, attribute, function = BUGS[name]
    real = owner.__dict__[attribute]
    if isinstance(real, property):
        changed = property(lambda self: function(real.fget, self))
    else:

        def changed(*args, **fields):
            return function(real, *args, **fields)

    with mock.patch.object(owner, attribute, changed):
        yield


# ---------------------------------------------------------------- lost disks


@bug(ShardState, "is_blank")
def a_blank_shard_answers(real, self, layout, record):
    return False


@bug(Views, "blank")
def a_lost_memory_goes_unnoticed(real, self, shards):
    return []


@bug(Views, "blank")
def a_lost_memory_is_one_only_if_it_says_so(real, self, shards):
    known = {number: boot for number, boot, _ in self.view.shards} if self.view is not None else {}
    said = self.proposal.reports if self.proposal is not None else {}
    return [(n, boot) for n, boot, _ in shards if known.get(n) != boot or (n in said and said[n].blank)]


@bug(Rounds, "held")
def a_promised_worker_decides(real, self):
    return False


@bug(Views, "_cut_of_workers")
def the_cut_is_that_of_the_slowest(real, self, layout, proposal):
    said = [each for promise in proposal.promises.values() for each in promise.layouts if each[0] == layout]
    return min((round_, epoch) for _, round_, epoch, _ in said) if said else (0, -1)


# ---------------------------------------------------------------- replays


@bug(Shard, "_folding")
def a_replay_forgets_a_skip(real, self, layout, record, held, skipped):
    return real(self, layout, record, held, False)


@bug(Replays, "finished")
def a_copy_is_of_what_the_round_left(real, self, layout, record):
    before = record.before
    record.before = record.after
    real(self, layout, record)
    record.before = before


@bug(Replays, "begun_anew")
def copies_stay_though_their_loss_was_stated(real, self, layout, record):
    return None


@bug(Replays, "_reach")
def pushes_of_whoever_is_there_are_replayed(real, self, layout, cut, members):
    reach = real(self, layout, cut, members)
    if reach is None:
        return None
    kept = {slot: {round_ for round_, _ in offer.rounds} for slot, (_, offer) in self._offers[layout].items()}
    who = {round_: [pair for pair in sorted(members.items()) if round_ in kept[pair[0]]] for round_ in range(cut - 4, cut)}
    return reach._replace(first=cut - 4, members=who)


@bug(ShardMemory, "write")
def a_loss_is_forgotten_with_the_next_view(real, self, state):
    real(self, state if state.epoch < 0 else msgspec.structs.replace(state, anew=False))


# ---------------------------------------------------------------- the shard


@bug(Shard, "_is_member")
def pushes_of_dead_processes_count(real, self, push):
    return push.slot in self.members


@bug(Shard, "on_freeze")
def a_frozen_shard_goes_on(real, self, freeze):
    actions, self.promise = real(self, freeze), -1
    return actions


@bug(Shard, "on_view")
def a_view_changes_members_only(real, self, view):
    if view.p <= self.epoch:
        return []
    self.members, self.epoch = dict(view.members), view.p
    return [action for (layout, _), record in self.records.items() for action in self._try_finish(layout, record)]


@bug(KeyRecord, "undo")
def a_round_is_never_undone(real, self, cut, previous_epoch):
    return None


@bug(KeyRecord, "undo")
def undo_forgets_the_residual(real, self, cut, previous_epoch):
    after = self.after
    real(self, cut, previous_epoch)
    self.after = after


@bug(KeyRecord, "undo")
def undo_goes_to_the_other_half(real, self, cut, previous_epoch):
    undone = self.round >= cut
    real(self, cut, previous_epoch)
    if undone:
        self.after = 1 - self.after


@bug(KeyRecord, "undo")
def undo_keeps_the_plan(real, self, cut, previous_epoch):
    plan = self.plan
    real(self, cut, previous_epoch)
    self.plan = plan


@bug(KeyRecord, "start")
def a_skip_does_not_go_back(real, self, *, skipped):
    return self.after


@bug(KeyRecord, "start")
def a_skip_always_changes_halves(real, self, *, skipped):
    return 1 - self.after if skipped else self.after


@bug(Shard, "_outcome")
def one_empty_push_ends_the_round(real, self, layout, record, held, *, skipped):
    if any(each.message.kind == "EMPTY" for each in held):
        held = [each._replace(message=replace_kind(each.message)) for each in held]
    return real(self, layout, record, held, skipped=skipped)


def replace_kind(push):
    return m.Push(push.layout, push.key, push.round, push.slot, push.incarnation, "EMPTY", 0.0, 0, push.previous_skipped)


# ---------------------------------------------------------------- the worker


@bug(Rounds, "on_missing")
def what_a_server_holds_frees_nothing(real, self, missing, now):
    return real(self, structs.replace(missing, held=[]), now)


@bug(Rounds, "_may_count")
def results_of_any_view_count(real, self, result):
    return True


@bug(Rounds, "on_view")
def results_stay_over_a_view(real, self, view, now, *, member):
    results, decoded = dict(self._results), set(self._decoded)
    real(self, view, now, member=member)
    if member:
        self._results, self._decoded = results, decoded


@bug(Rounds, "decide")
def the_first_skip_decides(real, self):
    if any(result.kind == "SKIP" for result in self._results.values()) and not self.out:
        for key in self.layout.keys:
            if key.number not in self._results and key.number in self.pushes.sent:
                skip = next(result for result in self._results.values() if result.kind == "SKIP")
                self._results[key.number] = m.Result(0, key.number, self.round, skip.epoch, "SKIP", 0)
                self._decoded.add(key.number)
    return real(self)


@bug(Rounds, "decide")
def skipped_pushes_are_not_taken_back(real, self):
    decision = real(self)
    return replace(decision, take_back=()) if isinstance(decision, Decide) else decision


@bug(Rounds, "standing")
def a_joiner_is_not_told_of_a_skip(real, self):
    return replace(real(self), previous_skipped=False)


@bug(Rounds, "standing")
def a_joiner_gets_no_plan(real, self):
    return replace(real(self), plan=b"")


@bug(Rounds, "on_result")
def a_plan_holds_at_once(real, self, result, frames, now):
    decode = real(self, result, frames, now)
    if self._next_plan is not None:
        self.plan = self._next_plan
    return decode


@bug(Rounds, "admit")
def who_comes_back_takes_nothing_back(real, self, standing, incarnation):
    real(self, standing, incarnation)
    return ()


@bug(Rounds, "admit")
def who_comes_back_takes_all_back(real, self, standing, incarnation):
    left = tuple((push, payload) for push, payload in self._left if payload is not None)
    real(self, standing, incarnation)
    return left


@bug(Exchange, "admit")
def who_comes_back_pushes_as_before(real, self, standing, incarnation):
    before = [coder.incarnation for coder in self.coders]
    real(self, standing, incarnation)
    for coder, old in zip(self.coders, before, strict=True):
        coder.incarnation = old


@bug(Exchange, "has_state")
def who_looks_on_hands_out_its_state(real, self):
    return not self.behind


# ---------------------------------------------------------------- who leaves, and who is new


@bug(Exchange, "flush")
def a_leaver_goes_before_its_round_counts(real, self):
    real(self)
    if self.rounds.idle == "FLUSH":
        self.rounds.idle, self.flushed = "EMPTY", self.rounds.round


@bug(Exchange, "_end")
def a_skipped_flush_is_not_sent_again(real, self, decision):
    if self.rounds.idle == "FLUSH":
        self.rounds.idle, self.flushed = "EMPTY", decision.round
    real(self, decision)


@bug(Exchange, "stands")
def a_leaver_hands_out_no_state(real, self):
    return real(self) and self.rounds.idle != "FLUSH"


@bug(KeyCoder, "flush")
def what_is_handed_over_stays_here_too(real, self, **fields):
    residual = self.host_residual()
    pushed = real(self, **fields)
    if residual is not None:
        self.set_residual(residual)
    return pushed


@bug(Folds, "_keep")
def what_nobody_trains_with_is_thrown_away(real, self, layout, record, held, start):
    return start._replace(kind="UNUSED", used=0)


@bug(Shard, "_outcome")
def who_is_new_has_no_weight(real, self, layout, record, held, *, skipped):
    new = set(self._state.new)
    held = [
        each._replace(message=structs.replace(each.message, weight=0.0)) if each.message.slot in new else each for each in held
    ]
    return real(self, layout, record, held, skipped=skipped)


@bug(History, "_take")
def a_restarted_coordinator_forgets_who_left(real, self, record):
    if record["what"] != "left":
        real(self, record)


@bug(Membership, "left")
def a_leaver_may_go_before_it_is_logged(real, self, peer, leave, now):
    return [action for action in real(self, peer, leave, now) if not isinstance(action, Record)]


# ---------------------------------------------------------------- the coordinator and the relay


@bug(Views, "_capped")
def a_shard_that_missed_a_view_is_believed(real, self, layout, seen, round_, epoch):
    return round_, epoch


@bug(Views, "_cut")
def the_cut_is_after_the_highest_round(real, self, layout, reports):
    done = [(round_, epoch) for report in reports for of, round_, epoch in report.done if of == layout]
    return (max(done)[0] + 1, max(done)[1]) if done else (0, -1)


@bug(Views, "missing")
def one_promise_is_enough(real, self, shards):
    reports = self.proposal.reports if self.proposal is not None else {}
    return [] if reports else real(self, shards)


@bug(Views, "promised")
def promises_for_another_number_count(real, self, report):
    if self.proposal is not None:
        self.proposal.reports[report.shard] = report


@bug(Views, "propose")
def a_number_is_used_twice(real, self, members):
    if self.proposal is not None:
        self._last -= 1
    return real(self, members)


@bug(Membership, "_wanted")
def who_was_removed_is_let_in_again(real, self):
    alive = {worker.slot: worker.incarnation for worker in self._run.workers.values() if not worker.gone and not worker.left}
    return alive | real(self)


@bug(Views, "aim")
def an_overtaken_proposal_is_abandoned(real, self):
    return self.members


@bug(Coordinator, "__init__")
def a_restarted_coordinator_forgets(real, self, settings, now, *, records=()):
    records = list(records)
    real(self, settings, now, records=records[: len(records) // 2])


@bug(Shard, "_recall")
def a_promise_dies_with_its_process(real, self):
    real(self)
    self.promise = -1


@bug(ShardMemory, "save")
def results_leave_before_they_are_written(real, self, layout, record):
    if record.round % 2:
        real(self, layout, record)


@bug(KeyRecord, "target")
def the_residual_is_overwritten_in_place(real, self, start):
    real(self, start)
    return real(self, 1 - start)


@bug(Relay, "hello")
def a_late_greeting_takes_the_route(real, self, peer, hello):
    self._routes[hello.slot] = peer
    return [Send((peer,), hello)]
