"""TorchIO: a transform of subjects, for ``tio.Compose`` and ``tio.SubjectsDataset``.

    pip install torchio
    python examples/recipe_torchio.py scan.nii.gz labels.nii.gz --out deformed

All images of a subject are moved by one field, label maps with nearest neighbours; they must lie on one grid. As with
TorchIO's own transforms there is a random one, and one without chance, which stands in the history of the subject and
replays the field. Subjects that are one voxel thick are deformed as 2D images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchio as tio
from monai.data import MetaTensor
from torchio.transforms.augmentation import RandomTransform

from monai_drdm import RandDRDMDeformd


class DRDM(tio.SpatialTransform):
    """Moves all images of a subject by the field that a seed stands for."""

    def __init__(
        self, seed: int, level: float | Sequence[float] = (0.3, 0.8), network: str = "auto", **options: Any
    ) -> None:
        super().__init__(**options)
        self.seed, self.level, self.network = seed, level, network
        self.args_names = ["seed", "level", "network"]

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        images = subject.get_images_dict(intensity_only=False, include=self.include, exclude=self.exclude)
        scans = [name for name, image in images.items() if not isinstance(image, tio.LabelMap)]
        if not scans:
            raise ValueError(f"DRDM: a subject needs a ScalarImage, which the network sees; got {list(images)}.")
        deform = RandDRDMDeformd(
            list(images),
            mode=["nearest" if isinstance(image, tio.LabelMap) else "bilinear" for image in images.values()],
            image_key=scans[0],
            seed_key="seed",
            prob=1.0,
            deformation_level=self.level,
            network=self.network,
        )
        flat = all(image.spatial_shape[-1] == 1 for image in images.values())
        data = {
            name: MetaTensor(image.data[..., 0] if flat else image.data, torch.as_tensor(image.affine))
            for name, image in images.items()
        }
        moved = deform({**data, "seed": self.seed})
        for name, image in images.items():
            tensor = moved[name].as_tensor()
            image.set_data(tensor[..., None] if flat else tensor)
        return subject


class RandomDRDM(RandomTransform, tio.SpatialTransform):
    """Moves all images of a subject by a random field; ``p`` is the chance that it does."""

    def __init__(self, level: float | Sequence[float] = (0.3, 0.8), network: str = "auto", **options: Any) -> None:
        super().__init__(**options)
        self.level, self.network = level, network

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        deform = DRDM(self._get_random_seed(), self.level, self.network, **self._get_base_args())
        moved = deform(subject)
        assert isinstance(moved, tio.Subject)
        return moved


def main(arguments: list[str] | None = None) -> tio.Subject:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("label", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", default="auto")
    args = parser.parse_args(arguments)
    subject = tio.Subject(image=tio.ScalarImage(args.image), label=tio.LabelMap(args.label))
    transform = tio.Compose([tio.ToCanonical(), RandomDRDM(network=args.network)])
    torch.manual_seed(args.seed)  # TorchIO takes its random numbers from here
    moved = transform(subject)
    args.out.mkdir(parents=True)
    for name, image in moved.get_images_dict(intensity_only=False).items():
        image.save(args.out / f"{name}.nii.gz")
    return moved


if __name__ == "__main__":
    main()
