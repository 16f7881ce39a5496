"""A worker's part of ps-accordion: join a run, wrap a model, push and pull gradients.

`connect` returns a `Session`, `DistributedModel` wraps a model. Inside, `client.py` owns the sockets, `rounds.py` and `member.py`
are the state machines, `exchange.py` moves gradients between backward, the codec threads and the sockets.
"""

from .model import DistributedModel
from .session import Session, connect

__all__ = ["DistributedModel", "Session", "connect"]
