"""The training data of registration networks, kept in memory: pairs with known fields, or images to pair at random."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor
from tqdm import tqdm

from monai_drdm.io import find_cases, load_ddf, load_image, read_cases
from monai_drdm.io.datalists import DATALIST, path_beside, read_section

_LOW, _HIGH = 0.005, 0.995
_PAIR = ("moving", "fixed", "ddf", "moving_label", "fixed_label")
_SAME_SPACING = 1e-2


@dataclass(frozen=True)
class RegistrationBatch:
    """Pairs on one grid."""

    moving: Tensor
    """``(B, 1, *S)`` in [0, 1]."""
    fixed: Tensor
    """``(B, 1, *S)`` in [0, 1]."""
    inside: Tensor
    """``(B, 1, *S)`` bool: true in the fixed image, false in its padding."""
    ddf: Tensor | None = None
    """``(B, D, *S)`` voxels, or None if it is not known."""
    moving_label: Tensor | None = None
    """``(B, 1, *S)`` uint8, or None without labels."""
    fixed_label: Tensor | None = None
    """``(B, 1, *S)`` uint8, or None without labels."""

    def to(self, device: torch.device) -> RegistrationBatch:
        """The pairs on a device, with images and fields in float32."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor.to(device)
            return tensor.float() if tensor.is_floating_point() else tensor

        values = {name: moved(value) for name, value in vars(self).items()}
        return RegistrationBatch(**values)  # type: ignore[arg-type]  # None stays None


@dataclass(frozen=True)
class PairBank:
    """Pairs whose fields are known."""

    pairs: RegistrationBatch
    names: tuple[str, ...]
    """Paths of their fixed images."""

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, count: int, generator: torch.Generator) -> RegistrationBatch:
        """Random pairs, on the generator's device."""
        chosen = torch.randint(len(self), (count,), generator=generator, device=generator.device).cpu()
        return self.at(chosen).to(generator.device)

    def at(self, chosen: Tensor) -> RegistrationBatch:
        """The pairs of the given indices."""
        values = {name: None if value is None else value[chosen] for name, value in vars(self.pairs).items()}
        return RegistrationBatch(**values)  # type: ignore[arg-type]

    def split(self, share: float) -> tuple[PairBank, PairBank]:
        """The pairs of the first images to train on, and those of the last images to validate on.

        With a single image or a share of 0, all pairs are in both.
        """
        sources = [os.path.join(folder, name.rsplit("_pair", 1)[0]) for folder, name in map(os.path.split, self.names)]
        images = list(dict.fromkeys(sources))
        if len(images) < 2 or share == 0:
            return self, self
        kept = set(images[-min(max(round(share * len(images)), 1), len(images) - 1) :])
        return self._part([i for i, one in enumerate(sources) if one not in kept]), self._part(
            [i for i, one in enumerate(sources) if one in kept]
        )

    def _part(self, chosen: list[int]) -> PairBank:
        return PairBank(self.at(torch.tensor(chosen)), tuple(self.names[i] for i in chosen))


@dataclass(frozen=True)
class ImageBank:
    """Images that are registered with each other, and their labels if there are any."""

    images: Tensor
    """``(N, 1, *S)`` float16 in [0, 1]."""
    inside: Tensor
    """``(N, 1, *S)`` bool."""
    labels: Tensor | None
    """``(N, 1, *S)`` uint8."""
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, count: int, generator: torch.Generator) -> RegistrationBatch:
        """Random pairs of different images, on the generator's device."""
        device = generator.device
        fixed = torch.randint(len(self), (count,), generator=generator, device=device)
        step = torch.randint(1, max(len(self), 2), (count,), generator=generator, device=device)
        return self.pairs(((fixed + step) % len(self)).cpu(), fixed.cpu()).to(device)

    def pairs(self, moving: Tensor, fixed: Tensor) -> RegistrationBatch:
        """The pairs of the images of the given indices."""
        labels = (None, None) if self.labels is None else (self.labels[moving], self.labels[fixed])
        return RegistrationBatch(self.images[moving], self.images[fixed], self.inside[fixed], None, *labels)

    def split(self, share: float) -> tuple[ImageBank, ImageBank]:
        """The first images to train on, and the last ones to validate on.

        Each part has at least two images; if there are too few for that, all images are in both.
        """
        kept = max(round(share * len(self)), 2)
        if len(self) - kept < 2 or share == 0:
            return self, self
        return self._part(slice(0, -kept)), self._part(slice(-kept, None))

    def _part(self, part: slice) -> ImageBank:
        labels = None if self.labels is None else self.labels[part]
        return ImageBank(self.images[part], self.inside[part], labels, self.names[part])


def load_pairs(
    data: str | os.PathLike[str], *, spatial_dims: int, section: str = "training", progress: bool = False
) -> PairBank:
    """Read the folder or the datalist that ``monai-drdm pairs`` wrote.

    Images of different size are centred on one grid; ``inside`` is false in the padding.

    Raises:
        FileNotFoundError: the folder or datalist does not exist.
        ValueError: the datalist has no pairs; images have other dimensions or are not finite; the files of a pair
            differ in shape.
    """
    path = Path(data)
    path = path / "datalist.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no folder of pairs or datalist {path}.")
    with DATALIST.reading(path):
        entries = read_section(path, section)
        files = [{key: path_beside(path, entry[key]) for key in _PAIR if key in entry} for entry in entries]
    if not files or not all({"moving", "fixed", "ddf"} <= set(one) for one in files):
        raise ValueError(f"{path} must list pairs with moving, fixed and ddf. Make them with monai-drdm pairs.")
    labelled = all({"moving_label", "fixed_label"} <= set(one) for one in files)
    keys = ["moving", "fixed", "ddf", *(("moving_label", "fixed_label") if labelled else ())]
    read: dict[str, list[Tensor]] = {key: [] for key in keys}
    for one in tqdm(files, desc="read", unit="pair", disable=not progress):
        read["ddf"].append(load_ddf(one["ddf"]).as_tensor().half())
        for side in ("moving", "fixed"):
            read[side].append(_image(load_image(one[side]).data.as_tensor(), one[side], spatial_dims))
            if labelled:
                read[f"{side}_label"].append(_label(one[f"{side}_label"]))
        for key in keys:
            _check_same_shape(one["fixed"], read["fixed"][-1], one[key], read[key][-1])
    shape = _common_shape(read["fixed"])
    stacked = {
        key: torch.stack([_centred(one, shape, image=key in ("moving", "fixed")) for one in values])
        for key, values in read.items()
    }
    inside = torch.stack([_centred(torch.ones_like(one, dtype=torch.bool), shape) for one in read["fixed"]])
    pairs = RegistrationBatch(inside=inside, **stacked)
    return PairBank(pairs, tuple(str(one["fixed"]) for one in files))


def load_images(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None = None,
    *,
    spatial_dims: int,
    section: str = "training",
    progress: bool = False,
) -> ImageBank:
    """Read a folder of images and a folder of labels with the same file names, or a MONAI datalist.

    Images of different size are centred on one grid; ``inside`` is false in the padding.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: there are fewer than two images, or one is listed twice; images have other dimensions, different
            orientations or voxel sizes, or are not finite; only some images have labels, labels are on another grid,
            or ``labels`` is given beside a datalist, which names its own.
    """
    if labels is not None and Path(images).is_file():
        raise ValueError(f"labels must be None with the datalist {images}, which names its labels, got {labels}.")
    cases = read_cases(images, section) if Path(images).is_file() else find_cases(images, labels)
    if len(cases) < 2:
        raise ValueError(f"{images} must hold two images or more to register with each other, got {len(cases)}.")
    repeated = [path for path, count in Counter(case.image for case in cases).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{images} must list every image once, got {repeated[0]} again, which would be paired with itself."
        )
    read, marks = [], []
    first = load_image(cases[0].image).data
    for case in tqdm(cases, desc="read", unit="image", disable=not progress):
        data = load_image(case.image).data
        _check_same_grid(case.image, data, cases[0].image, first)
        read.append(_image(data.as_tensor(), case.image, spatial_dims))
        if case.label is not None:
            marks.append(_label(case.label, data.affine))
            _check_same_shape(case.image, read[-1], case.label, marks[-1])
    shape = _common_shape(read)
    if marks and len(marks) < len(read):
        raise ValueError(f"{images}: all images or none must have labels, got {len(marks)} of {len(read)}.")
    return ImageBank(
        torch.stack([_centred(one, shape, image=True) for one in read]),
        torch.stack([_centred(torch.ones_like(one, dtype=torch.bool), shape) for one in read]),
        torch.stack([_centred(one, shape) for one in marks]) if marks else None,
        tuple(case.name for case in cases),
    )


def unit_range(image: Tensor) -> Tensor:
    """Scale the 0.5th to 99.5th percentiles of an image ``(C, *S)`` to [0, 1], as networks expect it."""
    values = image.float()
    low, high = (torch.quantile(values.flatten()[:: max(1, values.numel() // 2**20)], q) for q in (_LOW, _HIGH))
    return ((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _image(data: Tensor, path: Path, spatial_dims: int) -> Tensor:
    if data.ndim != spatial_dims + 1 or data.shape[0] != 1:
        raise ValueError(f"{path} must be a {spatial_dims}D image of one channel, got {tuple(data.shape)}.")
    if not bool(torch.isfinite(data).all()):
        raise ValueError(f"{path} must hold finite numbers, got NaN or infinity. Mend it or leave it out.")
    return unit_range(data).half()


def _label(path: Path, affine: Tensor | None = None) -> Tensor:
    data = load_image(path).data
    if affine is not None and not torch.allclose(data.affine, affine, rtol=0, atol=1e-3):
        raise ValueError(
            f"{path} must have the affine of its image, got {data.affine.tolist()} and {affine.tolist()}. Resample it "
            "to the image's grid first."
        )
    values = data.numpy()  # torch cannot compare unsigned integers of all sizes
    if len(values) != 1 or (values != np.round(values)).any() or values.min() < 0 or values.max() > 255:
        raise ValueError(f"{path} must hold label ids from 0 to 255 in one channel.")
    return torch.from_numpy(values.astype(np.uint8))


def _check_same_grid(path: Path, data: MetaTensor, first_path: Path, first: MetaTensor) -> None:
    """Raise ``ValueError`` unless two images have the same orientation and voxel size.

    Images of other dimensions are refused elsewhere.
    """
    mine, its = _orientation(data.affine), _orientation(first.affine)
    if mine != its:
        raise ValueError(
            f"{path} must have its axes along those of {first_path}, got world axes {mine} and {its}. Reorient them "
            "first (Orientationd)."
        )
    sizes, others = (one.pixdim[: one.ndim - 1] for one in (data, first))
    if len(sizes) == len(others) and not torch.allclose(sizes, others, rtol=_SAME_SPACING, atol=0):
        raise ValueError(
            f"{path} must have voxels of the size of {first_path}'s, got {sizes.tolist()} and {others.tolist()} mm. "
            "Resample them first (Spacingd)."
        )


def _check_same_shape(path: Path, image: Tensor, other_path: Path, other: Tensor) -> None:
    if other.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"{other_path} must have the spatial shape of {path}, got {tuple(other.shape[1:])} and "
            f"{tuple(image.shape[1:])}. Resample them to one grid first."
        )


def _orientation(affine: Tensor) -> tuple[int, ...]:
    """For each array axis, the number of its world axis, from 1, negative if it runs backwards."""
    directions = affine[:-1, :-1]
    along = directions.abs().argmax(dim=0)
    signs = directions[along, torch.arange(len(along))].sign()
    return tuple(int(value) for value in signs * (along + 1))


def _common_shape(images: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*(one.shape[1:] for one in images)))


def _centred(tensor: Tensor, shape: Sequence[int], image: bool = False) -> Tensor:
    """Pad to a larger grid.

    Images are extended by their border values: a network would learn to align frames of zeros with each other.
    """
    room = [size - n for size, n in zip(shape, tensor.shape[1:])]
    pad = [p for r in reversed(room) for p in (r // 2, r - r // 2)]
    return F.pad(tensor.float(), pad, "replicate").to(tensor.dtype) if image else F.pad(tensor, pad)
