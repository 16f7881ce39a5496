"""The messages of the protocol, one frozen class each.

On the wire a message is a msgpack array `[tag, field, ...]` in the order of the fields below; bulk data follows in raw frames.
`framing.py` packs and unpacks them. The rules of who sends what when are in `docs/wire.md`.
"""

from __future__ import annotations

from .base import (
    MAX_ASKED,
    MAX_BUNDLED,
    MAX_LAYOUTS,
    MAX_TEXT,
    Bundle,
    Entries,
    Message,
    PushKind,
    ResultKind,
)
from .lane import Lane, Lent
from .membership import Abort, Account, Books, Bye, Declare, Ended, Fault, Join, Leave, NewLayout, Ready, Refused, Welcome
from .rounds import Ask, Missing, Offer, Push, Recall, Refuse, Replay, Restore, Result
from .training import Get, Heard, Kept, NewPlan, Rate, Report, Save, Saved, State
from .views import Alive, Freeze, Frozen, Hello, Promise, Pulse, ServerAlive, View

__all__ = [
    "MAX_ASKED",
    "MAX_BUNDLED",
    "MAX_LAYOUTS",
    "MAX_TEXT",
    "Abort",
    "Account",
    "Alive",
    "Ask",
    "Books",
    "Bundle",
    "Bye",
    "Declare",
    "Ended",
    "Entries",
    "Fault",
    "Freeze",
    "Frozen",
    "Get",
    "Heard",
    "Hello",
    "Join",
    "Kept",
    "Lane",
    "Leave",
    "Lent",
    "Message",
    "Missing",
    "NewLayout",
    "NewPlan",
    "Offer",
    "Promise",
    "Pulse",
    "Push",
    "PushKind",
    "Rate",
    "Ready",
    "Recall",
    "Refuse",
    "Refused",
    "Replay",
    "Report",
    "Restore",
    "Result",
    "ResultKind",
    "Save",
    "Saved",
    "ServerAlive",
    "State",
    "View",
    "Welcome",
]
