"""
Training by steps: no epochs to think of, a loader that is gone round and round, a save every few minutes.

    python steps.py                 # 40 steps
    python steps.py 60              # 20 more
"""

import sys

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from trainbus import Handler
from trainbus_callbacks import Every, KeepLast, ModelCheckpoint

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40

torch.manual_seed(0)
inputs = torch.randn(256, 8)
loader = DataLoader(TensorDataset(inputs, inputs.sin().sum(1, keepdim=True)), batch_size=16, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
often = Every(steps=10) | Every(minutes=5)

with Handler(model, optimizer) as handler:
    handler.add_callback(ModelCheckpoint("run/{global_step:06d}.pt", save_freq=often, keep=KeepLast(2)))
    handler.resume("run")

    for x, y in handler.steps(steps, loader):
        loss = mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        handler.log(loss=loss)
        if (handler.global_step + 1) % 5 == 0:  # this step counts when its body is over
            print(f"step {handler.global_step + 1}: loss {loss.item():.6f}")
