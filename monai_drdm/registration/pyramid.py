"""A registration network that compares features of both images coarse to fine, and adds to a velocity on every grid.

Warped features and their products at neighbouring voxels are what PWC-Net (Sun et al., CVPR 2018) finds optical flow
by.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn, Tensor

from monai_drdm.fields import exp_svf, warp
from monai_drdm.networks.convolution import CONVOLUTION
from monai_drdm.registration.aligner import normalised
from monai_drdm.registration.forces import demons_forces, GAIN, WIDTHS

_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}
_MODE = {2: "bilinear", 3: "trilinear"}
_SLOPE = 0.2
_SQUARINGS = 5


class PyramidNet(nn.Module):
    """Registers two images coarse to fine: on each grid, what the velocity of the coarser ones has left.

    Both images go through the same encoder. On each grid the features of the moving image are warped by the field so
    far and compared with those of the fixed image, at the same voxel and at its direct neighbours; convolutions say
    from that what to add to the velocity. So the network need not learn what it is to correspond.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of each of both images.
        channels: features of each image on every grid; comparisons take twice as many.
        depth: how often the grid is halved.
        diffeomorphic: whether features are warped by the flow of what is predicted; otherwise by that itself.
        forces: whether every grid also gets the forces of demons between the images, the moving one warped.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 1,
        channels: int = 16,
        depth: int = 3,
        diffeomorphic: bool = True,
        forces: bool = True,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3) or min(in_channels, channels) < 1 or depth < 0:
            raise ValueError(
                "a pyramid needs spatial_dims 2 or 3, in_channels and channels of 1 or more, and depth of 0 or more, "
                f"got {spatial_dims}, {in_channels}, {channels} and {depth}."
            )
        self.spatial_dims, self.in_channels, self.diffeomorphic = spatial_dims, in_channels, diffeomorphic
        widths = [in_channels, *(channels,) * (depth + 1)]
        self.encoder = nn.ModuleList(
            nn.Sequential(_conv(spatial_dims, before, after), _act(), _conv(spatial_dims, after, after))
            for before, after in pairwise(widths)
        )
        self.levels = nn.ModuleList(_Level(spatial_dims, channels, forces) for _ in self.encoder)

    def forward(self, images: Tensor) -> Tensor:
        """Predict a velocity, or a field if it is not diffeomorphic.

        Args:
            images: ``(B, 2 in_channels, *S)``: moving and fixed image; each size is a multiple of ``2^depth``, with
                forces twice that or more.

        Returns:
            ``(B, D, *S)`` voxels.
        """
        both = torch.cat([images[:, : self.in_channels], images[:, self.in_channels :]])
        grids = self._encode(both)
        velocity = images.new_zeros(len(images), self.spatial_dims, *grids[-1][0].shape[2:], dtype=torch.float32)
        for (features, seen), level in zip(reversed(grids), reversed(self.levels)):
            if velocity.shape[2:] != seen.shape[2:]:
                velocity = 2 * F.interpolate(velocity, seen.shape[2:], mode=_MODE[self.spatial_dims])
            ddf = exp_svf(velocity, _SQUARINGS) if self.diffeomorphic else velocity
            velocity = velocity + level(features, seen, ddf)
        return velocity

    def _encode(self, both: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features of moving and fixed images, which are halves of the batch, and the images; fine to coarse."""
        x, seen = both, both.float().mean(dim=1, keepdim=True)
        found: list[tuple[Tensor, Tensor]] = []
        for block in self.encoder:
            if found:
                x, seen = (_POOL[self.spatial_dims](one, 2) for one in (F.leaky_relu(x, _SLOPE), seen))
            x = block(x)
            found.append((normalised(x).to(x.dtype), seen))
        return found


class _Level(nn.Module):
    """What to add to the velocity on one grid."""

    def __init__(self, dims: int, channels: int, forces: bool) -> None:
        super().__init__()
        self.forces = forces
        width, seen = 2 * channels, 2 * channels + (2 * dims + 1) + dims + forces * len(WIDTHS) * dims
        self.first = _conv(dims, seen, width)
        self.rest = nn.Sequential(_act(), _conv(dims, width, width), _act(), _conv(dims, width, width), _act())
        self.last = _conv(dims, width, dims)
        for one in self.last.parameters():
            nn.init.zeros_(one)

    def forward(self, features: Tensor, seen: Tensor, ddf: Tensor) -> Tensor:
        """``(B, D, *S)`` from features ``(2 B, C, *S)`` and images ``(2 B, 1, *S)``, and the field so far."""
        (moving, fixed), (image, target) = features.chunk(2), seen.chunk(2)
        both = warp(torch.cat([moving.float(), image], dim=1), ddf)
        warped, image = both[:, :-1].to(fixed.dtype), both[:, -1:]
        inputs = [warped, fixed, _products(warped, fixed), ddf.to(fixed.dtype)]
        if self.forces:
            with torch.autocast(image.device.type, enabled=False):
                inputs.append((GAIN * demons_forces(image, target)).to(fixed.dtype))
        x = self.first(torch.cat(inputs, dim=1))
        change: Tensor = self.last(x + self.rest(x)).float()
        return change


def _products(moving: Tensor, fixed: Tensor) -> Tensor:
    """Mean products of features at each voxel with those at the same place and one voxel to each side.

    ``(B, C, *S)`` twice to ``(B, 2 D + 1, *S)``.
    """
    found = [(moving * fixed).mean(dim=1)]
    for axis in range(2, fixed.ndim):
        for step in (-1, 1):
            found.append((_beside(moving, axis, step) * fixed).mean(dim=1))
    return torch.stack(found, dim=1)


def _beside(values: Tensor, axis: int, step: int) -> Tensor:
    """At each voxel the value of its neighbour, at the border the voxel's own."""
    size = values.shape[axis]
    at = (torch.arange(size, device=values.device) + step).clamp(0, size - 1)
    return values.index_select(axis, at)


def _conv(dims: int, before: int, after: int) -> nn.Module:
    return CONVOLUTION[dims](before, after, 3, padding=1)


def _act() -> nn.Module:
    return nn.LeakyReLU(_SLOPE)
