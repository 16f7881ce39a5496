"""Rows about what stands in `p.grad`: which parameters have a gradient, whose, and when."""

from __future__ import annotations

import torch
from behaviour.wrap import STEPS, Notes, Rows, Wrap, draw, sgd, train
from torch import Tensor, nn
from torch.nn import functional

rows = Rows()


def network() -> nn.Sequential:
    """Return a network of 3,234 parameters, in tensors above and below what is compressed."""
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 30))


def loss_of(model, step: int, rank: int, size: int = 8) -> Tensor:
    """Return the loss on one worker's batch of one step."""
    seed = 2 * (1000 * step + rank)
    return functional.mse_loss(model(draw(size, 20, seed=seed)), draw(size, 30, seed=seed + 1))


class Branches(nn.Module):
    """A trunk and three branches, of which each forward takes one; nobody ever takes the last."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(20, 64)
        self.branches = nn.ModuleList(nn.Linear(64, 30) for _ in range(3))

    def forward(self, x: Tensor, branch: int) -> Tensor:
        """Return what one branch makes of the trunk."""
        return self.branches[branch](torch.tanh(self.trunk(x)))


@rows
def plain(wrap: Wrap) -> dict[str, Tensor]:
    """A small network, SGD with momentum."""
    return train(wrap, network(), loss_of)


@rows
def adam(wrap: Wrap) -> dict[str, Tensor]:
    """The same with Adam."""
    return train(wrap, network(), loss_of, optimizer=torch.optim.Adam)


@rows.over(true=True, false=False)
def bucket_view(wrap: Wrap, views: bool) -> dict[str, Tensor]:
    """`gradient_as_bucket_view`, said to both."""
    return train(wrap, network(), loss_of, gradient_as_bucket_view=views)


@rows
def small_buckets(wrap: Wrap) -> dict[str, Tensor]:
    """A bucket for every tensor, so that they are built anew after the first step."""
    return train(wrap, nn.Sequential(*[nn.Linear(40, 40) for _ in range(4)]), wide_loss, bucket_cap_mb=0.001)


def wide_loss(model, step: int, rank: int) -> Tensor:
    """Return the loss of a network of 40 inputs."""
    return model(draw(8, 40, seed=100 * step + rank)).square().mean()


@rows
def initial_state_of_rank_zero(wrap: Wrap) -> dict[str, Tensor]:
    """Every rank has built other parameters and buffers; all train from those of rank 0."""
    torch.manual_seed(100 + wrap.rank)
    module = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.Linear(64, 30))
    module[0].bias.requires_grad_(False)
    module[1].running_mean.normal_()
    module[1].num_batches_tracked.fill_(wrap.rank)
    module.register_buffer("constant", torch.full((3,), float(wrap.rank)))
    module.eval()
    return train(wrap, module, loss_of)


@rows
def frozen_parameters(wrap: Wrap) -> dict[str, Tensor]:
    """Parameters that require no gradient get none, and stand still."""
    module = network()
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    return train(wrap, module, loss_of)


@rows.over(none=True, zeros=False)
def unused_branches(wrap: Wrap, set_to_none: bool) -> dict[str, Tensor]:
    """`find_unused_parameters`, a branch that depends on worker and step, one that nobody takes, and weight decay."""

    def loss(model, step, rank):
        return model(draw(8, 20, seed=100 * step + rank), (step // 2 + rank * (step % 3)) % 2).square().mean()

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)

    return train(wrap, Branches(), loss, optimizer=optimizer, set_to_none=set_to_none, find_unused_parameters=True)


@rows.over(views=True, own_memory=False)
def used_by_one_worker_only(wrap: Wrap, views: bool) -> dict[str, Tensor]:
    """A branch that only rank 1 takes: its gradient is half of rank 1's, on both."""

    def loss(model, step, rank):
        return model(draw(8, 20, seed=100 * step + rank), rank).square().mean()

    return train(wrap, Branches(), loss, find_unused_parameters=True, gradient_as_bucket_view=views)


@rows
def output_that_the_loss_leaves_out(wrap: Wrap) -> dict[str, Tensor]:
    """A branch that forward returns and the loss does not take has no gradient; weight decay leaves it alone."""

    class Returned(Branches):
        def forward(self, x):
            return super().forward(x, 0), super().forward(x, 1)

    def loss(model, step, rank):
        return model(draw(8, 20, seed=100 * step + rank))[0].square().mean()

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.05, weight_decay=0.01)

    return train(wrap, Returned(), loss, optimizer=optimizer, find_unused_parameters=True)


@rows
def unused_by_all_in_some_steps(wrap: Wrap) -> dict[str, Tensor]:
    """A branch that both take in the even steps only, without zero_grad in between: what stood in `p.grad` stays."""
    notes, model = Notes(), wrap.model(Branches(), find_unused_parameters=True)
    for step in range(STEPS):
        model(draw(8, 20, seed=100 * step + wrap.rank), step % 2).square().mean().backward()
        notes.gradients(step, model)
    return notes.tensors


@rows
def static_graph(wrap: Wrap) -> dict[str, Tensor]:
    """`static_graph`, with parameters that nobody uses."""

    def loss(model, step, rank):
        return model(draw(8, 20, seed=100 * step + rank), 1).square().mean()

    return train(wrap, Branches(), loss, static_graph=True)


@rows.over(none=True, zeros=False)
def no_sync(wrap: Wrap, set_to_none: bool) -> dict[str, Tensor]:
    """Two backwards under `no_sync`, then one that synchronises."""
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=set_to_none)
        with model.no_sync():
            loss_of(model, 3 * step, wrap.rank).backward()
            loss_of(model, 3 * step + 1, wrap.rank).backward()
        for name, parameter in model.named_parameters():
            notes.local(f"{step}.{name}", parameter.grad)
        loss_of(model, 3 * step + 2, wrap.rank).backward()
        notes.gradients(step, model)
        optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def no_sync_with_branches(wrap: Wrap) -> dict[str, Tensor]:
    """A branch that one rank takes under `no_sync` only, and does not take in the backward that synchronises."""
    notes, model = Notes(), wrap.model(Branches(), find_unused_parameters=True)
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        with model.no_sync():
            model(draw(8, 20, seed=100 * step + wrap.rank), wrap.rank).square().mean().backward()
        model(draw(8, 20, seed=100 * step + 50 + wrap.rank), 0).square().mean().backward()
        notes.gradients(step, model)
        optimizer.step()
    notes.state(model)
    return notes.tensors


@rows.over(views=True, own_memory=False)
def two_backwards_without_zero_grad(wrap: Wrap, views: bool) -> dict[str, Tensor]:
    """Two synchronised backwards a step: the sum of two means."""
    notes, model = Notes(), wrap.model(network(), gradient_as_bucket_view=views)
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(2):
            loss_of(model, 2 * step + part, wrap.rank).backward()
            notes.gradients(f"{step}.{part}", model)
        optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def gradients_that_are_never_zeroed(wrap: Wrap) -> dict[str, Tensor]:
    """Every backward adds its mean to those before."""
    notes, model = Notes(), wrap.model(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        loss_of(model, step, wrap.rank).backward()
        notes.gradients(step, model)
        optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def clipping_by_norm(wrap: Wrap) -> dict[str, Tensor]:
    """`clip_grad_norm_` sees, and returns, the norm of the mean."""
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, wrap.rank).backward()
        notes.add(f"norm.{step}", nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        notes.gradients(step, model)
        optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def several_parameter_groups(wrap: Wrap) -> dict[str, Tensor]:
    """A rate and a weight decay for each group, one of them added later."""
    notes, model = Notes(), wrap.model(network())
    optimizer = torch.optim.SGD([{"params": model.module[0].weight, "lr": 0.1}, {"params": model.module[0].bias}], lr=0.02)
    optimizer.add_param_group({"params": model.module[2].parameters(), "weight_decay": 0.1, "momentum": 0.9})
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, wrap.rank).backward()
        notes.gradients(step, model)
        optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def several_optimizers(wrap: Wrap) -> dict[str, Tensor]:
    """Two optimizers on one model; the second steps, and zeroes, in every other step only."""
    notes, model = Notes(), wrap.model(network())
    first, second = sgd(model.module[0].parameters()), torch.optim.Adam(model.module[2].parameters())
    for step in range(STEPS):
        loss_of(model, step, wrap.rank).backward()
        notes.gradients(step, model)
        first.step()
        first.zero_grad()
        if step % 2:
            second.step()
            second.zero_grad()
    notes.state(model)
    return notes.tensors


@rows
def two_forwards_one_backward(wrap: Wrap) -> dict[str, Tensor]:
    """A model called twice before the backward of the sum, as in siamese networks."""

    def loss(model, step, rank):
        return loss_of(model, 2 * step, rank) + loss_of(model, 2 * step + 1, rank)

    return train(wrap, network(), loss)


@rows
def forward_without_backward(wrap: Wrap) -> dict[str, Tensor]:
    """A loss that is thrown away in some steps, on one rank only."""

    def loss(model, step, rank):
        if step % 3 == rank:
            loss_of(model, 500 + step, rank)
        return loss_of(model, step, rank)

    return train(wrap, network(), loss)


@rows
def gradients_of_parameters_asked_for_between(wrap: Wrap) -> dict[str, Tensor]:
    """`torch.autograd.grad` for the parameters, between backward and step, leaves `p.grad` alone."""
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, wrap.rank).backward()
        asked = torch.autograd.grad(loss_of(model, 500 + step, wrap.rank), list(model.parameters()))
        notes.local(f"asked.{step}", torch.cat([gradient.flatten() for gradient in asked]))
        notes.gradients(step, model)
        optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def gradient_penalty(wrap: Wrap) -> dict[str, Tensor]:
    """A loss that holds a gradient with respect to the input, as in WGAN-GP."""

    def loss(model, step, rank):
        x = draw(8, 20, seed=100 * step + rank).requires_grad_()
        out = model(x).square().sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return out / 100 + (slope.norm(dim=1) - 1).square().mean()

    return train(wrap, network(), loss)


@rows
def hooks_on_parameters(wrap: Wrap) -> dict[str, Tensor]:
    """A user's hook on a parameter changes the local gradient, before the mean is taken."""
    module = network()
    module[0].weight.register_hook(lambda gradient: gradient.clamp(-0.001, 0.001))
    return train(wrap, module, loss_of)


@rows
def frozen_after_wrapping(wrap: Wrap) -> dict[str, Tensor]:
    """A layer that stops to require gradients half way, under `find_unused_parameters`."""

    def loss(model, step, rank):
        if step == STEPS // 2:
            model.module[0].requires_grad_(False)
        return loss_of(model, step, rank)

    return train(wrap, network(), loss, find_unused_parameters=True)


@rows
def static_graph_and_no_sync(wrap: Wrap) -> dict[str, Tensor]:
    """The first backward synchronises, as `static_graph` needs; then every other one does."""
    notes, model = Notes(), wrap.model(network(), static_graph=True)
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        if step:
            with model.no_sync():
                loss_of(model, 500 + step, wrap.rank).backward()
        loss_of(model, step, wrap.rank).backward()
        notes.gradients(step, model)
        optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def uneven_batches(wrap: Wrap) -> dict[str, Tensor]:
    """Every rank counts the same, whatever the size of its batch."""
    return train(wrap, network(), lambda model, step, rank: loss_of(model, step, rank, size=(3, 8)[rank]))
