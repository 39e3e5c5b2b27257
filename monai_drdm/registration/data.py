"""The training data of registration networks, kept in memory: pairs with known fields, or images to pair at random."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor
from tqdm import tqdm

from monai_drdm.fields import identity_grid, sample
from monai_drdm.fields.intensity import to_unit_range
from monai_drdm.io import find_cases, load_ddf, load_image, read_cases
from monai_drdm.io.datalists import Case, listed_path, read_entries
from monai_drdm.registration.affine import apply_affine, find_affine, invert_affine

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
    """Images that are registered with others of their group, and their labels if there are any."""

    images: Tensor
    """``(N, 1, *S)`` float16 in [0, 1]."""
    inside: Tensor
    """``(N, 1, *S)`` bool."""
    labels: Tensor | None
    """``(N, 1, *S)`` uint8."""
    names: tuple[str, ...]
    group: Tensor
    """``(N,)`` numbers of groups, in order: images of a group are neighbours."""
    from_first: Tensor | None = None
    """``(N, D, D + 1)``: voxels of each image from those of the first one of its group; None: the same voxels."""

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, count: int, generator: torch.Generator) -> RegistrationBatch:
        """Random pairs of different images of a group, all groups equally often, on the generator's device."""
        device = generator.device
        sizes = torch.bincount(self.group)[self.group]
        weight = (1 / sizes).to(device)
        fixed = torch.multinomial(weight, count, replacement=True, generator=generator).cpu()
        share = torch.rand(count, generator=generator, device=device).cpu()
        size, first = sizes[fixed], torch.searchsorted(self.group, self.group[fixed])
        step = 1 + (share * (size - 1)).long().minimum(size - 2)
        return self.pairs(first + (fixed - first + step) % size, fixed).to(device)

    def pairs(self, moving: Tensor, fixed: Tensor) -> RegistrationBatch:
        """The pairs of the images of the given indices, moving ones in the pose of the fixed ones if it is known."""
        labels = (None, None) if self.labels is None else (self.labels[moving], self.labels[fixed])
        pairs = RegistrationBatch(self.images[moving], self.images[fixed], self.inside[fixed], None, *labels)
        if self.from_first is None:
            return pairs
        grid = identity_grid(self.images.shape[2:])[None].expand(len(fixed), -1, *self.images.shape[2:])
        at = apply_affine(self.from_first[moving], apply_affine(invert_affine(self.from_first[fixed]), grid))
        label = pairs.moving_label
        return replace(
            pairs,
            moving=sample(pairs.moving.float(), at),
            moving_label=None if label is None else sample(label, at, "nearest"),
        )

    def aligned(self, progress: bool = False) -> ImageBank:
        """The same images with affine maps between them: each is aligned once, with the first of its group."""
        first = self.images[torch.searchsorted(self.group, self.group)]
        bar = tqdm(zip(self.images, first), total=len(self), desc="align", unit="image", disable=not progress)
        return replace(self, from_first=torch.cat([find_affine(image[None], to[None]) for image, to in bar]))

    def split(self, share: float) -> tuple[ImageBank, ImageBank]:
        """The first images of each group to train on, and the last ones to validate on.

        Each part has at least two images of each group; if there are too few for that, all images are in both.
        """
        sizes = torch.bincount(self.group)
        kept = (share * sizes).round().long().clamp(min=2)
        if bool((sizes - kept < 2).any()) or share == 0:
            return self, self
        last = torch.arange(len(self)) >= (sizes.cumsum(0) - kept)[self.group]
        return self._part(~last), self._part(last)

    def _part(self, chosen: Tensor) -> ImageBank:
        labels = None if self.labels is None else self.labels[chosen]
        names = tuple(name for name, here in zip(self.names, chosen.tolist()) if here)
        return ImageBank(self.images[chosen], self.inside[chosen], labels, names, self.group[chosen])


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
    entries = read_entries(path, section)
    if not all({"moving", "fixed", "ddf"} <= set(entry) for entry, _ in entries):
        raise ValueError(f"{path} must list pairs with moving, fixed and ddf. Make them with monai-drdm pairs.")
    files = [
        {key: listed_path(path, entry[key], f"{where}, {key}") for key in _PAIR if key in entry}
        for entry, where in entries
    ]
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

    Images of different size are centred on one grid; ``inside`` is false in the padding. An entry of a datalist may
    name a ``group``, a text: images are registered only with others of their group. Without it, all are one group.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: a group has fewer than two images, or one is listed twice; images have other dimensions, different
            orientations or voxel sizes within a group, or are not finite; only some images have labels, labels are on
            another grid, or ``labels`` is given beside a datalist, which names its own.
    """
    if labels is not None and Path(images).is_file():
        raise ValueError(f"labels must be None with the datalist {images}, which names its labels, got {labels}.")
    cases = read_cases(images, section) if Path(images).is_file() else find_cases(images, labels)
    groups = _groups(images, section) if Path(images).is_file() else [""] * len(cases)
    for name, count in Counter(groups).items():
        if count < 2:
            which = f" of group {name!r}" if name else " without a group" if len(set(groups)) > 1 else ""
            raise ValueError(f"{images} must hold two images{which} or more to register with each other, got {count}.")
    repeated = [path for path, count in Counter(case.image for case in cases).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{images} must list every image once, got {repeated[0]} again, which would be paired with itself."
        )
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([numbers[name] for name in groups])
    order = torch.argsort(group, stable=True)
    cases = [cases[i] for i in order.tolist()]
    read, marks = _read_images(cases, group[order].tolist(), spatial_dims, progress)
    if marks and len(marks) < len(read):
        raise ValueError(f"{images}: all images or none must have labels, got {len(marks)} of {len(read)}.")
    shape = _common_shape(read)
    return ImageBank(
        torch.stack([_centred(one, shape, image=True) for one in read]),
        torch.stack([_centred(torch.ones_like(one, dtype=torch.bool), shape) for one in read]),
        torch.stack([_centred(one, shape) for one in marks]) if marks else None,
        tuple(case.name for case in cases),
        group[order],
    )


def _groups(datalist: str | os.PathLike[str], section: str) -> list[str]:
    """The group of each entry of a datalist."""
    found = []
    for entry, where in read_entries(datalist, section):
        name = entry.get("group", "")
        if not isinstance(name, str):
            raise ValueError(f"{where}: group must be a text, got {name!r:.40}.")
        found.append(name)
    return found


def _read_images(
    cases: Sequence[Case], groups: Sequence[int], spatial_dims: int, progress: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The images and the labels of cases, those of a group with the same orientation and voxel size."""
    read, marks = [], []
    first: dict[int, tuple[Path, MetaTensor]] = {}
    for case, group in zip(tqdm(cases, desc="read", unit="image", disable=not progress), groups):
        data = load_image(case.image).data
        _check_same_grid(case.image, data, *first.setdefault(group, (case.image, data)))
        read.append(_image(data.as_tensor(), case.image, spatial_dims))
        if case.label is not None:
            marks.append(_label(case.label, data.affine))
            _check_same_shape(case.image, read[-1], case.label, marks[-1])
    return read, marks


def unit_range(image: Tensor) -> Tensor:
    """Scale the 0.5th to 99.5th percentiles of an image ``(C, *S)`` to [0, 1], as networks expect it."""
    return to_unit_range(image.float()[None])[0]


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
