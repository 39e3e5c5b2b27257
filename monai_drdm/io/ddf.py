"""Reading and writing displacement fields: NIfTI with RAS components, ITK formats with LPS components."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import SimpleITK
import torch
from monai.data import MetaTensor
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from monai_drdm.io.files import atomically, ITK_FORMATS, suffix_of
from monai_drdm.io.itk_files import read_with_itk
from monai_drdm.io.nifti import affine_in_monai, read_nifti

Convention = Literal["nifti", "itk"]

_DISPLACEMENT_INTENT = 1006  # RAS components
_VECTOR_INTENT = 1007  # written by ITK and ANTs: LPS components
_LPS = np.diag([-1.0, -1.0, 1.0])
_PLANAR = "ddf 2D"
_KIND = "monai_drdm"  # key in the header of ITK files for what NIfTI has as the name of the intent
_PLACE = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
_POSITIONS = ("Mapping", "NREG_TRANS")  # names that SPM and NiftyReg give to fields of positions
_ITK_SUFFIXES = (".mha", ".nrrd")


def save_ddf(
    ddf: Tensor,
    affine: ArrayLike,
    path: str | os.PathLike[str],
    *,
    convention: Convention | None = None,
    one_slice: bool = False,
) -> None:
    """Write a displacement field as a vector image of millimetres.

    World vectors are ``A[:3, :3] · u_vox``. ``.nii`` and ``.nii.gz`` hold them as RAS components with intent 1006,
    which SimpleITK converts to LPS on reading, or, with ``convention="itk"``, as LPS components with intent 1007, which
    SimpleITK and ANTs use unchanged. ``.mha`` and ``.nrrd`` hold LPS components. ITK cannot read a 2D field from NIfTI;
    write ``.mha`` for it.

    Args:
        ddf: ``(D, *S)`` voxels. In NIfTI a 2D field becomes one slice of 3 components.
        affine: ``(4, 4)`` voxel to RAS millimetres.
        path: a ``.nii``, ``.nii.gz``, ``.mha`` or ``.nrrd`` file. An existing file is replaced.
        convention: ``nifti`` (RAS) or ``itk`` (LPS); None: the usual one of the format.
        one_slice: write a 2D field to ``.mha`` or ``.nrrd`` as a volume of one slice, for images that ITK reads as a
            volume of one slice. ``load_ddf`` returns it as 2D.

    Raises:
        ValueError: not a field of 2 or 3 dimensions, another suffix or convention, an affine that is not ``(4, 4)``, or
            a 2D ITK file of a slice whose place in space it cannot hold; or values that are not finite.
    """
    write_field(ddf, affine, path, convention, one_slice)


def write_field(
    ddf: Tensor,
    affine: ArrayLike,
    path: str | os.PathLike[str],
    convention: Convention | None,
    one_slice: bool,
    placed_as: Any = None,
) -> None:
    """``save_ddf``, where a NIfTI file may be placed as another one is.

    Args:
        ddf: as in ``save_ddf``.
        affine: as in ``save_ddf``; with ``placed_as`` the affine by which ITK places that file.
        path: as in ``save_ddf``.
        convention: as in ``save_ddf``.
        one_slice: as in ``save_ddf``.
        placed_as: header of a NIfTI image on the same grid, whose sform, qform and units a NIfTI file of a 3D field
            takes over: whatever program reads it, the field then lies where that program places the image.
    """
    if ddf.ndim not in (3, 4) or ddf.shape[0] != ddf.ndim - 1:
        raise ValueError(f"save_ddf: ddf must have shape (D, *S) with D = len(S) in {{2, 3}}, got {tuple(ddf.shape)}.")
    if not bool(torch.isfinite(ddf).all()):
        raise ValueError("save_ddf: ddf must be finite, got NaN or infinity.")
    matrix = _checked_affine(affine, "save_ddf")
    suffix = suffix_of(path, (".nii", ".nii.gz", *_ITK_SUFFIXES), "save_ddf")
    own: Convention = "itk" if suffix in _ITK_SUFFIXES else "nifti"
    convention = convention or own
    if convention not in ("nifti", "itk") or (own == "itk" and convention != own):
        raise ValueError(f"save_ddf: convention must be 'itk'{' or nifti' * (own == 'nifti')}, got {convention!r}.")
    vectors = np.moveaxis(ddf.detach().cpu().double().numpy(), 0, -1)  # (*S, D) voxels
    world = vectors @ matrix[:3, : ddf.shape[0]].T  # (*S, 3) RAS mm
    if convention == "itk":
        world = world @ _LPS
    if own == "itk":
        image = _itk_image(world, matrix, ddf.shape[0], one_slice)
        atomically(path, lambda part: SimpleITK.WriteImage(image, part, imageIO=ITK_FORMATS[suffix]))
        return
    values = world.reshape(*_volume(ddf), 1, 3).astype(np.float32)
    if placed_as is None or ddf.shape[0] == 2:
        file = nib.Nifti1Image(values, matrix)
        file.header.set_xyzt_units("mm")
    else:
        file = nib.Nifti1Image(values, None, _header_placed_as(placed_as))
    intent = _DISPLACEMENT_INTENT if convention == "nifti" else _VECTOR_INTENT
    file.header.set_intent(intent, name=_PLANAR if ddf.shape[0] == 2 else "")
    atomically(path, lambda part: nib.save(file, part))


def _header_placed_as(header: Any) -> nib.Nifti1Header:
    """A new NIfTI header with all of another one that says where a volume lies."""
    placed = nib.Nifti1Header()
    for name in _PLACE:
        placed[name] = header[name]
    placed["pixdim"][:4] = header["pixdim"][:4]
    placed.set_xyzt_units(header.get_xyzt_units()[0])
    return placed


def load_ddf(path: str | os.PathLike[str]) -> MetaTensor:
    """Read a displacement field that ``save_ddf``, SimpleITK or ANTs wrote.

    NIfTI with intent 1006 has RAS components, with intent 1007 LPS components; other formats have LPS components. Where
    the sform and the qform of a file disagree, its vectors are those of the space in which ITK places it.

    Args:
        path: a ``.nii``, ``.nii.gz``, ``.mha`` or ``.nrrd`` file.

    Returns:
        ``(D, *S)`` float32 voxels of its own grid, with the file's affine (voxel to RAS millimetres).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, not a displacement field, or values that are not finite.
    """
    suffix = suffix_of(path, (".nii", ".nii.gz", *_ITK_SUFFIXES), "load_ddf")
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_ddf: no file {os.fspath(path)}.")
    name = os.fspath(path)
    world, affine, dims = _read_itk(name) if suffix in _ITK_SUFFIXES else _read_nifti(name)
    place, seen = (affine, dims) if suffix in _ITK_SUFFIXES else itk_place(name)
    matrix = affine if place is None or seen < 3 else place  # ITK drops the last axis of a NIfTI field of one slice
    if not np.isfinite(world).all():
        raise ValueError(f"load_ddf: {name} holds NaN or infinity.")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :dims]) < dims:
        raise ValueError(f"load_ddf: {name} must have an affine that can be inverted, got {affine.tolist()}.")
    to_voxels = np.linalg.pinv(matrix[:3, :dims])  # in 3D the inverse; in 2D it projects vectors onto the plane
    ddf = np.moveaxis(world @ to_voxels.T, -1, 0)
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(ddf, dtype=np.float32)), affine=torch.from_numpy(affine))


def _read_nifti(path: str) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Return world vectors ``(*S, 3)`` in RAS mm, the affine and the number of dimensions."""
    file, values = read_nifti(path)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"load_ddf: {path} must hold real numbers, got {values.dtype}.")
    vectors = values.astype(np.float64)
    intent = int(file.header["intent_code"])
    if intent not in (_DISPLACEMENT_INTENT, _VECTOR_INTENT):
        raise ValueError(
            f"load_ddf: {path} must have intent {_DISPLACEMENT_INTENT} (RAS displacements) or {_VECTOR_INTENT} (LPS "
            f"vectors), got {intent}. Without it nobody can tell what its numbers mean."
        )
    name = str(file.header["intent_name"].astype(str))
    if name in _POSITIONS:
        raise ValueError(
            f"load_ddf: {path} holds the {name!r} of another program, which may be positions. If so, subtract each "
            "voxel's own position and write what is left with save_ddf."
        )
    if vectors.ndim != 5 or vectors.shape[3] != 1 or vectors.shape[4] not in (2, 3):
        raise ValueError(f"load_ddf: {path} must have shape (X, Y, Z, 1, 2 or 3), got {vectors.shape}.")
    vectors = vectors[:, :, :, 0]
    planar = vectors.shape[-1] == 2 or name == _PLANAR
    if planar and vectors.shape[2] != 1:
        raise ValueError(f"load_ddf: {path} is a 2D field, but has {vectors.shape[2]} slices.")
    if vectors.shape[-1] == 2:
        vectors = np.concatenate([vectors, np.zeros_like(vectors[..., :1])], axis=-1)
    world = vectors @ _LPS if intent == _VECTOR_INTENT else vectors
    affine = affine_in_monai(file, world.shape[:3])
    return (world[:, :, 0], affine, 2) if planar else (world, affine, 3)


def _read_itk(path: str) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Return world vectors ``(*S, 3)`` in RAS mm, the affine and the number of dimensions."""
    image, _ = read_with_itk(path)
    dims = image.GetDimension()
    if dims not in (2, 3) or image.GetNumberOfComponentsPerPixel() != dims:
        raise ValueError(
            f"load_ddf: {path} must be a 2D or 3D image of as many components, got {dims}D with "
            f"{image.GetNumberOfComponentsPerPixel()} components."
        )
    vectors = SimpleITK.GetArrayFromImage(image).astype(np.float64)  # (…, y, x, D)
    world = np.zeros((*vectors.shape[:-1][::-1], 3))
    world[..., :dims] = vectors.transpose(*range(dims - 1, -1, -1), dims)
    if dims == 3 and world.shape[2] == 1 and image.HasMetaDataKey(_KIND) and image.GetMetaData(_KIND) == _PLANAR:
        world, dims = world[:, :, 0], 2
    return world @ _LPS, itk_affine(image), dims


def itk_affine(image: SimpleITK.Image | SimpleITK.ImageFileReader) -> NDArray[Any]:
    """Voxel to RAS millimetres ``(4, 4)`` of an ITK image; a 2D image lies in the plane of the first two axes.

    Axes after the third are left out.
    """
    dims, shown = image.GetDimension(), min(image.GetDimension(), 3)
    affine = np.eye(4)
    directed = np.array(image.GetDirection()).reshape(dims, dims) * np.array(image.GetSpacing())
    affine[:shown, :shown] = directed[:shown, :shown]
    affine[:shown, 3] = image.GetOrigin()[:shown]
    affine[:3] = _LPS @ affine[:3]
    if dims == 2:
        affine[2, 2] = 1.0
    return affine


def itk_place(path: str) -> tuple[NDArray[Any] | None, int]:
    """The affine of a NIfTI file as ITK reads it, None if ITK refuses it, and its number of spatial axes in ITK."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(path)
    reader.SetImageIO("NiftiImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None, 3
    return itk_affine(reader), min(reader.GetDimension(), 3)


def _itk_image(world: NDArray[Any], affine: NDArray[Any], dims: int, one_slice: bool) -> SimpleITK.Image:
    """An ITK vector image of LPS vectors ``(*S, 3)`` on the grid of a RAS affine."""
    if dims == 2 and one_slice:
        image = _itk_image(world[:, :, None], affine, 3, False)
        image.SetMetaData(_KIND, _PLANAR)
        return image
    lps = _LPS @ affine[:3]
    if dims == 2 and not (np.array_equal(lps[2], [0.0, 0.0, 1.0, 0.0]) and not lps[:2, 2].any()):
        raise ValueError(
            "save_ddf: a 2D ITK file cannot say where its slice lies in space; the affine must leave the third axis as "
            f"it is, got {affine.tolist()}. Write NIfTI, or a volume with one_slice=True."
        )
    spacing = np.linalg.norm(lps[:dims, :dims], axis=0)
    arranged = world[..., :dims].transpose(*range(dims - 1, -1, -1), dims)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(arranged, dtype=np.float32), isVector=True)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:dims, :dims] / spacing).flatten().tolist())
    image.SetOrigin(lps[:dims, 3].tolist())
    return image


def _volume(ddf: Tensor) -> tuple[int, ...]:
    return (*ddf.shape[1:], 1) if ddf.shape[0] == 2 else tuple(ddf.shape[1:])


def _checked_affine(affine: ArrayLike, function: str) -> NDArray[Any]:
    matrix = np.asarray(affine, dtype=float)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or np.linalg.matrix_rank(matrix[:3, :3]) < 3:
        raise ValueError(f"{function}: affine must be an invertible (4, 4) matrix, got {matrix.tolist()}.")
    return matrix
