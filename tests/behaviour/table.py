"""All rows of the table, by name."""

from behaviour.gradients import rows as gradients
from behaviour.models import rows as models
from behaviour.precision import rows as precision
from behaviour.scripts import rows as scripts
from behaviour.training import longer as LONGER
from behaviour.training import rows as training

__all__ = ["ATTACHED", "LONGER", "ROWS", "TRAINING"]

TRAINING = list(training)
"""Rows that train something whole, and note how good it becomes."""
ROWS = gradients | models | precision | scripts | training
ATTACHED = [
    "plain",
    "unused_branches_none",
    "unused_branches_zeros",
    "static_graph",
    "two_backwards_without_zero_grad_views",
    "tied_parameters",
    "batch_norm",
    "checkpointing_reentrant",
    "overflow_in_one_worker",
    "half_precision_bfloat16",
    "two_models",
]
"""Rows that run once more with our hook on a DistributedDataParallel of the script's own."""
