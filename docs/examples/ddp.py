"""
DistributedDataParallel. Kill any process, run it again, and all ranks go on after the last saved batch.

    torchrun --standalone --nproc-per-node 2 ddp.py         # 4 epochs
    torchrun --standalone --nproc-per-node 2 ddp.py 6       # 2 more
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from trainbus import Handler
from trainbus_callbacks import ModelCheckpoint, Preemption

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 4

gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if gpus else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
if gpus:
    torch.cuda.set_device(device)

torch.manual_seed(0)  # the same data and the same first weights everywhere
inputs = torch.randn(256, 8)
data = TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))
train_loader = DataLoader(data, batch_size=16, sampler=DistributedSampler(data))
val_loader = DataLoader(data, batch_size=64, sampler=DistributedSampler(data, shuffle=False))

layers = torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1)
model = DistributedDataParallel(torch.nn.Sequential(*layers).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
torch.manual_seed(1 + dist.get_rank())  # another dropout on each rank

# From here on there is no `if rank == 0`: each rank makes the same calls, rank 0 writes.
with Handler(model, optimizer) as handler:
    handler.add_callback(ModelCheckpoint("run/last.pt", save_freq=5))
    handler.add_callback(ModelCheckpoint("run/best.pt", monitor="val_loss", save_best_only=True))
    handler.add_callback(Preemption("run/preempted.pt"))
    handler.resume("run")

    @handler.on("epoch_end")
    def report(epoch, logs):
        if handler.rank == 0:  # what is no save may well be under one
            print(f"epoch {epoch + 1}: val_loss {logs['val_loss']:.6f}")

    for _ in handler.epochs(epochs):
        model.train()
        for x, y in handler.batches(train_loader):
            loss = mse_loss(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            handler.log(loss=loss)

        model.eval()
        with torch.no_grad():
            for x, y in handler.val_batches(val_loader):
                handler.log(loss=mse_loss(model(x.to(device)), y.to(device)))

dist.destroy_process_group()
