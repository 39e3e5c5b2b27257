"""One slice of an image, turned as radiologists look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_drdm.fields import identity_grid, sample
from monai_drdm.fields.sampling import Mode, SIGNED_VIEW
from monai_drdm.samples import directions_of, spacing_of


@dataclass(frozen=True)
class Plane:
    """How a 2D picture is cut from an image and turned.

    The picture has its first axis to the right and its second one upwards. The left side of the body lies to the right,
    the front or the head above; in sagittal slices the front lies to the left. A 2D image whose affine is the identity,
    such as a photograph, has its second axis downwards.
    """

    axis: int | None
    """Spatial axis that the slice is across; None for a 2D image."""
    index: int
    """Which slice."""
    swapped: bool
    """Whether the two axes of the slice change places."""
    flipped: tuple[bool, bool]
    """Which axes of the picture, after that, are reversed."""
    spacing: tuple[float, float]
    """Millimetres per pixel along both axes of the picture."""
    colour: bool
    """Whether the three channels are red, green and blue."""

    @classmethod
    def of(
        cls,
        image: Tensor,
        axis: int | None = None,
        label: Tensor | None = None,
        pixdim: Sequence[float] | None = None,
    ) -> Plane:
        """The slice that shows most of an image.

        Args:
            image: ``(C, *S)``; a ``MetaTensor`` says by its affine how it lies. Three or four channels of bytes are
                colours.
            axis: across which a volume is sliced; None: the one with the largest spacing, of equal ones from feet to
                head.
            label: ``(C, *S)``: the slice goes through the middle of what is labelled. None: of the image.
            pixdim: millimetres per voxel of an image without an affine.

        Raises:
            ValueError: an affine or ``pixdim`` without a positive spacing.
        """
        spacing = spacing_of(image, pixdim, "image")
        dims = len(spacing)
        directions = directions_of(image)
        colour = dims == 2 and image.dtype == torch.uint8 and image.shape[0] in (3, 4)
        if dims == 2:
            axis, index = None, 0
        else:
            upwards = np.abs(directions[2])
            axis = int(np.lexsort((upwards, np.round(spacing, 3)))[-1]) if axis is None else axis
            index = _middle(image, axis, label)
        first, second = (d for d in range(dims) if d != axis)
        if dims == 2 and np.array_equal(directions, np.eye(3)[:, :2]):
            swapped, flipped = False, (False, True)
        else:
            swapped, flipped = _turned(directions[:, first], directions[:, second])
        sides = (spacing[second], spacing[first]) if swapped else (spacing[first], spacing[second])
        return cls(axis, index, swapped, flipped, sides, colour)

    def cut(self, image: Tensor) -> Tensor:
        """The picture of an image ``(C, *S)``: its first channel ``(H, W)``, or its colours ``(3, H, W)``."""
        chosen = image.as_subclass(Tensor).detach()[: 3 if self.colour and len(image) > 1 else 1]
        picture = self._turn(chosen if self.axis is None else chosen.select(self.axis + 1, self.index))
        return picture if len(picture) == 3 else picture[0]

    def cut_field(self, ddf: Tensor) -> Tensor:
        """The part of a field ``(D, *S)`` in voxels that lies in the picture: ``(2, H, W)`` pixels."""
        rows = [d for d in range(len(ddf)) if d != self.axis]
        field = ddf.detach()[rows[::-1] if self.swapped else rows]
        field = self._turn(field if self.axis is None else field.select(self.axis + 1, self.index))
        signs = torch.tensor([-1.0 if flip else 1.0 for flip in self.flipped], device=field.device)
        return field * signs.view(2, 1, 1)

    def cut_warped(self, image: Tensor, ddf: Tensor, mode: Mode = "bilinear") -> Tensor:
        """The picture of an image ``(C, *S)`` that a field ``(D, *S)`` deforms; no other slice is computed."""
        at = ddf.detach().float() + identity_grid(ddf.shape[1:], device=ddf.device)
        at = at if self.axis is None else at.narrow(self.axis + 1, self.index, 1)
        values = sample(image.as_subclass(Tensor).detach()[None], at[None].to(image.device), mode)[0]
        here = Plane(self.axis, 0, self.swapped, self.flipped, self.spacing, self.colour)
        return here.cut(values)

    def _turn(self, pictures: Tensor) -> Tensor:
        """Pictures ``(C, P, Q)`` as they are looked at."""
        turned = pictures.transpose(1, 2) if self.swapped else pictures
        axes = [d + 1 for d, flip in enumerate(self.flipped) if flip]
        signed = SIGNED_VIEW.get(turned.dtype)  # torch flips only these
        return turned.flip(axes) if signed is None else turned.view(signed).flip(axes).view(turned.dtype)


def _middle(image: Tensor, axis: int, label: Tensor | None) -> int:
    """The slice through the middle of what is labelled, else of the image."""
    if label is not None:
        others = [d for d in range(label.ndim) if d != axis + 1]
        inside = (label.as_subclass(Tensor) != 0).sum(others).cumsum(0)
        if inside[-1] > 0:
            return int((2 * inside >= inside[-1]).int().argmax())
    return int(image.shape[axis + 1]) // 2


def _turned(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[bool, tuple[bool, bool]]:
    """Whether two axes of a slice change places, and which are then reversed, from their world directions."""
    world = [int(np.abs(first).argmax()), 0]
    rest = np.abs(second)
    rest[world[0]] = -1
    world[1] = int(rest.argmax())
    swapped = world[0] > world[1]
    right, up = (second, first) if swapped else (first, second)
    across, above = (world[1], world[0]) if swapped else (world[0], world[1])
    return swapped, (bool(right[across] > 0), bool(up[above] < 0))
