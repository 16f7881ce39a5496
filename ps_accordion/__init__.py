"""Parameter servers with two-way gradient compression that follows the learning regime.

This is the core that every role shares: the errors are here, the rest is in its rooms (`ps_accordion.config`, `.codecs` ...).
What a training script needs is in `ps_accordion.worker`.
Importing this package starts nothing, opens nothing and loads neither torch, numba nor a socket library.
"""

from .errors import (
    CodecError,
    ConfigError,
    JoinRefused,
    LayoutError,
    LedgerError,
    PayloadError,
    PsAccordionError,
    RunAborted,
    RunOver,
    StorageError,
    TooManySkips,
    Unreachable,
    UsageError,
    WireError,
)

__all__ = [
    "CodecError",
    "ConfigError",
    "JoinRefused",
    "LayoutError",
    "LedgerError",
    "PayloadError",
    "PsAccordionError",
    "RunAborted",
    "RunOver",
    "StorageError",
    "TooManySkips",
    "Unreachable",
    "UsageError",
    "WireError",
    "__version__",
]

__version__ = "0.1.0.dev0"
