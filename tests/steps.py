"""A small model and its training steps, for workers that are threads of one process."""

import torch
from ring import Ring
from torch import nn
from torch.nn import functional

__all__ = ["EXACT", "TOPK", "draw", "filled", "gradients", "loss_of", "network", "run", "same", "state"]


EXACT = {"codec.name": "dense", "codec.light": 32, "regime.policy": "static"}
TOPK = {"codec.name": "topk", "codec.light": 0.1, "regime.policy": "static"}


def run(settings, work, workers=2):
    """Run `work` in every worker."""
    return Ring({"workers.count": workers, "servers.count": 2, "layout.partition_elements": 1024} | settings).run(work)


def draw(*shape, seed):
    """Return random numbers that depend on nothing else."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module, seed=0):
    """Fill a module's parameters with random numbers."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=1000 * seed + index) * 0.2)
    return module


def network(norm=False):
    """Return a small network, with batch-norm if asked for."""
    layers = [nn.Linear(20, 64), nn.BatchNorm1d(64) if norm else nn.Identity(), nn.ReLU(), nn.Linear(64, 32)]
    return filled(nn.Sequential(*layers))


def loss_of(model, step, rank, size=8):
    """Return the loss on one worker's batch of one step."""
    seed = 2 * (1000 * step + rank)
    return functional.mse_loss(model(draw(size, 20, seed=seed)), draw(size, 32, seed=seed + 1))


def state(model):
    """Return a copy of all parameters and buffers."""
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def gradients(model):
    """Return a copy of all gradients."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(mine, theirs):
    """Say whether two lists of tensors have the same bits: equal numbers are not enough, since zeros have a sign."""
    pairs = list(zip(mine, theirs, strict=True))
    return all(a is b or (torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))) for a, b in pairs)
