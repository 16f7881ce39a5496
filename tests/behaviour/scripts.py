"""Rows about training scripts: data of different lengths, samplers, evaluation, schedulers, checkpoints, two models."""

from __future__ import annotations

import torch
from behaviour.gradients import loss_of, network
from behaviour.wrap import STEPS, Notes, Rows, Wrap, draw, sgd
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

rows = Rows()


@rows
def two_models(wrap: Wrap) -> dict[str, Tensor]:
    """A GAN as in the DCGAN tutorial: two backwards of D without zero_grad between, then G's through D; batch-norm in G."""
    notes = Notes()
    generator = wrap.model(nn.Sequential(nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 20)))
    critic = wrap.model(nn.Sequential(nn.Linear(20, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)))
    for_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
    for_generator = torch.optim.Adam(generator.parameters(), lr=1e-3)
    judge = functional.binary_cross_entropy_with_logits
    for step in range(STEPS):
        seed = 10 * step + wrap.rank
        yes, no = torch.ones(8, 1), torch.zeros(8, 1)
        critic.zero_grad()
        judge(critic(draw(8, 20, seed=seed) + 2), yes).backward()
        fake = generator(draw(8, 8, seed=seed + 2))
        judge(critic(fake.detach()), no).backward()
        notes.gradients(step, critic, "critic")
        for_critic.step()
        generator.zero_grad()
        loss = judge(critic(fake), yes)
        loss.backward()
        notes.local(f"loss.{step}", loss)
        notes.gradients(step, generator, "generator")
        notes.gradients(step, critic, "critic in generator's step")
        for_generator.step()
    notes.state(critic, "critic")
    notes.state(generator, "generator")
    return notes.tensors


@rows
def critic_without_gradients_for_a_while(wrap: Wrap) -> dict[str, Tensor]:
    """A GAN as in CycleGAN: D requires no gradients while G trains through it."""
    notes, generator, critic = Notes(), wrap.model(nn.Linear(8, 20)), wrap.model(network())
    for_critic, for_generator = sgd(critic.parameters()), sgd(generator.parameters())
    for step in range(STEPS):
        seed = 10 * step + wrap.rank
        critic.requires_grad_(False)
        fake = generator(draw(8, 8, seed=seed))
        for_generator.zero_grad()
        critic(fake).square().mean().backward()
        notes.gradients(step, generator, "generator")
        for_generator.step()
        critic.requires_grad_(True)
        for_critic.zero_grad()
        (critic(draw(8, 20, seed=seed + 2)) - critic(fake.detach())).square().mean().backward()
        notes.gradients(step, critic, "critic")
        for_critic.step()
    notes.state(generator, "generator")
    notes.state(critic, "critic")
    return notes.tensors


@rows
def two_models_in_one_backward(wrap: Wrap) -> dict[str, Tensor]:
    """Encoder and head are wrapped apart; one loss, one optimizer."""
    notes, models = Notes(), [wrap.model(nn.Linear(20, 40)), wrap.model(nn.Linear(40, 30))]
    optimizer = sgd([parameter for model in models for parameter in model.parameters()])
    for step in range(STEPS):
        optimizer.zero_grad()
        models[1](torch.tanh(models[0](draw(8, 20, seed=100 * step + wrap.rank)))).square().mean().backward()
        for number, model in enumerate(models):
            notes.gradients(f"{step}.{number}", model)
        optimizer.step()
    return notes.tensors


@rows.over(counted=True, left_out=False)
def join(wrap: Wrap, divide_by_initial_world_size: bool) -> dict[str, Tensor]:
    """Ranks with 6 and 10 batches; a missing gradient is a zero, or does not count. The last one's parameters are for all."""
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    with model.join(divide_by_initial_world_size=divide_by_initial_world_size):
        for step in range((6, STEPS)[wrap.rank]):
            optimizer.zero_grad()
            loss_of(model, step, wrap.rank).backward()
            if wrap.rank:
                for name, parameter in model.named_parameters():
                    notes.local(f"{step}.{name}", parameter.grad)
            optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def join_with_a_rank_without_data(wrap: Wrap) -> dict[str, Tensor]:
    """It takes over what the other has learned; then both train on."""
    notes, model = Notes(), wrap.model(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrap.track(optimizer)
    for epoch in range(2):
        with model.join():
            for step in range(5 if wrap.rank == epoch else 0):
                optimizer.zero_grad()
                loss_of(model, 10 * epoch + step, wrap.rank).backward()
                optimizer.step()
        notes.state(model, f"state.{epoch}")
    return notes.tensors


@rows
def evaluation_between_steps(wrap: Wrap) -> dict[str, Tensor]:
    """`model.eval()` and forwards without gradients, different numbers of them on each rank."""
    notes, model = Notes(), wrap.model(nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.1), nn.Linear(64, 30)))
    optimizer = sgd(model.parameters())
    torch.manual_seed(wrap.rank)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, wrap.rank).backward()
        notes.gradients(step, model)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            for part in range(1 + wrap.rank):
                notes.local(f"{step}.{part}", loss_of(model, 900 + part, 0))
        model.train()
    notes.state(model)
    return notes.tensors


@rows
def sampler_with_epochs(wrap: Wrap) -> dict[str, Tensor]:
    """A DistributedSampler that shuffles anew in every epoch, tracked, with a last batch that is smaller."""
    data = TensorDataset(draw(46, 20, seed=1), draw(46, 30, seed=2))
    sampler = DistributedSampler(data, num_replicas=wrap.world_size, rank=wrap.rank, seed=3)
    loader = DataLoader(data, batch_size=5, sampler=sampler)
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    wrap.track(optimizer, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for step, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            functional.mse_loss(model(x), y).backward()
            notes.local(f"{epoch}.{step}", x)
            notes.gradients(f"{epoch}.{step}", model)
            optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def schedulers(wrap: Wrap) -> dict[str, Tensor]:
    """A warm-up and a cosine, stepped after the optimizer."""
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[3])
    wrap.track(optimizer, scheduler=scheduler)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, wrap.rank).backward()
        optimizer.step()
        scheduler.step()
        notes.add(f"rate.{step}", scheduler.get_last_lr()[0])
    notes.state(model)
    return notes.tensors


@rows
def optimizer_with_closure(wrap: Wrap) -> dict[str, Tensor]:
    """`optimizer.step(closure)`, forward and backward inside."""
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    for step in range(STEPS):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step, wrap.rank)
            loss.backward()
            return loss

        notes.local(f"loss.{step}", optimizer.step(closure))
        notes.gradients(step, model)
    notes.state(model)
    return notes.tensors


@rows
def state_dict(wrap: Wrap) -> dict[str, Tensor]:
    """Names begin with `module.`; what was saved half way trains on alike in a new wrapper, and in the old one after loading."""
    notes, model = Notes(), wrap.model(nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.Linear(64, 30)))
    optimizer = sgd(model.parameters())
    saved = {}
    for step in range(STEPS):
        if step == STEPS // 2:
            if wrap.rank:  # whatever a rank had: the wrapper loads what it is given
                nn.init.zeros_(model.module[0].weight)
            model.load_state_dict(saved)
            module = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.Linear(64, 30))
            module.load_state_dict({name.removeprefix("module."): tensor for name, tensor in saved.items()})
            model = wrap.model(module)
            kept = optimizer.state_dict()
            optimizer = sgd(model.parameters())
            optimizer.load_state_dict(kept)
        optimizer.zero_grad()
        loss_of(model, step, wrap.rank).backward()
        notes.gradients(step, model)
        optimizer.step()
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():  # the forward in which DistributedDataParallel copies buffers
        model.eval()
        loss_of(model, 0, 0)
    notes.state(model)
    return notes.tensors
