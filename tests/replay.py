"""The whole two-way system once more, in numpy: from recorded gradients and the plan log to every result and residual.

Nothing here knows sockets, threads or kernels. `twins.py` has the codecs; this file has the rounds:

    worker   e := rule(e) if its level turned lighter;  v = g + e;  payload = C(v);  e := v - D(payload)
    dgc      u := momentum x u + g stands for g, whatever its key is sent as; where D(payload) of dgc is not 0, u := 0 afterwards
    server   total = sum of weight x D(payload), slot order;  p = total / weights + rule(E);  result = C(p);  E := p - D(result)
    skipped  a round with a gradient that is not finite: E as before it, and every payload pushed in it returns to its e
    buffers  one worker's, with weight 1, exact; of a skipped round nothing returns
"""

import fnmatch
import json
import tomllib
from pathlib import Path

import numpy as np
import thin
import twins

from ps_accordion.codecs import Coding
from ps_accordion.seeds import SERVER, SHARED, seed_for

__all__ = ["Replay", "plan_log"]

F32 = np.float32


def plan_log(directory):
    """Return ({version: {tensor name: (codec, level)}}, {round: version that its result of key 0 carried})."""
    plans = {0: {}}
    for line in (directory / "events-coordinator.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "plan":
            choices = zip(event["codecs"], event["levels"], strict=True)
            plans[event["version"]] = dict(zip(event["names"], choices, strict=True)) or plans[max(plans)]
    carried = {}
    for file in Path(directory).glob("events-server-*.jsonl"):
        for line in file.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "round":
                carried[event["round"]] = event["plan"]
    return plans, carried


class Replay:
    """State of all workers and shards for one layout."""

    def __init__(self, layout, settings, plans, carried):
        self.layout, self.settings, self.plans, self.carried = layout, settings, plans, carried
        workers = range(settings.workers.count)
        self.worker = {(slot, key.number): np.zeros(key.elements, F32) for slot in workers for key in layout.keys}
        self.server = {key.number: np.zeros(key.elements, F32) for key in layout.keys}
        self.velocity = {where: np.zeros_like(residual) for where, residual in self.worker.items()}
        self.worker_bound = dict.fromkeys(self.worker, 0)
        self.server_bound = dict.fromkeys(self.server, 0)
        self.basis = {}
        """What each key's next round goes on from; the same at all workers."""
        self.losses = []
        """(role, key, round, norm) of what switches of level threw away; role is a slot or "server"."""
        self.thrown = {where: np.zeros(residual.size) for where, residual in (self.worker | self.server).items()}
        """The same as vectors, summed: by (slot, key) and by key."""
        self.pushed = {where: np.zeros(residual.size) for where, residual in self.worker.items()}
        """What each worker's counted payloads stand for, summed."""
        self.applied = {number: np.zeros(residual.size) for number, residual in self.server.items()}
        """What the results stand for, summed."""

    def choice(self, key, round_):
        """Return codec and level of a key: those of the plan that the round before carried, if any."""
        if key.buffer:
            return "dense", 32
        names = [self.layout.tensors[part.tensor].name for part in key.slices]
        if key.small:
            exact = ("dense", 32) in map(self.light, names)
            return "dense", 32 if exact else self.settings.codec.small_bits
        plan = self.plans[self.carried.get(round_ - 1, 0)]
        choice = plan.get(names[0], self.light(names[0]))
        return twins.effective(*choice, key.elements, self.settings.codec.values, rows=key.rows)

    def momenta(self, key):
        """Return (span, momentum) of each tensor in a key that is given some."""
        tensors = [] if key.buffer else [(part, self.layout.tensors[part.tensor].name) for part in key.slices]
        return [
            ((part.offset, part.length), self.settings.codec.momentum) for part, name in tensors if self.light(name)[0] == "dgc"
        ]

    def light(self, name):
        """Return codec and light level of a tensor: of the first pattern that matches its name, else the job's."""
        codec = self.settings.codec
        rows = [*tomllib.loads(f"rows = {codec.tensors}")["rows"].items(), ("*", {"codec": codec.name, "light": codec.light})]
        row = next(row for pattern, row in rows if fnmatch.fnmatchcase(name, pattern))
        return row["codec"], row["light"]

    def round(self, round_, gradients, weights=None):
        """Run one round.

        Args:
            round_: Its number.
            gradients: (slot, key) -> (float32[n], used bits) of every push that was encoded; a missing entry was UNUSED.
            weights: What each slot's gradients count for; None is 1 for all.

        Returns:
            key -> (coding, payload), without the keys that had no data; None if the round is skipped.
        """
        weights = weights or [1.0] * self.settings.workers.count
        pushes = {key.number: [] for key in self.layout.keys}
        skip = False
        for (slot, number), (gradient, bits) in sorted(gradients.items()):
            key = self.layout.keys[number]
            pushed = self._push(slot, key, round_, gradient, bits, 1.0 if key.buffer else weights[slot])
            skip |= pushed is None
            if pushed is not None:
                pushes[number].append((slot, bits, pushed))
        if skip:
            for number, number_pushes in pushes.items():
                for slot, _, (_, coding, payload) in () if self.layout.keys[number].buffer else number_pushes:
                    self.worker[slot, number] = self.worker[slot, number] + F32(1) * twins.decode(coding, payload)
            return None
        results = {}
        for number, number_pushes in pushes.items():
            if number_pushes:
                used = 0
                for slot, bits, (_, coding, payload) in number_pushes:
                    used |= bits
                    self.pushed[slot, number] += twins.decode(coding, payload)
                key = self.layout.keys[number]
                total = 1.0 if key.buffer else sum(weights)
                results[number] = self._fold(key, round_, [push for _, _, push in number_pushes], used, total)
                self.applied[number] += twins.decode(*results[number])
                coding, payload = results[number]
                if coding.codec == "powersgd":
                    self.basis[number] = thin.basis_of(coding.level, key.elements, payload)
        return results

    def _push(self, slot, key, round_, gradient, bits, weight):
        codec, level = self.choice(key, round_)
        values, rule = self.settings.codec.values, self.settings.codec.residual_at_switch
        bound, where = twins.payload_bound(codec, level, key.elements, values, key.rows), (slot, key.number)
        residual, lost = self.worker[where], None
        held = [(part.offset, part.length) for part in key.elements_of(bits)]
        gradient, velocity = twins.advance(self.velocity[where], gradient, self.momenta(key), held)
        if 0 < self.worker_bound[where] < bound:
            residual, lost = twins.settle(rule, residual, gradient)
        who = SHARED if codec in twins.SHARED_SEED else slot + 1
        seed = seed_for(self.settings.seed, 0, key.number, round_, who)
        if codec == "quic_fl":
            seed = seed_for(self.settings.seed, 0, key.number, round_, SHARED) & ~0xFFFFFFFF | seed & 0xFFFFFFFF
        if codec in twins.SHARED and self.settings.codec.coverage == "cyclic":
            seed = twins.turn(codec, level, key.elements, seed_for(self.settings.seed, 0, key.number, 0, SHARED), round_)
        matrix = {"rows": key.rows, "basis": self.basis.get(key.number)}
        packed = twins.encode_holding(codec, level, gradient, residual, held, seed=seed, values=values, **matrix)
        if packed is None:
            return None
        if lost is not None:
            self.losses.append((slot, key.number, round_, lost))
            self.thrown[where] += self.worker[where].astype(np.float64) - residual
        self.worker[where], self.worker_bound[where] = packed.rest, bound
        coding = Coding(codec, level, key.elements, packed.count, seed if codec in twins.SHARED_SEED else 0)
        if codec == "dgc":
            velocity = np.where(twins.decode(coding, packed.payload) != 0, F32(0), velocity)
        self.velocity[where] = velocity
        return weight, coding, packed.payload

    def _fold(self, key, round_, pushes, used, total_weight, flushed=()):
        """Fold pushes; what is `flushed`, positions among them, is a residual that is handed over, whose level nobody answers."""
        values, number = self.settings.codec.values, key.number
        choices = [(coding.codec, coding.level) for at, (_, coding, _) in enumerate(pushes) if at not in flushed]
        bound = max(twins.payload_bound(*choice, key.elements, values, key.rows) for choice in choices)
        lighter = 0 < self.server_bound[number] < bound
        rule = self.settings.codec.residual_at_switch
        folded = twins.fold(
            pushes,
            self.server[number],
            elements=key.elements,
            total_weight=total_weight,
            seed_reply=seed_for(self.settings.seed, 0, number, round_, SERVER),
            values=values,
            reply=twins.lightest(choices, key.elements, values, key.rows),
            held=[(part.offset, part.length) for part in key.elements_of(used)],
            rule=rule if lighter else "keep",
            rows=key.rows,
        )
        if lighter:
            total = sum(F32(weight) * twins.decode(coding, payload) for weight, coding, payload in pushes)
            settled, lost = twins.settle(rule, self.server[number], total, float(F32(1.0 / total_weight)))
            self.losses.append(("server", number, round_, lost))
            self.thrown[number] += self.server[number].astype(np.float64) - settled
        self.server[number], self.server_bound[number] = folded.new_residual, bound
        return folded.coding, folded.payload
