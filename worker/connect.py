"""How a script comes into a run: `session = connect()`."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Mapping

import torch.distributed as dist

from ps_accordion import config, role
from ps_accordion.config import Settings
from ps_accordion.cores import codec_threads, usable_cores
from ps_accordion.errors import ConfigError, JoinRefused, UsageError
from ps_accordion.sources import ENVIRONMENT_PREFIX
from ps_accordion.wire.transport import Transport

from .alone import Alone
from .base import BaseSession
from .entry import over_is_fine
from .local import Follower, LocalGroup
from .session import Session
from .whereami import Place, place

__all__ = ["connect", "current"]

FAILED = -1
"""What a leader tells the other processes of its host instead of a slot."""

_current: weakref.ref[BaseSession] | None = None


def connect(
    *,
    settings: Settings | None = None,
    rank: int | None = None,
    transport: Transport | None = None,
    local_group: dist.ProcessGroup | None = None,
) -> BaseSession:
    """Join the run and return this worker's session.

    Under `ps-accordion launch`, and wherever PS_ACCORDION_CONFIG or PS_ACCORDION_COORDINATOR_ADDRESS are set, no argument is
    needed. Rank and number of workers come from whoever started this process: our launcher, torchrun, Open MPI, Slurm.
    Where nobody names a coordinator and this process is the only one, it trains alone, without servers, and says so.

    Use the session in a `with` statement.
    Without one it closes when the script ends, where `sys.exit(3)` cannot be told from success.

    Args:
        settings: Settings to use; None reads the config file and environment.
        rank: The rank to ask for; None takes it from the launcher's variables, or lets the coordinator choose.
        transport: Sockets to use, for tests.
        local_group: Processes of this host, this one among them, that act as one worker: they take their mean in this group, and
            its first one pushes it. The run then has as many workers as there are such groups. For instance
            `dist.new_subgroups(devices_per_host)[0]`.

    Raises:
        ConfigError: The settings are wrong, or this process is one of several and nobody names a coordinator.
        Unreachable: No coordinator answered, or others did not join, within `timeouts.join`.
        JoinRefused: The coordinator said no.
    """
    global _current
    here = place(os.environ)
    session: BaseSession
    if local_group is not None:
        session = _of_host(settings, here, local_group, transport)
    elif settings is None and not _names_a_coordinator(os.environ):
        session = _alone(here)
    else:
        settings = settings if settings is not None else config.load(role.config_file())
        threads = settings.workers.threads or codec_threads(usable_cores() // max(1, here.local_size))
        restart = role.restart_number()
        with over_is_fine(restart > 0):
            session = Session(
                settings, rank=here.rank if rank is None else rank, threads=threads, transport=transport, restart=restart
            )
    _current = weakref.ref(session)
    return session


def current() -> BaseSession:
    """Return the session that `connect` made last in this process.

    Raises:
        UsageError: There is none.
    """
    session = _current() if _current is not None else None
    if session is None or session.closed:
        raise UsageError(
            "expected a session: call `session = connect()` before the model is wrapped, and keep it as long as the model trains"
        )
    return session


def _names_a_coordinator(environment: Mapping[str, str]) -> bool:
    return any(environment.get(ENVIRONMENT_PREFIX + name) for name in ("CONFIG", "COORDINATOR_ADDRESS"))


def _of_host(settings: Settings | None, here: Place, group: dist.ProcessGroup, transport: Transport | None) -> BaseSession:
    settings = settings if settings is not None else config.load(role.config_file())
    local = LocalGroup(group)
    session: BaseSession
    if local.leads:
        # Unless our own launcher has numbered the hosts, any slot will do: ranks come from the script's own group.
        rank = here.rank if here.source == "ps-accordion" else -1
        threads = settings.workers.threads or codec_threads(usable_cores())
        try:
            session = Session(settings, rank=rank, threads=threads, transport=transport)
        except BaseException:
            local.tell([FAILED, 0])
            raise
        session.local = local
        slot, hosts = local.tell([session.slot, session.world_size])
        session.weigh(1.0)
    else:
        slot, hosts = local.tell([FAILED, 0])
        if slot == FAILED:
            raise JoinRefused("the process of this host that joins the run could not; its own output says why")
        session = Follower(settings, local)
    session.rank, session.world_size = _place_in_all(local, slot, hosts)
    return session


def _place_in_all(local: LocalGroup, slot: int, hosts: int) -> tuple[int, int]:
    """Return rank and number among all processes of all hosts: the script's own where its group has them all."""
    everyone = hosts * local.size
    if dist.get_world_size() == everyone:
        return dist.get_rank(), everyone
    return slot * local.size + local.rank, everyone


def _alone(here: Place) -> Alone:
    if here.world_size > 1:
        raise ConfigError(
            f"this is rank {here.rank} of {here.world_size} processes ({here.source}), and nobody names a coordinator: start "
            "`ps-accordion coordinator` and `ps-accordion server`, and set PS_ACCORDION_COORDINATOR_ADDRESS to where it listens, "
            "or start the script with `ps-accordion launch`"
        )
    settings = config.load(role.config_file())
    wanted = settings.checkpoint
    if wanted.resume or wanted.every_steps:
        name = "resume" if wanted.resume else "every_steps"
        raise ConfigError(
            f"checkpoint.{name} is set, and nobody names a coordinator: checkpoints are of runs with servers; start the script "
            "with `ps-accordion launch`, or take the setting away to train alone"
        )
    print(
        "ps-accordion: no coordinator is named (PS_ACCORDION_COORDINATOR_ADDRESS), so this process trains alone, without "
        "servers; to train with several: ps-accordion launch --workers 2 --servers 2 -- python script.py",
        file=sys.stderr,
        flush=True,
    )
    return Alone(settings)
