"""Unlabelled scans to train on: read once, resampled to one grid and intensity range, and kept in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirst, LoadImage
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion import WorkingGrid
from monai_drdm.io.datalists import listed_images, read_entries
from monai_drdm.io.dicom import DICOM_SUFFIXES, find_series, load_with_itk
from monai_drdm.io.files import is_utf8
from monai_drdm.io.images import check_plain
from monai_drdm.samples import spacing_of
from monai_drdm.training.run_folder import is_run_folder

_ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".tif", ".tiff")
_SUFFIXES = (".nii", ".nii.gz", ".png", ".jpg", ".jpeg", ".bmp", ".npy", *_ITK_SUFFIXES)
_MIN_SIZE = 8
_WEIGHTS = 1e-30, 1e30  # of scans; float32 holds their sums
_EMPTY = 0.05  # slices whose standard deviation is below this share of their volume's are left out as empty


class Scan(NamedTuple):
    """A file to train on."""

    path: Path
    weight: float = 1.0
    """How often it is drawn, relative to the others."""


@dataclass(frozen=True)
class ScanBank:
    """Images on one grid, from which batches are drawn."""

    images: Tensor
    """``(N, 1, *S)`` uint8; 255 is the top of the intensity range."""
    source: Tensor
    """``(N,)`` number of the file or series that each image is from."""
    weight: Tensor
    """``(N,)`` how often each image is drawn, relative to the others: all images of a file share its weight."""
    skipped: tuple[str, ...]
    """The files that could not be used, each with the reason."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` random images ``(B, 1, *S)`` in [0, 1], drawn and returned on the generator's device."""
        weight = self.weight.to(generator.device)
        indices = torch.multinomial(weight, count, replacement=True, generator=generator)
        return self.images[indices.cpu()].to(generator.device, torch.float32) / 255

    def report(self) -> str:
        """The number of skipped files and a line for each of them; empty if none was skipped."""
        if not self.skipped:
            return ""
        total = len(torch.unique(self.source)) + len(self.skipped)
        text = f"{len(self.skipped)} of {total} scans skipped:\n" + "".join(f"  {line}\n" for line in self.skipped)
        return text.encode(errors="backslashreplace").decode()  # file names may not be valid UTF-8

    def split(self, share: float, seed: int) -> tuple[ScanBank, ScanBank]:
        """Split into a bank to train on and one to validate on, without a common file.

        About ``share`` of the files are for validation. A single file is in both.
        """
        files = torch.unique(self.source)
        order = files[torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))]
        count = min(max(round(share * len(files)), 1 if share > 0 else 0), len(files) - 1)
        kept = torch.isin(self.source, order[:count])
        if count == 0:
            return self, self
        return self._where(~kept), self._where(kept)

    def _where(self, mask: Tensor) -> ScanBank:
        return ScanBank(self.images[mask], self.source[mask], self.weight[mask], ())


def find_scans(data: str | os.PathLike[str], section: str = "training") -> list[Scan]:
    """Image files and DICOM folders below a folder, or the images of a MONAI datalist.

    Entries of a datalist may have a ``weight``: how often a scan is drawn, relative to the others; 1 by default.

    Raises:
        FileNotFoundError: the path does not exist, or holds no image.
        ValueError: the file is no datalist with that section, or a weight is not a positive number.
    """
    if not os.fspath(data):
        raise ValueError("data must name a folder or datalist, got an empty text.")
    path = Path(data)
    if path.is_file():
        scans = [_listed(path, entry, where) for entry, where in read_entries(path, section)]
    elif path.is_dir():
        scans = [Scan(one) for one in sorted(set(_walk(path)))]
    else:
        raise FileNotFoundError(f"no folder or datalist {path}.")
    if not scans:
        raise FileNotFoundError(f"{path} holds no image; known formats are {', '.join((*_SUFFIXES, *DICOM_SUFFIXES))}.")
    return scans


def _listed(datalist: Path, entry: Mapping[str, Any], where: str) -> Scan:
    """The scan that an entry of a datalist names: a file, or a folder of DICOM series."""
    (image,), weight = listed_images(datalist, entry, where, folders=True), entry.get("weight", 1.0)
    try:
        scan = Scan(image, float(weight))
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: weight must be a positive number, got {weight!r:.40} ({error}).") from None
    if not _WEIGHTS[0] <= scan.weight <= _WEIGHTS[1]:
        raise ValueError(
            f"{where}: weight must be a positive number, {_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}, got {scan.weight} for "
            f"{scan.path}."
        )
    return scan


def load_bank(
    scans: Sequence[Scan],
    *,
    spatial_dims: int,
    working_size: int,
    slice_axis: int | None = None,
    image_channel: int | None = None,
    mix_dimensions: bool = False,
    progress: bool = False,
) -> ScanBank:
    """Read scans and resample them to the grid and intensity range of a network.

    The longest physical side of every image, or slice, gets ``working_size`` voxels, and zeros around it fill a square
    or cube. Its 0.5th to 99.5th percentiles become [0, 1].

    Args:
        scans: image files or DICOM folders; volumes are sliced for 2D networks.
        spatial_dims: 2 or 3.
        working_size: voxels along the longest side.
        slice_axis: the axis across which volumes are sliced; None: all three.
        image_channel: the channel to take from images that have several.
        mix_dimensions: take 2D images and slices of volumes together.
        progress: show a progress bar.

    Returns:
        The bank. Files that cannot be used are skipped and named in it.

    Raises:
        ValueError: no scan can be used, images and volumes are mixed, or ``image_channel`` is needed and not given.
    """
    images: list[Tensor] = []
    origins: list[int] = []  # for every image, the position of its files in the list
    skipped: list[str] = []
    dims: dict[int, Path] = {}
    entries = [(files, scan.weight) for scan in scans for files in _files_of(scan.path)]
    series_folders = {files[0].parent for files, _ in entries if len(files) > 1}
    for number, (files, _) in enumerate(tqdm(entries, desc="read", unit="scan", disable=not progress)):
        path = files[0]
        try:
            scan = _read(files)
            if scan.ndim == 3 and path.parent in series_folders:
                raise _UnusableError("is a single slice beside a series")
            dims.setdefault(scan.ndim - 1, path)
            _check_dims(dims, spatial_dims, mix_dimensions)
            scan = _one_channel(scan, image_channel, path)
            fitted = [_fit(one, spacing, working_size) for one, spacing in _planes(scan, spatial_dims, slice_axis)]
        except _UnusableError as error:
            skipped.append(f"{path}: {error}")
            continue
        images += fitted
        origins += [number] * len(fitted)
    if not images:
        lines = "\n".join(f"  {line}" for line in skipped)
        raise ValueError(f"none of {len(entries)} scans can be used:\n{lines}")
    return ScanBank(torch.stack(images), *_sources_and_weights(entries, torch.tensor(origins)), tuple(skipped))


def _sources_and_weights(entries: Sequence[tuple[list[Path], float]], origins: Tensor) -> tuple[Tensor, Tensor]:
    """For every image the number of its file, and its weight.

    Args:
        entries: files and weight of each scan.
        origins: ``(N,)`` for every image, the position of its scan in ``entries``.
    """
    images_per_entry = torch.bincount(origins, minlength=len(entries))
    weights = torch.tensor([weight for _, weight in entries]) / images_per_entry.clamp(min=1)
    numbers: dict[tuple[str, ...], int] = {}  # files that are listed twice have one number
    sources = torch.tensor([numbers.setdefault(_identity(files), n) for n, (files, _) in enumerate(entries)])
    return sources[origins], weights[origins]


def _check_dims(seen: Mapping[int, Path], spatial_dims: int, mix_dimensions: bool) -> None:
    """Raise ``ValueError`` unless one network can take all images; ``seen`` has a file of each dimension."""
    if spatial_dims == 3 and 2 in seen:
        raise ValueError(f"a 3D network needs volumes, got the 2D image {seen[2]}. Set spatial_dims=2.")
    if len(seen) > 1 and not mix_dimensions:
        raise ValueError(
            f"2D and 3D images are mixed: {seen[2]} and {seen[3]}. Train on one kind at a time, or, if a 2D network "
            "shall see slices of the volumes beside the images, set mix_dimensions=true."
        )


class _UnusableError(Exception):
    """One file cannot be trained on. It is skipped."""


def _walk(folder: Path) -> Iterator[Path]:
    """Image files and folders of DICOM files, through links too, without hidden folders and those of training runs."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        real = os.path.realpath(here)
        if real in seen or (here != folder and (here.name.startswith(".") or is_run_folder(here))):
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in names:
            if not name.startswith("."):  # broken links too, which are reported when they are read
                if name.lower().endswith(DICOM_SUFFIXES):
                    yield here  # a folder with one or several series
                elif name.lower().endswith(_SUFFIXES):
                    yield here / name


def _files_of(path: Path) -> list[list[Path]]:
    """The files of each scan below a path: a single file, or those of one DICOM series.

    DICOM files that belong to no series are scans of their own. A folder without DICOM files stands for the folders
    of DICOM files below it; other images are listed one by one.
    """
    if not path.is_dir() or not is_utf8(path):  # a name that is not UTF-8 is reported when the file is read
        return [[path]]
    series, rest = find_series(path)
    direct = [[Path(file) for file in files] for files in (*series, *((file,) for file in rest))]
    if direct:
        return direct
    places = [one for one in sorted(set(_walk(path))) if one != path and one.is_dir()]
    return [files for one in places for files in _files_of(one)] or [
        [path]
    ]  # an empty folder is reported when it is read


def _identity(files: Sequence[Path]) -> tuple[str, ...]:
    """The files without links. ``Path.resolve`` would raise for links that form a circle."""
    return tuple(os.path.realpath(file) for file in files)


def _read(files: Sequence[Path]) -> MetaTensor:
    """``(C, *S)`` float32 with its affine."""
    name = files[0].name.lower()
    if files[0].is_dir() and not is_utf8(files[0]):
        raise _UnusableError("has a name that is not UTF-8, which ITK does not read; rename the folder")
    if files[0].is_dir():
        raise _UnusableError("is a folder without a DICOM series; list other images one by one")
    try:
        if len(files) > 1 or not name.endswith(_SUFFIXES) or name.endswith(_ITK_SUFFIXES):
            scan: Any = load_with_itk([os.fspath(file) for file in files])
        else:
            check_plain(files[0])
            with warnings.catch_warnings():
                warnings.simplefilter("error", np.exceptions.ComplexWarning)
                load = Compose([LoadImage(image_only=True, dtype=np.float32), EnsureChannelFirst()])
                scan = load(os.fspath(files[0]))
    except Exception as error:  # readers raise errors of any kind for damaged files
        reason = str(error.__cause__ or error) or type(error).__name__
        raise _UnusableError(f"cannot be read: {reason.splitlines()[0]}") from error
    if scan.ndim == 4 and scan.shape[-1] == 1:
        scan = scan[..., 0]
    if scan.ndim not in (3, 4):
        raise _UnusableError(f"has {scan.ndim - 1} spatial axes, expected 2 or 3")
    if not bool(torch.isfinite(scan).all()):
        raise _UnusableError("holds NaN or infinity")
    assert isinstance(scan, MetaTensor)
    return scan


def _one_channel(scan: MetaTensor, channel: int | None, path: Path) -> MetaTensor:
    if channel is None and scan.shape[0] > 1:
        raise ValueError(f"{path} has {scan.shape[0]} channels. Choose one with image_channel=.")
    if channel is not None and channel >= scan.shape[0]:
        raise ValueError(f"image_channel must be below {scan.shape[0]} for {path}, got {channel}.")
    one: Any = scan[channel or 0][None]
    return one  # type: ignore[no-any-return]  # MetaTensor keeps its affine when it is indexed


def _planes(scan: MetaTensor, spatial_dims: int, slice_axis: int | None) -> Iterator[tuple[Tensor, tuple[float, ...]]]:
    """The image itself, or the slices of a volume that are not empty, with their spacing."""
    try:
        spacing, values = spacing_of(scan, None, "scan"), scan.as_tensor()[0]
    except ValueError as error:
        raise _UnusableError(str(error)) from error
    if values.ndim == spatial_dims:
        if min(values.shape) < _MIN_SIZE:
            raise _UnusableError(f"is smaller than {_MIN_SIZE} voxels: {tuple(values.shape)}")
        yield values, spacing
        return
    spread = float(values.std())
    found = False
    for axis in range(3) if slice_axis is None else (slice_axis,):
        in_plane = tuple(s for d, s in enumerate(spacing) if d != axis)
        for plane in values.unbind(axis):
            if min(plane.shape) >= _MIN_SIZE and float(plane.std()) > _EMPTY * spread:
                found = True
                yield plane, in_plane
    if not found:
        raise _UnusableError(f"has no slice of {_MIN_SIZE} voxels or more that is not empty")


def _fit(image: Tensor, spacing: tuple[float, ...], working_size: int) -> Tensor:
    """One image resampled to the working grid, in the centre of a square or cube: ``(1, *S)`` uint8."""
    if float(image.max()) <= float(image.min()):
        raise _UnusableError("is constant")
    grid = WorkingGrid.of(image.shape, spacing, working_size, odd=working_size % 2 == 1)
    unit = grid.image_to_working(image[None, None], (0.0, 1.0))[0]
    room = [working_size - n for n in unit.shape[1:]]
    padded = F.pad(unit, [p for r in reversed(room) for p in (r // 2, r - r // 2)])
    return (padded * 255).round().to(torch.uint8)
