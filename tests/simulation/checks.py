"""What must be true of a run, whatever went wrong in it.

1. All who decided a round hold the same bits, the same plan, and agree whether it was skipped.
2. Results are those of a sequential replay: the members of one view, once each, in slot order, on the residual that the round
   before left.
3. The run ended, and nobody was left behind.
4. What a worker encoded is in counted pushes or in its residual: none is counted that went back, none went back that was counted.
5. The ledger that the product itself makes at the end balances.
"""

import itertools

import numpy as np

from ps_accordion.codecs import Push as FoldPush
from ps_accordion.codecs import fold, registry
from ps_accordion.codecs.base import Coding
from ps_accordion.seeds import SERVER, seed_for
from ps_accordion.wire import messages as m

__all__ = ["check"]


def check(world):
    """Raise AssertionError if a promise was broken."""
    # Before the first view all are waited for: one that is silent then ends the run, which has nothing to lose yet.
    if "training starts from" in world.over or (not world.views and "has been silent" in world.over):
        world.count["lost starts"] += 1
        return
    if "nobody else has the model's state" in world.over and not world.holders:
        world.count["lost runs"] += 1
        _replicas_agree(world)
        return
    if "nobody has the last results" in world.over:
        world.count["lost results"] += 1
        _replicas_agree(world)
        return
    assert not world.over, ("the run was aborted", world.over)
    if not world.ended and any(worker.left for worker in world.workers_ever):
        world.count["runs that all have left"] += 1
        _replicas_agree(world)
        _verdict(world)
        return
    kinds = _replicas_agree(world)
    assert len(world.ended) == 1, ("one last round", world.ended)
    (last,) = world.ended
    assert sorted(kinds) == list(range(last)) or set(range(last)) - set(kinds) <= _rounds_nobody_saw(world, kinds, last), (
        "rounds are missing",
        sorted(kinds),
        last,
    )
    counted = _replay(world, kinds, last)
    assert not world.differing, ("a replay came to something else", world.differing)
    _ledger(world, counted)
    _verdict(world)


def _replicas_agree(world):
    states = {}
    for round_, name, state in world.applied:
        if (round_, name) in world.forgotten:
            continue
        states.setdefault(round_, {}).setdefault(state, []).append(name)
    for round_, groups in states.items():
        assert len(groups) == 1, ("replicas differ after round", round_, groups)
    return {round_: next(iter(groups))[1] for round_, groups in states.items()}


def _rounds_nobody_saw(world, kinds, last):
    """Rounds that were decided only by workers that had finished, or died before they could say so."""
    return {round_ for round_ in range(last) if round_ in world.results}


def _replay(world, kinds, last):
    """Fold every round again from what was pushed; return which pushes counted."""
    settings, layout = world.settings, world.layout
    suite = registry.suite(**settings.codec.options)
    residuals = {key.number: np.zeros(key.elements, np.float32) for key in layout.keys}
    bounds = dict.fromkeys(residuals, 0)
    counted = set()
    for round_ in range(last):
        results = world.results[round_]
        epochs = {result.epoch for result, _ in results.values()}
        assert len(epochs) == 1, ("one round, several views", round_, epochs)
        members = world.views[epochs.pop()].members
        skip = any(result.kind == "SKIP" for result, _ in results.values())
        _lose(world, round_, residuals, bounds)
        before = dict(residuals), dict(bounds)
        for key in layout.keys:
            codecs = registry.fitted(suite, key.rows)
            result, payload = results[key.number]
            pushes = [world.pushes[key.number, round_, slot, incarnation] for slot, incarnation in members]
            kinds_here = {push.kind for push, _ in pushes}
            order = {"SKIP": "SKIP", "DATA": "DATA", "UNUSED": "UNUSED", "FLUSH": "UNUSED", "EMPTY": "END"}
            expected = next(becomes for kind, becomes in order.items() if kind in kinds_here)
            assert result.kind == expected, ("kind of a result", round_, key.number, result.kind, expected)
            flushed = any(push.kind == "FLUSH" and data is not None for push, data in pushes)
            data = [
                FoldPush(push.weight, Coding(push.codec, push.level, push.elements, push.count, push.seed), data)
                for push, data in pushes
                if data is not None
            ]
            weights = sum(push.weight for push, _ in pushes)
            if expected == "UNUSED" and flushed:
                total = sum(np.float32(push.weight) * _vector(codecs, push.coding, push.payload, key.elements) for push in data)
                residuals[key.number] = np.float32(1.0 / weights) * total + residuals[key.number]
            if expected != "DATA":
                continue
            used = 0
            for push, _ in pushes:
                used |= push.used
            levels = [(push.codec, push.level) for push, _ in pushes if push.kind == "DATA"]
            reply = registry.lightest(levels, key.elements, codecs=codecs)
            bound = codecs[reply[0]].payload_bound(key.elements, reply[1])
            out, target = np.empty(bound, np.uint8), np.zeros(key.elements, np.float32)
            folded = fold(
                data,
                residuals[key.number],
                target,
                elements=key.elements,
                total_weight=weights,
                seed_reply=seed_for(settings.seed, 0, key.number, round_, SERVER),
                scratch=np.zeros(key.elements, np.float32),
                out=out,
                codecs=codecs,
                reply=reply,
                held=[(part.offset, part.length) for part in key.elements_of(used)],
                rule=settings.codec.residual_at_switch if 0 < bounds[key.number] < bound else "keep",
            )
            assert folded is not None
            assert payload == out[: folded.nbytes].tobytes(), ("result differs from the replay", round_, key.number)
            if folded.wrote:
                residuals[key.number] = target
            bounds[key.number] = bound
        if skip:
            residuals, bounds = before
        else:
            counted |= {(key.number, round_, *member) for key in layout.keys for member in members}
    _lose(world, last, residuals, bounds)
    for process in world.alive("server"):
        for (_, key), record in process.shard.records.items():
            mine = record.halves[record.start(skipped=kinds.get(last - 1) == "SKIP")]
            mine = np.zeros(record.key.elements, np.float32) if mine is None else mine
            if record.round >= last - 1:
                assert np.array_equal(mine, residuals[key]), ("residual of a shard differs from the replay", key)
    return counted


def _vector(codecs, coding, payload, elements):
    out = np.empty(elements, np.float32)
    registry.find(codecs, coding.codec).decode(payload, coding, out)
    return out


def _lose(world, round_, residuals, bounds):
    """Begin anew where a view says that a shard is blank, in this round, and the residual was not made again.

    Who has begun anew and then goes back has nothing from before either.
    """
    cuts = {p: view.cut_of(0)[0] for p, view in sorted(world.views.items())}
    blank = {}
    for p, cut in cuts.items():
        for shard, _ in world.views[p].restore:
            after = [of for of in cuts if of > p]
            same = itertools.takewhile(lambda of, shard=shard: shard not in dict(world.views[of].restore), after)
            begins = min([cut, *(cuts[of] for of in same)])
            # What a view said of a round does not hold if a later one went back past it: that round was made again, from another
            # state.
            if begins == round_ and not any(cuts[of] < begins for of in after):
                blank.setdefault(shard, []).append(cut)
    for key in world.layout.keys:
        if any((cut, key.number) not in world.replayed for cut in blank.get(key.shard, ())):
            residuals[key.number] = np.zeros(key.elements, np.float32)
            last, _ = world.results[round_ - 1][key.number] if round_ else (None, None)
            data = last is not None and last.kind == "DATA"
            bounds[key.number] = registry.get(last.codec).fitted(key.rows).payload_bound(key.elements, last.level) if data else 0


def _ledger(world, counted):
    names = {world.settings.codec.of(tensor.name).codec for tensor in world.layout.tensors if not tensor.small}
    if world.settings.codec.residual_at_switch != "keep" or names & {"signsgd", "terngrad"}:
        return  # what a switch throws away is itemised by its norm only, and what is clipped by its mass
    codecs = registry.suite(**world.settings.codec.options)
    for process in world.workers_ever:
        again = {round_ for round_, name in world.forgotten if name == process.name}
        theirs = {round_ for _, round_, *who in counted if tuple(who) in process.incarnations}
        if again and (again - theirs or not world.settings.servers.replay_rounds):
            continue  # what it pushed in a round that was made again, or again without it, is lost, and its account says so
        if process.state != "gone" or process.exchange is None or process.exchange.behind:
            continue  # what a dead worker had left out is lost with it
        if process.uncertain:
            continue  # as is what it had in a round that was undone, if it has heard of the end only
        for key in world.layout.keys:
            total, noise = np.zeros(key.elements), np.zeros(key.elements)
            for where, (push, data) in world.pushes.items():
                if where[0] != key.number or data is None or where[2:] not in process.incarnations:
                    continue
                out = np.empty(key.elements, np.float32)
                coding = Coding(push.codec, push.level, push.elements, push.count, push.seed)
                codec = registry.find(codecs, push.codec)
                codec.decode(data, coding, out)
                total += out * (where in counted)
                if codec.noisy(push.level):
                    noise += codec.rounding(data, coding, 0, out)  # also of pushes that went back: it does not go back with them
            residual = process.exchange.coders[key.number].host_residual()
            total += 0.0 if residual is None else residual
            encoded = process.gradient_sum.get(key.number, np.zeros(key.elements))
            error = (np.abs(total - encoded) - noise).max()
            assert error < 1e-3 * max(1.0, np.abs(encoded).max()), ("mass of a worker", process.name, key.number, float(error))


def _verdict(world):
    """Balance the ledger as the coordinator does when all have said goodbye."""
    for coordinator in world.alive("coordinator"):
        run = coordinator.machine.run
        for server in world.alive("server"):
            shard = server.shard
            whole = [(server.number, shard.boot)] if shard.whole else []
            coordinator.machine.handle(
                b"",
                m.Books(server.number, [(server.number, *shard.account())], whole=whole, boots=[(server.number, shard.boot)]),
                (),
                world.now,
            )
        verdict = run.accounts.verdict(run.views.members, range(world.settings.num_shards), ended=True)
        if verdict is not None:
            lost = {item.who for item in verdict.lost}
            for cut, key in world.begun_anew:
                assert cut == 0 or f"shard {world.layout.keys[key].shard}" in lost, ("a loss that the ledger does not know", key)
            assert not verdict.wrong, ("the ledger", str(verdict))
            items = {(item.who, item.incarnation): item.why for item in verdict.lost}
            # Who heard of the end instead of the coordinator's word that it may go, may have come too late with its own.
            for worker in (each for each in world.workers_ever if each.left and each.client.membership.released):
                why = items.get((f"worker {worker.number}", worker.client.membership.incarnation), "")
                assert "made again" in why or not why, ("an item of a worker that left in peace", why)
            silent = {who for who, why in items.items() if why == "gave no account at the end"}
            # What was said to a coordinator that then died may be lost: who has heard of the end does not say it again.
            deaf = world.count["kills of coordinators"] or coordinator.name in world.stalled
            lasted = [] if deaf else world.workers_ever
            for worker in (each for each in lasted if each.state == "gone"):
                member = (f"worker {worker.number}", worker.client.membership.incarnation)
                assert member not in silent, ("an account that was given is not known", member)
            world.count["sums compared"] += verdict.compared
            world.count["residuals itemised as lost"] += len(verdict.lost)
