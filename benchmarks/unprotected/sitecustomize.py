"""Switches the loss ledger off in every process that has this folder on its PYTHONPATH: no key is probed, no norm taken.

For `benchmarks/safety_cost.py` only; the product has no such switch.
"""

from ps_accordion import ledger

original = ledger.Probe.__init__


def without_looking(self, layout, key):  # noqa: D103
    original(self, layout, key)
    self.counts = False


ledger.Probe.__init__ = without_looking
ledger.Probe.norm = lambda self, vector: 0.0
