"""
Averaged weights: an exponential moving average is what is validated and saved as the best.

    python ema.py                   # 4 epochs
    python ema.py 6                 # 2 more
"""

import sys

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from trainbus import Handler
from trainbus_callbacks import EMA, ModelCheckpoint

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 4

torch.manual_seed(0)
inputs = torch.randn(320, 8)
targets = inputs.sin().sum(1, keepdim=True)
train_loader = DataLoader(TensorDataset(inputs[:256], targets[:256]), batch_size=8, shuffle=True)
val_loader = DataLoader(TensorDataset(inputs[256:], targets[256:]), batch_size=64)

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)  # large: the weights jump about


def report(epoch, logs):
    print(f"epoch {epoch + 1}: val_loss {logs['val_loss']:.6f}, of the last weights {logs['last']:.6f}")


with Handler(model, optimizer) as handler:
    handler.add_callback(EMA(decay=0.95))
    handler.add_callback(ModelCheckpoint("run/last.pt", save_freq=10))
    handler.add_callback(  # holds the average alone, for whoever uses the model later
        ModelCheckpoint("run/best.pt", monitor="val_loss", save_best_only=True, save_weights_only=True)
    )
    handler.on("epoch_end", report)
    handler.resume("run")

    for _ in handler.epochs(epochs):
        for x, y in handler.batches(train_loader):
            loss = mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            handler.log(loss=loss)

        with torch.no_grad():
            for x, y in val_loader:  # no events here: the module holds the weights in training
                handler.log(last=mse_loss(model(x), y))
            for x, y in handler.val_batches(val_loader):  # here it holds the average
                handler.log(loss=mse_loss(model(x), y))
