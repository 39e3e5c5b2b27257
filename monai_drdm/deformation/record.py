"""The result of one call of a transform: the parameters that replay it, the field, and its statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, MISSING
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from monai_drdm._version import __version__
from monai_drdm.deformation.stored_field import ComposedField, StoredField
from monai_drdm.deformation.warping import FieldWarper, unmoved
from monai_drdm.diffusion.schedule import check_precision
from monai_drdm.documents import Document
from monai_drdm.fields.invert import Inverse
from monai_drdm.fields.sampling import Mode, PaddingMode
from monai_drdm.metrics import field_statistics, FieldStatistics


def check_record(given: object, kind: type) -> None:
    """Raise ``TypeError`` unless the value given as ``params=`` is a record of this kind."""
    if not isinstance(given, kind):
        name, got = kind.__name__, type(given).__name__
        raise TypeError(f"params must be {name}, such as .last holds or {name}.from_json reads, got {got}.")


RECORD_FORMAT = 1
"""Version of the format of records. It changes if entries change their meaning, not if one with a default is added."""
_RECORD = Document("a record", "Give it what .to_json() of such a record wrote.")


def record_entries(kind: Any, values: object) -> dict[str, Any]:
    """Check the entries of a record. Those with a default may be missing, because earlier versions did not write them.

    Args:
        kind: the dataclass of the record.
        values: what its JSON holds.

    Raises:
        ValueError: not a mapping, or entries are missing or unknown.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected entries in braces, got {type(values).__name__}")
    names = {one.name for one in fields(kind)}
    needed = {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}
    missing, unknown = sorted(needed - set(values)), sorted(set(values) - names)
    if missing or unknown:
        raise ValueError(
            f"entries {missing} are missing and {unknown} unknown; version {values.get('version')!r} of monai_drdm "
            f"wrote it, this is {__version__!r}"
        )
    return dict(values)


def _origin(record: type, text: str) -> str:
    return f"{record.__name__}.from_json: {text[:80]!r}"


def _entries(kind: type, text: str) -> dict[str, Any]:
    """The entries of a record, from JSON.

    Raises:
        ValueError: not those of such a record, or of a later format.
    """
    values = record_entries(kind, _RECORD.parse_json(text, _origin(kind, text)))
    if values.get("format", RECORD_FORMAT) != RECORD_FORMAT:
        raise ValueError(f"format {values['format']!r}, this version reads {RECORD_FORMAT}; update monai_drdm")
    return values


@dataclass(frozen=True)
class DeformationParams:
    """Everything that fixes a field, given the image: the same record replays the same field."""

    seed: int
    deformation_level: float
    network: str
    network_sha256: str
    sampler: str
    steps: int
    recovery: float
    """Factor on every recovery step."""
    precision: str
    """Precision of the network's convolutions."""
    image_channel: int | None
    """Channel that the network saw; None: the mean."""
    slice_axis: int | None
    """Axis of a volume along which an in-plane field, drawn on the middle slice, is repeated."""
    scale: float
    """Factor on the drawn field, from ``max_displacement_mm`` and the fold policy."""
    version: str
    format: int = RECORD_FORMAT
    symmetry: float = 0.0
    """How far the field was kept symmetric where the image is. Version 1.0 did not do it, and did not write this."""

    def _check(self) -> None:
        """Raise unless every entry has the right type and range: a rounded number, for example, gives another field."""
        integers = {"seed": self.seed, "steps": self.steps}
        integers |= {
            name: value
            for name, value in (("image_channel", self.image_channel), ("slice_axis", self.slice_axis))
            if value is not None
        }
        for name, value in integers.items():
            if type(value) is not int:
                raise TypeError(f"{name} must be an integer, got {value!r}")
        for name, number in (
            ("deformation_level", self.deformation_level),
            ("recovery", self.recovery),
            ("symmetry", self.symmetry),
            ("scale", self.scale),
        ):
            if type(number) not in (int, float) or not 0.0 <= number <= 1.0:
                raise ValueError(f"{name} must be a number in [0, 1], got {number!r}")
        for name, text in (("network", self.network), ("sampler", self.sampler), ("version", self.version)):
            if not isinstance(text, str):
                raise TypeError(f"{name} must be a string, got {text!r}")
        check_precision(self.precision)

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DeformationParams:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not the JSON of a record.
        """
        with _RECORD.reading(_origin(cls, text)):
            record = cls(**_entries(cls, text))
            record._check()
            return record


@dataclass(frozen=True)
class BankedParams:
    """Everything that fixes a deformation by a field of a bank, given the bank: the same record replays it."""

    identity: str
    """Identity of the image."""
    index: int
    """Number of the field, from 0, among those of the image."""
    scale: float
    """Factor on its displacement."""
    matrix: tuple[tuple[float, ...], ...] | None
    """Homogeneous affine map about the centre, in voxels, which comes before the field."""
    bank: str
    """Digest of the bank's settings."""
    field: str
    """Record that replays the field without the bank: a ``DeformationParams`` as JSON."""
    version: str
    format: int = RECORD_FORMAT

    def _check(self) -> None:
        """Raise unless every entry has its type and range."""
        texts = {"identity": self.identity, "bank": self.bank, "field": self.field, "version": self.version}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"{name} must be a string, got {text!r}")
        if type(self.index) is not int or self.index < 0:
            raise ValueError(f"index must be a whole number of 0 or more, got {self.index!r}")
        if type(self.scale) not in (int, float) or not 0.0 <= self.scale <= 1.0:
            raise ValueError(f"scale must be a number in [0, 1], got {self.scale!r}")
        rows = self.matrix or ()
        if not all(len(row) == len(rows) and all(math.isfinite(one) for one in row) for row in rows):
            raise ValueError(f"matrix must be square and finite, got {rows}")

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps(self.__dict__, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> BankedParams:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not the JSON of a record.
        """
        with _RECORD.reading(_origin(cls, text)):
            values = _entries(cls, text)
            matrix = values["matrix"]
            values["matrix"] = None if matrix is None else tuple(tuple(float(v) for v in row) for row in matrix)
            record = cls(**values)
            record._check()
            return record


@dataclass(frozen=True)
class PairParams:
    """Everything that fixes a synthetic pair, given the image: the same record replays the same pair."""

    augmentation: DeformationParams | None
    """Record of the field that made the moving image from the given one; None: they are the same."""
    synthesis: DeformationParams
    """Record of the field that made the fixed image from the moving one, on which it was drawn."""
    format: int = RECORD_FORMAT

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PairParams:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not the JSON of a record.
        """
        with _RECORD.reading(_origin(cls, text)):
            values = _entries(cls, text)
        first, second = values["augmentation"], json.dumps(values["synthesis"])
        return cls(
            None if first is None else DeformationParams.from_json(json.dumps(first)),
            DeformationParams.from_json(second),
        )


@dataclass(frozen=True)
class DeformationStatistics(FieldStatistics):
    """Statistics of the applied field, and how it was chosen."""

    scale: float
    """Factor applied to the drawn field by ``max_displacement_mm``, the fold policy and a bank's transform."""
    fold_action: str
    """Action of the fold policy: ``none``, ``rescale``, ``resample``, ``resample+rescale``, ``skip`` or ``keep``."""
    draws: int
    """Number of fields that were drawn; more than one under ``resample``."""
    notes: tuple[str, ...]
    """Remarks on the input, such as ``constant image``."""


class Deformation:
    """One applied field. A transform keeps its latest as ``.last``.

    Args:
        ddf: ``(D, *S)`` voxels, the field that was applied, at full resolution.
        spacing: mm per voxel along each axis.
        params: the record that replays it; None for a field that was given.
        stored: the form in which records keep the field; None: a copy of ``ddf``, made when asked for.
        banked: how ``RandDRDMBankd`` changed the field that ``params`` replays.
        fold_action: as in ``DeformationStatistics``.
        draws: as in ``DeformationStatistics``.
        notes: as in ``DeformationStatistics``.
    """

    def __init__(
        self,
        ddf: Tensor,
        spacing: Sequence[float],
        params: DeformationParams | None = None,
        *,
        stored: StoredField | ComposedField | None = None,
        banked: BankedParams | None = None,
        fold_action: str = "none",
        draws: int = 0,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.ddf = ddf
        self.spacing = tuple(spacing)
        self.params = params
        self.banked = banked
        self._stored = stored
        self._account = {
            "scale": (1.0 if params is None else params.scale) * (1.0 if banked is None else banked.scale),
            "fold_action": fold_action,
            "draws": draws,
            "notes": notes,
        }

    def warp(self, image: Tensor, mode: Mode = "bilinear", padding_mode: PaddingMode = "border") -> Tensor:
        """Warp an image or label: ``warped(x) = image(x + ddf(x))``.

        Args:
            image: ``(C, *S)``, any dtype.
            mode: as in ``monai_drdm.fields.warp``.
            padding_mode: as in ``monai_drdm.fields.warp``.

        Returns:
            ``(C, *S)``; an unmoved copy of the values if the fold policy was ``skip``.

        Raises:
            ValueError: shapes or modes do not fit.
        """
        return unmoved(image, mode) if self.skipped else FieldWarper(self.ddf[None])(image[None], mode, padding_mode)[0]

    @cached_property
    def statistics(self) -> DeformationStatistics:
        """Displacement, folding and log-Jacobian statistics, computed when first asked for."""
        numbers = field_statistics(self.ddf[None], self.spacing).to_dict()
        return DeformationStatistics(**numbers, **self._account)  # type: ignore[arg-type]  # entries typed above

    @cached_property
    def stored(self) -> StoredField | ComposedField:
        """The field as records keep it."""
        return StoredField.exact(self.ddf) if self._stored is None else self._stored

    def parts(self, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """The field ``(D, *S)`` in voxels without its affine map, and that map ``(D + 1, D + 1)``, if there is one."""
        if isinstance(self._stored, StoredField) and self._stored.matrix is not None:
            return self._stored.parts(device)
        return self.ddf.to(device), None

    @property
    def skipped(self) -> bool:
        """Whether the fold policy ``skip`` left the data alone."""
        return self._account["fold_action"] == "skip"

    @property
    def inverse_ddf(self) -> Tensor:
        """The inverse field ``(D, *S)`` in voxels, computed when first asked for; see ``inverse_residual_vox``."""
        return self._inverse.ddf[0]

    @property
    def inverse_residual_vox(self) -> float:
        """Largest distance by which going there and back misses, in voxels."""
        return float(self._inverse.residual[0])

    @cached_property
    def _inverse(self) -> Inverse:
        with torch.no_grad():
            return self.stored.inverse(self.ddf.device)
