"""The settings of a bank, on which its fields depend."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from monai_drdm.deformation.drawing import FOLD_POLICIES
from monai_drdm.deformation.record import record_entries
from monai_drdm.documents import Document, Origin
from monai_drdm.samples import checked_pixdim

FORMAT = 3
_DIGEST = "sha256"

_BANK = Document("the settings of a deformation bank", "Build the bank again, in a new folder.")


@dataclass(frozen=True)
class BankSettings:
    """Everything that, with an image and its identity, fixes the fields of a bank."""

    network: str
    """Name of the network."""
    network_sha256: str
    fields_per_image: int
    deformation_level: tuple[float, float]
    sampler: str
    steps: int
    recovery: float
    image_channel: int | None
    max_displacement_mm: float | None
    on_fold: str
    max_fold_fraction: float
    slice_axis: int | None
    pixdim: tuple[float, ...] | None
    seed: int
    format: int = FORMAT
    symmetry: float = 0.0
    """How far fields are kept symmetric where images are. Version 1.0 did not do it, and did not write this."""

    @property
    def digest(self) -> str:
        """Hash that identifies these settings."""
        return hashlib.sha256(json.dumps(self._described(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The settings as one line of JSON, with a checksum in it."""
        return json.dumps(self._described() | {_DIGEST: self.digest}, sort_keys=True)

    def _described(self) -> dict[str, Any]:
        """All settings except those at their defaults, so that settings of later versions do not change the digest."""
        given = asdict(self)
        defaults = {field.name: field.default for field in fields(self) if field.name != "format"}
        return {name: one for name, one in given.items() if one != defaults.get(name, ...)}

    @classmethod
    def from_json(cls, text: str, origin: Origin = "BankSettings") -> BankSettings:
        """Read what ``to_json`` wrote.

        Args:
            text: the JSON.
            origin: the file that it is from, for error messages.

        Raises:
            ValueError: something else, a format that this version does not know, or values that were changed.
        """
        with _BANK.reading(origin):
            values: dict[str, Any] = _BANK.parse_json(text, origin)
            _check_format(values["format"])
            digest = values.pop(_DIGEST, None)
            values = record_entries(cls, values)
            for name in ("deformation_level", "pixdim"):
                values[name] = None if values[name] is None else tuple(values[name])
            settings = cls(**values)
            if settings.digest != digest:
                raise ValueError("wrong checksum: it is damaged or was edited")
            settings._check()
            return settings

    @classmethod
    def read(cls, path: Path) -> BankSettings:
        """Read the file that holds what ``to_json`` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: as of ``from_json``.
        """
        return cls.from_json(_BANK.read_text(path), path)

    def _check(self) -> None:
        """Raise unless every setting has its type and range."""
        texts = {"network": self.network, "network_sha256": self.network_sha256, "sampler": self.sampler}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"{name} must be a string, got {text!r}")
        check_count(self.fields_per_image, "fields_per_image")
        check_count(self.steps, "steps")
        if type(self.seed) is not int:
            raise TypeError(f"seed must be a whole number, got {self.seed!r}")
        low, high = self.deformation_level
        shares = {"deformation_level": low, "deformation_level to": high, "recovery": self.recovery}
        shares["symmetry"] = self.symmetry
        for name, number in (shares | {"max_fold_fraction": self.max_fold_fraction}).items():
            if type(number) not in (int, float) or not 0.0 <= number <= 1.0:
                raise ValueError(f"{name} must be a number in [0, 1], got {number!r}")
        if self.on_fold not in FOLD_POLICIES:
            raise ValueError(f"on_fold must be one of {FOLD_POLICIES}, got {self.on_fold!r}")
        if self.max_displacement_mm is not None and not 0 < self.max_displacement_mm < math.inf:
            raise ValueError(f"max_displacement_mm must be positive or null, got {self.max_displacement_mm!r}")
        if self.slice_axis not in (None, 0, 1, 2) or type(self.image_channel) not in (int, type(None)):
            raise ValueError(f"slice_axis {self.slice_axis!r} or image_channel {self.image_channel!r} is none")
        checked_pixdim(self.pixdim)

    def differences(self, other: BankSettings) -> list[str]:
        """The differences between two settings, in words."""
        mine, others = asdict(self), asdict(other)
        return [f"{name} {mine[name]!r} against {others[name]!r}" for name in mine if mine[name] != others[name]]


def _check_format(number: object) -> None:
    if number == FORMAT:
        return
    if type(number) is int and number < FORMAT:
        raise ValueError(
            f"format {number}, this version reads {FORMAT}: an earlier version of monai_drdm built the bank, without a "
            "checksum over everything that decides a field"
        )
    raise ValueError(f"format {number!r}, this version reads {FORMAT}")


def field_seed(seed: int, identity: str, index: int) -> int:
    """Seed of one field: it depends on nothing but these, so any split of the work gives the same bank."""
    digest = hashlib.sha256(json.dumps([seed, identity, index]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def check_count(value: int, name: str) -> int:
    """A whole number of 1 or more.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}.")
    return int(value)
