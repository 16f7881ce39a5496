"""Rows about number formats: autocast, loss scaling, and parameters that are not float32."""

from __future__ import annotations

import copy

import torch
from behaviour.gradients import loss_of, network
from behaviour.wrap import STEPS, Notes, Rows, Wrap, draw, sgd, train
from torch import Tensor, nn

rows = Rows()


@rows
def bfloat16_autocast(wrap: Wrap) -> dict[str, Tensor]:
    """Forward in bfloat16, parameters and gradients in float32."""
    return train(wrap, network(), loss_of, around=lambda: torch.autocast("cpu", torch.bfloat16))


@rows.over(one_worker=(1,), all_workers=(0, 1))
def overflow_in(wrap: Wrap, ranks: tuple[int, ...]) -> dict[str, Tensor]:
    """float16 autocast and a GradScaler: an overflow in steps 2 and 7. All skip those, and every scale backs off alike.

    Where rank 0 does not overflow, its gradient of the skipped step is lost under DistributedDataParallel. Under ps-accordion it
    comes with the next step's mean; the row adds it by hand under DistributedDataParallel, so that it holds them to that.
    """
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    wrap.track(optimizer, scaler=scaler)
    delayed: list[Tensor] = []

    def loss_at(module, step, rank):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(module, step, rank)
        # Times the scale, above what float16 holds.
        return scaler.scale(loss * 1e7 if step in (2, 7) and rank in ranks else loss)

    for step in range(STEPS):
        optimizer.zero_grad()
        loss_at(model, step, wrap.rank).backward()
        alone = copy.deepcopy(model.module)
        late = torch.autograd.grad(loss_at(alone, step, 0), list(alone.parameters()))
        scaler.unscale_(optimizer)
        if not wrap.keeps_what_is_skipped:
            for parameter, gradient in zip(model.parameters(), delayed, strict=bool(delayed)):
                parameter.grad.add_(gradient)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        notes.add(f"finite.{step}", torch.isfinite(norm))
        delayed = []
        if torch.isfinite(norm):
            notes.gradients(step, model)
        elif 0 not in ranks:
            delayed = [gradient / scaler.get_scale() / wrap.world_size for gradient in late]
        scaler.step(optimizer)
        scaler.update()
        notes.add(f"scale.{step}", scaler.get_scale())
        notes.state(model, f"state.{step}")
    return notes.tensors


@rows
def scaler_without_unscale(wrap: Wrap) -> dict[str, Tensor]:
    """`scaler.step` alone, and gradients as they stand before it: scaled."""
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    wrap.track(optimizer, scaler=scaler)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, wrap.rank)).backward()
        notes.gradients(step, model)
        scaler.step(optimizer)
        scaler.update()
    notes.state(model)
    return notes.tensors


@rows
def scaler_with_accumulation(wrap: Wrap) -> dict[str, Tensor]:
    """Scaled gradients under `no_sync`, then two backwards that synchronise, then a clipped step."""
    notes, model = Notes(), wrap.model(network())
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    wrap.track(optimizer, scaler=scaler)
    for step in range(STEPS):
        optimizer.zero_grad()
        with model.no_sync():
            scaler.scale(loss_of(model, 3 * step, wrap.rank)).backward()
        for part in (1, 2):
            scaler.scale(loss_of(model, 3 * step + part, wrap.rank)).backward()
        scaler.unscale_(optimizer)
        notes.gradients(step, model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
    notes.state(model)
    return notes.tensors


@rows
def scaler_of_two_models(wrap: Wrap) -> dict[str, Tensor]:
    """One scaler, two models, fused optimizers; the second model overflows in step 3, and only its step is skipped."""
    notes, models = Notes(), [wrap.model(network()) for _ in range(2)]
    optimizers = [torch.optim.Adam(model.parameters(), fused=True) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for optimizer in optimizers:
        wrap.track(optimizer, scaler=scaler)
    for step in range(STEPS):
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = loss_of(model, 2 * step + number, wrap.rank)
            scaler.scale(loss * torch.inf if (step, number) == (3, 1) else loss).backward()
            scaler.step(optimizer)
            notes.state(model, f"state.{step}.{number}")
        scaler.update()
        notes.add(f"scale.{step}", scaler.get_scale())
    return notes.tensors


@rows.over(bfloat16=torch.bfloat16, float16=torch.float16)
def half_precision(wrap: Wrap, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters and gradients of 16 bits; compared to what one rounding makes of them."""

    def loss(model, step, rank):
        return model(draw(8, 20, seed=100 * step + rank).to(dtype)).float().square().mean()

    return train(wrap, network().to(dtype), loss)


@rows
def float64_parameters(wrap: Wrap) -> dict[str, Tensor]:
    """Gradients travel as float32, so that they agree to that precision."""

    def loss(model, step, rank):
        return model(draw(8, 20, seed=100 * step + rank).double()).square().mean()

    return train(wrap, network().double(), loss)


@rows
def several_formats_in_one_model(wrap: Wrap) -> dict[str, Tensor]:
    """A bfloat16 layer between float32 ones."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(20, 40), nn.Linear(40, 40).bfloat16(), nn.Linear(40, 30)

        def forward(self, x):
            return self.last(self.middle(self.first(x).bfloat16()).float())

    return train(wrap, Mixed(), loss_of)
