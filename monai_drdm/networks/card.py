"""What is known about a network: where it comes from, what it expects, how it samples by default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class NetworkCard:
    """A network's card. It travels inside the weights file as JSON and, for known networks, in the registry."""

    name: str
    """Registry name, or a name of the user's own."""
    kind: str
    """Architecture: ``recresacnet``."""
    spatial_dims: int
    """2 or 3."""
    working_size: int
    """Voxels along the longest side of the grid the network was trained on."""
    in_channels: int = 1
    input_range: tuple[float, float] = (0.0, 1.0)
    """Intensity range the network expects."""
    sampler: str = "fast"
    """Default sampler."""
    steps: int = 12
    """Default number of recovery steps."""
    level: tuple[float, float] = (0.3, 0.8)
    """Deformation levels the network is meant for."""
    sha256: str = ""
    """Of the safetensors file; empty for a network that never was one."""
    source: str = ""
    licence: str = ""
    training_data: str = ""
    gates: Mapping[str, float] = field(default_factory=dict)
    """Measured figures; empty until measured."""

    def to_json(self) -> str:
        """The card as JSON with sorted keys, without empty entries and its hash, which a file cannot hold of itself."""
        values = {k: v for k, v in asdict(self).items() if k != "sha256" and v}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, sha256: str = "") -> NetworkCard:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not a card.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            unknown = set(values) - {f.name for f in fields(cls)}
            if unknown:
                raise ValueError(f"unknown entries {sorted(unknown)}")
            for name in ("input_range", "level"):
                if name in values:
                    low, high = values[name]
                    values[name] = (float(low), float(high))
            card = cls(**{**values, "sha256": sha256})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"NetworkCard: expected the JSON of a network card, got {text[:80]!r} ({error})."
            ) from None
        card.check()
        return card

    def check(self) -> None:
        """Raise ``ValueError`` unless the numbers make sense."""
        if self.spatial_dims not in (2, 3) or self.working_size < 1 or self.in_channels < 1 or self.steps < 1:
            raise ValueError(
                "NetworkCard: spatial_dims must be 2 or 3, working_size, in_channels and steps 1 or more, got "
                f"{self.spatial_dims}, {self.working_size}, {self.in_channels}, {self.steps}."
            )
        if self.input_range[0] >= self.input_range[1]:
            raise ValueError(f"NetworkCard: input_range must be (low, high), got {self.input_range}.")
