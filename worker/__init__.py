"""A worker's part of ps-accordion: join a run, wrap a model, push and pull gradients.

`connect` returns a session, `DistributedModel` wraps a model, `attach` takes a DistributedDataParallel that you made.
Inside, `gradients.py` says what stands in `p.grad`, `client.py` owns the sockets, `rounds.py` and `member.py` are the state
machines, and `exchange.py` moves gradients between backward, the codec threads and the sockets.
"""

from .base import BaseSession
from .connect import connect
from .model import DistributedModel, attach
from .session import Session

__all__ = ["BaseSession", "DistributedModel", "Session", "attach", "connect"]
