"""The card of a network: where it comes from, what it expects, and the default settings of its sampler."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from monai_drdm.documents import Document, Origin
from monai_drdm.networks.kinds import MAX_STEPS

_CARD = Document("a network card", "Write weights with save_network, which writes the card too.")


@dataclass(frozen=True)
class NetworkCard:
    """A description of a network.

    It is stored as JSON inside the weights file. The registry holds one for each known name.
    """

    name: str
    """Registry name, or a name of the user's own."""
    kind: str
    """Architecture: ``recresacnet`` or ``velocity_unet``."""
    spatial_dims: int
    """2 or 3."""
    working_size: int
    """Voxels along the longest side of the grid the network was trained on."""
    in_channels: int = 1
    channels: tuple[int, ...] = ()
    """Number of features on each grid, for architectures where it can be chosen."""
    input_range: tuple[float, float] = (0.0, 1.0)
    """Intensity range the network expects."""
    sampler: str = "fast"
    """Default sampler."""
    steps: int = 12
    """Default number of recovery steps."""
    level: tuple[float, float] = (0.3, 0.8)
    """Deformation levels the network is meant for."""
    sha256: str = ""
    """Hash of the safetensors file; empty for a network that was not read from a file."""
    source: str = ""
    licence: str = ""
    training_data: str = ""
    gates: Mapping[str, float] = field(default_factory=dict)
    """Measured results of the network by name."""

    def to_json(self, indent: int | None = None) -> str:
        """The card as JSON with sorted keys, without empty entries, in one line or indented.

        The hash is left out, because the file that has this hash contains the JSON.
        """
        values = {k: v for k, v in asdict(self).items() if k != "sha256" and v}
        return json.dumps(values, sort_keys=True, indent=indent, separators=(",", ": " if indent else ":"))

    @classmethod
    def from_json(cls, text: str, sha256: str = "", origin: Origin = "NetworkCard") -> NetworkCard:
        """Read what ``to_json`` wrote.

        Args:
            text: the JSON.
            sha256: hash of the weights file that the card is from.
            origin: that file, for error messages.

        Raises:
            ValueError: not the JSON of a valid card.
        """
        with _CARD.reading(origin):
            values = _CARD.parse_json(text, origin)
            unknown = set(values) - {f.name for f in fields(cls)}
            if unknown:
                raise ValueError(f"unknown entries {sorted(unknown)}")
            for name in ("input_range", "level"):
                if name in values:
                    low, high = values[name]
                    values[name] = (float(low), float(high))
            if "channels" in values:
                values["channels"] = tuple(values["channels"])
            card = cls(**{**values, "sha256": sha256})
            card.check()
            return card

    def check(self) -> None:
        """Raise ``ValueError`` unless every entry has the right type and numbers are in range."""
        for name in ("name", "kind", "sampler", "source", "licence", "training_data"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"NetworkCard: {name} must be text, got {getattr(self, name)!r}.")
        for name, limit in (("spatial_dims", 3), ("working_size", 4096), ("in_channels", 64), ("steps", MAX_STEPS)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"NetworkCard: {name} must be an integer from 1 to {limit}, got {value!r}.")
        channels = self.channels
        if (
            not isinstance(channels, tuple)
            or len(channels) > 8
            or not all(type(value) is int and 1 <= value <= 512 for value in channels)
        ):
            raise ValueError(f"NetworkCard: channels must be at most 8 integers from 1 to 512, got {channels!r}.")
        if self.spatial_dims == 1:
            raise ValueError("NetworkCard: spatial_dims must be 2 or 3, got 1.")
        for name, (low, high) in (("input_range", self.input_range), ("level", self.level)):
            if not -math.inf < low < math.inf or not low <= high < math.inf:
                raise ValueError(f"NetworkCard: {name} must be (low, high), got {(low, high)}.")
        if self.input_range[0] == self.input_range[1] or not 0 < self.level[0] <= self.level[1] <= 1:
            raise ValueError(
                "NetworkCard: input_range must not be empty and level lie in (0, 1], got "
                f"{self.input_range} and {self.level}."
            )
        if not isinstance(self.gates, Mapping) or not all(type(one) in (int, float) for one in self.gates.values()):
            raise ValueError(f"NetworkCard: gates must map names to figures, got {self.gates!r}.")
