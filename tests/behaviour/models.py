"""Rows about models: shared parameters, buffers, what forward takes and returns, and what is compiled."""

from __future__ import annotations

import copy

import torch
from behaviour.gradients import loss_of, network
from behaviour.wrap import STEPS, Notes, Rows, Wrap, draw, sgd, train
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

rows = Rows()


class Tied(nn.Module):
    """A small transformer whose embedding is its output layer, too."""

    def __init__(self, tokens: int = 40, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.place = nn.Parameter(0.1 * torch.randn(12, width))
        self.layer = nn.TransformerEncoderLayer(width, nhead=2, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.out = nn.Linear(width, tokens, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next token, [batch, length, tokens]."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.out(self.layer(self.embedding(tokens) + self.place[: tokens.shape[1]], src_mask=mask, is_causal=True))


def next_token_loss(model, step: int, rank: int) -> Tensor:
    """Return the loss on sequences that count on from a random token."""
    start = torch.randint(40, (8, 1), generator=torch.Generator().manual_seed(100 * step + rank))
    tokens = (start + torch.arange(13)) % 40
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@rows
def tied_parameters(wrap: Wrap) -> dict[str, Tensor]:
    """A transformer with tied embeddings: one tensor, one gradient."""
    return train(wrap, Tied(), next_token_loss, optimizer=torch.optim.AdamW)


@rows
def batch_norm(wrap: Wrap) -> dict[str, Tensor]:
    """Running statistics are those of rank 0, on every rank once it has trained or run a further forward."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    notes, model = Notes(), wrap.model(module)
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        model(draw(4, 3, 8, 8, seed=100 * step + wrap.rank)).square().mean().backward()
        notes.gradients(step, model)
        optimizer.step()
    model.eval()
    with torch.no_grad():  # the forward in which DistributedDataParallel copies buffers
        notes.add("evaluated", model(draw(4, 3, 8, 8, seed=7)))
    notes.state(model)
    return notes.tensors


@rows
def local_buffers(wrap: Wrap) -> dict[str, Tensor]:
    """`broadcast_buffers=False`: running statistics stay each rank's own."""
    notes, model = Notes(), wrap.model(nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64)), broadcast_buffers=False)
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        model(draw(8, 20, seed=100 * step + wrap.rank)).pow(3).mean().backward()
        notes.gradients(step, model)
        optimizer.step()
    for name, buffer in model.named_buffers():
        notes.local(name, buffer)
    return notes.tensors


@rows
def spectral_norm(wrap: Wrap) -> dict[str, Tensor]:
    """A parametrised weight whose buffers every forward changes."""
    module = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(20, 64)), nn.Tanh(), nn.Linear(64, 30))
    notes = Notes()
    train(wrap, module, loss_of, notes=notes)
    return {name: tensor for name, tensor in notes.tensors.items() if not name.startswith("state.") or "original" in name}


@rows
def dropout(wrap: Wrap) -> dict[str, Tensor]:
    """Wrapping and training take nothing out of torch's random generator."""
    module = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.5), nn.Linear(64, 30))
    torch.manual_seed(50 + wrap.rank)
    return train(wrap, module, loss_of)


@rows
def channels_last(wrap: Wrap) -> dict[str, Tensor]:
    """Parameters whose memory is not in the order of their dimensions."""
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10))

    def loss(model, step, rank):
        x = draw(4, 3, 8, 8, seed=100 * step + rank).to(memory_format=torch.channels_last)
        return model(x).square().mean()

    return train(wrap, module.to(memory_format=torch.channels_last), loss)


@rows
def tensors_of_all_sizes(wrap: Wrap) -> dict[str, Tensor]:
    """A scalar, an odd one, and one of many partitions."""

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))
            self.odd = nn.Parameter(torch.randn(7, 1, 3))
            self.wide = nn.Linear(20, 1501)

        def forward(self, x):
            return self.scale * self.wide(x) + self.odd.sum()

    return train(wrap, Sizes(), lambda model, step, rank: model(draw(8, 20, seed=100 * step + rank)).square().mean())


@rows
def a_layer_used_twice(wrap: Wrap) -> dict[str, Tensor]:
    """One layer, two places in one forward."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 20)
            self.out = nn.Linear(20, 30)

        def forward(self, x):
            return self.out(self.layer(torch.tanh(self.layer(x))))

    return train(wrap, Twice(), loss_of)


@rows
def outputs_in_dicts_and_tuples(wrap: Wrap) -> dict[str, Tensor]:
    """Forward returns a nest of tensors and what is none."""

    class Nest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(20, 30), nn.Linear(20, 30)

        def forward(self, x):
            return {"both": (self.a(x), [self.b(x)]), "size": len(x)}

    def loss(model, step, rank):
        out = model(draw(8, 20, seed=100 * step + rank))
        first, (second,) = out["both"]
        return (first * second).square().mean() / out["size"]

    return train(wrap, Nest(), loss, find_unused_parameters=True)


@rows
def keyword_arguments(wrap: Wrap) -> dict[str, Tensor]:
    """Forward takes keywords, and what is no tensor."""

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 30)

        def forward(self, *, x, options):
            return self.layer(x).pow(options["power"])

    def loss(model, step, rank):
        return model(x=draw(8, 20, seed=100 * step + rank), options={"power": 2 + step % 2}).mean()

    return train(wrap, Keywords(), loss)


@rows
def custom_autograd_function(wrap: Wrap) -> dict[str, Tensor]:
    """A Function with a backward of its own."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return -0.5 * gradient

    module = network()
    module[1] = type("Reverse", (nn.Module,), {"forward": lambda self, x: Reversed.apply(x)})()
    return train(wrap, module, loss_of)


class Checkpointed(nn.Module):
    """Two blocks whose activations are computed again in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(20, 40), nn.ModuleList(), nn.Linear(40, 30)
        self.blocks.extend(nn.Sequential(nn.Linear(40, 40), nn.Dropout(0.2), nn.Tanh()) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Return 30 numbers for each of the batch."""
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.last(x)


@rows.over(reentrant={"use_reentrant": True}, not_reentrant={"use_reentrant": False})
def checkpointing(wrap: Wrap, how: dict[str, bool]) -> dict[str, Tensor]:
    """Activation checkpointing, with dropout."""
    torch.manual_seed(50 + wrap.rank)
    return train(wrap, Checkpointed(**how), loss_of)


@rows.over(reentrant=True, not_reentrant=False)
def checkpointing_in_a_static_graph(wrap: Wrap, use_reentrant: bool) -> dict[str, Tensor]:
    """A block that is checkpointed twice in one forward, for which DistributedDataParallel wants `static_graph`."""

    class Twice(Checkpointed):
        def forward(self, x):
            return self.last(self.again(self.again(self.first(x))))

        def again(self, x):
            return checkpoint(self.blocks[0], x, use_reentrant=self.use_reentrant)

    module = Twice(use_reentrant)
    module.blocks = module.blocks[:1]
    return train(wrap, module, loss_of, static_graph=True)


@rows
def checkpoint_around_the_wrapper(wrap: Wrap) -> dict[str, Tensor]:
    """The wrapper itself runs again in backward."""

    def loss(model, step, rank):
        x = draw(8, 20, seed=100 * step + rank).requires_grad_()
        return checkpoint(model, x, use_reentrant=True).square().mean()

    return train(wrap, network(), loss)


@rows
def compiled_before(wrap: Wrap) -> dict[str, Tensor]:
    """`torch.compile`, then the wrapper."""
    return train(wrap, torch.compile(network(), backend="eager"), loss_of)


@rows
def compiled_after(wrap: Wrap) -> dict[str, Tensor]:
    """The wrapper, then `torch.compile`."""
    notes = Notes()
    model = wrap.model(network())
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(compiled, step, wrap.rank).backward()
        notes.gradients(step, model)
        optimizer.step()
    notes.state(model)
    return notes.tensors


@rows
def copies_of_the_model(wrap: Wrap) -> dict[str, Tensor]:
    """A moving average in a copy of the model, and a copy that trains on by itself."""
    notes, model = Notes(), wrap.model(nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.Linear(64, 30)))
    optimizer = sgd(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model.module)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, wrap.rank).backward()
        notes.gradients(step, model)
        optimizer.step()
        average.update_parameters(model.module)
        alone = copy.deepcopy(model.module)
        loss_of(alone, step, wrap.rank).backward()
        alone.load_state_dict(average.module.state_dict())
    for name, parameter in average.named_parameters():
        notes.add(f"average.{name}", parameter)
    notes.state(model)
    return {name: tensor for name, tensor in notes.tensors.items() if "running" not in name}
