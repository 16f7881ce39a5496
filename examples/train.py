"""Train a small network to tell ten noisy pictures apart."""

import torch
from torch import nn
from torch.nn import functional

from ps_accordion.worker import DistributedModel, connect

EPOCHS, BATCH = 4, 32

session = connect()
torch.manual_seed(0)
pictures = torch.randn(10, 64)
labels = torch.randint(10, (4096,))
images = pictures[labels] + 1.5 * torch.randn(4096, 64)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
model = DistributedModel(model, session=session)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

for epoch in range(EPOCHS):
    session.begin_epoch(epoch)
    order = torch.randperm(len(images))[session.rank :: session.world_size]
    for batch in order.split(BATCH):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")

with torch.no_grad():
    fresh = pictures[labels] + 1.5 * torch.randn(4096, 64)
    accuracy = (model(fresh).argmax(1) == labels).float().mean()
print(f"accuracy {accuracy:.4f}")
