"""VelocityUNet: predicts from a deformed image and its deformation level the stationary velocity that undoes it.

Convolutions run at half the resolution of the image and below. The network predicts a velocity, so every recovery step
is a small diffeomorphism, up to discretisation. Each coarser grid consists of every second voxel of the finer one: a
size of 2n + 1 becomes n + 1, and both ends stay in place, as in ``fields.resize_ddf``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn, Tensor

from monai_drdm.fields import crop
from monai_drdm.networks.base import RecoveryNetwork
from monai_drdm.networks.card import NetworkCard
from monai_drdm.networks.convolution import CONVOLUTION
from monai_drdm.networks.kinds import WORKING_SIZE
from monai_drdm.networks.normalization import GroupNorm

_LINEAR = {2: "bilinear", 3: "trilinear"}
_FREQUENCIES = 8
_EMBEDDING = 64
_GROUPS = 8


class ResidualBlock(nn.Module):
    """Convolution, group norm, scale and shift by the level, SiLU and dilated convolution, added to the input."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__()
        conv = CONVOLUTION[spatial_dims]
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.norm = GroupNorm(_groups(out_channels), out_channels)
        self.level = nn.Linear(_EMBEDDING, 2 * out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=dilation, dilation=dilation)
        self.skip = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``(B, in, *S)`` and ``(B, E)`` to ``(B, out, *S)``."""
        shift, scale = self.level(embedding).view(x.shape[0], -1, *(1,) * (x.ndim - 2)).chunk(2, dim=1)
        hidden = F.silu(self.norm(self.conv1(x)) * (1 + scale) + shift)
        out: Tensor = self.skip(x) + self.conv2(hidden)
        return out


class VelocityUNet(RecoveryNetwork):
    """U-Net of residual blocks that predicts a stationary velocity on the half grid.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        channels: number of features on each grid, from the half grid to the coarsest.

    Raises:
        ValueError: other numbers of dimensions or channels.
    """

    def __init__(self, spatial_dims: int, in_channels: int = 1, channels: Sequence[int] = (16, 32, 48, 64)) -> None:
        channels = tuple(int(c) for c in channels)
        if spatial_dims not in (2, 3) or in_channels < 1 or len(channels) < 2 or min(channels) < 2:
            raise ValueError(
                "VelocityUNet: spatial_dims must be 2 or 3, in_channels 1 or more and channels two or more "
                f"numbers of 2 or more, got {spatial_dims}, {in_channels} and {channels}."
            )
        super().__init__(
            NetworkCard(
                name=f"velocity-unet-{spatial_dims}d-untrained",
                kind="velocity_unet",
                spatial_dims=spatial_dims,
                in_channels=in_channels,
                working_size=WORKING_SIZE["velocity_unet"][spatial_dims],
                sampler="velocity",
                steps=12,
                channels=channels,
            )
        )
        conv = CONVOLUTION[spatial_dims]
        pairs = list(pairwise(channels))
        self.embed = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, _EMBEDDING), nn.SiLU(), nn.Linear(_EMBEDDING, _EMBEDDING)
        )
        self.stem = conv(in_channels, channels[0], 5, stride=2, padding=2)
        self.down_blocks = nn.ModuleList(ResidualBlock(spatial_dims, c, c, 2) for c in channels)
        self.downs = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.ups = nn.ModuleList(conv(b, a, 1) for a, b in reversed(pairs))
        self.up_blocks = nn.ModuleList(ResidualBlock(spatial_dims, 2 * a, a, 2) for a, _ in reversed(pairs))
        self.out = conv(channels[0], spatial_dims, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Predict the velocity that undoes the deformation of an image, for unit integration time.

        Args:
            x: ``(B, in_channels, *S)`` image in [0, 1]; sizes odd, or 1.
            level: ``(B,)`` or ``(1,)`` deformation levels in [0, 1].

        Returns:
            ``(B, D, *H)`` voxels of the half grid, ``H = (S + 1) / 2``.

        Raises:
            ValueError: shapes or levels do not fit.
        """
        self._check(x, level)
        half = half_shape(x.shape[2:])
        multiple = 2 ** len(self.downs)
        padded = [2 * (-(-(h - 1) // multiple) * multiple) + 1 for h in half]
        x = F.pad(x, [p for n, m in zip(x.shape[:1:-1], padded[::-1]) for p in (0, m - n)])
        embedding = self.embed(_level_features(level)).expand(x.shape[0], -1)
        features = self.stem(x)
        if self.spatial_dims == 2:  # faster on CPUs; the following layers keep this memory format
            features = features.contiguous(memory_format=torch.channels_last)
        kept = []
        for block, down in zip(self.down_blocks, [*self.downs, None]):
            features = block(features, embedding)
            if down is not None:
                kept.append(features)
                features = down(F.silu(features))
        for up, block in zip(self.ups, self.up_blocks):
            skip = kept.pop()
            features = F.interpolate(up(features), skip.shape[2:], mode=_LINEAR[self.spatial_dims], align_corners=True)
            features = block(torch.cat((skip, features), dim=1), embedding)
        return crop(self.out(F.silu(features)).float(), half)

    def _check(self, x: Tensor, level: Tensor) -> None:
        shape = tuple(x.shape)
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels or any(n % 2 == 0 for n in shape[2:]):
            raise ValueError(
                f"VelocityUNet: x must have shape (B, {self.in_channels}, *S) with {self.spatial_dims} spatial axes of "
                f"odd sizes, got {shape}."
            )
        if level.ndim != 1 or level.shape[0] not in (1, x.shape[0]) or not level.is_floating_point():
            raise ValueError(f"VelocityUNet: level must be (B,) floating, got {level.dtype} {tuple(level.shape)}.")


def half_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The half grid of a grid of odd sizes: every second voxel, both ends included."""
    return tuple((n + 1) // 2 for n in shape)


def _groups(channels: int) -> int:
    """Number of groups such that each has at least two features.

    On a grid of one voxel a single feature has no variance, and group norm would erase it.
    """
    groups = math.gcd(_GROUPS, channels)
    return groups if channels >= 2 * groups else max(groups // 2, 1)


def _level_features(level: Tensor) -> Tensor:
    """Sines and cosines ``(B, 16)`` of the levels ``(B,)``, at frequencies that double from one to the next."""
    octaves = 2.0 ** torch.arange(_FREQUENCIES, device=level.device, dtype=torch.float32) * (math.pi / 2)
    angle = level.float()[:, None] * octaves
    return torch.cat((angle.sin(), angle.cos()), dim=1)
