"""Train a small network to tell ten noisy pictures apart, in processes that torchrun has started."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS, BATCH = 4, 32

dist.init_process_group("gloo")
torch.manual_seed(0)
pictures = torch.randn(10, 64)
labels = torch.randint(10, (4096,))
images = pictures[labels] + 1.5 * torch.randn(4096, 64)
data = TensorDataset(images, labels)
sampler = DistributedSampler(data)

model = DDP(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)
    for x, y in DataLoader(data, BATCH, sampler=sampler):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")

with torch.no_grad():
    fresh = pictures[labels] + 1.5 * torch.randn(4096, 64)
    accuracy = (model(fresh).argmax(1) == labels).float().mean()
print(f"accuracy {accuracy:.4f}")
dist.destroy_process_group()
