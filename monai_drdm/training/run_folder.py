"""The folder of a run: one run at a time, checkpoints that are whole or absent, and what a full disk leaves."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from monai_drdm.io.files import atomically, locked
from monai_drdm.training.settings import RunConfig

_CONFIG = "config.json"
_CHECKPOINTS = "checkpoints"
_DATA = "data.sha256"
_KEPT = 3


@contextmanager
def claimed(folder: Path, config: RunConfig, resume: bool) -> Iterator[None]:
    """Hold the folder of a new run, or of one to go on with, against all others.

    Raises:
        FileExistsError: another run is at it, or it holds something and not ``resume``.
        FileNotFoundError: ``resume``, and there is no run.
        ValueError: ``resume`` with other settings.
    """
    _check(folder, config, resume)
    ours = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            _check(folder, config, resume)  # another run may have come and gone
            for torn in (*folder.rglob(".part-*"), *folder.glob(".*.partial")):
                torn.unlink()  # of a process that was killed while it wrote
            yield
        finally:
            if ours and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def telling_what_is_left(folder: Path) -> Iterator[None]:
    """Say of a file that could not be written, on a full disk for one, what is left of the run and how it goes on."""
    try:
        yield
    except OSError as error:
        kept = Checkpoints(folder).paths()
        left = f"{kept[0].name} is intact" if kept else "there is no checkpoint yet"
        raise OSError(
            f"the run in {folder} cannot be written and has stopped: {error.strerror or error}. {left}; make room "
            "there, then go on with --resume."
        ) from error


def check_data(folder: Path, fingerprint: str, resume: bool) -> None:
    """Write down which data a run learns from; or, where it goes on, see that they are the same.

    Raises:
        ValueError: they are not.
    """
    noted = folder / _DATA
    if not fingerprint:
        return
    if resume and noted.is_file():
        if noted.read_text(encoding="utf-8").strip() != fingerprint:
            raise ValueError(
                f"{folder}: the data have changed since the run was begun, or others of that name were read. Resume "
                "with the same data, or begin a new run, with init=network.safetensors to start from an old one."
            )
        return
    atomically(noted, lambda part: Path(part).write_text(fingerprint + "\n", encoding="utf-8"))


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the settings, which make the folder that of a run."""
    atomically(folder / _CONFIG, lambda part: Path(part).write_text(config.to_json(), encoding="utf-8"))


class Checkpoints:
    """The checkpoints of a run: the latest few, each written whole or not at all.

    An instance is the save handler of ignite's ``Checkpoint``.

    Args:
        folder: of the run.
        leads: this process writes; others only read.
    """

    def __init__(self, folder: Path, leads: bool = True) -> None:
        self.folder, self.leads = folder / _CHECKPOINTS, leads

    def __call__(self, checkpoint: Mapping[str, Any], filename: str) -> None:
        """Write a checkpoint, then drop what it makes superfluous: never the other way round."""
        if not self.leads:
            return
        data = io.BytesIO()  # torch.save tells of a full disk in words of its own, and may crash
        torch.save(checkpoint, data)
        self.folder.mkdir(exist_ok=True)
        atomically(self.folder / filename, lambda part: _write_through(part, data.getbuffer()))
        newest = _step_of(Path(filename))
        kept = [path for path in self.paths() if _step_of(path) <= newest][:_KEPT]
        for path in self.paths():
            if path not in kept:  # too old or, where the run has gone back behind it, damaged
                path.unlink()

    def paths(self) -> list[Path]:
        """Checkpoint files, the latest first."""
        whole = (path for path in self.folder.glob("*.pt") if not path.name.startswith("."))  # others are being written
        return sorted(whole, key=_step_of, reverse=True)

    def latest(self) -> dict[str, Any] | None:
        """What the latest checkpoint that can be read holds; says which cannot be, and what it falls back to.

        A file that exists and cannot be read is not a damaged one: to start again would overwrite good checkpoints.

        It is on the CPU. An optimizer keeps its step counts where they are loaded: on a GPU, every step would wait for
        each of them.

        Raises:
            ValueError: a file that cannot be read now, for want of memory or by an error of the disk.
        """
        paths = self.paths()
        for path, before in zip(paths, [*paths[1:], None]):
            try:
                return _load(path)
            except (OSError, MemoryError) as error:
                reason = str(error) or type(error).__name__
                raise ValueError(
                    f"{path} cannot be read now ({reason}); nothing was changed. Try again, or move it away to go on "
                    "from the one before."
                ) from error
            except Exception as error:  # a torn file fails in as many ways as there are bytes
                reason = (str(error) or type(error).__name__).splitlines()[0]
                instead = f"falling back to {before.name}" if before else "starting again"
                print(f"{path.name} is damaged ({reason}); {instead}", file=sys.stderr)
        return None


def _load(path: Path) -> dict[str, Any]:
    data = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(data) as archive:
        broken = archive.testzip()  # torch does not compare checksums
    if broken is not None:
        raise ValueError(f"checksum of {broken} does not match")
    data.seek(0)
    saved: dict[str, Any] = torch.load(data, map_location="cpu", weights_only=True)
    return saved


def _write_through(path: str, data: memoryview) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def holds_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / _CONFIG).is_file() and (folder / _CHECKPOINTS).is_dir()


def _step_of(path: Path) -> int:
    digits = path.stem.rsplit("_", 1)[-1]
    return int(digits) if digits.isdigit() else -1


def _check(folder: Path, config: RunConfig, resume: bool) -> None:
    there = folder / _CONFIG
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not an empty folder. Choose another, or --resume.")
        return
    if not there.is_file():
        raise FileNotFoundError(f"{folder} holds no run to resume. Leave out --resume to start one.")
    before = json.loads(there.read_text(encoding="utf-8"))
    after = json.loads(config.to_json())
    changed = sorted(key for key in after if before.get(key) != after[key])
    if changed:
        listed = ", ".join(f"{key}: {before.get(key)!r} before, {after[key]!r} now" for key in changed)
        raise ValueError(f"{folder} was made with other settings ({listed}). Resume with the same ones.")
