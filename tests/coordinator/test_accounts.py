"""The loss ledger at the coordinator: what balances, what does not, and what is said of those that have died."""

import pytest

from ps_accordion.coordinator.accounts import Accounts
from ps_accordion.coordinator.history import History
from ps_accordion.ledger import Tally
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Record

SHARD = Tally(came=6.0, went=5.0, kept=0.5, lost=0.5, other=12.0, slack=1e-6)
"""Two workers, each of which pushed 6: a mean of 6."""
WORKER = Tally(came=8.0, went=6.0, kept=2.0, lost=0.0, other=5.0, slack=1e-6)


def account(slot=0, incarnation=1, tally=WORKER, **fields):
    """Return a worker's whole account."""
    base = {"former": [], "round": 9, "norm": 2.0, "final": True, "entries": [(0, *tally)]}
    return m.Account(slot, incarnation, **(base | fields))


def verdict(*accounts, shard=SHARD, ended=True, ledger=None, shards=(0,)):
    """Return what a run of one shard and the workers that say so comes to."""
    ledger = ledger or Accounts()
    for each in accounts:
        ledger.worker(each)
    if shard is not None:
        ledger.books(m.Books(0, [(0, *shard)]), {})
    return ledger.verdict({each.slot: each.incarnation for each in accounts}, shards, ended=ended)


def test_sums_that_agree_balance():
    """Each side by itself, what workers and the shard say of pushes, and what each worker saw of results."""
    found = verdict(account(), account(1, 2))
    assert not found.wrong
    assert not found.open
    assert found.compared == 6
    assert found.workers == Tally(16.0, 12.0, 4.0, 0.0, 10.0, pytest.approx(2**0.5 * 1e-6))
    assert "ok" in str(found)


@pytest.mark.parametrize(
    ("tally", "shard", "what"),
    [
        (WORKER._replace(kept=1.0), SHARD, "gradients and pushes of worker 0"),
        (WORKER, SHARD._replace(kept=0.0), "means and results of shard 0"),
        (WORKER, SHARD._replace(other=18.0), "pushes that shard 0 counts and those that workers do"),
        (WORKER._replace(other=4.0), SHARD, "results of shard 0 and those that worker 0 applied"),
        (WORKER._replace(came=float("nan")), SHARD, "gradients and pushes of worker 0"),
    ],
)
def test_what_is_dropped_or_doubled_is_found_and_named(tally, shard, what):
    """Whichever side it happens on; a sum that is not a number does not balance either."""
    found = verdict(account(tally=tally), account(1, 2), shard=shard)
    assert len(found.wrong) == 1
    assert what in found.wrong[0]
    assert "DOES NOT BALANCE" in str(found)


def test_rounding_is_no_difference():
    """What float32 makes of it is allowed, and no more."""
    assert not verdict(account(tally=WORKER._replace(kept=2.0 + 9e-7)), account(1, 2)).wrong
    assert verdict(account(tally=WORKER._replace(kept=2.0 + 2e-6)), account(1, 2)).wrong


def test_a_killed_worker_is_an_item_with_what_it_said_last():
    """And how many of its pushes counted is not compared, because nobody knows any more."""
    ledger = Accounts()
    ledger.worker(account(1, 2, final=False, entries=[], round=40, norm=0.03))
    record, note = ledger.gone(1, 2, "has closed its connection")
    assert isinstance(record, Record)
    assert (note.event, note.fields["round"], note.fields["norm"]) == ("lost", 40, 0.03)
    found = verdict(account(), shard=SHARD._replace(other=99.0), ledger=ledger)
    assert not found.wrong
    assert [(item.who, item.round, item.norm) for item in found.lost] == [("worker 1", 40, 0.03)]
    assert "pushes that workers count" in found.open[0]


def test_what_a_worker_brings_back_is_not_lost():
    """It was taken out alive, and came back as another incarnation with its residual."""
    ledger = Accounts()
    ledger.worker(account(1, 2, final=False, entries=[]))
    ledger.gone(1, 2, "has been silent for 3 s")
    found = verdict(account(), account(1, 7, former=[2]), ledger=ledger)
    assert not found.lost
    assert found.compared == 6


@pytest.mark.parametrize("final", [False, True])
def test_who_has_not_come_in_again_when_the_run_ends_is_an_item(final):
    """It lives, under another number, but is in no view: its residual goes with it, and of its pushes nobody has the sum."""
    ledger = Accounts()
    ledger.worker(account(1, 2, final=False, entries=[]))
    ledger.gone(1, 2, "has been silent for 3 s")
    ledger.worker(account(1, 7, former=[2], final=final))
    found = verdict(account(), shard=SHARD._replace(other=99.0), ledger=ledger)
    assert not found.wrong
    assert [(item.who, item.incarnation) for item in found.lost] == [("worker 1", 2)]
    assert "pushes that workers count" in found.open[0]


def test_a_coordinator_that_is_started_again_knows_the_items_and_accounts():
    """They were logged, and come out of the log as they went in."""
    ledger = Accounts()
    records = [action.fields for action in ledger.gone(1, 2, "is gone") if isinstance(action, Record)]
    records += [action.fields for action in ledger.worker(account()) if isinstance(action, Record)]
    past = History.of(records)
    found = verdict(ledger=Accounts(past.lost, past.accounts), shard=None, shards=())
    assert [item.who for item in found.lost] == ["worker 1"]
    found = Accounts(past.lost, past.accounts).verdict({0: 1}, [], ended=True)
    assert found.workers == WORKER._replace(slack=pytest.approx(1e-6))


def test_a_shard_that_has_all_of_it_again_has_lost_nothing():
    """It says so of its boot, which took the place of the lost one; a shard that was lost before that one stays an item."""
    ledger = Accounts()
    records = [action.fields for action in ledger.shard_lost(0, 5, "gone", successor=6) if isinstance(action, Record)]
    records += [action.fields for action in ledger.shard_lost(0, 6, "gone", successor=7) if isinstance(action, Record)]
    assert ledger.books(m.Books(0, whole=[(0, 5), (1, 7)]), {}) == []
    record, note = ledger.books(m.Books(0, whole=[(0, 7)]), {})
    assert (note.event, note.fields) == ("found", {"who": "shard 0", "incarnation": 6})
    past = History.of([*records, record.fields])
    assert [item.incarnation for item in past.lost] == [5]
    assert past.found
    ledger.books(m.Books(0, whole=[(0, 6)]), {})
    found = verdict(account(), account(1, 2), ledger=ledger)
    assert (found.compared, found.lost, found.open) == (6, [], [])
    found = verdict(account(), account(1, 7, former=[2]), ledger=ledger)
    assert found.open == ["pushes that workers count, because a round may have been made again"]


@pytest.mark.parametrize(("known", "boot", "lost"), [({0: 5}, 5, []), ({0: 5}, 6, [("shard 0", 5)]), ({}, 5, [])])
def test_a_shard_that_lost_its_memory_at_the_very_end_is_named(known, boot, lost):
    """Its server was started again without it after the END, and counts from nothing: that is a loss, and no wrong sum.

    One that has its memory, but not a layout that the view knows from a checkpoint, has lost nothing.
    """
    ledger = Accounts()
    ledger.books(m.Books(0, [(0, *Tally())], boots=[(0, boot)]), known)
    assert [(item.who, item.incarnation) for item in verdict(account(), shard=None, ledger=ledger).lost] == lost
    assert (not verdict(account(), shard=None, ledger=ledger).wrong) == bool(lost)


def test_a_second_loss_is_named_beside_the_first():
    """A shard that began anew in the middle and is lost once more after the END: twice a residual, and each once."""
    ledger = Accounts()
    ledger.shard_lost(0, 5, "gone", successor=6)
    assert ledger.books(m.Books(0, [(0, *SHARD)], boots=[(0, 6)]), {0: 6}) == []
    assert ledger.books(m.Books(0, [(0, *Tally())], boots=[(0, 7)]), {0: 6}) != []
    assert ledger.books(m.Books(0, [(0, *Tally())], boots=[(0, 7)]), {0: 6}) == []
    found = verdict(account(), shard=None, ledger=ledger)
    assert [(item.who, item.incarnation) for item in found.lost] == [("shard 0", 5), ("shard 0", 6)]


def test_who_gives_no_account_is_named():
    """A worker that is gone in the last round, and a server that was."""
    ledger = Accounts()
    ledger.worker(account())
    found = ledger.verdict({0: 1, 1: 2}, [0], ended=True)
    assert [item.why for item in found.lost] == ["gave no account at the end"]
    assert found.open[0] == "shards 0 gave no account"


def test_of_a_run_that_was_cut_short_only_servers_are_compared():
    """Workers are in the middle of a round."""
    found = verdict(account(final=False, entries=[]), ended=False)
    assert found.compared == 1
    assert not found.wrong


def test_nothing_is_said_where_nobody_has_said_anything():
    """The run ended before it began."""
    assert Accounts().verdict({0: 1}, [0], ended=False) is None
