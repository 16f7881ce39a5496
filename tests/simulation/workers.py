"""Workers: thin loops around the real state machines, with a client that has neither sockets nor threads."""

import hashlib
from types import SimpleNamespace

import numpy as np
import twins
from process import Process
from world import RATE, TABLE

from ps_accordion.selection import Selection
from ps_accordion.telemetry.trace import Trace
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send
from ps_accordion.wire.lending import Lending
from ps_accordion.wire.silence import Silence
from ps_accordion.worker.accounting import Accounting
from ps_accordion.worker.client import Client
from ps_accordion.worker.handover import packed, unpacked
from ps_accordion.worker.host_exchange import HostExchange
from ps_accordion.worker.member import COORDINATOR, Membership
from ps_accordion.worker.overdue import Overdue
from ps_accordion.worker.restoring import Restoring
from ps_accordion.worker.rounds import Standing
from ps_accordion.worker.transfer import START, Blob, Donor, Joiner

__all__ = ["WorkerProcess"]


class SimulatedClient(Client):
    """A worker's client without sockets and threads: what is handed to another thread is done a moment later."""

    def __init__(self, process, settings, slot, token, restart):
        self.process = process
        self.membership = Membership(
            settings, terms=settings.explicit_terms(), slot=slot, token=token, now=process.world.now, restart=restart
        )
        self.error = None
        self.exchanges, self.donors, self.joiners = {}, {}, {}
        self.accounting = Accounting(self.membership)
        self.restoring = Restoring(self.membership, self.exchanges)
        self.events = SimpleNamespace(write=lambda **fields: None, on=False)
        self.trace = Trace()
        self.record = SimpleNamespace(result=self._result, gradient=self._gradient, push=lambda push, payload: None)
        self.codecs = SimpleNamespace(submit=self._submit)
        linked = process.world.processes.__contains__  # a link to a dead process has no connection
        self.transport = SimpleNamespace(
            send=process.post,
            send_soon=process.post,
            connect=lambda name, address: None,
            sent_bytes=0,
            linked=linked,
            broke=lambda name: False,
            lending=Lending(),  # off: memory of other processes is not simulated
        )
        self._broken = set()
        self._overdue, self._silence = Overdue(), Silence(settings.timeouts.heartbeat)
        self.state_bytes = 0
        self._garbage, self._on_tick, self._on_heard, self._on_wanted = {}, [], [], []
        self._key_free = {}

    def call(self, function):
        world, process = self.process.world, self.process
        world.at(0.0, lambda: world._run(process, function), process)

    call_soon = call

    def _submit(self, key, work):
        """Do work on the thread that owns a key: after all that came before it for this key."""
        world, process = self.process.world, self.process
        done = max(world.now + world.rng.uniform(0, 0.01), self._key_free.get(key, 0.0))
        self._key_free[key] = done
        world.at(done - world.now, lambda: world._run(process, work), process)

    def carry(self, actions):
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, m.Push):
                self._note(action.message, action.payload)
            super().carry([action])
            if isinstance(action, Send) and isinstance(action.message, m.Push):
                self.process.world.point(self.process, "w.push")

    def _note(self, push, payload):
        where = push.key, push.round, push.slot, push.incarnation
        data = np.frombuffer(bytes(payload[0]), np.uint8) if payload else None
        known = self.process.world.pushes.setdefault(where, (push, data))
        assert known[0] == push, ("another push in the place of one", known[0], push)
        assert data is None or np.array_equal(known[1], data), ("other bytes in the place of a push", push)

    def _result(self, result, payload):
        self.process.payloads[result.key, result.round, result.epoch] = payload.tobytes()

    def _gradient(self, layout, round_, key, used, vector):
        self.process.encoding(round_, key, used, vector)


class WatchedExchange(HostExchange):
    """An exchange that tells which results a round was decided by."""

    def _try_decide(self):
        rounds, round_ = self.rounds, self.rounds.round
        results = dict(rounds._results)
        try:
            super()._try_decide()
        finally:
            if rounds.round == round_ + 1:
                self.client.process.decided_by(round_, results)


class WorkerProcess(Process):
    """A worker whose script trains a vector a tensor: p -= rate x mean gradient, where the gradient is noise + rate x p."""

    kind = "worker"
    exchange_class = WatchedExchange

    def __init__(self, world, number, restart=0):
        super().__init__(world, number)
        self.life = world.count["worker lives"]
        world.count["worker lives"] += 1
        self.name = f"worker {number}.{self.life}"
        self.restart = restart
        self.client = SimulatedClient(self, world.settings, number, f"token {self.life}", restart)
        self.client.on_wanted(self._wanted)
        self.exchange = None
        self.params = [np.zeros(tensor.elements, np.float32) for tensor in TABLE]
        self.state = "connecting"
        self.asked = START
        self.gradient_sum, self.payloads, self.incarnations = {}, {}, set()
        self.error = None
        self.leaves = False
        """Whether it has been asked to leave."""
        self.left = False
        self.uncertain = False
        """Whether it has gone without knowing what became of the round in which it handed over its residual."""
        """Whether it has left, with the coordinator's word that nothing is lost."""
        self._open = None
        self._blob = None

    def heritage(self):
        return {"restart": self.restart + 1}

    def end(self, error):
        self.error = error

    @property
    def has_state(self):
        view = self.world.views.get(max(self.world.views, default=0))
        membership = self.client.membership
        inside = view is None or (membership.slot, membership.incarnation) in view.members  # it may not have heard yet
        return self.exchange is not None and self.exchange.has_state and inside and not self.leaves

    @property
    def last_round(self):
        return self.exchange.rounds.round - 1

    def describe(self):
        membership = self.client.membership
        rounds = self.exchange and self.exchange.rounds
        missing = rounds and sorted(key for key in rounds.pushes.sent if key not in rounds._results)
        where = rounds and (
            rounds.round,
            rounds.out,
            rounds.idle,
            rounds.ended,
            self.exchange.behind,
            self.exchange.is_open,
            missing,
        )
        return self.name, self.state, membership.incarnation, membership.member, membership.view and membership.view.p, where

    # ------------------------------------------------------------ what the loop does

    def receive(self, source, message, payload):
        peer = COORDINATOR if source.startswith("coordinator") else source
        self.client._handle(SimpleNamespace(peer=peer, message=message, payload=payload, error=None, posted=None, loan=None))
        self._go_on()

    def tick(self):
        self.client._tick()
        self._go_on()

    # ------------------------------------------------------------ what the script does

    def decided_by(self, round_, results):
        """Note by which results a round was decided, and compare them with what others had."""
        found = {
            key: (result, self.payloads.get((key, result.round, result.epoch)) if result.kind == "DATA" else None)
            for key, result in results.items()
        }
        membership, world = self.client.membership, self.world
        deciders = world.deciders.setdefault(round_, {})
        known = world.results.setdefault(round_, found)
        if known != found:
            # Rounds that only workers had decided which are out of a later view may be made again, if a disk was lost.
            older, newer = sorted(each[0][0].epoch for each in (known, found))
            views = [
                view for p, view in world.views.items() if older < p <= newer and view.restore and view.cut_of(0)[0] <= round_
            ]
            mine = {(membership.slot, membership.incarnation): self.name}
            gone = deciders if known[0][0].epoch == older else mine
            assert any(not gone.keys() & set(view.members) for view in views), ("workers decided a round differently", round_)
            world.count["rounds made again"] += 1
            world.forgotten |= {(round_, name) for name in gone.values()}
            if gone is mine:
                return
            world.results[round_] = found
            deciders.clear()
        deciders[membership.slot, membership.incarnation] = self.name

    def _go_on(self):
        if self.client.membership.joined:
            self.incarnations.add((self.client.membership.slot, self.client.membership.incarnation))
        if self.client.membership.gone:
            self.left = self.left or (self.state == "handed_over" and self.client.membership.over)
            self.uncertain = self.uncertain or self.state == "handing_over"
            if self.state in ("finishing", "handing_over"):  # it has heard of the end, and lacks its last results
                self.client.carry(self.client.accounting.close([self.exchange]))
                self.state = "leaving"
            self.client.carry(self.client.membership.bye())
            self.state = "gone" if self.state in ("leaving", "handed_over") else "refused"
            self.world.processes.pop(self.name, None)
        before = None
        while before != self.state:
            before = self.state
            getattr(self, f"_{self.state}")()

    def _connecting(self):
        membership, client = self.client.membership, self.client
        if not membership.inside:
            return
        self.exchange = self.exchange_class(client, 0, self.world.layout, self._decided)
        self.exchange.rounds.view = membership.view
        self.exchange.rounds.out = not membership.member
        client.exchanges[0] = self.exchange
        membership.declare(0, self.world.layout)
        self.state = "declaring"

    def _declaring(self):
        declared = self.client.membership.layouts[0]
        if declared.ready:
            self.exchange.behind = self.exchange.behind or declared.begun or not self.client.membership.member
            self.state = "between"

    def _between(self):
        """Between two steps."""
        if self.exchange.behind or not self.client.membership.member:
            if not self.client.membership.member:
                self.client.ask_in()
            self.state = "waiting_for_a_place"
        elif self.exchange.rounds.round >= self.world.finish[self.number]:
            self.exchange.finish()
            self.state = "finishing"
        elif self.leaves:
            self.state = "computing"
            self.client.call(self._flush)
        else:
            self.state = "computing"
            self.world.at(self.world.rng.uniform(0.01, 0.3), lambda: self.world._run(self, self._step), self)

    def _waiting_for_a_place(self):
        membership = self.client.membership
        if membership.out:
            self.client.ask_in()
        if not (membership.member and membership.inside) or self.exchange.rounds.held:
            return
        cut, _ = membership.view.cut_of(0)
        self._blob, self._cut = Blob(), cut
        self._incarnation = membership.incarnation
        if cut > 0:
            member, view = (membership.slot, membership.incarnation), membership.view
            others = [slot for slot, _ in view.members]
            joiner = Joiner(0, cut - 1, self._blob, self.client.settings, member, view.donor, others)
            self.client.joiners[0] = joiner
        self.state = "fetching"

    def _fetching(self):
        membership, joiner = self.client.membership, self.client.joiners.get(0)
        if not membership.member or (joiner is not None and membership.cut_of(0) < self._cut):
            self.client.joiners.pop(0, None)
            self.state = "between"
            return
        if joiner is not None and joiner.progress:
            return
        standing, params = Standing(), [np.zeros_like(part) for part in self.params]
        if joiner is not None:
            del self.client.joiners[0]
            standing, data = unpacked(self._blob.bytes())
            flat = np.frombuffer(data, np.float32)
            params = [part.copy() for part in np.split(flat, np.cumsum([part.size for part in self.params])[:-1])]
        if membership.incarnation == self._incarnation and not self.exchange.rounds.held:
            self.params = params
            self.exchange.admit(standing, membership.incarnation)
            self.world.count["came in"] += 1
            self.world.point(self, "w.admitted")
        self.state = "between"

    def _step(self):
        """Backward: hand over all gradients, in an order of its own."""
        world, round_ = self.world, self.exchange.rounds.round
        incarnation = self.client.membership.incarnation
        self._hand_out()
        self._open = [self._gradient_of(tensor, round_) for tensor in range(len(TABLE))]
        self.state = "in_a_round"
        for tensor in world.rng.sample(range(len(TABLE)), len(TABLE)):
            used = world.chance("unused", self.number, round_, tensor) >= world.faults.unused
            if world.chance("skip", self.number, incarnation, round_, tensor) < world.faults.skip:
                self._open[tensor][world.rng.randrange(TABLE[tensor].elements)] = np.nan
            self.exchange.add(tensor, self._open[tensor], used=used)

    def _gradient_of(self, tensor, round_):
        rng = np.random.default_rng((self.world.seed, self.number, round_, tensor))
        return rng.standard_normal(TABLE[tensor].elements).astype(np.float32) + RATE * self.params[tensor]

    def _computing(self):
        pass

    def _in_a_round(self):
        pass

    def encoding(self, round_, key, used, vector):
        """Note what goes into the residual for a gradient, for the ledger; what is not finite does not."""
        coder = self.exchange.coders[key]
        residual, velocity = coder.host_residual(), coder.host_velocity()
        if velocity is not None:
            spans = [(part.offset, part.length) for part in coder.key.slices]
            momenta = Selection(self.world.settings.codec, self.world.layout).momenta(coder.key)
            unused = [(part.offset, part.length) for part in coder.key.elements_of(used)]
            vector, _ = twins.advance(velocity, vector, list(zip(spans, momenta, strict=True)), unused)
        whole = vector if residual is None else vector + residual
        if np.isfinite(whole).all():
            masked = np.zeros_like(vector)
            every = self.world.layout.keys[key]
            for position, part in enumerate(every.slices):
                if used >> position & 1:
                    masked[part.offset : part.offset + part.length] = vector[part.offset : part.offset + part.length]
            self.gradient_sum[key] = self.gradient_sum.get(key, 0) + masked.astype(np.float64)

    def _decided(self, decision, timing):
        world, rounds = self.world, self.exchange.rounds
        if decision.kind == "END":
            world.ended.add(decision.round)
            return
        if decision.out and self.state == "handed_over":
            return  # the view without it came before the word that it may go
        if decision.out:
            self._open = None
            self.state = "between"
            world.count["lost steps"] += 1
            self._go_on()
            return
        if self._open is None:
            return  # it has finished, and only looks on
        if decision.kind == "DATA":
            for key in world.layout.keys:
                for position, part in enumerate(key.slices):
                    if decision.used[key.number] >> position & 1:
                        run = slice(part.start, part.start + part.length)
                        self.params[part.tensor][run] -= RATE * self._open[part.tensor][run]
        self._open = None
        self.client.donors.pop(0, None)
        state = hashlib.sha1(b"".join(part.tobytes() for part in self.params)).hexdigest()
        world.applied.append(
            (decision.round, self.name, (state, decision.kind, rounds.plan_version, rounds.previous_skipped, rounds.lead))
        )
        world.count["decided"] += 1
        self._report(decision.round)
        world.point(self, "w.applied")
        self.state = "between"
        self._go_on()

    def _report(self, round_):
        membership = self.client.membership
        scale = 5.0 if self.world.chance("norm", round_ // 2) < 0.5 else 1.0
        norms = np.full(len(TABLE), scale, np.float32)
        report = m.Report(membership.slot, membership.incarnation, 0, round_ // 2, round_, 0.1, 1.0)
        self.client.carry([Send((COORDINATOR,), report, (norms.tobytes(),))])

    def _finishing(self):
        if self.exchange.rounds.ended:
            self.client.carry(self.client.accounting.close([self.exchange]))
            if self.exchange.rounds.alone:
                self.client.membership.leave_others([])
            else:
                self.client.membership.leave("", 0)
            self.state = "leaving"

    def _flush(self):
        self.exchange.flush()
        self.state = "handing_over"
        self._go_on()

    def _handing_over(self):
        if self.exchange.rounds.idle == "FLUSH":
            return
        if self.exchange.rounds.ended:
            self.state = "finishing"
        elif self.exchange.flushed is None:
            self.state = "between"
        else:
            self.client.carry(self.client.accounting.close([self.exchange]))
            self.client.membership.leave_others([(0, self.exchange.flushed)])
            self.state = "handed_over"

    def _handed_over(self):
        if self.client.membership.released:
            self.world.count["left"] += 1
            self.left = True
            self._leaving_ends()

    def _leaving(self):
        if self.client.membership.gone or self.client.membership.released:
            self._leaving_ends()

    def _leaving_ends(self):
        self.state = "gone"
        self.world.processes.pop(self.name, None)

    def _gone(self):
        pass

    _refused = _gone

    # ------------------------------------------------------------ state for who joins

    def _wanted(self, get):
        if self.exchange is None or get.donor != self.number:
            return
        self.asked = get.round
        if self.exchange.stands:
            self._hand_out()

    def _hand_out(self):
        if self.asked <= START or self.asked != self.last_round or not self.exchange.has_state:
            return
        blob = Blob(packed(self.exchange.standing, b"".join(part.tobytes() for part in self.params)))
        self.client.donors[0] = Donor(0, self.asked, blob)
        self.world.point(self, "w.handed_out")
