"""
Stop when the validation loss no longer improves, and go on with the best weights.

    python early_stopping.py        # stops by itself
    python early_stopping.py        # stays stopped
"""

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from trainbus import CheckpointFolder, Handler
from trainbus_callbacks import EarlyStopping, ModelCheckpoint

torch.manual_seed(0)
inputs = torch.randn(96, 8)
targets = inputs.sin().sum(1, keepdim=True) + 0.5 * torch.randn(96, 1)  # too few, and noisy: it overfits
train_loader = DataLoader(TensorDataset(inputs[:48], targets[:48]), batch_size=8, shuffle=True)
val_loader = DataLoader(TensorDataset(inputs[48:], targets[48:]), batch_size=48)

model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)

with Handler(model, optimizer) as handler:
    handler.add_callback(EarlyStopping("val_loss", patience=3))
    handler.add_callback(ModelCheckpoint("run/{epoch}.pt", monitor="val_loss"))
    handler.on("epoch_end", lambda epoch, logs: print(f"epoch {epoch + 1}: val_loss {logs['val_loss']:.6f}"))
    handler.resume("run")
    handler.fit(train_loader, val_loader, epochs=100, loss_fn=mse_loss)
    print(f"stopped after epoch {handler.epoch}: {handler.stop_reason}")

    best = CheckpointFolder("run").best("val_loss", "min")
    handler.load(best.path, only=("module",))
    print(f"the weights are now those of epoch {best.manifest.epoch + 1}")
