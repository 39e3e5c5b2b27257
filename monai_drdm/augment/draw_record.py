"""The record that a run writes for every finished draw."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from monai_drdm.deformation.record import record_entries

_FORMAT = 1


@dataclass(frozen=True)
class DrawRecord:
    """A finished draw: where it came from, its files, and what replays it."""

    name: str
    source: dict[str, str]
    """The files that it was made from, by kind."""
    inputs_sha256: dict[str, str]
    files: dict[str, str]
    """Its files by kind, as paths within the folder of the run."""
    params: dict[str, Any]
    """The entries of the record that replays the field."""
    statistics: dict[str, Any]
    settings_sha256: str
    """Hash of the settings of the run."""
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size and hash of each of its files, to notice changes. Empty in records of versions that did not write them."""
    format: int = _FORMAT

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def of(cls, described: Mapping[str, Any], name: str, folders: Collection[str]) -> DrawRecord:
        """The record that ``to_json`` described.

        Args:
            described: what the JSON holds.
            name: of the draw.
            folders: names of the folders in which its files may lie.

        Raises:
            ValueError: not the record of this draw, or one that names files outside these folders.
        """
        values = record_entries(cls, described)
        if values.get("format", _FORMAT) != _FORMAT:
            raise ValueError(f"format {values['format']!r}, this version reads {_FORMAT}; update monai_drdm")
        record = cls(**values)
        tables = (record.source, record.inputs_sha256, record.files, record.params, record.statistics, record.outputs)
        if record.name != name or not all(isinstance(one, dict) for one in tables):
            raise ValueError(f"it names {record.name!r}, or its entries are of other kinds")
        for table in (record.source, record.inputs_sha256, record.files):
            if not all(isinstance(one, str) for one in table.values()):
                raise ValueError(f"expected text, got {table}")
        for file in record.files.values():
            parts = PurePath(file).parts
            if len(parts) != 2 or parts[0] not in folders or not parts[1].startswith(name):
                raise ValueError(f"it names the file {file!r}, which is none of this draw in {sorted(folders)}")
        seals = [set(one) if isinstance(one, dict) else set() for one in record.outputs.values()]
        if record.outputs and (set(record.outputs) != set(record.files) or seals != [{"bytes", "sha256"}] * len(seals)):
            raise ValueError("it does not say size and hash of each of its files")
        return record

    def missing(self, folder: Path) -> list[str]:
        """Files of this draw that no longer exist."""
        return [file for file in self.files.values() if not os.path.isfile(folder / file)]

    def changed(self, folder: Path, *, read: bool) -> list[str]:
        """Files of this draw that exist but have changed since they were written.

        Args:
            folder: of the run.
            read: read the files and compare their hashes; otherwise only their sizes are compared.
        """
        there = {kind: folder / file for kind, file in self.files.items() if os.path.isfile(folder / file)}
        return [
            self.files[kind]
            for kind, path in there.items()
            if (seal := self.outputs.get(kind)) is not None
            and (path.stat().st_size != seal["bytes"] or (read and sealed(path) != seal))
        ]


def sealed(path: Path) -> dict[str, Any]:
    """Size and hash of a file, to notice later whether it has changed."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
