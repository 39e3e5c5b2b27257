"""RecResACNet, the recovery network of the published DRDM (paper §3.4; Zheng et al., 2026).

The names and shapes of parameters are those of the authors' published state dicts, so that these can be loaded.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn, Tensor

from monai_drdm.fields import crop, fractions_to_voxels, warp
from monai_drdm.networks.base import RecoveryNetwork
from monai_drdm.networks.card import NetworkCard
from monai_drdm.networks.convolution import CONVOLUTION
from monai_drdm.networks.kinds import WORKING_SIZE

TIME_STEPS = 80
"""T, the number of time steps of the published model."""
_EMBEDDING = 100
_MULTIPLE = 8
_CONV_TRANSPOSE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class AtrousBlock(nn.Module):
    """Convolution, optional instance norm, then a residual pair of convolutions with dilations 1 and 3."""

    first_in_float32 = False
    """Compute the first convolution and norm without autocast."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, normalize: bool) -> None:
        super().__init__()
        conv = CONVOLUTION[spatial_dims]
        self.ln = _NORM[spatial_dims](out_channels, affine=True) if normalize else nn.Identity()
        self.conv0 = conv(in_channels, out_channels, 3, padding=1)
        self.convs = nn.ModuleList(conv(out_channels, out_channels, 3, padding=d, dilation=d) for d in (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, *S)`` to ``(B, out, *S)``."""
        with _without_autocast(x.device) if self.first_in_float32 else nullcontext():
            x = self.ln(self.conv0(x))
        out = x
        for conv in self.convs:
            out = conv(_activate(out))
        return _activate(out + x)


class RecResACNet(RecoveryNetwork):
    """Recursive residual atrous-convolution U-Net, which predicts a displacement from an image and a time step.

    Displacements are in the published unit, fractions of the image size. If the sides differ, they are fractions of the
    longest side along every axis.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.

    Raises:
        ValueError: other numbers of dimensions or channels.
    """

    def __init__(self, spatial_dims: int, in_channels: int = 1) -> None:
        if spatial_dims not in (2, 3) or in_channels < 1:
            raise ValueError(
                "RecResACNet: spatial_dims must be 2 or 3 and in_channels 1 or more, "
                f"got {spatial_dims} and {in_channels}."
            )
        super().__init__(
            NetworkCard(
                name=f"recresacnet-{spatial_dims}d-untrained",
                kind="recresacnet",
                spatial_dims=spatial_dims,
                in_channels=in_channels,
                working_size=WORKING_SIZE["recresacnet"][spatial_dims],
            )
        )
        conv, conv_transpose = CONVOLUTION[spatial_dims], _CONV_TRANSPOSE[spatial_dims]
        self.time_embed = nn.Embedding(TIME_STEPS, _EMBEDDING, _weight=_time_table(), _freeze=True)
        self.te1 = _time_mlp(in_channels)
        self.b1 = self._level(in_channels, 10, 10, 10)
        first = self.b1[0]
        assert isinstance(first, AtrousBlock)
        first.first_in_float32 = True
        self.down1 = conv(10, 10, 4, 2, 1)
        self.te2 = _time_mlp(10)
        self.b2 = self._level(10, 20, 20, 20)
        self.down2 = conv(20, 20, 4, 2, 1)
        self.te3 = _time_mlp(20)
        self.b3 = self._level(20, 40, 40, 40)
        self.down3 = conv(40, 40, 4, 2, 1)
        self.te_mid = _time_mlp(40)
        self.b_mid = self._level(40, 20, 20, 40)
        self.up1 = conv_transpose(40, 40, 4, 2, 1)
        self.te4 = _time_mlp(80)
        self.b4 = self._level(80, 40, 20, 20, normalize=False)
        self.up2 = conv_transpose(20, 20, 4, 2, 1)
        self.te5 = _time_mlp(40)
        self.b5 = self._level(40, 20, 10, 10, normalize=False)
        self.up3 = conv_transpose(10, 10, 4, 2, 1)
        self.te_out = _time_mlp(20)
        self.b_out = self._level(20, 10, 10, 10, normalize=False)
        self.conv_out = conv(10, spatial_dims, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, recursions: int = 2) -> Tensor:
        """Predict the displacement that makes the image a little more realistic.

        Args:
            x: ``(B, in_channels, *S)`` image in [0, 1], any size.
            t: ``(B,)`` or ``(1,)`` time steps, integers in [0, 80).
            recursions: how often the network runs. From the second time on its input is warped by the field so far.

        Returns:
            ``(B, D, *S)`` displacement in fractions of the longest side.

        Raises:
            ValueError: shapes, time steps or recursions do not fit.
        """
        self._check(x, t, recursions)
        longest = max(x.shape[2:])
        limit = 1 - 1 / longest
        embedding = self.time_embed(t).expand(x.shape[0], -1)
        image, ddf = x, None
        for recursion in range(recursions):
            predicted = self._predict(image, embedding).clamp(-limit, limit)
            step = fractions_to_voxels(predicted)
            ddf = predicted if ddf is None else predicted + warp(ddf, step, padding_mode="border")
            if recursion + 1 < recursions:
                image = warp(x, fractions_to_voxels(ddf), padding_mode="zeros")
        assert ddf is not None
        return ddf

    def _predict(self, image: Tensor, embedding: Tensor) -> Tensor:
        """One pass of the U-Net, on the image padded with zeros to a size that can be halved three times."""
        shape = image.shape[2:]
        # at least two voxels at the bottleneck, because instance norm needs more than one element
        padded = [max(-(-n // _MULTIPLE) * _MULTIPLE, 2 * _MULTIPLE) for n in shape]
        image = F.pad(image, [p for n, m in zip(shape[::-1], padded[::-1]) for p in (0, m - n)])

        def time_features(mlp: nn.Module) -> Tensor:
            """The features of the time step for one level of the U-Net, shaped to be added to those of the image."""
            features: Tensor = mlp(embedding)
            return features.reshape(*features.shape, *(1,) * self.spatial_dims)

        out1 = self.b1(image + time_features(self.te1))
        out2 = self.b2(self.down1(out1) + time_features(self.te2))
        out3 = self.b3(self.down2(out2) + time_features(self.te3))
        bottom = self.b_mid(self.down3(out3) * time_features(self.te_mid))
        up = self.b4(torch.cat((out3, self.up1(bottom)), dim=1) + time_features(self.te4))
        up = self.b5(torch.cat((out2, self.up2(up)), dim=1) + time_features(self.te5))
        up = self.b_out(torch.cat((out1, self.up3(up)), dim=1) + time_features(self.te_out))
        with _without_autocast(image.device):
            return crop(self.conv_out(up.to(image.dtype)), shape)

    def _level(self, *channels: int, normalize: bool = True) -> nn.Sequential:
        pairs = pairwise(channels)
        return nn.Sequential(*(AtrousBlock(self.spatial_dims, a, b, normalize) for a, b in pairs))

    def _check(self, x: Tensor, t: Tensor, recursions: int) -> None:
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels or 0 in x.shape:
            raise ValueError(
                f"RecResACNet: x must have shape (B, {self.in_channels}, *S) with {self.spatial_dims} spatial axes, "
                f"got {tuple(x.shape)}."
            )
        if t.ndim != 1 or t.shape[0] not in (1, x.shape[0]) or t.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"RecResACNet: t must be (B,) integers in [0, {TIME_STEPS}), got {t.dtype} {tuple(t.shape)}."
            )
        if not bool(((t >= 0) & (t < TIME_STEPS)).all()):
            raise ValueError(f"RecResACNet: t must be in [0, {TIME_STEPS}), got {t.tolist()}.")
        if recursions < 1:
            raise ValueError(f"RecResACNet: recursions must be 1 or more, got {recursions}.")


def _without_autocast(device: torch.device) -> torch.autocast:
    """A context without autocast, also inside an autocast of the caller.

    In bfloat16 the first convolution alone changes the prediction of the published network by a third, because instance
    norm amplifies the rounding of small contrasts. All other convolutions together change it by 2 to 3 %. The last one
    is computed in float32 too, because rounded displacements would be rough.
    """
    return torch.autocast(device.type, enabled=False)


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 1e-6)


def _time_mlp(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(_EMBEDDING, channels), nn.ReLU(), nn.Linear(channels, channels))


def _time_table() -> Tensor:
    """``e[t, 2i] = sin(t · 10000^(-4i/100))`` and ``e[t, 2i+1] = cos`` of the same angle: ``(80, 100)``."""
    rate = torch.tensor([10_000 ** (-4 * i / _EMBEDDING) for i in range(_EMBEDDING // 2)], dtype=torch.float64)
    angle = torch.arange(TIME_STEPS, dtype=torch.float64)[:, None] * rate[None]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()
