"""What tests of models share."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel


@pytest.fixture
def one_thread():
    """Let torch compute on one thread, and forget afterwards what forwards in several of our threads leave behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    # Where torch notes the model whose forward runs. Forwards in several threads leave one of them there.
    DistributedDataParallel._active_ddp_module = None
