"""Who decides how hard to compress: policies take in window reports and answer with a level for every tensor.

`base.py` is the contract; `accordion.py` and `static.py` are policies; `registry.py` finds them by name; `plan.py` is how a
decision travels; `span.py` reads the length of a window. No clock, no socket, no randomness.
"""

from __future__ import annotations

from .base import Choice, Decision, Plan, Policy, Window
from .plan import decode_plan, encode_plan, plan_bound
from .registry import build_policy, check_settings, policy_names
from .span import Span, parse_span

__all__ = [
    "Choice",
    "Decision",
    "Plan",
    "Policy",
    "Span",
    "Window",
    "build_policy",
    "check_settings",
    "decode_plan",
    "encode_plan",
    "parse_span",
    "plan_bound",
    "policy_names",
]
