"""Rows that train something whole, and note the loss that it reaches."""

from __future__ import annotations

import torch
from behaviour.models import Tied, next_token_loss
from behaviour.wrap import REPLICA, Notes, Rows, Wrap, draw
from torch import Tensor, nn
from torch.nn import functional

rows = Rows()
longer = Rows()
"""The same for the longer suite: compression needs some steps to catch up."""

SHORT = {"reaches_its_loss": 60}
LONG = {"in_the_long_run": 400}
LAST = 10
"""Steps whose losses are averaged: one batch says little."""


@rows.over(**SHORT)
@longer.over(**LONG)
def transformer(wrap: Wrap, length: int) -> dict[str, Tensor]:
    """Tied embeddings learn to count."""
    notes, model, losses = Notes(), wrap.model(Tied()), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(length):
        optimizer.zero_grad()
        loss = next_token_loss(model, step, wrap.rank)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    notes.local("first", losses[0])
    notes.local("loss", torch.stack(losses[-LAST:]).mean())
    notes.state(model, REPLICA)
    return notes.tensors


@rows.over(**SHORT)
@longer.over(**LONG)
def conditional_branch(wrap: Wrap, length: int) -> dict[str, Tensor]:
    """Two experts; which one a worker's batch goes to depends on the batch."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(20, 64)
            self.experts = nn.ModuleList(nn.Linear(64, 4) for _ in range(2))

        def forward(self, x: Tensor, expert: int) -> Tensor:
            return self.experts[expert](torch.relu(self.trunk(x)))

    notes, losses = Notes(), []
    model = wrap.model(Experts(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(length):
        x = draw(32, 20, seed=10 * step + wrap.rank)
        expert = int(x[0, 0] > 0)
        y = x[:, :4].abs() if expert else x[:, 4:8]
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x, expert), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    notes.local("first", torch.stack(losses[:LAST]).mean())
    notes.local("loss", torch.stack(losses[-LAST:]).mean())
    notes.state(model, REPLICA)
    return notes.tensors


@rows.over(**SHORT)
@longer.over(**LONG)
def gan(wrap: Wrap, length: int) -> dict[str, Tensor]:
    """A generator learns where points lie; the loss is the distance of the mean of what it makes."""
    notes = Notes()
    generator = wrap.model(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 16)))
    critic = wrap.model(nn.Sequential(nn.Linear(16, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)))
    for_critic = torch.optim.SGD(critic.parameters(), lr=0.3)
    for_generator = torch.optim.SGD(generator.parameters(), lr=0.3)
    center, judge = torch.linspace(-2, 2, 16), functional.binary_cross_entropy_with_logits
    distances = []
    for step in range(length):
        seed = 10 * step + wrap.rank
        critic.zero_grad()
        judge(critic(center + 0.3 * draw(32, 16, seed=seed)), torch.ones(32, 1)).backward()
        fake = generator(draw(32, 4, seed=seed + 2))
        judge(critic(fake.detach()), torch.zeros(32, 1)).backward()
        for_critic.step()
        generator.zero_grad()
        judge(critic(fake), torch.ones(32, 1)).backward()
        for_generator.step()
        distances.append((fake.detach().mean(0) - center).norm())
    notes.local("first", distances[0])
    notes.local("loss", torch.stack(distances[-LAST:]).mean())
    notes.state(generator, REPLICA + "generator")
    notes.state(critic, REPLICA + "critic")
    return notes.tensors
