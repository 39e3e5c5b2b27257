"""What ``monai-drdm register MOVING FIXED`` does: two image files registered, and the results written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_drdm._version import __version__
from monai_drdm.fields import fold_fraction, identity_grid, sample
from monai_drdm.io import ImageFile, load_image
from monai_drdm.registration.affine import apply_affine, identity_affine, inside
from monai_drdm.registration.alignment import check_numbers, check_stages, register
from monai_drdm.registration.data import unit_range
from monai_drdm.registration.networks import load_registration, RegistrationNetwork
from monai_drdm.registration.registry import registration_file

USUAL_STEPS = 40
"""Steps of refinement after an affine map, where no other way to register two images is asked for."""
_SAME_PLACE_MM = 1e-3
_SAME_PLANE_DEG = 10.0
_WHOLE = 1e-3
"""How far labels may be from whole numbers: NIfTI files may hold a factor for their values."""
_FLAT = 1e-6
"""Share of the largest value by which values differ that count as one."""


@dataclass(frozen=True)
class PairSettings:
    """How a pair of files is registered; see ``register``.

    Raises:
        TypeError: values of other types.
        ValueError: numbers out of range, or a device that cannot be used.
    """

    affine: bool = False
    refine: int = 0
    rounds: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_numbers(self.rounds, self.affine, self.refine)
        try:
            torch.empty(0, device=self.device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device {self.device!r} cannot be used: {str(error).splitlines()[0]}") from None


def register_files(
    moving: str | os.PathLike[str],
    fixed: str | os.PathLike[str],
    network: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None = None,
    settings: PairSettings | None = None,
) -> list[Path]:
    """Bring a moving image, and its label map, onto the grid of a fixed image, and write everything about it.

    Images may lie on different grids: what the headers say of their places is where the registration begins. The moving
    image is resampled once, from its own grid. Results have the grid and header of the fixed image and the data type of
    the moving one; voxels that see nothing of the moving image get its smallest value, labels 0.

    Args:
        moving: an image of one channel.
        fixed: an image of one channel and as many dimensions.
        network: a name or file, as for ``load_registration``; None: no network, see ``register``.
        out: a folder that is new or empty.
        labels: a label map on the grid of the moving image.
        settings: how to register; None: the network alone or, without a network, an affine map and 40 steps of
            refinement.

    Returns:
        The files written: the warped image ``warped`` and label map ``labels`` in the format of the fixed image; the
        field ``field`` as ITK and ANTs read it, in ``.nii.gz``, or ``.mha`` of a 2D image; ``record.json`` and
        ``figure.png``.

    Raises:
        FileNotFoundError: a file does not exist.
        FileExistsError: the folder is not empty.
        OSError: the folder cannot be written.
        ValueError: a file that cannot be read, or does not suit the network or the other files; settings by which
            nothing would be registered.
    """
    folder = Path(out)
    if settings is None:
        settings = PairSettings() if network is not None else PairSettings(affine=True, refine=USUAL_STEPS)
    check_stages(network is not None, settings.rounds, settings.affine, settings.refine)
    if (folder.exists() or folder.is_symlink()) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Choose another with --out.")
    loaded = None if network is None else load_registration(network, settings.device)
    pair = _Pair.read(Path(moving), Path(fixed), None if labels is None else Path(labels), loaded)
    place = _writable_place(folder)
    began = time.perf_counter()
    ddf = pair.register(loaded, settings)
    seconds = time.perf_counter() - began
    pair.warn_of_nothing(ddf, settings)
    # files are moved into place at the end, so that an error leaves none of them behind
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=place) as partial:
        numbers = pair.statistics(ddf)
        written = pair.write(ddf, numbers, Path(partial))
        record = {
            "moving": _described(moving),
            "fixed": _described(fixed),
            "labels": None if labels is None else _described(labels),
            "network": None if network is None else _described(registration_file(network)),
            "settings": asdict(settings),
            "statistics": numbers | {"seconds": round(seconds, 3)},
            "files": {path.name.partition(".")[0]: path.name for path in written},
            "version": __version__,
        }
        written.append(Path(partial) / "record.json")
        written[-1].write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        return [path.replace(folder / path.name) for path in written]


@dataclass(frozen=True)
class _Pair:
    """Both images, on their own grids."""

    moving: ImageFile
    fixed: ImageFile
    labels: ImageFile | None
    to_moving: Tensor
    """``(1, D, D + 1)``: voxels of the moving image from those of the fixed one."""

    @classmethod
    def read(cls, moving: Path, fixed: Path, labels: Path | None, network: RegistrationNetwork | None) -> _Pair:
        """Read and check the files."""
        dims = load_image(fixed).data.ndim - 1 if network is None else network.structure.spatial_dims
        images = (_read_image(moving, dims), _read_image(fixed, dims))
        marks = None if labels is None else _read_image(labels, dims)
        if marks is not None:
            _check_same_place(labels, marks, moving, images[0])
            _check_whole(labels, marks)
        for path, file in ((moving, images[0]), (labels, marks)):
            _check_suffix(fixed, images[1], path, file)
        there, here = (_place(one)[:3, [*range(dims), 3]] for one in images)
        if dims == 2:
            _check_planes(moving, fixed, there, here)
        back = np.linalg.pinv(there[:, :dims])  # in 2D it projects onto the plane of the moving image
        matrix = np.concatenate([back @ here[:, :dims], (back @ (here[:, dims] - there[:, dims]))[:, None]], axis=1)
        return cls(images[0], images[1], marks, torch.from_numpy(matrix).float()[None])

    def register(self, network: RegistrationNetwork | None, settings: PairSettings) -> Tensor:
        """``(1, D, *S)`` voxels of the fixed image."""
        device = torch.device(settings.device)
        images = tuple(unit_range(one.data.as_tensor())[None].to(device) for one in (self.moving, self.fixed))
        nothing = identity_affine(1, self.to_moving.shape[1], self.to_moving.device)
        same = images[0].shape == images[1].shape and torch.allclose(self.to_moving, nothing, atol=1e-5)
        ddf = register(
            network,
            images[0],
            images[1],
            rounds=settings.rounds,
            affine=settings.affine,
            refine=settings.refine,
            to_moving=None if same else self.to_moving.to(device),
        )
        return ddf.cpu()

    def through(self, ddf: Tensor, file: ImageFile, *, labels: bool = False) -> Tensor:
        """An image or label map ``(C, *S)`` of the moving side, resampled once."""
        data, where = file.data.as_tensor()[None], self.where(ddf)
        if labels:
            return sample(data, where, "nearest", "zeros")[0]
        exact = data.double() if data.dtype.itemsize > 2 and data.dtype != torch.float32 else data.float()
        seen = inside(where, data.shape[2:])
        return torch.where(seen, sample(exact, where.to(exact.dtype)), exact.min())[0]

    def where(self, ddf: Tensor) -> Tensor:
        """``(1, D, *S)``: voxels of the moving image that a field brings to the voxels of the fixed image."""
        return apply_affine(self.to_moving, identity_grid(ddf.shape[2:])[None] + ddf)

    def seen(self, ddf: Tensor) -> Tensor:
        """Which voxels of the fixed image show the moving image, ``S``."""
        return inside(self.where(ddf), self.moving.data.shape[1:])[0, 0]

    def write(self, ddf: Tensor, numbers: dict[str, float], folder: Path) -> list[Path]:
        """All files but the record."""
        warped, suffix = self.through(ddf, self.moving), self.fixed.suffix
        written = [folder / f"warped{suffix}"]
        self.fixed.save_like(warped, written[-1], self.moving.data.numpy().dtype)
        written.append(folder / ("field.nii.gz" if ddf.shape[1] == 3 else "field.mha"))
        self.fixed.save_field(ddf[0], written[-1], convention="itk")
        if self.labels is not None:
            written.append(folder / f"labels{suffix}")
            moved = self.through(ddf, self.labels, labels=True)
            self.fixed.save_like(moved, written[-1], self.labels.data.numpy().dtype)
        written.append(folder / "figure.png")
        self._plot(ddf, warped, numbers, written[-1])
        return written

    def statistics(self, ddf: Tensor) -> dict[str, float]:
        """Displacements, folds, and how alike the images are before and after, where both of them are seen."""
        steps = ddf.new_tensor(self.spacing).view(1, -1, *(1,) * (ddf.ndim - 2))
        lengths = (ddf * steps).norm(dim=1)
        fixed, alike = self.fixed.data.as_tensor()[0].double(), []
        for one in (torch.zeros_like(ddf), ddf):
            seen = self.seen(one)
            alike.append(_correlation(self.through(one, self.moving)[0].double()[seen], fixed[seen]))
        found = {
            "mean_displacement_mm": float(lengths.mean()),
            "max_displacement_mm": float(lengths.max()),
            "fold_fraction": float(fold_fraction(ddf)[0]),
            "correlation_before": alike[0],
            "correlation": alike[1],
        }
        return {name: round(value, 6) for name, value in found.items()}

    def warn_of_nothing(self, ddf: Tensor, settings: PairSettings) -> None:
        """Say so if there was nothing to compare."""
        shown = self.through(ddf, self.moving)[0][self.seen(ddf)]
        images = {"moving": self.moving.data.as_tensor(), "fixed": self.fixed.data.as_tensor(), "warped": shown}
        for name, values in images.items():
            if _is_flat(values):
                hint = "" if settings.affine else " If the headers place the images apart, use the affine stage."
                warnings.warn(f"the {name} image is constant, so nothing was registered.{hint}", stacklevel=3)
                return

    @property
    def spacing(self) -> list[float]:
        """Mm per voxel of the fixed image."""
        return [float(one) for one in np.linalg.norm(_place(self.fixed)[:3, : self.to_moving.shape[1]], axis=0)]

    def _plot(self, ddf: Tensor, warped: Tensor, numbers: dict[str, float], path: Path) -> None:
        from monai_drdm.viz import registration_figure  # needs matplotlib, which is an extra

        still, labels = torch.zeros_like(ddf), None
        if self.labels is not None:
            before, after = (self.through(one, self.labels, labels=True)[0] for one in (still, ddf))
            labels = (before, after)
        before = self.through(still, self.moving)[0]
        title = (
            f"correlation {numbers['correlation_before']:.2f} before, {numbers['correlation']:.2f} after; mean "
            f"displacement {numbers['mean_displacement_mm']:.1f} mm, folds {100 * numbers['fold_fraction']:.2g} %"
        )
        fixed = self.fixed.data.as_tensor()[0]
        registration_figure(fixed, before, warped[0], ddf[0], self.spacing, labels, title).savefig(path, dpi=100)


def _read_image(path: Path, dims: int) -> ImageFile:
    file = load_image(path)
    if file.data.ndim != dims + 1 or file.data.shape[0] != 1:
        raise ValueError(
            f"{path} must be a {dims}D image of one channel, as the network and the other files need, got "
            f"{tuple(file.data.shape)} with channels first."
        )
    if not bool(torch.isfinite(file.data.as_tensor().float()).all()):
        raise ValueError(
            f"{path} must hold finite numbers below 3e38, got NaN, infinity or larger ones. Mend it first."
        )
    return file


def _check_whole(path: Path | None, labels: ImageFile) -> None:
    values = labels.data.numpy()
    if values.dtype.kind == "f" and bool((np.abs(values - np.round(values)) > _WHOLE).any()):
        raise ValueError(f"{path} must hold whole numbers, one for each structure, got others. Is it a label map?")


def _writable_place(folder: Path) -> Path:
    """Where files can be written before they are moved to a folder, which is made at the end if it does not exist."""
    place = folder if folder.is_dir() else folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=place):
            return place
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error}. Choose another with --out.") from None


def _check_suffix(fixed_path: Path, fixed: ImageFile, path: Path | None, file: ImageFile | None) -> None:
    """Results have the format of the fixed image and the data type of another file."""
    if file is not None and fixed.suffix == ".png" and file.data.numpy().dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"{path} must hold unsigned integers of 8 or 16 bits, because what is made of it is written as PNG like "
            f"{fixed_path}, got {file.data.numpy().dtype}. Give the fixed image in another format, such as .mha."
        )


def _check_planes(moving: Path, fixed: Path, there: NDArray[Any], here: NDArray[Any]) -> None:
    """A field within the plane cannot say how a slice is turned out of it."""
    normals = [np.cross(one[:, 0], one[:, 1]) for one in (there, here)]
    cosine = abs(normals[0] @ normals[1]) / np.prod([np.linalg.norm(one) for one in normals])
    angle = float(np.degrees(np.arccos(min(1.0, cosine))))
    if angle > _SAME_PLANE_DEG:
        raise ValueError(
            f"{moving} and {fixed} must be slices of parallel planes, got an angle of {angle:.1f} degrees between "
            "them. Register volumes, or mend the headers."
        )


def _is_flat(values: Tensor) -> bool:
    """Whether single precision, in which images are compared, sees one value only, or nothing."""
    exact = values.float()
    return exact.numel() == 0 or float(exact.max() - exact.min()) <= _FLAT * float(exact.abs().max())


def _place(file: ImageFile) -> NDArray[Any]:
    """Where ITK places an image, because fields are written for it; voxel to RAS millimetres."""
    return file.data.affine.numpy() if file.itk_affine is None else file.itk_affine


def _check_same_place(path: Path | None, labels: ImageFile, image_path: Path, image: ImageFile) -> None:
    if labels.data.shape != image.data.shape or not np.allclose(_place(labels), _place(image), atol=_SAME_PLACE_MM):
        raise ValueError(
            f"{path} must lie on the grid of {image_path}, got shapes {tuple(labels.data.shape)} and "
            f"{tuple(image.data.shape)} and affines {_place(labels).tolist()} and {_place(image).tolist()}. Resample "
            "it first."
        )


def _correlation(first: Tensor, second: Tensor) -> float:
    """Of the values of two images, in double precision; 0 if one of them is constant, or if there are none."""
    if _is_flat(first) or _is_flat(second):
        return 0.0
    a, b = ((one - one.mean()) / one.std(correction=0) for one in (first, second))
    return float((a * b).mean())


def _described(path: str | os.PathLike[str]) -> dict[str, str]:
    """A file and its sha256."""
    return {"path": str(Path(path).absolute()), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
