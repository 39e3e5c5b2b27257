"""``RandDRDMDeform``: the array form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.transforms import RandomizableTransform
from monai.utils import TransformBackends
from torch import Tensor

from monai_drdm.deformation.drawing import FieldDrawer
from monai_drdm.deformation.record import check_record, Deformation, DeformationParams
from monai_drdm.deformation.seeds import stable_hash
from monai_drdm.fields.warp import check_modes, Mode, PaddingMode
from monai_drdm.networks import RecoveryNetwork
from monai_drdm.samples import (
    as_tensor,
    check_field,
    check_field_fits,
    checked_pixdim,
    flushed,
    idle,
    Mover,
    spacing_of,
)
from monai_drdm.transforms.base import field_info, take_back
from monai_drdm.transforms.tracing import in_plain_mode, TracedTransform

_SEEDS = 2**32


class DRDMRandomness(RandomizableTransform, TracedTransform):
    """Firing and seeds, the same for the array and the dictionary form.

    Args:
        prob: chance that the transform fires.
        drawer: draws the fields.
    """

    drawer: FieldDrawer
    last: Any = None
    backend = [TransformBackends.TORCH]  # noqa: RUF012  # MONAI declares it so

    def __init__(self, prob: float, drawer: FieldDrawer) -> None:
        RandomizableTransform.__init__(self, checked_prob(prob))
        self.drawer = drawer
        self._seed: int | None = None

    def randomize(self, data: object = None) -> None:
        """Draw whether to fire, then one integer seed, in that order whether or not it fires.

        Args:
            data: a value whose hash takes the place of the random state; None: the state alone.

        Raises:
            TypeError: a value that has no hash that is the same in every process.
        """
        super().randomize(None)
        self._seed = int(self.R.randint(0, _SEEDS, dtype="uint64"))
        if data is not None:
            self._do_transform, self._seed = self._decided_by(data)

    def _decided_by(self, value: object) -> tuple[bool, int]:
        """Whether to fire, and the seed, of a value: no state of the transform's, so threads may share it."""
        state = np.random.RandomState(stable_hash(value))
        return bool(state.rand() < self.prob), int(state.randint(0, _SEEDS, dtype="uint64"))

    def deformation(
        self,
        image: NdarrayOrTensor,
        spacing: Sequence[float],
        name: str,
        randomize: bool,
        params: DeformationParams | None,
        field: Tensor | None,
        seed_value: object = None,
    ) -> Deformation | None:
        """The deformation to apply to an image, or None if the transform does not fire.

        Raises:
            TypeError: ``params`` of another kind.
            ValueError: both ``params`` and ``field``, a field that does not fit, or nothing yet to replay.
        """
        if params is not None and field is not None:
            raise ValueError("give params= to replay a record or field= to apply a field, not both.")
        if params is not None:
            check_record(params, DeformationParams)
        tensor = as_tensor(image, name)
        if field is not None:
            check_field(field)
            check_field_fits(field, tensor)
            own = field.detach().as_subclass(Tensor).to(tensor.device, copy=True)
            return Deformation(own, spacing)
        if params is not None:
            return self.drawer.draw(tensor, spacing, params=params)
        if randomize:
            self.randomize(seed_value)
        fires, seed = self._do_transform, self._seed
        if randomize and seed_value is not None:
            fires, seed = self._decided_by(seed_value)
        if seed is None:
            raise ValueError(
                "randomize=False replays the last draw, and there is none yet. Call once with randomize=True."
            )
        return self.drawer.draw(tensor, spacing, seed=seed) if fires else None

    def __getstate__(self) -> dict[str, object]:
        """Everything but the last field, which may be large."""
        state: dict[str, object] = super().__getstate__()  # type: ignore[no-untyped-call]  # MONAI leaves it without types
        return {key: value for key, value in state.items() if key != "last"}


def checked_prob(prob: object) -> float:
    """A number in [0, 1].

    Raises:
        ValueError: it is not.
    """
    number = float(prob) if isinstance(prob, Real) else np.nan
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"prob must be in [0, 1], got {prob!r}.")
    return number


class RandDRDMDeform(DRDMRandomness):
    """Deform an image at random into another plausible anatomy (paper, Algorithms 2 and 3).

    A random multi-scale field deforms the image; a network that knows realistic images recovers what became
    unrealistic; the image is resampled once by what remains.

    Args:
        network: registry name, path of a safetensors file, or loaded network; ``"auto"``: the default of the image's
            dimensions.
        prob: chance that the transform fires.
        deformation_level: the paper's T'/T in (0, 1], a number or a range drawn uniformly.
        sampler: ``"reference"``, ``"fast"``, or ``"auto"``: the network card's.
        steps: recovery steps; None: the network card's.
        recovery: factor on every recovery step, in [0, 1]: less leaves more of the random field, so that shapes differ
            more and are less plausible. Below 1 for ``velocity`` only.
        mode: ``bilinear``, ``nearest``, ``bicubic`` (2D) or ``label``.
        padding_mode: ``border``, ``zeros`` or ``reflection``.
        image_channel: channel that the network sees; None: the mean over channels.
        max_displacement_mm: scales the field down to at most this.
        on_fold: if folds exceed ``max_fold_fraction``: ``rescale`` (shrink until they do not), ``resample`` (draw again
            at most 4 times, then shrink the least folded), ``skip``, ``keep``, ``raise``.
        max_fold_fraction: accepted fraction of folding cells at full resolution, by the corner measure.
        pixdim: spacing in mm of tensors without an affine.
        slice_axis: lets a 2D network deform volumes: one in-plane field, drawn on the middle slice across this spatial
            axis, moves the whole stack.
        device: where the network runs; None: where the image is.
        invertible: record on the output what ``inverse`` needs.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range.
    """

    def __init__(
        self,
        network: str | os.PathLike[str] | RecoveryNetwork = "auto",
        *,
        prob: float = 0.1,
        deformation_level: float | Sequence[float] = (0.3, 0.8),
        sampler: str = "auto",
        steps: int | None = None,
        recovery: float = 1.0,
        mode: Mode = "bilinear",
        padding_mode: PaddingMode = "border",
        image_channel: int | None = None,
        max_displacement_mm: float | None = None,
        on_fold: str = "rescale",
        max_fold_fraction: float = 1e-4,
        pixdim: Sequence[float] | None = None,
        slice_axis: int | None = None,
        device: torch.device | str | None = None,
        invertible: bool = True,
    ) -> None:
        TracedTransform.__init__(self)
        drawer = FieldDrawer(
            network=network,
            deformation_level=deformation_level,
            sampler=sampler,
            steps=steps,
            recovery=recovery,
            image_channel=image_channel,
            max_displacement_mm=max_displacement_mm,
            on_fold=on_fold,
            max_fold_fraction=max_fold_fraction,
            slice_axis=slice_axis,
            device=device,
        )
        DRDMRandomness.__init__(self, prob, drawer)
        self.last: Deformation | None = None
        check_modes(mode, padding_mode, 2, "RandDRDMDeform")
        self.mode: Mode = mode
        self.padding_mode: PaddingMode = padding_mode
        self.pixdim = checked_pixdim(pixdim)
        self.invertible = invertible

    @in_plain_mode
    def __call__(
        self,
        img: NdarrayOrTensor,
        mode: Mode | None = None,
        padding_mode: PaddingMode | None = None,
        randomize: bool = True,
        *,
        params: DeformationParams | None = None,
        field: Tensor | None = None,
    ) -> Tensor:
        """Deform an image.

        Args:
            img: ``(C, *S)`` with 2 or 3 spatial axes.
            mode: overrides the constructor's.
            padding_mode: overrides the constructor's.
            randomize: False replays the last draw.
            params: replays a record instead.
            field: applies this field ``(D, *S)`` in voxels instead.

        Returns:
            ``(C, *S)`` tensor, or MetaTensor where metadata is tracked. The input is left as it is.

        Raises:
            TypeError: not an array or tensor of a real numeric type.
            ValueError: anything that does not fit; see the table of inputs and answers in the README.
        """
        img = flushed(img)
        mode, padding_mode = mode or self.mode, padding_mode or self.padding_mode
        check_modes(mode, padding_mode, as_tensor(img, "img").ndim - 1, "RandDRDMDeform")
        spacing = spacing_of(img, self.pixdim, "img")
        self.last = deformation = self.deformation(img, spacing, "img", randomize, params, field)
        ddf = None if deformation is None or deformation.skipped else deformation.ddf
        out = idle(img, mode) if ddf is None else Mover(ddf[None]).like(img, mode, padding_mode, "img")
        if not self.invertible:
            return out
        info = {"kind": "image", "mode": mode, "padding_mode": padding_mode}
        return self.record(out, ddf is not None, info | field_info(deformation, tuple(img.shape[1:])))

    @in_plain_mode
    def inverse(self, data: Tensor) -> Tensor:
        """Take back what this transform did to an image, or to something on its grid that carries its records.

        Args:
            data: MetaTensor ``(C, *S)``.

        Returns:
            ``(C, *S)`` MetaTensor without this transform's latest record; the input is left as it is.

        Raises:
            TypeError: data that carry no records.
            ValueError: no record of this transform, or data of another shape than it recorded.
        """
        return take_back(self, data, "data", {})
