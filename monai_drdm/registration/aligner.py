"""The residual aligner network: coarse-to-fine registration in which near points can move differently.

Zheng et al., Residual aligner-based network (RAN): motion-separable structure for coarse-to-fine discontinuous
deformable registration, Medical Image Analysis 91 (2024) 103038, arXiv 2203.04290.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn, Tensor

from monai_drdm.fields import crop, warp
from monai_drdm.networks.convolution import CONVOLUTION

SEPARABLE_STRUCTURES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    0: ((16, 8, 4, 2, 1), (1, 1, 1, 1, 1)),
    3: ((2, 2, 2, 2, 1), (8, 4, 2, 1, 1)),
    4: ((1, 1, 1, 1, 1), (16, 8, 4, 2, 1)),
}
"""Pool sizes and dilations of the published structures ``q``: 0 is the classical pyramid."""

_MODE = {2: "bilinear", 3: "trilinear"}
_NORM_EPSILON = 1e-3
_SLOPE = 0.2
_SLOPE_ALIGNER = 0.01


def check_levels(pool_sizes: Sequence[int], dilations: Sequence[int]) -> None:
    """Raise ``ValueError`` unless both say of the same levels, coarse to fine, what a decoder can be built of."""
    pools, reach = tuple(pool_sizes), tuple(dilations)
    whole = all(isinstance(one, int) and one >= 1 for one in (*pools, *reach))
    if not pools or len(pools) != len(reach) or not whole:
        raise ValueError(f"pool_sizes and dilations must be as many numbers of 1 or more, got {pools} and {reach}.")
    if any(coarse % fine for coarse, fine in pairwise(pools)):
        raise ValueError(f"pool_sizes must be coarse to fine, each a multiple of the next, got {pools}.")


class InstanceNorm(nn.Module):
    """Instance norm with scale and shift for any grid: a single voxel, which has no spread, is left unnormalised."""

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))
        self.bias = nn.Parameter(torch.zeros(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, *S)`` to the same shape."""
        x = normalised(x) if x[0, 0].numel() > 1 else x
        return x * self.weight + self.bias


def normalised(x: Tensor) -> Tensor:
    """Features ``(B, C, *S)`` in float32, with mean 0 and variance 1 over each image and channel."""
    variance, mean = torch.var_mean(x.float(), tuple(range(2, x.ndim)), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + _NORM_EPSILON)


class _Builder:
    """Makes the layers of a network of some dimensions."""

    def __init__(self, spatial_dims: int) -> None:
        self.dims = spatial_dims

    def conv(self, before: int, after: int, size: int = 3, *, dilation: int = 1, bias: bool = True) -> nn.Module:
        """A convolution that keeps the grid."""
        padding = dilation * (size // 2)
        return CONVOLUTION[self.dims](before, after, size, padding=padding, dilation=dilation, bias=bias)

    def normed(self, before: int, after: int, size: int = 3, *, dilation: int = 1) -> list[nn.Module]:
        """A convolution and its norm, which would take away a bias."""
        return [
            self.conv(before, after, size, dilation=dilation, bias=False),
            InstanceNorm(self.dims, after),
        ]


class _ResidualBlock(nn.Module):
    """Convolution; then another one and a dilated one, added to it. All are normalised."""

    def __init__(self, make: _Builder, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*make.normed(before, after), nn.LeakyReLU(_SLOPE))
        self.rest = nn.Sequential(
            *make.normed(after, after), nn.LeakyReLU(_SLOPE), *make.normed(after, after, dilation=3)
        )

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.first(x)
        return F.leaky_relu(first + self.rest(first), _SLOPE)


class _Matching(nn.Module):
    """Compares two feature maps by two stacked dilated convolutions: this is how far a level can see."""

    def __init__(self, make: _Builder, channels: int, width: int, dilation: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(InstanceNorm(make.dims, channels) for _ in range(2))
        self.wide = nn.ModuleList(make.conv(before, width, dilation=dilation) for before in (2 * channels, width))
        self.near = make.conv(width, width)

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        both = torch.cat([norm(one) for norm, one in zip(self.norms, (own, other))], dim=1)
        hidden = F.leaky_relu(self.wide[0](both), _SLOPE_ALIGNER)
        return F.leaky_relu(self.near(F.leaky_relu(self.wide[1](hidden), _SLOPE_ALIGNER)) + hidden, _SLOPE_ALIGNER)


class _Heads(nn.Module):
    """What all levels share: fields of several heads, how they are weighed, and how they become one field.

    The weights of the heads are found anew in every voxel. So two organs that touch can each follow another head: this
    is the disentanglement of motion.
    """

    def __init__(self, make: _Builder, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.dims = heads, make.dims

        def act() -> nn.Module:
            return nn.LeakyReLU(_SLOPE_ALIGNER)

        middle = 3 * width // 2
        self.residuals = nn.Sequential(make.conv(width, middle), act(), make.conv(middle, heads * make.dims, 1))
        self.attributes = nn.Sequential(*make.normed(width, width), act(), make.conv(width, heads, 1))
        self.features = nn.Sequential(*make.normed(width, heads, 1), act())
        self.weights = nn.Sequential(*make.normed(2 * heads, width), act(), make.conv(width, heads))
        self.fuse = nn.Sequential(make.conv(2 * heads + 2, width), act(), make.conv(width, 1))
        nn.init.zeros_(self.fuse[-1].weight)  # type: ignore[arg-type]  # a convolution's
        nn.init.zeros_(self.fuse[-1].bias)  # type: ignore[arg-type]

    def forward(self, matched: Tensor, ddf: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The new field, the new weights before their softmax, and features.

        Args:
            matched: ``(B, width, *S)``.
            ddf: ``(B, D, *S)`` voxels: the field so far.
            theta: ``(B, heads, *S)``: the weights so far, before their softmax.
        """
        attributes = self.attributes(matched)
        new_theta = self.weights(torch.cat([attributes, theta], dim=1))
        shares = new_theta.float().softmax(dim=1)
        residuals = rearrange(self.residuals(matched).float(), "b (h d) ... -> b d h ...", h=self.heads)
        steps = residuals * (shares * F.softplus(attributes.float()))[:, None]
        before = ddf[:, :, None] * (shares * F.softplus(theta.float()))[:, None]
        parts = [one for some in (steps, before) for one in (some, some.mean(dim=2, keepdim=True))]
        each = rearrange(torch.cat(parts, dim=2), "b d h ... -> (b d) h ...")  # one coordinate after another
        change = rearrange(self.fuse(each).float(), "(b d) 1 ... -> b d ...", d=self.dims)
        return ddf + change, new_theta, self.features(matched)


class _Level(nn.Module):
    """One level of the decoder: features of both images on its grid, and one residual aligner.

    Both images come as halves of a batch: each is the other's partner, so both directions are registered alike.
    """

    def __init__(self, make: _Builder, before: int, channels: int, heads: int, width: int, dilation: int) -> None:
        super().__init__()
        self.block = _ResidualBlock(make, before, channels)
        self.project = make.conv(channels, channels, 1, bias=False)
        self.matching = _Matching(make, channels, width, dilation)
        self.update = make.conv(channels + heads, channels, 1)

    def forward(self, x: Tensor, ddf: Tensor, theta: Tensor, heads: _Heads) -> tuple[Tensor, Tensor, Tensor]:
        own = self.block(x)
        other = torch.cat(own.chunk(2)[::-1])
        matched = self.matching(own, _warped(self.project(other), ddf))
        ddf, theta, features = heads(matched, ddf, theta)
        update = self.update(torch.cat([_warped(other, ddf), features.to(other.dtype)], dim=1))
        return own + F.leaky_relu(update, _SLOPE_ALIGNER), ddf, theta


class ResidualAlignerNet(nn.Module):
    """Registers two images coarse to fine, with several candidate motions in every voxel.

    A level sees features that were pooled ``pool_sizes[k]`` times and compares them by two convolutions of dilation
    ``dilations[k]``. Pooling finds large motion but cannot part near points that move differently; dilation finds it on
    a fine grid. ``separability_bound(pool_sizes, dilations=dilations)`` says how differently points may move.

    Args:
        spatial_dims: 2 or 3.
        pool_sizes: one number a level, coarse to fine, each a multiple of the next.
        dilations: one number a level.
        in_channels: channels of each of both images.
        pair_channels: further channels that belong to the pair and change sign when the images are swapped, such as
            forces.
        channels: features on the finest grid; there are four times as many on the coarsest.
        depth: how often the encoder halves the grid.
        heads: candidate motions in every voxel.

    Raises:
        ValueError: numbers out of range, numbers of levels that differ, or pool sizes of which one is no multiple of
            the next.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        pool_sizes: Sequence[int] = SEPARABLE_STRUCTURES[3][0],
        dilations: Sequence[int] = SEPARABLE_STRUCTURES[3][1],
        *,
        in_channels: int = 1,
        pair_channels: int = 0,
        channels: int = 8,
        depth: int = 3,
        heads: int = 6,
    ) -> None:
        super().__init__()
        check_levels(pool_sizes, dilations)
        if spatial_dims not in CONVOLUTION or min(in_channels, channels, heads) < 1 or min(pair_channels, depth) < 0:
            raise ValueError(
                "a residual aligner needs spatial_dims 2 or 3, in_channels, channels and heads of 1 or more, and "
                f"pair_channels and depth of 0 or more, got {spatial_dims}, {in_channels}, {channels}, {heads}, "
                f"{pair_channels} and {depth}."
            )
        self.dims, self.in_channels, self.heads = spatial_dims, in_channels, heads
        self.pools, make, width = tuple(pool_sizes), _Builder(spatial_dims), 3 * heads
        encoded = [channels, *(2 * channels,) * (depth - 1), 4 * channels][: depth + 1]
        before = [in_channels + pair_channels, *encoded]
        self.encoder = nn.ModuleList(_ResidualBlock(make, *both) for both in pairwise(before))
        decoded = [*(4 * channels,) * max(len(self.pools) - 3, 0), *(2 * channels,) * 2, channels][-len(self.pools) :]
        self.levels, previous = nn.ModuleList(), 0
        for number, (after, dilation) in enumerate(zip(decoded, dilations)):
            skips = sum(encoded[one] for one in self._skips(number, depth))
            self.levels.append(_Level(make, previous + skips, after, heads, width, dilation))
            previous = after
        self.shared = _Heads(make, heads, width)
        self.last = make.conv(channels + spatial_dims, spatial_dims)
        nn.init.zeros_(self.last.weight)  # type: ignore[arg-type]  # a convolution's
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]
        self.multiple = math.lcm(self.pools[0], 2**depth)

    def _skips(self, level: int, depth: int) -> list[int]:
        """The levels of the encoder that a level of the decoder sees.

        Every level sees the features on its own grid, or the deepest ones if its grid is coarser; the first one sees
        all deeper features instead, where there are any.
        """
        own = min(self.pools[level].bit_length() - 1, depth)
        return [*range(depth, own, -1)] if level == 0 and own < depth else [own]

    def forward(self, images: Tensor) -> Tensor:
        """The field that warps the moving image onto the fixed one.

        Args:
            images: ``(B, 2 in_channels + pair_channels, *S)``: moving and fixed image, then what belongs to the pair.

        Returns:
            ``(B, D, *S)`` displacement in voxels: ``warp(moving, ddf)`` resembles ``fixed``.
        """
        shape = images.shape[2:]
        room = [-n % self.multiple for n in shape]
        padded = F.pad(images, [p for r in reversed(room) for p in (0, r)], "replicate")
        count = self.in_channels
        moving, fixed, pair = padded[:, :count], padded[:, count : 2 * count], padded[:, 2 * count :]
        both = torch.cat([torch.cat([fixed, pair], dim=1), torch.cat([moving, -pair], dim=1)])
        features, ddf = self._decode(self._encode(both), both)
        change = self.last(torch.cat([features, ddf.to(features.dtype)], dim=1).chunk(2)[0])
        return crop(ddf.chunk(2)[0] + change.float(), shape)

    def _encode(self, x: Tensor) -> list[Tensor]:
        """Features of both images, fine to coarse."""
        found: list[Tensor] = []
        for block in self.encoder:
            x = block(self._at(x, [n // 2 for n in x.shape[2:]]) if found else x)
            found.append(x)
        return found

    def _decode(self, encoded: list[Tensor], both: Tensor) -> tuple[Tensor, Tensor]:
        """Features and fields on the finest grid of the decoder, brought to that of the images."""
        state: tuple[Tensor, ...] = ()
        for number, level in enumerate(self.levels):
            pool = self.pools[number]
            shape = [n // pool for n in both.shape[2:]]
            skips = [self._at(encoded[one], shape) for one in self._skips(number, len(encoded) - 1)]
            if not state:
                ddf, theta = (
                    both.new_zeros(len(both), n, *shape, dtype=torch.float32) for n in (self.dims, self.heads)
                )
                inputs = skips
            else:
                times = self.pools[number - 1] // pool
                x, ddf, theta = (self._finer(one, times) for one in state)
                inputs, ddf = [x, *skips], times * ddf
            state = level(torch.cat(inputs, dim=1), ddf, theta, self.shared)
        times = self.pools[-1]
        return self._finer(state[0], times), times * self._finer(state[1], times)

    def _at(self, features: Tensor, shape: Sequence[int]) -> Tensor:
        """Features on another grid over the same extent."""
        if features.shape[2] == shape[0]:
            return features
        mode = "area" if features.shape[2] > shape[0] else _MODE[self.dims]  # a mean over what becomes one voxel
        return F.interpolate(features, list(shape), mode=mode)

    def _finer(self, values: Tensor, times: int) -> Tensor:
        return self._at(values, [times * n for n in values.shape[2:]])


def _warped(features: Tensor, ddf: Tensor) -> Tensor:
    return warp(features.float(), ddf).to(features.dtype)
