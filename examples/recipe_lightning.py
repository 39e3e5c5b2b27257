"""PyTorch Lightning: batches are deformed on their device, after Lightning has moved them there.

    pip install lightning
    python examples/recipe_lightning.py --epochs 5

The hook ``on_after_batch_transfer`` is the place: the loader's workers do not wait for the network, and on a GPU the
deformation runs there. Batches for validation and prediction are left alone. The data are slices of hearts that this
example draws.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from recipe_pytorch import CLASSES, draw_tensors
from torch import Tensor
from torch.utils.data import DataLoader

from monai_drdm import BatchRandDRDMDeformd

Batch = dict[str, Tensor]


class Segmenter(lightning.LightningModule):
    """A segmenter whose training batches are deformed."""

    def __init__(self, prob: float = 0.5, network: str = "auto") -> None:
        super().__init__()
        self.net = UNet(2, 1, CLASSES, channels=(16, 32, 64), strides=(2, 2))
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)
        self.deform = BatchRandDRDMDeformd(
            ["image", "label"], mode=["bilinear", "nearest"], prob=prob, network=network, invertible=False
        )

    def on_fit_start(self) -> None:
        """Every process draws its own fields."""
        self.deform.set_random_state(self.global_rank)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.deform(batch) if self.trainer.training else batch

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.loss(self.net(batch["image"]), batch["label"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        self.log("val_loss", self.loss(self.net(batch["image"]), batch["label"]), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def loaders(scans: int, size: int) -> tuple[DataLoader, DataLoader]:
    """Loaders of drawn hearts for training and validation."""
    images, labels = draw_tensors(scans, size)
    samples = [{"image": image, "label": label} for image, label in zip(images, labels)]
    held_out = max(1, scans // 4)
    return DataLoader(samples[held_out:], batch_size=8, shuffle=True), DataLoader(samples[:held_out], batch_size=8)


def main(arguments: list[str] | None = None, **trainer: Any) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--scans", type=int, default=32, help="number of drawn hearts")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--prob", type=float, default=0.5, help="share of the images that are deformed")
    parser.add_argument("--network", default="auto")
    args = parser.parse_args(arguments)
    lightning.seed_everything(0)
    run = lightning.Trainer(max_epochs=args.epochs, log_every_n_steps=1, **trainer)
    run.fit(Segmenter(args.prob, args.network), *loaders(args.scans, args.size))
    loss = float(run.callback_metrics["val_loss"])
    print(f"validation loss {loss:.3f}")
    return loss


if __name__ == "__main__":
    main()
