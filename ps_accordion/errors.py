"""Every error that ps-accordion raises on purpose.

    PsAccordionError
    ├── ConfigError          a setting, flag or variable is wrong                         exit 2
    ├── LayoutError          a model or tensor cannot be laid out into keys               exit 2
    ├── CodecError           a codec was asked for something it cannot do                 exit 2
    ├── UsageError           the worker interface was called out of order                 exit 2
    ├── WireError            bytes from a socket are not a message of this protocol       exit 6
    │   └── PayloadError     a payload's length, index or checksum is wrong               exit 6
    ├── JoinRefused          the coordinator did not let this process into the run        exit 3
    │   └── RunOver          the run has ended well, and without this process             exit 3
    ├── Unreachable          nobody answered at an address within the time allowed        exit 4
    ├── RunAborted           another process of the run failed; it is named               exit 5
    ├── TooManySkips         too many rounds in a row were not finite                     exit 7
    ├── StorageError         the disk is full, or a state file cannot be read or written  exit 8
    └── LedgerError          what was pushed is not what was applied, kept or lost        exit 9

A message says what was expected, what came and from where, and what to do now.
`docs/exit-codes.md` lists the codes for users; they never change meaning.
"""

from __future__ import annotations

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
]


class PsAccordionError(Exception):
    """Base of all errors raised by this package."""

    exit_code = 1


class ConfigError(PsAccordionError, ValueError):
    """A setting is unknown, malformed or out of range."""

    exit_code = 2


class LayoutError(PsAccordionError, ValueError):
    """A tensor table cannot become keys."""

    exit_code = 2


class CodecError(PsAccordionError, ValueError):
    """A codec does not exist or cannot work at the level asked for."""

    exit_code = 2


class UsageError(PsAccordionError, RuntimeError):
    """A method of the worker interface was called at a time when it cannot work."""

    exit_code = 2


class WireError(PsAccordionError, ValueError):
    """Bytes from a socket are not a message of this protocol."""

    exit_code = 6


class PayloadError(WireError):
    """A payload does not fit its header: length, index, count or checksum."""


class JoinRefused(PsAccordionError):
    """The coordinator answered a join with no, and said why."""

    exit_code = 3


class RunOver(JoinRefused):
    """The run has ended well while this process came into it, or wanted to come back."""


class Unreachable(PsAccordionError, TimeoutError):
    """Nobody answered at an address within the time allowed."""

    exit_code = 4


class RunAborted(PsAccordionError):
    """Another process of the run failed, and the run has ended for all."""

    exit_code = 5


class TooManySkips(PsAccordionError):
    """As many rounds in a row were skipped as the configuration allows."""

    exit_code = 7


class StorageError(PsAccordionError, OSError):
    """The disk is full, or a state file cannot be read or written."""

    exit_code = 8


class LedgerError(PsAccordionError):
    """At the end of a run, what was pushed is not what was applied, kept in residuals or itemised as lost."""

    exit_code = 9
