"""``FieldDrawer``: draws the field that the transforms apply, from an image and a seed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from monai_drdm._version import __version__
from monai_drdm.deformation.network_source import NetworkSource
from monai_drdm.deformation.options import AllDrawOptions, NetworkLike, with_options
from monai_drdm.deformation.record import Deformation, DeformationParams
from monai_drdm.deformation.stored_field import StoredField
from monai_drdm.diffusion import DRDM, SAMPLERS
from monai_drdm.diffusion.schedule import check_precision, check_share
from monai_drdm.fields import fold_fraction, shrink_to_fold_limit, voxels_to_mm
from monai_drdm.networks import network_sha256, RecoveryNetwork
from monai_drdm.networks.kinds import MAX_STEPS

FOLD_POLICIES = ("rescale", "resample", "skip", "keep", "raise")
_MAX_REDRAWS = 4
_SEEDS = 2**32
_LIMIT_MARGIN = 1 - 2**-14  # rounding should not carry a field over the displacement limit again


class _View(NamedTuple):
    """The part of an image that the network sees, and where it lies in the image."""

    image: Tensor  # (1, *P), the image or its middle slice
    spacing: tuple[float, ...]
    shape: tuple[int, ...]  # of the image
    slice_axis: int | None


class _Draw(NamedTuple):
    """A field as it came from the sampler, and as it would be applied after scaling and rounding."""

    drawn: Tensor  # (1, D, *C) voxels of the grid it was drawn on
    scale: float
    stored: StoredField
    planar: Tensor  # (1, D, *P) voxels of the network's view
    folds: float
    seed: int


@with_options(AllDrawOptions)
class FieldDrawer:
    """Draws the field of one image. Holds settings only; the network is loaded at the first draw, once per process.

    Args:
        network: registry name, path of a safetensors file, or loaded network; ``"auto"``: the default of the image's
            dimensions.
        options: those of ``AllDrawOptions``.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range.
    """

    def __init__(self, network: NetworkLike = "auto", **options: Unpack[AllDrawOptions]) -> None:
        _check_limits(options)
        self.source = NetworkSource(network)
        self.levels = _level_range(options["deformation_level"])
        self.sampler, self.steps = options["sampler"], _optional_index(options["steps"], "steps")
        self.recovery = check_share(options["recovery"], "recovery")
        self.symmetry = check_share(options["symmetry"], "symmetry")
        self.precision, self.compiled = check_precision(options["precision"]), options["compiled"]
        self.image_channel = _optional_index(options["image_channel"], "image_channel")
        limit = options["max_displacement_mm"]
        self.max_displacement_mm = None if limit is None else float(limit)
        self.on_fold, self.max_fold_fraction = options["on_fold"], float(options["max_fold_fraction"])
        self.slice_axis = _optional_index(options["slice_axis"], "slice_axis")
        self.device = None if options["device"] is None else _device(options["device"])
        self._check_sampler()

    def _check_sampler(self) -> None:
        """Wrong arguments fail here, not when the transform first fires."""
        if isinstance(self.source.network, RecoveryNetwork):
            self.model(self.source.network)
            return
        known = sorted({one for samplers in SAMPLERS.values() for one in samplers})
        if self.sampler not in ("auto", *known):
            raise ValueError(f"sampler must be 'auto' or one of {known}, got {self.sampler!r}.")
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps must be from 1 to {MAX_STEPS}, or None, got {self.steps}.")

    def model(self, network: RecoveryNetwork) -> DRDM:
        """A network with this drawer's sampler."""
        return DRDM(
            network,
            self.sampler,
            self.steps,
            self.recovery,
            symmetry=self.symmetry,
            precision=self.precision,
            compiled=self.compiled,
        )

    def draw(self, image: Tensor, spacing: Sequence[float], seed: int) -> Deformation:
        """Draw the field of one image ``(C, *S)``; see ``draw_batch``."""
        return self.draw_batch([image], [spacing], [seed])[0]

    def draw_batch(
        self, images: Sequence[Tensor], spacings: Sequence[Sequence[float]], seeds: Sequence[int]
    ) -> list[Deformation]:
        """Draw the fields of images; images of one shape and spacing go through the network together.

        Args:
            images: ``(C, *S)`` each, any real dtype, all with the same number of axes and on one device.
            spacings: for each image, mm per voxel along each axis.
            seeds: for each image, the seed that fixes level and field.

        Returns:
            The fields on the images' device, after the displacement limit and the fold policy.

        Raises:
            RuntimeError: CUDA was asked for in a forked process.
            TypeError: seeds that are not whole numbers.
            ValueError: an image does not fit the network or is not finite; lists of different lengths; seeds outside
                [0, 2**32); under ``on_fold="raise"`` a field that folds too much.
        """
        _check_counts(images=images, spacings=spacings, seeds=seeds)
        seeds = [_checked_seed(seed) for seed in seeds]
        if not images:
            return []
        views = [
            _network_view(image, spacing, self.image_channel, self.slice_axis)
            for image, spacing in zip(images, spacings)
        ]
        model, device = self.model(self._network(views[0], images[0].device)), images[0].device
        records = [self._record(model, seed) for seed in seeds]
        drawn = _sample([model] * len(views), views, [one.deformation_level for one in records], seeds)
        return [
            self._finish(model, view, record, ddf, spacing, device)
            for view, record, ddf, spacing in zip(views, records, drawn, spacings)
        ]

    def replay(self, image: Tensor, spacing: Sequence[float], params: DeformationParams) -> Deformation:
        """The field of an image ``(C, *S)`` that a record describes; see ``replay_batch``."""
        return self.replay_batch([image], [spacing], [params])[0]

    def replay_batch(
        self, images: Sequence[Tensor], spacings: Sequence[Sequence[float]], params: Sequence[DeformationParams]
    ) -> list[Deformation]:
        """The fields that records describe, one for each image. The limits of this drawer do not apply to them.

        Args:
            images: as in ``draw_batch``.
            spacings: as in ``draw_batch``.
            params: for each image, its record.

        Raises:
            RuntimeError: CUDA asked for in a forked process.
            ValueError: an image does not fit the network or is not finite, or a record is of another network.
        """
        _check_counts(images=images, spacings=spacings, params=params)
        if not images:
            return []
        views = [
            _network_view(image, spacing, one.image_channel, one.slice_axis)
            for image, spacing, one in zip(images, spacings, params)
        ]
        network, device = self._network(views[0], images[0].device), images[0].device
        models = [self._recorded_model(network, one) for one in params]
        drawn = _sample(models, views, [one.deformation_level for one in params], [one.seed for one in params])
        return [
            _deformation(device, spacing, view, _scaled(ddf, one.scale, view, one.seed), one, "none", 1)
            for spacing, view, ddf, one in zip(spacings, views, drawn, params)
        ]

    def replay_steps(self, image: Tensor, spacing: Sequence[float], params: DeformationParams) -> list[StoredField]:
        """The fields on the way to the one that a record describes: before recovery, and after each step of it.

        Arguments and errors are those of ``replay``. The last field is the one that ``replay`` gives.
        """
        view = _network_view(image, spacing, params.image_channel, params.slice_axis)
        model = self._recorded_model(self._network(view, image.device), params)
        steps = model.sample_steps(
            view.image[None], params.deformation_level, [params.seed], view.spacing, compact=True
        )
        return [StoredField.quantised(ddf[0] * params.scale, view.shape, view.slice_axis) for ddf in steps]

    def _network(self, view: _View, image_device: torch.device) -> RecoveryNetwork:
        return self.source.load(view.image.ndim - 1, image_device if self.device is None else self.device)

    def _recorded_model(self, network: RecoveryNetwork, params: DeformationParams) -> DRDM:
        """The network with the sampler of a record. It must be the network that the record names."""
        compiled = self.compiled and params.sampler == "velocity"
        sampler = params.sampler, params.steps, params.recovery
        model = DRDM(network, *sampler, symmetry=params.symmetry, precision=params.precision, compiled=compiled)
        _check_record(params, model)
        return model

    def _finish(
        self,
        model: DRDM,
        view: _View,
        record: DeformationParams,
        drawn: Tensor,
        spacing: Sequence[float],
        device: torch.device,
    ) -> Deformation:
        """Apply the displacement limit and the fold policy to a drawn field."""
        draws = [self._limited(_scaled(drawn, 1.0, view, record.seed), view)]
        for seed in _seed_chain(record.seed, _MAX_REDRAWS if self.on_fold == "resample" else 0):
            if draws[-1].folds <= self.max_fold_fraction:
                break
            (again,) = _sample([model], [view], [record.deformation_level], [seed])
            draws.append(self._limited(_scaled(again, 1.0, view, seed), view))
        best, action = min(draws, key=lambda draw: draw.folds), "none" if len(draws) == 1 else "resample"
        if best.folds > self.max_fold_fraction:
            best, action = self._settle(best, view, action)
        params = replace(record, seed=best.seed, scale=best.scale)
        return _deformation(device, spacing, view, best, params, action, len(draws))

    def _limited(self, draw: _Draw, view: _View) -> _Draw:
        """A field scaled down to the displacement limit."""
        if self.max_displacement_mm is None:
            return draw
        limit = self.max_displacement_mm
        while (largest := float(voxels_to_mm(draw.planar, view.spacing).norm(dim=1).max())) > limit:
            draw = _scaled(draw.drawn, draw.scale * limit / largest * _LIMIT_MARGIN, view, draw.seed)
        return draw

    def _settle(self, draw: _Draw, view: _View, action: str) -> tuple[_Draw, str]:
        """Apply the fold policy to a field above the limit. Returns the field and the action that was taken."""
        if self.on_fold == "keep":
            return draw, "keep"
        if self.on_fold == "skip":
            return _scaled(draw.drawn, 0.0, view, draw.seed), "skip"
        if self.on_fold == "raise":
            raise ValueError(
                f"on_fold='raise': the field folds in {draw.folds:.2%} of cells, above max_fold_fraction="
                f"{self.max_fold_fraction:.2%}. Lower deformation_level or choose another policy."
            )
        factor = float(shrink_to_fold_limit(draw.planar, self.max_fold_fraction)[1][0])
        while draw.folds > self.max_fold_fraction:  # once, unless rounding folds a cell again
            draw = _scaled(draw.drawn, draw.scale * factor, view, draw.seed)
            factor = 0.98
        return draw, "rescale" if action == "none" else "resample+rescale"

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
            recovery=model.recovery,
            symmetry=model.symmetry,
            precision=model.precision,
            image_channel=self.image_channel,
            slice_axis=self.slice_axis,
            scale=1.0,
            version=__version__,
        )


def _check_limits(options: AllDrawOptions) -> None:
    """Check the fold policy, the limits and the slice axis."""
    on_fold, share, limit = options["on_fold"], options["max_fold_fraction"], options["max_displacement_mm"]
    share = _number(share, "max_fold_fraction")
    limit = None if limit is None else _number(limit, "max_displacement_mm")
    if on_fold not in FOLD_POLICIES:
        raise ValueError(f"on_fold must be one of {FOLD_POLICIES}, got {on_fold!r}.")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"max_fold_fraction must be in [0, 1], got {share}.")
    if limit is not None and not 0.0 < limit < math.inf:
        raise ValueError(f"max_displacement_mm must be positive or None, got {limit}.")
    axis = _optional_index(options["slice_axis"], "slice_axis")
    if axis not in (None, 0, 1, 2):
        raise ValueError(f"slice_axis must be the spatial axis 0, 1 or 2 of a volume, or None, got {axis!r}.")


def _number(value: object, name: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    try:
        return float(value)
    except OverflowError:  # of a whole number
        return math.inf


def _sample(
    models: Sequence[DRDM], views: Sequence[_View], levels: Sequence[float], seeds: Sequence[int]
) -> list[Tensor]:
    """Compact fields ``(1, D, *C)``. Images of equal model, shape and spacing go through the network together."""
    alike: dict[object, list[int]] = {}
    for i, (model, view) in enumerate(zip(models, views)):
        kind = model.sampler, model.steps, model.recovery, model.symmetry, model.precision
        alike.setdefault((kind, view.image.shape, view.spacing), []).append(i)
    found: dict[int, Tensor] = {}
    for group in alike.values():
        view, batch = views[group[0]], torch.stack([views[i].image for i in group])
        fields = models[group[0]].sample(
            batch, [levels[i] for i in group], [seeds[i] for i in group], view.spacing, compact=True
        )
        found |= {i: fields[row : row + 1] for row, i in enumerate(group)}
    return [found[i] for i in range(len(views))]


def _scaled(drawn: Tensor, scale: float, view: _View, seed: int) -> _Draw:
    stored = StoredField.quantised(drawn[0] * scale, view.shape, view.slice_axis)
    planar = stored.planar(drawn.device)[None]
    return _Draw(drawn, scale, stored, planar, float(fold_fraction(planar)[0]), seed)


def _deformation(
    device: torch.device,
    spacing: Sequence[float],
    view: _View,
    draw: _Draw,
    params: DeformationParams,
    action: str,
    draws: int,
) -> Deformation:
    return Deformation(
        draw.stored.spread(draw.planar[0].to(device)),
        spacing,
        params,
        stored=draw.stored,
        fold_action=action,
        draws=draws,
        notes=_notes(view.image),
    )


def _network_view(image: Tensor, spacing: Sequence[float], channel: int | None, slice_axis: int | None) -> _View:
    """What the network sees: one channel or the mean over channels, of the image or of its middle slice."""
    if 0 in image.shape:
        raise ValueError(f"the image must be (C, *S) with a channel and a voxel or more, got {tuple(image.shape)}.")
    if slice_axis is not None and image.ndim != 4:
        raise ValueError(f"slice_axis={slice_axis} needs a volume (C, X, Y, Z), got an image of {tuple(image.shape)}.")
    if channel is not None and not -image.shape[0] <= channel < image.shape[0]:
        raise ValueError(f"image_channel must be a channel of the image, got {channel} of {image.shape[0]}.")
    seen = image if slice_axis is None else image.select(slice_axis + 1, image.shape[slice_axis + 1] // 2)
    seen = seen.to(torch.float32).mean(dim=0, keepdim=True) if channel is None else seen[channel][None].float()
    if not bool(torch.isfinite(image).all() & torch.isfinite(seen).all()):
        raise ValueError("the image holds NaN or infinity (or overflows float32). Clean it first (numpy.nan_to_num).")
    in_plane = tuple(s for d, s in enumerate(spacing) if d != slice_axis)
    return _View(seen, in_plane, tuple(image.shape[1:]), slice_axis)


def _notes(view: Tensor) -> tuple[str, ...]:
    return ("constant image",) if bool((view == view.flatten()[0]).all()) else ()


def _check_record(params: DeformationParams, model: DRDM) -> None:
    card = model.network.card
    digest = network_sha256(model.network)
    if (params.network, params.network_sha256) != (card.name, digest):
        raise ValueError(
            f"params were recorded with network {params.network!r} (sha256 {params.network_sha256[:12]}…), this "
            f"transform has {card.name!r} ({digest[:12]}…). Load that network to replay them."
        )


def _check_counts(**lists: Sequence[Any]) -> None:
    """Raise ``ValueError`` unless there are as many of each as there are images."""
    counts = {name: len(several) for name, several in lists.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{' and '.join(lists)} must be equally many, one for each image, got {counts}.")


def _checked_seed(seed: SupportsIndex) -> int:
    number = _optional_index(seed, "seed")
    if number is None or not 0 <= number < _SEEDS:
        raise ValueError(f"seed must be a whole number from 0 to {_SEEDS - 1}, got {seed!r}.")
    return number


def _optional_index(value: SupportsIndex | None, name: str) -> int | None:
    if isinstance(value, (bool, np.bool_)) or not (value is None or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an integer or None, got {value!r}.")
    return None if value is None else operator.index(value)


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r} ({error})."
        ) from None


def _level_range(level: float | Sequence[float]) -> tuple[float, float]:
    if not isinstance(level, (Real, Sequence)):
        raise TypeError(f"deformation_level must be a number or a range (low, high), got {type(level).__name__}.")
    numbers = tuple(level) if isinstance(level, Sequence) else (level, level)
    if len(numbers) != 2 or not 0.0 < numbers[0] <= numbers[1] <= 1.0:
        raise ValueError(f"deformation_level must be a number in (0, 1] or a range (low, high) of them, got {level!r}.")
    return float(numbers[0]), float(numbers[1])


def _seed_chain(seed: int, count: int) -> list[int]:
    """The seeds that follow a seed when fields are drawn again."""
    later = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=count, dtype=np.uint64)
    return [int(one) for one in later]
