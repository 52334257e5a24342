"""
A loop of your own. Stop it (Ctrl-C, kill, power cut), run it again: it goes on after the last saved batch.

    python plain_loop.py            # 4 epochs
    python plain_loop.py 6          # 2 more
"""

import sys

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from trainbus import Handler
from trainbus_callbacks import ModelCheckpoint

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 4

torch.manual_seed(0)
inputs = torch.randn(256, 8)
data = TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))
train_loader = DataLoader(data, batch_size=16, shuffle=True)
val_loader = DataLoader(data, batch_size=64)

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

with Handler(model, optimizer) as handler:
    handler.add_callback(ModelCheckpoint("run/last.pt", save_freq=10))
    handler.add_callback(ModelCheckpoint("run/best.pt", monitor="val_loss", save_best_only=True))
    handler.on("epoch_end", lambda epoch, logs: print(f"epoch {epoch + 1}: val_loss {logs['val_loss']:.6f}"))
    handler.resume("run")

    for _ in handler.epochs(epochs):
        model.train()
        for x, y in handler.batches(train_loader):
            loss = mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            handler.log(loss=loss)

        model.eval()
        with torch.no_grad():
            for x, y in handler.val_batches(val_loader):
                handler.log(loss=mse_loss(model(x), y))
