"""
Two networks and two optimizers: a GAN that learns a ring of points.

    python gan.py                   # 4 epochs
    python gan.py 6                 # 2 more
"""

import sys

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils.data import DataLoader

from trainbus import Handler
from trainbus_callbacks import ModelCheckpoint

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 4


def network(inputs, outputs):
    return torch.nn.Sequential(torch.nn.Linear(inputs, 32), torch.nn.ReLU(), torch.nn.Linear(32, outputs))


torch.manual_seed(0)
angles = 2 * torch.pi * torch.rand(256)
points = torch.stack([angles.cos(), angles.sin()], dim=1)
generator, critic = network(4, 2), network(2, 1)
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=0.001)
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=0.001)

with Handler(
    {"generator": generator, "critic": critic},
    {"generator": generator_optimizer, "critic": critic_optimizer},
) as handler:
    handler.add_callback(ModelCheckpoint("run/last.pt", save_freq=6))
    handler.on("epoch_end", lambda epoch, logs: print(f"epoch {epoch + 1}: radius {logs['radius']:.6f}"))
    handler.resume("run")

    for _ in handler.epochs(epochs):
        for real in handler.batches(DataLoader(points, batch_size=32, shuffle=True)):
            fake = generator(torch.randn(len(real), 4))
            of_real, of_fake = critic(real), critic(fake.detach())
            critic_loss = cross_entropy(of_real, torch.ones_like(of_real))
            critic_loss = critic_loss + cross_entropy(of_fake, torch.zeros_like(of_fake))
            critic_optimizer.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()

            of_fake = critic(fake)
            generator_loss = cross_entropy(of_fake, torch.ones_like(of_fake))
            generator_optimizer.zero_grad()
            generator_loss.backward()
            generator_optimizer.step()
            handler.log(
                critic_loss=critic_loss,
                generator_loss=generator_loss,
                radius=fake.detach().norm(dim=1).mean(),
            )
