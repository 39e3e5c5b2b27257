"""A MONAI segmentation pipeline on 2D slices with DRDM augmentation: load, deform, train a small U-Net.

    python examples/segmentation_pipeline.py --images scans/ --labels masks/ --classes 4 --epochs 20

Image and label files are NIfTI volumes, paired by sorted name. The network that comes with the package is used unless
--network says otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader, list_data_collate
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Resized,
    ScaleIntensityRangePercentilesd,
    SplitDimd,
)
from monai.utils import set_determinism

from monai_drdm import RandDRDMDeformd

KEYS = ["image", "label"]


def pipeline(network: str, prob: float, size: int) -> Compose:
    return Compose(
        [
            LoadImaged(keys=KEYS),
            EnsureChannelFirstd(keys=KEYS),
            ScaleIntensityRangePercentilesd(keys="image", lower=1, upper=99, b_min=0, b_max=1, clip=True),
            SplitDimd(keys=KEYS, dim=-1, keepdim=False, list_output=True),
            Resized(keys=KEYS, spatial_size=(size, size), mode=["bilinear", "nearest"]),
            RandDRDMDeformd(
                keys=KEYS, mode=["bilinear", "nearest"], prob=prob, deformation_level=(0.3, 0.8), network=network
            ),
        ]
    )


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--classes", type=int, required=True, help="number of classes, background included")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--prob", type=float, default=0.5)
    parser.add_argument("--network", default="auto")
    args = parser.parse_args(arguments)
    set_determinism(0)
    pairs = zip(sorted(args.images.glob("*.nii*")), sorted(args.labels.glob("*.nii*")), strict=True)
    items = [{"image": str(image), "label": str(label)} for image, label in pairs]
    dataset = CacheDataset(items, pipeline(args.network, args.prob, args.size))
    loader = DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=list_data_collate)
    net = UNet(2, 1, args.classes, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=1)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    loss = torch.zeros(())
    for epoch in range(args.epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_function(net(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
