"""
Mixed precision: autocast, and a GradScaler whose scale is saved with the run.

    python mixed_precision.py       # 4 epochs
    python mixed_precision.py 6     # 2 more
"""

import sys

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from trainbus import Handler
from trainbus_callbacks import ModelCheckpoint

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 4
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.bfloat16

torch.manual_seed(0)
inputs = torch.randn(256, 8)
loader = DataLoader(TensorDataset(inputs, inputs.sin().sum(1, keepdim=True)), batch_size=16, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scaler = torch.amp.GradScaler(device, init_scale=1024, growth_interval=20)  # doubles every 20 steps


def report(epoch, logs):
    print(f"epoch {epoch + 1}: loss {logs['loss']:.6f}, scale {scaler.get_scale():.0f}")


with Handler(model, optimizer, scaler=scaler) as handler:
    handler.add_callback(ModelCheckpoint("run/last.pt", save_freq=10))
    handler.on("epoch_end", report)
    handler.resume("run")

    for _ in handler.epochs(epochs):
        for x, y in handler.batches(loader):
            with torch.autocast(device, dtype):
                loss = mse_loss(model(x.to(device)), y.to(device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            handler.log(loss=loss)
