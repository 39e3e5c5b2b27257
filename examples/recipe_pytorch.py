"""Plain PyTorch: batches of tensors are deformed in the training loop, on the device where they are.

    python examples/recipe_pytorch.py --steps 100

The data are slices of hearts that this example draws. Nothing of MONAI's transforms or metadata is needed: the two
lines that matter are those with ``deform``.
"""

from __future__ import annotations

import argparse

import drawn_hearts
import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from monai_drdm import BatchRandDRDMDeformd

CLASSES = 4


def draw_tensors(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, H, W)`` and labels ``(N, 1, H, W)`` of drawn hearts."""
    generator = np.random.default_rng(0)
    images, labels = zip(*(drawn_hearts.draw_heart(generator, size) for _ in range(count)))
    return torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(labels))[:, None]


def train(images: Tensor, labels: Tensor, steps: int, prob: float, network: str, device: str) -> list[float]:
    """Train a small network on deformed batches; the loss of every step."""
    torch.manual_seed(0)
    net = UNet(2, 1, CLASSES, channels=(16, 32, 64), strides=(2, 2)).to(device)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    data = TensorDataset(images, labels)
    loader = DataLoader(data, batch_size=8, sampler=RandomSampler(data, replacement=True, num_samples=8 * steps))
    deform = BatchRandDRDMDeformd(
        ["image", "label"], mode=["bilinear", "nearest"], prob=prob, network=network, invertible=False
    )
    deform.set_random_state(0)
    losses = []
    for image, label in loader:
        image, label = deform.deform(image.to(device), label.to(device))
        loss = F.cross_entropy(net(image), label[:, 0].long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--scans", type=int, default=24, help="number of drawn hearts")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--prob", type=float, default=0.5, help="share of the images that are deformed")
    parser.add_argument("--network", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    losses = train(*draw_tensors(args.scans, args.size), args.steps, args.prob, args.network, args.device)
    print(f"loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")
    return losses


if __name__ == "__main__":
    main()
