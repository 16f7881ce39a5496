"""A model's tensors as memory: where they lie, and how their bytes come from another worker."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from nosync import DEVICES
from torch import nn

from ps_accordion.errors import UsageError
from ps_accordion.worker.group import group_of_one
from ps_accordion.worker.memory import _State, device_of, state_of

devices = pytest.mark.parametrize("where", DEVICES)


def model(seed):
    """Return a model of several types and layouts in memory."""
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Linear(4, 2, bias=False)).to(
        memory_format=torch.channels_last
    )
    module[2].to(torch.bfloat16)
    module.register_parameter("scale", nn.Parameter(torch.zeros(())))
    with torch.no_grad():
        for index, tensor in enumerate(module.state_dict().values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(100 * seed + index)) * 10)
    return module


@devices
@pytest.mark.parametrize("source", DEVICES)
def test_a_model_takes_over_the_bytes_of_another(where, source):
    """Every parameter and buffer, to the bit, wherever either model lies."""
    mine, theirs = model(1).to(where), model(2).to(source)
    target, origin = state_of(mine, copy_buffers=False), state_of(theirs, copy_buffers=True)
    assert (target.digest, target.nbytes) == (origin.digest, origin.nbytes)
    for part in range(origin.parts):
        target.write(part, origin.read(part))
    target.write_back()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name].cpu(), tensor.cpu()), name
        assert mine.state_dict()[name].stride() == tensor.stride()


def test_what_lies_elsewhere_is_written_back():
    """As copies on the host, whose bytes go to the tensors when all have come."""
    tensor, copy = torch.zeros(3), torch.ones(3)
    state = _State([copy.view(torch.uint8).numpy()], "", [(tensor, copy)])
    state.write(0, np.full(3, 2.5, np.float32).view(np.uint8))
    assert tensor.tolist() == [0.0] * 3
    state.write_back()
    assert tensor.tolist() == [2.5] * 3


def test_parameters_must_lie_on_one_device():
    """The message has both names and places; without parameters there is nothing to refuse."""
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    assert device_of([("a", there), ("b", there)]) == torch.device("meta")
    assert device_of([]) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"'a' lies on cpu and 'c' on meta: expected all parameters .* on one device"):
        device_of([("a", here), ("b", here), ("c", there)])


def test_the_group_of_one_knows_the_accelerator(monkeypatch):
    """The parent calls it with tensors there, though nothing moves."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    group = group_of_one.__wrapped__()
    for kind in ("cpu", "cuda"):
        assert isinstance(group._get_backend(torch.device(kind)), dist.ProcessGroupGloo)
