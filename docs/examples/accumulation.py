"""
Gradient accumulation: one optimizer step for every four batches. A save waits for the step.

    python accumulation.py          # 4 epochs
    python accumulation.py 6        # 2 more
"""

import sys

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from trainbus import Handler
from trainbus_callbacks import ModelCheckpoint

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 4
accumulate = 4

torch.manual_seed(0)
inputs = torch.randn(216, 8)
loader = DataLoader(TensorDataset(inputs, inputs.sin().sum(1, keepdim=True)), batch_size=16, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)


def step():
    optimizer.step()
    optimizer.zero_grad()


with Handler(model, optimizer) as handler:
    handler.add_callback(
        ModelCheckpoint("run/last.pt", save_freq=5)
    )  # due at 5, 10, ...; taken at 8, 12, ...
    handler.on("epoch_end", lambda epoch, logs: print(f"epoch {epoch + 1}: loss {logs['loss']:.6f}"))
    handler.resume("run")

    for _ in handler.epochs(epochs):
        waiting = 0  # batches whose gradients no step has used yet
        for x, y in handler.batches(loader):
            loss = mse_loss(model(x), y)
            (loss / accumulate).backward()
            handler.log(loss=loss)
            waiting += 1
            if waiting == accumulate or handler.batch + 1 == len(loader):  # the last one takes the rest
                step()
                waiting = 0
