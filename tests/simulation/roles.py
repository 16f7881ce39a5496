"""The thin loops around the real state machines, where `World` gives them sockets and a clock."""

from process import NAMED, POINTS
from servers import CoordinatorProcess, ServerProcess
from workers import WorkerProcess

__all__ = ["NAMED", "POINTS", "ROLES", "CoordinatorProcess", "ServerProcess", "WorkerProcess"]

ROLES = {"coordinator": CoordinatorProcess, "server": ServerProcess, "worker": WorkerProcess}
