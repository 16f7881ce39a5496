"""The loss ledger of a whole run: what workers and servers say that they pushed, applied, kept and lost, compared at the end.

    each worker    gradients = pushes that count + residual + lost
    each shard     means of the pushes = results + residual + lost
    each shard     the pushes that it counted = those that the workers do; the results that it gave = those that each worker saw

What a worker that is killed had in its residual is an item of its own: whose, after which round, of about which norm. It is
known from what that worker said last, once a second, so it is as of then. How many of its pushes counted dies with it, too; so
the third line is compared only where nobody has died. `ps_accordion/ledger.py` says what is added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..ledger import Tally, added
from ..wire import messages as m
from ..wire.actions import Action, Note
from . import history
from .history import Lost

__all__ = ["Accounts", "Verdict"]


@dataclass
class Verdict:
    """What the ledger comes to.

    Attributes:
        workers, servers: What is added up on each side; None where nothing is known.
        wrong: What does not balance, for people.
        open: What could not be compared, and why.
        compared: How many sums were compared.
        difference: Largest difference of two sums that should be equal.
        slack: What rounding explains of that one.
        lost: Items.
    """

    workers: Tally | None = None
    servers: Tally | None = None
    wrong: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    compared: int = 0
    difference: float = 0.0
    slack: float = 0.0
    lost: list[Lost] = field(default_factory=list)

    def compare(self, what: str, difference: float, slack: float) -> None:
        """Compare two sums that are `difference` apart, of which rounding explains `slack`."""
        self.compared += 1
        if not abs(difference) <= slack:  # NaN too
            self.wrong.append(f"{what} differ by {difference:.3g}, and rounding explains {slack:.1g}")
        if abs(difference) >= self.difference:
            self.difference, self.slack = abs(difference), slack

    def account(self, what: str, of: str, tally: Tally) -> None:
        """Compare the sums of one side's account, and see that its rounding at random is even."""
        self.compare(f"{what} {of}", tally.difference, tally.slack)
        if not tally.even:  # NaN too
            self.wrong.append(
                f"rounding {of} adds up to {tally.noise:.3g} and drifts by {tally.drift:.3g}, chance explains {tally.chance:.1g}"
            )

    @property
    def fields(self) -> dict[str, Any]:
        """What goes into the event log."""
        return {
            "balanced": not self.wrong,
            "workers": None if self.workers is None else self.workers._asdict(),
            "servers": None if self.servers is None else self.servers._asdict(),
            "compared": self.compared,
            "difference": self.difference,
            "slack": self.slack,
            "wrong": self.wrong,
            "open": self.open,
            "lost": [msgspec.structs.asdict(item) for item in self.lost],
            "text": str(self),
        }

    def __str__(self) -> str:
        parts = []
        if self.wrong:
            parts.append(f"DOES NOT BALANCE: {'; '.join(self.wrong[:3])}{'; ...' * (len(self.wrong) > 3)}")
        if self.workers is not None:
            parts.append(_sums("gradients", "pushed", self.workers))
        if self.servers is not None:
            parts.append(_sums("means", "applied", self.servers))
        if not self.wrong:
            parts.append(f"{self.compared} sums compared, at most {self.difference:.1g} apart: ok")
        if self.lost:
            parts.append(f"lost {len(self.lost)}: " + "; ".join(map(str, self.lost[:4])) + "; ..." * (len(self.lost) > 4))
        if self.open:
            parts.append(f"not compared: {'; '.join(self.open)}")
        return "ledger: " + " · ".join(parts)


class Accounts:
    """What workers and servers have said of their sums.

    Args:
        lost: Items that earlier coordinators of the run have logged.
        accounts: Accounts of workers that had finished then.
        settled: Incarnations of those that had left the others by then.
        found: Whether some shard had lost its memory by then, and got all of it back.
    """

    def __init__(
        self,
        lost: Iterable[Lost] = (),
        accounts: Iterable[m.Account] = (),
        settled: Iterable[int] = (),
        *,
        found: bool = False,
    ) -> None:
        self._settled = set(settled)
        self._found = found
        self._lost = {(item.who, item.incarnation): item for item in lost}
        self._workers = {account.incarnation: account for account in accounts}
        self._shards: dict[int, Tally] = {}
        self._norms: dict[int, tuple[int, float]] = {}

    # ------------------------------------------------------------ in

    def worker(self, account: m.Account) -> list[Action]:
        """Take in what a worker says."""
        before = self._workers.get(account.incarnation)
        self._workers[account.incarnation] = account
        for former in account.former:
            self._workers.pop(former, None)
        return [history.accounted(account)] if account.final and (before is None or not before.final) else []

    def books(self, books: m.Books, boots: Mapping[int, int]) -> list[Action]:
        """Take in what a server says. What one shard has made good of the loss of the memory before it, is lost no more.

        Args:
            books: It.
            boots: Boot of each shard in the last view. One that has another has lost its memory since.
        """
        self._norms.update({shard: (round_, norm) for shard, round_, norm in books.norms})
        self._shards.update({shard: Tally(*sums) for shard, *sums in books.entries})
        whole = {(f"shard {shard}", boot) for shard, boot in books.whole}
        actions: list[Action] = []
        for item in [item for item in self._lost.values() if (item.who, item.successor) in whole]:
            del self._lost[item.who, item.incarnation]
            self._found = True
            actions += [history.found(item), Note("found", {"who": item.who, "incarnation": item.incarnation})]
        why = "its server was started again without it when the rounds had ended"
        for shard, boot in books.boots:
            if boots.get(shard, boot) != boot:
                actions += self.shard_lost(shard, boots[shard], why, successor=boot)
        return actions

    def is_final(self, incarnation: int) -> bool:
        """Whether a worker has given its whole account."""
        account = self._workers.get(incarnation)
        return account is not None and account.final

    def settled(self, incarnation: int) -> None:
        """Note that a worker has left, and nothing of it is lost, whatever was said before."""
        self._settled.add(incarnation)
        self._lost = {key: item for key, item in self._lost.items() if item.of_shard or item.incarnation != incarnation}

    def gone(self, slot: int, incarnation: int, why: str) -> list[Action]:
        """Note that a worker has been taken out of the run. Unless it comes back, its residual is lost."""
        last = self._workers.get(incarnation)
        if incarnation in self._settled and last is not None:
            self._settled.discard(incarnation)
            last = msgspec.structs.replace(last, norm=-1.0)  # of what it handed over: nobody knows that any more
        return self._add(_last_words(slot, incarnation, last, why or "is gone"))

    def shard_lost(self, shard: int, boot: int, why: str, *, successor: int = 0) -> list[Action]:
        """Note that the memory of a shard is lost: its residual, and what it had counted.

        Args:
            shard: Number of the shard.
            boot: Of the memory that is lost, as a view has named it: another that came between has never had anything.
            why: What happened.
            successor: Boot of the one in its place. If that has all of it again, nothing is lost.
        """
        known = self._lost.get((f"shard {shard}", boot))
        if known is not None:
            renamed = msgspec.structs.replace(known, successor=successor)
            return [] if renamed == known else self._add(renamed)
        round_, norm = self._norms.pop(shard, (-1, None))
        return self._add(Lost(f"shard {shard}", boot, round_, norm, why, successor))

    def _add(self, item: Lost) -> list[Action]:
        self._lost[item.who, item.incarnation] = item
        return [history.lost(item), Note("lost", {**msgspec.structs.asdict(item), "text": str(item)})]

    # ------------------------------------------------------------ the end

    def verdict(self, members: Mapping[int, int], shards: Iterable[int], *, ended: bool) -> Verdict | None:
        """Compare all that was said; return None where nobody has said anything.

        Args:
            members: Incarnation of each slot of the last view.
            shards: All shards.
            ended: Whether the run ended well. If not, rounds are open, and only the servers' own sums can be compared.
        """
        if not self._workers and not self._shards:
            return None
        found = Verdict()
        # One that was taken out and had not come in again when the run ended has lost what it had, though it is heard.
        stayed = (*members.values(), *self._settled)
        back = {former for who in stayed if who in self._workers for former in self._workers[who].former}
        found.lost = [item for item in self._lost.values() if item.of_shard or item.incarnation not in back]
        began_anew = {item.who for item in found.lost if item.of_shard}
        finals = {who: self._workers[who] for who in stayed if self.is_final(who)}
        if ended:
            self._look_at_workers(found, members, finals)
        known = sorted(shard for shard in shards if shard in self._shards)
        missing = sorted(shard for shard in shards if shard not in self._shards)
        if missing:
            found.open.append(f"shards {', '.join(map(str, missing))} gave no account")
        for shard in known:
            tally = self._shards[shard]
            found.account("means and results", f"of shard {shard}", tally)
        if known:
            found.servers = added(self._shards[shard] for shard in known)
        if ended:
            died = any(not item.of_shard for item in found.lost)
            made_again = bool(began_anew) or (self._found and bool(back))
            whole = not died and not made_again
            for shard in known:
                if f"shard {shard}" in began_anew:
                    found.open.append(f"what shard {shard} counted before it lost its memory")
                else:
                    self._look_between(found, shard, finals, whole=whole)
            if died:
                found.open.append("pushes that workers count, because some have died")
            elif made_again:
                found.open.append("pushes that workers count, because a round may have been made again")
        return found

    def _look_at_workers(self, found: Verdict, members: Mapping[int, int], finals: Mapping[int, m.Account]) -> None:
        for slot, incarnation in sorted(members.items()):
            if incarnation not in finals:
                last = self._workers.get(incarnation)
                found.lost.append(_last_words(slot, incarnation, last, "gave no account at the end"))
        for account in finals.values():
            if not account.measured:
                found.open.append(f"gradients of worker {account.slot}, whose client does not know them")
                continue
            for shard, *sums in account.entries:
                tally = Tally(*sums)
                found.account("gradients and pushes", f"of worker {account.slot} to shard {shard}", tally)
                if account.incarnation in self._settled:
                    found.compare(f"nothing and the residual with which worker {account.slot} has left", tally.kept, 0.0)
        measured = [Tally(*sums) for account in finals.values() if account.measured for _, *sums in account.entries]
        if measured:
            found.workers = added(measured)

    def _look_between(self, found: Verdict, shard: int, finals: Mapping[int, m.Account], *, whole: bool) -> None:
        mine = self._shards[shard]
        theirs = dict(_of_shard(shard, finals))
        for incarnation, tally in theirs.items():
            account = finals[incarnation]
            if account.whole:
                what = f"results of shard {shard} and those that worker {account.slot} applied"
                found.compare(what, mine.went - tally.other, mine.slack)
        if whole and theirs:
            total = added(theirs.values())
            found.compare(f"pushes that shard {shard} counts and those that workers do", mine.other - total.went, total.slack)


def _sums(came: str, went: str, tally: Tally) -> str:
    noise = f" + rounding {tally.noise:.5g} (spread {tally.spread:.2g})" if tally.spread else ""
    return f"{came} {tally.came:.5g} = {went} {tally.went:.5g} + residuals {tally.kept:.5g} + lost {tally.lost:.5g}{noise}"


def _last_words(slot: int, incarnation: int, last: m.Account | None, why: str) -> Lost:
    """Return the item of a worker that is gone, from what it said last."""
    round_, norm = (-1, None) if last is None else (last.round, last.norm if last.norm >= 0 else None)
    return Lost(f"worker {slot}", incarnation, round_, norm, why)


def _of_shard(shard: int, finals: Mapping[int, m.Account]) -> Iterator[tuple[int, Tally]]:
    for incarnation, account in finals.items():
        for of, *sums in account.entries:
            if of == shard:
                yield incarnation, Tally(*sums)
