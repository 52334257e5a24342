"""
The same with `fit`: the loop is ours, with a learning-rate schedule and clipped gradients.

    python fit.py                   # 4 epochs
    python fit.py 6                 # 2 more
"""

import sys

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from trainbus import Handler
from trainbus_callbacks import LearningRateMonitor, ModelCheckpoint

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 4

torch.manual_seed(0)
inputs = torch.randn(256, 8)
data = TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))
train_loader = DataLoader(data, batch_size=16, shuffle=True)
val_loader = DataLoader(data, batch_size=64)

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)


def report(epoch, logs):
    print(f"epoch {epoch + 1}: lr {logs['lr']:.4f}, val_loss {logs['val_loss']:.6f}")


with Handler(model, optimizer, scheduler=scheduler) as handler:
    handler.add_callback(LearningRateMonitor())
    handler.add_callback(ModelCheckpoint("run/{epoch}.pt", monitor="val_loss"))
    handler.on("epoch_end", report)
    handler.resume("run")
    handler.fit(train_loader, val_loader, epochs=epochs, loss_fn=mse_loss, clip_norm=1.0)
