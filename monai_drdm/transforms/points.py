"""Landmarks and boxes: what moves with an image but is not on its grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args, Literal

import torch
from monai.data.box_utils import get_boxmode
from torch import Tensor

from monai_drdm.fields import sample, warp_points

PointSpace = Literal["voxel", "world"]

_CORNER_MODES = {2: ("xyxy", "xxyy"), 3: ("xyzxyz", "xxyyzz", "xyxyzz")}
_MAX_SAMPLES = {2: 65, 3: 17}  # along a side of a box
_REFINEMENTS = 2
_HALF_VOXEL = 0.5
_TOLERANCE_VOX = 1e-6
_MISSED_VOX = 1e-2
_SAME_BOX = 1e-3  # voxels


class Motion:
    """How an image was moved: an affine map, if there is one, and then a field.

    They are kept apart, because beyond the grid a field goes on with its border value, and an affine map with itself.

    Args:
        ddf: ``(D, *S)`` voxels, without the map.
        pose: ``(D + 1, D + 1)`` voxels, about the centre of the grid.
    """

    def __init__(self, ddf: Tensor, pose: Tensor | None = None) -> None:
        self.ddf, self.shape, self.pose = ddf.double(), ddf.shape[1:], pose
        if pose is not None:  # about the origin
            centre = (torch.tensor(self.shape).to(pose) - 1) / 2
            self.pose = pose.clone()
            self.pose[:-1, -1] += centre - pose[:-1, :-1] @ centre

    def back(self, points: Tensor) -> Tensor:
        """Where points ``(1, N, D)`` of the warped image were in the image."""
        posed = points if self.pose is None else to_world(points, self.pose)
        at = posed.transpose(1, 2).reshape(1, len(self.ddf), -1, *(1,) * (self.ddf.ndim - 2))
        return posed + sample(self.ddf[None], at).flatten(2).transpose(1, 2)

    def there(self, points: Tensor) -> Tensor:
        """Where points ``(1, N, D)`` of the image are in the warped one."""
        return to_voxels(warp_points(points, self.ddf[None], tolerance=_TOLERANCE_VOX), self.pose)


def move_points(points: Tensor, motion: Motion, affine: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Landmarks of an image where ``warp`` takes them.

    Args:
        points: ``(C, N, D)`` voxels, or world coordinates if there is an affine. NaN: a landmark that is not there.
        motion: how the image was moved.
        affine: ``(D + 1, D + 1)`` voxel to world.

    Returns:
        Moved points ``(C, N, D)``, float64, and ``(C, N)`` bool: which are inside the image before and after.
    """
    voxels = to_voxels(points.double(), affine)
    known = torch.isfinite(voxels).all(dim=-1)
    start = torch.where(known[..., None], voxels, 0.0).flatten(0, 1)[None]
    moved = motion.there(start)
    missed = (motion.back(moved) - start).norm(dim=-1)[0].view(known.shape)
    moved = moved[0].view(voxels.shape)
    valid = inside(voxels, motion.shape) & inside(moved, motion.shape) & (missed <= _MISSED_VOX)
    return to_world(torch.where(known[..., None], moved, voxels), affine), valid


def restore_points(points: Tensor, motion: Motion, affine: Tensor | None = None) -> Tensor:
    """Where landmarks ``(C, N, D)`` of the warped image were before; float64."""
    voxels = to_voxels(points.double(), affine)
    known = torch.isfinite(voxels).all(dim=-1, keepdim=True)
    start = torch.where(known, voxels, 0.0).flatten(0, 1)[None]
    moved = motion.back(start)[0].view(voxels.shape)
    return to_world(torch.where(known, moved, voxels), affine)


def move_boxes(boxes: Tensor, motion: Motion, box_mode: str, *, back: bool = False) -> Tensor:
    """The boxes that enclose what boxes of an image become.

    The faces are sampled, once a voxel or 65 (in 3D 17) times along each side if they are longer, and then more finely
    around the samples that go farthest; the image of a box is enclosed by the image of its faces. As in MONAI, box
    coordinates are edges: ``[i, i + 1]`` holds voxel ``i``.

    Args:
        boxes: ``(N, 2D)`` voxels.
        motion: how the image was moved.
        box_mode: one of MONAI's corner modes, such as ``xyxy``, ``xyzxyz`` or ``xxyyzz``.
        back: from the warped image to the image; the result encloses the box that was moved.

    Returns:
        ``(N, 2D)``, float64, in the same mode. Boxes are not clipped to the image.
    """
    dims = len(motion.shape)
    mode = get_boxmode(box_mode)
    if boxes.shape[0] == 0:
        return boxes.double()
    corners = torch.stack(mode.boxes_to_corners(boxes.double()), dim=-1)  # (N, 1, 2D), lower corner first
    corners = corners.reshape(-1, 2, dims) - _HALF_VOXEL
    # box by box, because how finely faces are sampled depends on the size of the box
    enclosed = [_enclosing(corner[None], motion, back) for corner in corners]
    low, high = torch.cat(enclosed, dim=0).unbind(1)
    low, high = low + _HALF_VOXEL, high + _HALF_VOXEL
    enclosing: Tensor = mode.corners_to_boxes(torch.cat([low, high], dim=1)[..., None].unbind(1))
    return enclosing


def restore_boxes(boxes: Tensor, before: Tensor, after: Tensor, motion: Motion, box_mode: str) -> Tensor:
    """Boxes ``(N, 2D)`` of the warped image in the image it was; those that are as ``after`` were ``before``."""
    restored = move_boxes(boxes, motion, box_mode, back=True)
    if boxes.shape[0] and before.shape[0]:
        missed, index = torch.cdist(boxes.double(), after.double(), p=torch.inf).min(dim=1)
        restored = torch.where((missed < _SAME_BOX)[:, None], before.double()[index], restored)
    return restored


def check_points(points: Tensor, dims: int, name: str) -> None:
    """Raise ``ValueError`` unless points are ``(C, N, D)``."""
    if points.ndim != 3 or points.shape[-1] != dims:
        raise ValueError(f"{name} must hold points (C, N, {dims}), got shape {tuple(points.shape)}.")


def check_boxes(boxes: Tensor, dims: int, box_mode: str, name: str) -> None:
    """Raise ``ValueError`` unless boxes are ``(N, 2D)``, finite, with no upper corner below the lower one."""
    if box_mode not in _CORNER_MODES[dims]:
        raise ValueError(
            f"box_mode must be one of {_CORNER_MODES[dims]} for {dims}D images, got {box_mode!r}. Convert them "
            "first (monai.data.box_utils.convert_box_mode)."
        )
    if boxes.ndim != 2 or boxes.shape[-1] != 2 * dims:
        raise ValueError(f"{name} must hold boxes (N, {2 * dims}), got shape {tuple(boxes.shape)}.")
    corners = torch.cat(get_boxmode(box_mode).boxes_to_corners(boxes.double()), dim=-1)
    if not bool(torch.isfinite(corners).all()) or bool((corners[:, dims:] < corners[:, :dims]).any()):
        raise ValueError(
            f"{name} must hold finite boxes in mode {box_mode!r}, their upper corners not below the lower."
        )


def check_spaces(point_space: str, box_mode: str) -> None:
    """Raise ``ValueError`` unless the point space and the box mode are known."""
    if point_space not in get_args(PointSpace):
        raise ValueError(f"point_space must be one of {get_args(PointSpace)}, got {point_space!r}.")
    known = sorted({mode for modes in _CORNER_MODES.values() for mode in modes})
    if box_mode not in ("standard", *known):
        raise ValueError(f"box_mode must be 'standard' or one of MONAI's corner modes {known}, got {box_mode!r}.")


def standard_mode(box_mode: str, dims: int) -> str:
    """The name of a box mode in a dimension; ``standard`` is MONAI's own, lower corner first."""
    return _CORNER_MODES[dims][0] if box_mode == "standard" else box_mode


def inside(voxels: Tensor, shape: Sequence[int]) -> Tensor:
    """Which points ``(…, D)`` lie in a voxel of a grid; NaN does not."""
    size = torch.tensor(tuple(shape), device=voxels.device)
    within: Tensor = ((voxels >= -_HALF_VOXEL) & (voxels <= size - 1 + _HALF_VOXEL)).all(dim=-1)
    return within


def to_voxels(points: Tensor, affine: Tensor | None) -> Tensor:
    """World coordinates ``(…, D)`` as voxels."""
    if affine is None:
        return points
    inverse = torch.linalg.inv(affine)
    voxels: Tensor = points @ inverse[:-1, :-1].T + inverse[:-1, -1]
    return voxels


def to_world(points: Tensor, affine: Tensor | None) -> Tensor:
    """Voxels ``(…, D)`` as world coordinates."""
    return points if affine is None else points @ affine[:-1, :-1].T + affine[:-1, -1]


def _enclosing(corners: Tensor, motion: Motion, back: bool) -> Tensor:
    """Lowest and highest coordinates ``(N, 2, D)`` that boxes of such corners reach when they are moved."""
    dims, size = len(motion.shape), (corners[:, 1] - corners[:, 0])[:, None]
    count = int(size.amax().clamp(1, _MAX_SAMPLES[dims] - 1).ceil()) + 1
    at, step = _unit_faces(dims, count).to(corners).expand(len(corners), -1, -1), 1.0 / (count - 1)
    reached: list[Tensor] = []
    for _ in range(1 + _REFINEMENTS):
        points = corners[:, :1] + at * size
        moved = restore_points(points, motion) if back else move_points(points, motion)[0]
        reached += [moved.amin(dim=1), moved.amax(dim=1)]
        farthest = torch.cat([moved.argmin(dim=1), moved.argmax(dim=1)], dim=1)  # (N, 2D) samples
        start = at.gather(1, farthest[..., None].expand(-1, -1, dims))[:, :, None]
        # what lies inside a box moves with it, so the samples around may leave its faces
        at = (start + _unit_patch(dims).to(corners) * step).clamp(0, 1).flatten(1, 2)
        step /= 2
    low, high = torch.stack(reached[::2]).amin(dim=0), torch.stack(reached[1::2]).amax(dim=0)
    return torch.stack([low, high], dim=1)


def _unit_patch(dims: int) -> Tensor:
    """Five offsets along each axis, from one step back to one forward: ``(5^D, D)``."""
    ticks = torch.linspace(-1, 1, 5, dtype=torch.float64)
    return torch.cartesian_prod(*([ticks] * dims))


def _unit_faces(dims: int, count: int) -> Tensor:
    """Points on the faces of the unit box, ``count`` along every side: ``(M, D)``."""
    points = torch.cartesian_prod(*([torch.linspace(0, 1, count, dtype=torch.float64)] * dims))
    return points[((points == 0) | (points == 1)).any(dim=1)]
