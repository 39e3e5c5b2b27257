"""From an image and a seed to the field that the transforms apply."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_drdm._version import __version__
from monai_drdm.diffusion import DRDM, SAMPLERS
from monai_drdm.fields import fold_fraction, shrink_to_fold_limit, voxels_to_mm
from monai_drdm.networks import (
    auto_network,
    load_network,
    network_card,
    network_sha256,
    RecResACNet,
    weights_folder,
)
from monai_drdm.transforms.record import Deformation, DeformationParams

FOLD_POLICIES = ("rescale", "resample", "skip", "keep", "raise")
_MAX_REDRAWS = 4


class _Draw(NamedTuple):
    folds: float
    ddf: Tensor  # (1, D, *S) voxels
    scale: float
    seed: int


class FieldDrawer:
    """Draws the field of one image. Holds settings only; the network is loaded at the first draw, once per process.

    The arguments are those of ``RandDRDMDeform``.
    """

    def __init__(
        self,
        *,
        network: str | os.PathLike[str] | RecResACNet,
        deformation_level: float | Sequence[float],
        sampler: str,
        steps: int | None,
        image_channel: int | None,
        max_displacement_mm: float | None,
        on_fold: str,
        max_fold_fraction: float,
        device: torch.device | str | None,
    ) -> None:
        if not isinstance(network, (str, os.PathLike, RecResACNet)):
            raise TypeError(f"network must be a name, a path or a loaded network, got {type(network).__name__}.")
        if on_fold not in FOLD_POLICIES:
            raise ValueError(f"on_fold must be one of {FOLD_POLICIES}, got {on_fold!r}.")
        if not 0.0 <= max_fold_fraction <= 1.0:
            raise ValueError(f"max_fold_fraction must be in [0, 1], got {max_fold_fraction}.")
        if max_displacement_mm is not None and not 0.0 < max_displacement_mm < math.inf:
            raise ValueError(f"max_displacement_mm must be positive or None, got {max_displacement_mm}.")
        self.network = network
        self.levels = _level_range(deformation_level)
        self.sampler = sampler
        self.steps = steps
        self.image_channel = image_channel
        self.max_displacement_mm = max_displacement_mm
        self.on_fold = on_fold
        self.max_fold_fraction = max_fold_fraction
        self.device = device
        self._moved: dict[torch.device, RecResACNet] = {}
        # wrong arguments fail here, not when the transform first fires
        if isinstance(network, RecResACNet):
            DRDM(network, sampler, steps)
            return
        name = os.fspath(network)
        if name != "auto" and not name.endswith(".safetensors"):
            network_card(name)
        known = sorted({one for samplers in SAMPLERS.values() for one in samplers})
        if sampler not in ("auto", *known):
            raise ValueError(f"sampler must be 'auto' or one of {known}, got {sampler!r}.")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be 1 or more, or None, got {steps}.")

    def __getstate__(self) -> dict[str, object]:
        """Settings without the copies of the network on other devices."""
        return {**self.__dict__, "_moved": {}}

    def draw(
        self,
        image: Tensor,
        spacing: Sequence[float],
        *,
        seed: int | None = None,
        params: DeformationParams | None = None,
    ) -> Deformation:
        """Draw the field of an image from a seed, or replay a record.

        Args:
            image: ``(C, *S)``, any real dtype.
            spacing: mm per voxel along each axis.
            seed: fixes level and field.
            params: a record to replay instead.

        Returns:
            The field on the image's device, after the displacement limit and the fold policy.

        Raises:
            ValueError: the image does not fit the network, is not finite, or the record is of another network;
                under ``on_fold="raise"`` a field that folds too much.
        """
        model = self._model(image, params)
        if params is not None:
            return self._replay(model, image, spacing, params)
        assert seed is not None
        record = self._record(model, seed)
        view = _network_view(image, self.image_channel)
        draws: list[_Draw] = []
        for one_seed in _seed_chain(seed, 1 + (_MAX_REDRAWS if self.on_fold == "resample" else 0)):
            draws.append(self._draw_one(model, view, record.deformation_level, one_seed, spacing))
            if draws[-1].folds <= self.max_fold_fraction:
                break
        best = min(draws, key=lambda draw: draw.folds)
        ddf, factor, action = best.ddf, 1.0, "none" if len(draws) == 1 else "resample"
        if best.folds > self.max_fold_fraction:
            ddf, factor, action = self._settle(best, action)
        return Deformation(
            ddf[0].to(image.device),
            spacing,
            replace(record, seed=best.seed, scale=best.scale * factor),
            fold_action=action,
            draws=len(draws),
            notes=_notes(view),
        )

    def _replay(self, model: DRDM, image: Tensor, spacing: Sequence[float], params: DeformationParams) -> Deformation:
        """The recorded field, at the recorded scale: this transform's own limits and policy do not apply."""
        _check_record(params, model)
        view = _network_view(image, params.image_channel)
        ddf = model.sample(view[None], params.deformation_level, [params.seed], spacing) * params.scale
        return Deformation(ddf[0].to(image.device), spacing, params, draws=1, notes=_notes(view))

    def _draw_one(self, model: DRDM, view: Tensor, level: float, seed: int, spacing: Sequence[float]) -> _Draw:
        """One field, scaled down to the displacement limit."""
        ddf, scale = model.sample(view[None], level, [seed], spacing), 1.0
        if self.max_displacement_mm is not None:
            largest = float(voxels_to_mm(ddf, spacing).norm(dim=1).max())
            scale = min(1.0, self.max_displacement_mm / max(largest, 1e-12))
            ddf = ddf * scale
        return _Draw(float(fold_fraction(ddf)[0]), ddf, scale, seed)

    def _settle(self, draw: _Draw, action: str) -> tuple[Tensor, float, str]:
        """Apply the fold policy to a field above the limit: the field, the factor on it, and what was done."""
        ddf = draw.ddf
        if self.on_fold == "keep":
            return ddf, 1.0, "keep"
        if self.on_fold == "skip":
            return torch.zeros_like(ddf), 0.0, "skip"
        if self.on_fold == "raise":
            raise ValueError(
                f"on_fold='raise': the field folds in {draw.folds:.2%} of cells, above max_fold_fraction="
                f"{self.max_fold_fraction:.2%}. Lower deformation_level or choose another policy."
            )
        ddf, factor = shrink_to_fold_limit(ddf, self.max_fold_fraction)
        return ddf, float(factor[0]), "rescale" if action == "none" else "resample+rescale"

    def _record(self, model: DRDM, seed: int) -> DeformationParams:
        low, high = self.levels
        card = model.network.card
        return DeformationParams(
            seed=seed,
            deformation_level=float(np.random.RandomState(seed).uniform(low, high)) if low < high else low,
            network=card.name,
            network_sha256=network_sha256(model.network),
            sampler=model.sampler,
            steps=model.steps,
            image_channel=self.image_channel,
            scale=1.0,
            version=__version__,
        )

    def _model(self, image: Tensor, params: DeformationParams | None) -> DRDM:
        dims = image.ndim - 1
        # an empty tensor knows the index that "cuda" stands for
        device = torch.empty(0, device=image.device if self.device is None else self.device).device
        if isinstance(self.network, RecResACNet):
            network = self._on_device(self.network, device)
        else:
            name = auto_network(dims) if self.network == "auto" else os.fspath(self.network)
            network = _shared_network(name, str(device), str(weights_folder()))
        _check_dims(network, dims)
        if params is not None:
            return DRDM(network, params.sampler, params.steps)
        return DRDM(network, self.sampler, self.steps)

    def _on_device(self, network: RecResACNet, device: torch.device) -> RecResACNet:
        """The given network, or a copy on another device: the caller's own stays where it is."""
        if next(network.parameters()).device == device:
            return network
        if device not in self._moved:
            self._moved[device] = copy.deepcopy(network).to(device)
        return self._moved[device]


def _network_view(image: Tensor, channel: int | None) -> Tensor:
    """What the network sees: one channel or the mean over channels, float32 ``(1, *S)``."""
    if channel is None:
        view = image.to(torch.float32).mean(dim=0, keepdim=True)
    elif -image.shape[0] <= channel < image.shape[0]:
        view = image[channel][None].to(torch.float32)
    else:
        raise ValueError(f"image_channel must be a channel of the image, got {channel} of {image.shape[0]}.")
    if not bool(torch.isfinite(image).all() & torch.isfinite(view).all()):
        raise ValueError("the image holds NaN or infinity (or overflows float32). Clean it first (numpy.nan_to_num).")
    return view


def _notes(view: Tensor) -> tuple[str, ...]:
    return ("constant image",) if bool((view == view.flatten()[0]).all()) else ()


@lru_cache(maxsize=8)
def _shared_network(name: str, device: str, folder: str) -> RecResACNet:
    """One network per process, name and device; ``folder``, where names are looked up, is part of the key."""
    return load_network(name, device)


def _check_dims(network: RecResACNet, dims: int) -> None:
    card = network.card
    if card.spatial_dims != dims:
        raise ValueError(
            f"network {card.name!r} deforms {card.spatial_dims}D images, got an image of {dims} spatial dimensions. "
            + ("Deform 2D slices, or pass a 3D network." if dims == 3 else "Pass a 2D network.")
        )
    if card.in_channels != 1:
        raise ValueError(f"network {card.name!r} must have one input channel, got {card.in_channels}.")


def _check_record(params: DeformationParams, model: DRDM) -> None:
    card = model.network.card
    digest = network_sha256(model.network)
    if (params.network, params.network_sha256) != (card.name, digest):
        raise ValueError(
            f"params were recorded with network {params.network!r} (sha256 {params.network_sha256[:12]}…), this "
            f"transform has {card.name!r} ({digest[:12]}…). Load that network to replay them."
        )


def _level_range(level: float | Sequence[float]) -> tuple[float, float]:
    if not isinstance(level, (Real, Sequence)):
        raise TypeError(f"deformation_level must be a number or a range (low, high), got {type(level).__name__}.")
    numbers = tuple(level) if isinstance(level, Sequence) else (level, level)
    if len(numbers) != 2 or not 0.0 < numbers[0] <= numbers[1] <= 1.0:
        raise ValueError(f"deformation_level must be a number in (0, 1] or a range (low, high) of them, got {level!r}.")
    return float(numbers[0]), float(numbers[1])


def _seed_chain(seed: int, count: int) -> list[int]:
    """The seed and the ones that follow it when fields are drawn again."""
    later = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=_MAX_REDRAWS, dtype=np.uint64)
    return [seed, *(int(s) for s in later)][:count]
