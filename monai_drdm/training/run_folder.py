"""The folder of a run: its lock, its settings, the digest of its data, and its checkpoints."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_drdm.documents import Document
from monai_drdm.io.files import atomically, is_taken, locked
from monai_drdm.training.settings import config_file, EARLIER, RunConfig

_CHECKPOINTS = "checkpoints"
_DATA = "data.sha256"
_KEPT = 3
_SETTINGS = Document("the settings of a run", "Put back the file that the run wrote, or begin a new run.")
_DIGEST = Document("the digest of a run's data", "Put back the file that the run wrote, or begin a new run.")


@contextmanager
def lock_run_folder(folder: Path, config: RunConfig, resume: bool) -> Iterator[None]:
    """Lock the folder of a new or resumed run, so that no other run writes to it.

    A new folder that is still empty at the end is removed again.

    Raises:
        FileExistsError: another run uses the folder, or it is not empty and ``resume`` is False.
        FileNotFoundError: ``resume`` is True and the folder holds no run.
        ValueError: ``resume`` with other settings.
    """
    _check_usable(folder, config, resume)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            _check_usable(folder, config, resume)  # again: another run may have used it before it was locked
            for unfinished in (*folder.rglob(".part-*"), *folder.glob(".*.partial")):
                unfinished.unlink()  # left by a process that was killed while it wrote a file
            yield
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn an ``OSError``, such as that of a full disk, into one that names the latest checkpoint and what to do."""
    try:
        yield
    except OSError as error:
        kept = Checkpoints(folder).paths()
        state = f"{kept[0].name} is intact" if kept else "there is no checkpoint yet"
        raise OSError(
            f"the run in {folder} cannot be written and has stopped: {error.strerror or error}. {state}; make room "
            "there, then go on with --resume."
        ) from error


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """The sha256 of the types, shapes and values of tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def check_same_data(folder: Path, fingerprint: str, resume: bool) -> None:
    """Write the fingerprint of the data of a new run; compare it with that of a resumed one.

    Args:
        folder: of the run.
        fingerprint: digest of the data; empty: there is nothing to check.
        resume: the run is resumed.

    Raises:
        ValueError: the data of a resumed run have changed.
    """
    path = folder / _DATA
    if not fingerprint:
        return
    if resume and path.is_file():
        if _DIGEST.read_text(path).strip() != fingerprint:
            raise ValueError(
                f"{folder}: the data have changed since the run was begun, or others of that name were read. Resume "
                "with the same data, or begin a new run, with init=network.safetensors to start from an old one."
            )
        return
    atomically(path, lambda part: Path(part).write_text(fingerprint + "\n", encoding="utf-8"))


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the settings of a run into its folder."""
    atomically(config_file(folder), lambda part: Path(part).write_text(config.to_json(), encoding="utf-8"))


class Checkpoints:
    """The latest checkpoints of a run. Each is written whole or not at all.

    An instance is the ``save_handler`` of ignite's ``Checkpoint``.

    Args:
        folder: of the run.
        writes: whether this process writes checkpoints, or only reads them.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder / _CHECKPOINTS, writes

    def __call__(self, checkpoint: Mapping[str, Any], filename: str) -> None:
        """Write a checkpoint, and only then delete those that are no longer needed."""
        if not self.writes:
            return
        data = io.BytesIO()  # torch.save may crash on a full disk, or raise other errors than OSError
        torch.save(checkpoint, data)
        self.folder.mkdir(exist_ok=True)
        atomically(self.folder / filename, lambda part: _write_through(part, data.getbuffer()))
        newest = _step_of(Path(filename))
        kept = [path for path in self.paths() if _step_of(path) <= newest][:_KEPT]
        for path in self.paths():
            if path not in kept:  # too old, or damaged and of a later step than the one that the run went on from
                path.unlink()

    def paths(self) -> list[Path]:
        """Checkpoint files, the latest first."""
        finished = (path for path in self.folder.glob("*.pt") if not path.name.startswith("."))
        return sorted(finished, key=_step_of, reverse=True)

    def latest(self) -> dict[str, Any] | None:
        """The content of the latest intact checkpoint, on the CPU; None if there is none.

        Damaged files are named on standard error. A file that cannot be read at the moment does not count as damaged,
        because falling back to an earlier step would delete intact checkpoints.

        The tensors stay on the CPU because an optimizer keeps its step counts on the device where they are loaded: on a
        GPU, every step would wait for each of them.

        Raises:
            ValueError: a file cannot be read at the moment, for lack of memory or by an error of the disk.
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
            except Exception as error:  # damaged files raise errors of many kinds
                reason = (str(error) or type(error).__name__).splitlines()[0]
                fallback = f"falling back to {before.name}" if before else "starting again"
                print(f"{path.name} is damaged ({reason}); {fallback}", file=sys.stderr)
        return None


def _load(path: Path) -> dict[str, Any]:
    data = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(data) as archive:
        broken = archive.testzip()  # torch.load does not compare checksums
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


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return config_file(folder).is_file() and (folder / _CHECKPOINTS).is_dir()


def _step_of(path: Path) -> int:
    digits = path.stem.rsplit("_", 1)[-1]
    return int(digits) if digits.isdigit() else -1


def _check_usable(folder: Path, config: RunConfig, resume: bool) -> None:
    """Raise unless a run with these settings may begin, or be resumed, in the folder; see ``lock_run_folder``."""
    saved = config_file(folder)
    if not resume:
        if is_taken(folder):
            raise FileExistsError(f"{folder} exists and is not an empty folder. Choose another, or --resume.")
        return
    if not saved.is_file():
        raise FileNotFoundError(f"{folder} holds no run to resume. Leave out --resume to start one.")
    before = EARLIER | _SETTINGS.read_json(saved)
    after = _SETTINGS.parse_json(config.to_json(), "the new settings")
    changed = sorted(key for key in after if before.get(key) != after[key])
    if changed:
        listed = ", ".join(f"{key}: {before.get(key)!r} before, {after[key]!r} now" for key in changed)
        raise ValueError(f"{folder} was made with other settings ({listed}). Resume with the same ones.")
