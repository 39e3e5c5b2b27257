import gzip
import math
import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from monai_drdm.fields import identity_grid, warp
from monai_drdm.io import load_ddf, save_ddf, save_image

SHAPE = (14, 11, 9)


def affine(matrix, origin):
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = matrix, origin
    return out


def rotation(*degrees):
    return Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()


AFFINES = {
    "identity": np.eye(4),
    "RAS": affine(np.diag([1.5, 0.8, 2.5]), [-10, 5, 30]),
    "LAS": affine(np.diag([-2.0, 2.0, 2.0]), [4, 5, 6]),
    "LPS": affine(np.diag([-1.5, -0.8, 2.5]), [12, -7, 3]),
    "PIR": affine([[0, 0, 2.5], [-1.5, 0, 0], [0, -0.8, 0]], [1, 2, 3]),
    "oblique": affine(rotation(20, -15, 35) @ np.diag([1.5, 0.8, 2.5]), [-8, 40, 11]),
    "oblique LPS": affine(np.diag([-1, -1, 1]) @ rotation(-10, 25, 5) @ np.diag([0.7, 1.1, 3.0]), [100, -3, 0]),
}
FORMATS = {
    "nii": (".nii", None),
    "nii.gz": (".nii.gz", None),
    "nii itk": (".nii", "itk"),
    "nii.gz itk": (".nii.gz", "itk"),
    "mha": (".mha", None),
    "nrrd": (".nrrd", None),
}
each_affine = pytest.mark.parametrize("matrix", AFFINES.values(), ids=AFFINES.keys())
each_format = pytest.mark.parametrize(("suffix", "convention"), FORMATS.values(), ids=FORMATS.keys())
each_suffix = pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])

# 2D slices that a 2D ITK file can hold: they lie at z = 0 with a normal along z
FLAT = {
    "identity": np.eye(4),
    "RAS": affine(np.diag([1.5, 2.0, 1.0]), [1, 2, 0]),
    "LPS": affine(np.diag([-1.5, -2.0, 1.0]), [7, -2, 0]),
    "turned": affine(rotation(0, 0, 30) @ np.diag([0.7, 1.2, 1.0]), [-3, 8, 0]),
}


def smooth_field(shape):
    """A field of about 1 voxel that differs from axis to axis."""
    x = identity_grid(shape)
    waves = [torch.sin(0.4 * x[d] + d) * torch.cos(0.3 * x[d - 1]) for d in range(len(shape))]
    return torch.stack([(1.2 - 0.3 * d) * wave + 0.2 * d for d, wave in enumerate(waves)])


def texture(shape):
    k = torch.arange(float(math.prod(shape)))
    return (100 * torch.sin(0.37 * k) + k / 10).reshape(shape)


def to_lps(matrix):
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


def itk_field(ddf, matrix):
    """The SimpleITK image of a field, built component by component from its definition."""
    dims, lps = ddf.shape[0], to_lps(matrix)
    spacing = np.linalg.norm(lps[:dims, :dims], axis=0)
    components = []
    for i in range(dims):
        values = sum(lps[i, j] * ddf[j].double().numpy() for j in range(dims))
        components.append(SimpleITK.GetImageFromArray(np.ascontiguousarray(values.T)))
    image = SimpleITK.Compose(components)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:dims, :dims] / spacing).ravel().tolist())
    image.SetOrigin(lps[:dims, 3].tolist())
    return image


def read_transform(path):
    """SimpleITK turns intent 1006 into its own LPS on reading."""
    return SimpleITK.DisplacementFieldTransform(SimpleITK.ReadImage(str(path), SimpleITK.sitkVectorFloat64))


def check(read, ddf, matrix, atol=1e-4):
    assert isinstance(read, MetaTensor)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read.as_tensor(), ddf, rtol=0, atol=atol)
    np.testing.assert_allclose(read.affine.numpy(), matrix, atol=1e-4)


@each_affine
@each_format
def test_round_trip(tmp_path, matrix, suffix, convention):
    path, ddf = tmp_path / f"field{suffix}", smooth_field(SHAPE)
    before = ddf.clone()
    save_ddf(ddf, matrix, path, convention=convention)
    check(load_ddf(path), ddf, matrix)
    assert torch.equal(ddf, before)
    check(load_ddf(str(path)), ddf, matrix)


@each_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types(tmp_path, suffix, convention, dtype):
    ddf = smooth_field((6, 5, 4)).to(dtype)
    save_ddf(ddf, AFFINES["LPS"], tmp_path / f"f{suffix}", convention=convention)
    check(load_ddf(tmp_path / f"f{suffix}"), ddf.float(), AFFINES["LPS"])


def test_metatensor_with_gradient(tmp_path):
    ddf = smooth_field((6, 5, 4))
    save_ddf(MetaTensor(ddf.clone().requires_grad_()), AFFINES["RAS"], tmp_path / "f.nii")
    check(load_ddf(tmp_path / "f.nii"), ddf, AFFINES["RAS"])


@each_affine
@pytest.mark.parametrize(
    ("convention", "intent", "sign"),
    [(None, 1006, (1, 1, 1)), ("nifti", 1006, (1, 1, 1)), ("itk", 1007, (-1, -1, 1))],
)
def test_nifti_as_nibabel_reads_it(tmp_path, matrix, convention, intent, sign):
    path, ddf = tmp_path / "field.nii.gz", smooth_field(SHAPE)
    save_ddf(ddf, matrix, path, convention=convention)
    read = nib.load(path)
    assert read.shape == (*SHAPE, 1, 3)
    assert int(read.header["intent_code"]) == intent
    assert read.get_data_dtype() == np.float32
    assert read.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(read.affine, matrix, atol=1e-5)
    world = np.einsum("ij,jxyz->xyzi", matrix[:3, :3], ddf.numpy())
    np.testing.assert_allclose(read.get_fdata()[:, :, :, 0], world * sign, atol=1e-5)


@each_affine
@each_suffix
def test_itk_grid_and_vectors(tmp_path, matrix, suffix):
    """What SimpleITK reads equals the field built in SimpleITK, whatever the file."""
    ddf = smooth_field(SHAPE)
    save_ddf(ddf, matrix, tmp_path / f"f{suffix}")
    read, expected = SimpleITK.ReadImage(str(tmp_path / f"f{suffix}")), itk_field(ddf, matrix)
    for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(read, name)(), getattr(expected, name)(), atol=1e-4)
    vectors = (SimpleITK.GetArrayFromImage(image) for image in (read, expected))
    np.testing.assert_allclose(*vectors, atol=1e-4)


@each_affine
@each_format
def test_simpleitk_moves_points_alike(tmp_path, matrix, suffix, convention):
    ddf = smooth_field(SHAPE)
    save_ddf(ddf, matrix, tmp_path / f"field{suffix}", convention=convention)
    transform = read_transform(tmp_path / f"field{suffix}")
    for voxel in ((0, 0, 0), (7, 5, 4), (12, 1, 6), (3, 9, 8)):
        moved = np.array(voxel) + ddf[(slice(None), *voxel)].numpy()
        start, end = (to_lps(matrix) @ np.append(point, 1.0) for point in (voxel, moved))
        np.testing.assert_allclose(transform.TransformPoint(start[:3]), end[:3], atol=1e-3)


@each_affine
@each_format
def test_simpleitk_warps_alike(tmp_path, matrix, suffix, convention):
    image, ddf = texture(SHAPE), smooth_field(SHAPE)
    save_image(image, matrix, tmp_path / "image.nii")
    save_ddf(ddf, matrix, tmp_path / f"field{suffix}", convention=convention)
    moving = SimpleITK.ReadImage(str(tmp_path / "image.nii"), SimpleITK.sitkFloat64)
    transform = read_transform(tmp_path / f"field{suffix}")
    warped = SimpleITK.Resample(moving, moving, transform, SimpleITK.sitkLinear, 0.0)
    theirs = torch.from_numpy(SimpleITK.GetArrayFromImage(warped).T.copy()).float()
    ours = warp(image[None, None], ddf[None])[0, 0]
    position = identity_grid(SHAPE) + ddf
    last = torch.tensor(SHAPE).view(3, 1, 1, 1) - 1
    inside = ((position > 0.01) & (position < last - 0.01)).all(dim=0)  # outside, paddings differ
    assert float(inside.float().mean()) > 0.5
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=0.02)


@each_affine
@each_suffix
@pytest.mark.parametrize("pixel", [SimpleITK.sitkVectorFloat32, SimpleITK.sitkVectorFloat64])
def test_written_by_simpleitk(tmp_path, matrix, suffix, pixel):
    path, ddf = tmp_path / f"theirs{suffix}", smooth_field(SHAPE)
    SimpleITK.WriteImage(SimpleITK.Cast(itk_field(ddf, matrix), pixel), str(path))
    check(load_ddf(path), ddf, matrix)


def test_compressed_by_simpleitk(tmp_path):
    ddf, matrix = smooth_field(SHAPE), AFFINES["oblique"]
    for suffix in (".mha", ".nrrd"):
        SimpleITK.WriteImage(itk_field(ddf, matrix), str(tmp_path / f"f{suffix}"), useCompression=True)
        check(load_ddf(tmp_path / f"f{suffix}"), ddf, matrix)


@pytest.mark.parametrize("matrix", FLAT.values(), ids=FLAT.keys())
@each_suffix
def test_2d_written_by_simpleitk(tmp_path, matrix, suffix):
    path, ddf = tmp_path / f"theirs{suffix}", smooth_field((9, 12))
    SimpleITK.WriteImage(itk_field(ddf, matrix), str(path))
    if suffix.startswith(".nii"):
        assert nib.load(path).shape == (9, 12, 1, 1, 2)  # two components, as ANTs writes them
    check(load_ddf(path), ddf, matrix)


@pytest.mark.parametrize("matrix", FLAT.values(), ids=FLAT.keys())
@each_format
def test_2d_round_trip(tmp_path, matrix, suffix, convention):
    path, ddf = tmp_path / f"field{suffix}", smooth_field((9, 12))
    save_ddf(ddf, matrix, path, convention=convention)
    check(load_ddf(path), ddf, matrix)


@each_affine
@pytest.mark.parametrize("convention", ["nifti", "itk"])
def test_2d_nifti_of_any_slice(tmp_path, matrix, convention):
    ddf = smooth_field((9, 12))
    save_ddf(ddf, matrix, tmp_path / "f.nii", convention=convention)
    read = nib.load(tmp_path / "f.nii")
    assert read.shape == (9, 12, 1, 1, 3)
    sign = (1, 1, 1) if convention == "nifti" else (-1, -1, 1)
    world = np.einsum("ij,jxy->xyi", matrix[:3, :2], ddf.numpy())
    np.testing.assert_allclose(read.get_fdata()[:, :, 0, 0], world * sign, atol=1e-5)
    check(load_ddf(tmp_path / "f.nii"), ddf, matrix)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_2d_itk_is_2d_and_moves_points_alike(tmp_path, suffix):
    ddf, matrix = smooth_field((9, 12)), FLAT["turned"]
    save_ddf(ddf, matrix, tmp_path / f"f{suffix}")
    image = SimpleITK.ReadImage(str(tmp_path / f"f{suffix}"), SimpleITK.sitkVectorFloat64)
    assert (image.GetDimension(), image.GetNumberOfComponentsPerPixel(), image.GetSize()) == (2, 2, (9, 12))
    transform = SimpleITK.DisplacementFieldTransform(image)
    lps = to_lps(matrix)[:2]
    for voxel in ((0, 0), (4, 7), (8, 11)):
        moved = np.array(voxel) + ddf[(slice(None), *voxel)].numpy()
        start, end = (lps @ np.array([*point, 0.0, 1.0]) for point in (voxel, moved))
        np.testing.assert_allclose(transform.TransformPoint(start), end, atol=1e-3)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_2d_itk_slice_away_from_the_origin(tmp_path, suffix):
    """The position and thickness of a slice have no place in 2D; they must not get lost silently."""
    matrix = affine(np.diag([-1.5, 2.0, 4.0]), [1, 2, 3])
    with pytest.raises(ValueError, match="a 2D ITK file cannot say where its slice lies in space"):
        save_ddf(smooth_field((8, 6)), matrix, tmp_path / f"f{suffix}")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@each_affine
def test_2d_field_as_one_slice(tmp_path, matrix, suffix):
    """A volume for ITK, in the plane; 2D again for us."""
    ddf = smooth_field((8, 6))
    save_ddf(ddf, matrix, tmp_path / f"f{suffix}", one_slice=True)
    check(load_ddf(tmp_path / f"f{suffix}"), ddf, matrix)
    image = SimpleITK.ReadImage(str(tmp_path / f"f{suffix}"))
    assert (image.GetSize(), image.GetNumberOfComponentsPerPixel()) == ((8, 6, 1), 3)
    transform = SimpleITK.DisplacementFieldTransform(SimpleITK.Cast(image, SimpleITK.sitkVectorFloat64))
    lps, voxel = np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix, np.array([3.0, 2.0])
    start, end = ((lps @ np.array([*point, 0.0, 1.0]))[:3] for point in (voxel, voxel + ddf[:, 3, 2].numpy()))
    np.testing.assert_allclose(transform.TransformPoint(start), end, atol=1e-3)


@pytest.mark.parametrize("name", ["Mapping", "NREG_TRANS"])
def test_positions_of_other_programs_are_refused(tmp_path, name):
    """SPM's and NiftyReg's files say where voxels go, not how far."""
    positions = np.moveaxis(identity_grid((6, 5, 4)).numpy(), 0, -1)[:, :, :, None]
    file = nib.Nifti1Image(positions, np.eye(4))
    file.header.set_intent("vector", name=name)
    nib.save(file, tmp_path / "y.nii")
    with pytest.raises(ValueError, match=f"holds the '{name}' of another program"):
        load_ddf(tmp_path / "y.nii")


def test_fields_of_microscopes(tmp_path):
    """Voxels of 65 × 65 × 200 nm, in millimetres."""
    ddf, matrix = smooth_field((6, 5, 4)), np.diag([6.5e-5, 6.5e-5, 2e-4, 1.0])
    save_ddf(ddf, matrix, tmp_path / "f.nii.gz")
    torch.testing.assert_close(load_ddf(tmp_path / "f.nii.gz").as_tensor(), ddf, rtol=0, atol=1e-4)


@each_format
def test_one_slice_stays_3d(tmp_path, suffix, convention):
    for shape in ((9, 12, 1), (9, 1, 12), (1, 9, 12)):
        ddf = smooth_field(shape)
        save_ddf(ddf, AFFINES["oblique"], tmp_path / f"f{suffix}", convention=convention)
        check(load_ddf(tmp_path / f"f{suffix}"), ddf, AFFINES["oblique"])


@each_suffix
def test_upper_case_suffix(tmp_path, suffix):
    path, ddf = tmp_path / f"FIELD{suffix.upper()}", smooth_field((6, 5, 4))
    save_ddf(ddf, np.eye(4), path)
    check(load_ddf(path), ddf, np.eye(4))


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (3, 4, 4), (1, 3, 4, 4, 4), (2, 4), (1, 4)])
@each_suffix
def test_save_a_wrong_shape(tmp_path, shape, suffix):
    with pytest.raises(ValueError, match=r"ddf must have shape \(D, \*S\)"):
        save_ddf(torch.zeros(shape), np.eye(4), tmp_path / f"field{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "matrix",
    [np.eye(3), np.zeros((4, 4)), np.diag([1.0, 1, 0, 1]), np.full((4, 4), np.nan), np.diag([1.0, np.inf, 1, 1])],
)
@each_suffix
def test_save_a_wrong_affine(tmp_path, matrix, suffix):
    with pytest.raises(ValueError, match=r"affine must be an invertible \(4, 4\)"):
        save_ddf(smooth_field((4, 5, 6)), matrix, tmp_path / f"field{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["field", "field.img", "field.mhd", "field.gz", "field.nii.bz2", "field.png", ".mha"])
def test_wrong_suffix(tmp_path, name):
    with pytest.raises(ValueError, match="save_ddf: the file must end in one of"):
        save_ddf(smooth_field((4, 5)), np.eye(4), tmp_path / name)
    with pytest.raises(ValueError, match="load_ddf: the file must end in one of"):
        load_ddf(tmp_path / name)


@pytest.mark.parametrize(
    ("suffix", "convention"), [(".nii", "ants"), (".nii", "LPS"), (".mha", "nifti"), (".nrrd", "nifti"), (".mha", "x")]
)
def test_wrong_convention(tmp_path, suffix, convention):
    with pytest.raises(ValueError, match="convention must be 'itk'"):
        save_ddf(smooth_field((4, 5)), np.eye(4), tmp_path / f"f{suffix}", convention=convention)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("name", ["PIR", "oblique"])
def test_oblique_slice_has_no_2d_itk_file(tmp_path, suffix, name):
    with pytest.raises(ValueError, match="a 2D ITK file cannot say where its slice lies"):
        save_ddf(smooth_field((4, 5)), AFFINES[name], tmp_path / f"f{suffix}")
    assert os.listdir(tmp_path) == []


@each_suffix
def test_missing_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match="load_ddf: no file"):
        load_ddf(tmp_path / f"none{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(FileNotFoundError, match="load_ddf: no file"):
        load_ddf(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@each_suffix
def test_load_not_finite(tmp_path, suffix, value):
    image = itk_field(smooth_field((6, 5, 4)), np.eye(4))
    image[2, 3, 1] = (0.0, value, 0.0)
    SimpleITK.WriteImage(image, str(tmp_path / f"f{suffix}"))
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        load_ddf(tmp_path / f"f{suffix}")


@pytest.mark.parametrize("kept", [0, 20, 300, 0.5, 0.99])
@each_suffix
def test_truncated_file(tmp_path, suffix, kept):
    path = tmp_path / f"f{suffix}"
    save_ddf(torch.randn(3, 20, 20, 20, generator=torch.Generator().manual_seed(0)), np.eye(4), path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(ValueError, match="cannot be read"):
        load_ddf(path)


@each_suffix
def test_file_of_something_else(tmp_path, suffix):
    (tmp_path / f"f{suffix}").write_bytes(b"no image " * 100)
    with pytest.raises(ValueError, match="cannot be read"):
        load_ddf(tmp_path / f"f{suffix}")


def test_damaged_gzip(tmp_path):
    path = tmp_path / "f.nii.gz"
    save_ddf(smooth_field((20, 20, 20)), np.eye(4), path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes([255]) * 200
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"f\.nii\.gz"):
        load_ddf(path)


def test_damaged_header(tmp_path):
    path = tmp_path / "f.nii"
    save_ddf(smooth_field((6, 5, 4)), np.eye(4), path)
    content = bytearray(path.read_bytes())
    content[70:72] = (999).to_bytes(2, "little")  # no such data type
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        load_ddf(path)


def nifti(values, path, intent=1006, matrix=None):
    image = nib.Nifti1Image(values.astype(np.float32), np.eye(4))
    if matrix is not None:
        image.set_sform(matrix, 1)
        image.set_qform(None, 0)
    image.header.set_intent(intent)
    nib.save(image, path)


@pytest.mark.parametrize("intent", [0, 1005, 1001, 1008])
def test_other_intents(tmp_path, intent):
    nifti(np.zeros((4, 5, 6, 1, 3)), tmp_path / "f.nii", intent)
    with pytest.raises(ValueError, match=f"must have intent 1006 .* or 1007 .*, got {intent}"):
        load_ddf(tmp_path / "f.nii")


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3), (4, 5, 6, 2, 3), (4, 5, 6, 1, 4), (4, 5, 6, 1, 1)])
def test_other_nifti_shapes(tmp_path, shape):
    nifti(np.zeros(shape), tmp_path / "f.nii")
    with pytest.raises(ValueError, match=r"must have shape \(X, Y, Z, 1, 2 or 3\)"):
        load_ddf(tmp_path / "f.nii")


def test_two_components_of_a_volume(tmp_path):
    nifti(np.zeros((4, 5, 6, 1, 2)), tmp_path / "f.nii", 1007)
    with pytest.raises(ValueError, match="is a 2D field, but has 6 slices"):
        load_ddf(tmp_path / "f.nii")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize(("size", "components"), [((4, 5, 6), 1), ((4, 5, 6), 2), ((4, 5), 3), ((4, 5, 6, 2), 3)])
def test_other_itk_shapes(tmp_path, suffix, size, components):
    image = SimpleITK.Image(size, SimpleITK.sitkVectorFloat32 if components > 1 else SimpleITK.sitkFloat32, components)
    SimpleITK.WriteImage(image, str(tmp_path / f"f{suffix}"))
    with pytest.raises(ValueError, match="must be a 2D or 3D image of as many components"):
        load_ddf(tmp_path / f"f{suffix}")


def test_singular_affine_in_a_file(tmp_path):
    nifti(np.ones((4, 5, 6, 1, 3)), tmp_path / "f.nii", matrix=np.diag([1.0, 1, 0, 1]))
    with pytest.raises(ValueError, match="affine"):
        load_ddf(tmp_path / "f.nii")


def test_scaled_integers_and_big_endian(tmp_path):
    """Fields of other programs may be stored as scaled integers, or on another machine."""
    ddf, matrix = smooth_field(SHAPE), AFFINES["RAS"]
    world = np.einsum("ij,jxyz->xyzi", matrix[:3, :3], ddf.numpy())[:, :, :, None]
    image = nib.Nifti1Image(world, matrix)
    image.set_data_dtype(np.int16)
    image.header.set_intent(1006)
    nib.save(image, tmp_path / "scaled.nii")
    check(load_ddf(tmp_path / "scaled.nii"), ddf, matrix, atol=1e-3)
    big = nib.Nifti1Image(world.astype(">f4"), matrix, nib.Nifti1Header(endianness=">"))
    big.header.set_intent(1006)
    nib.save(big, tmp_path / "big.nii")
    check(load_ddf(tmp_path / "big.nii"), ddf, matrix)


@each_suffix
def test_overwriting(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    save_ddf(smooth_field(SHAPE), AFFINES["RAS"], path)
    save_ddf(smooth_field((6, 5, 4)), AFFINES["LPS"], path)
    check(load_ddf(path), smooth_field((6, 5, 4)), AFFINES["LPS"])
    assert os.listdir(tmp_path) == [path.name]


@each_suffix
def test_target_is_a_folder(tmp_path, suffix):
    (tmp_path / f"f{suffix}").mkdir()
    with pytest.raises(OSError, match="cannot be written"):
        save_ddf(smooth_field((4, 5)), np.eye(4), tmp_path / f"f{suffix}")
    assert os.listdir(tmp_path) == [f"f{suffix}"]
    with pytest.raises(OSError, match="cannot be written"):
        save_ddf(smooth_field((4, 5)), np.eye(4), tmp_path / "none" / f"f{suffix}")


def test_file_that_cannot_be_finished(tmp_path, fork):
    paths = [tmp_path / f"f{suffix}" for suffix in (".nii", ".nii.gz", ".mha", ".nrrd")]
    for path in paths:
        save_ddf(smooth_field((5, 4, 3)), AFFINES["RAS"], path)
    new = [path.with_name(f"new-{path.name}") for path in paths]

    def allow_20000_bytes():
        resource = pytest.importorskip("resource", reason="there are no such limits here")
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))

    def save_all():
        for path in paths + new:
            with pytest.raises(OSError, match="cannot be written"):
                save_ddf(torch.randn(3, 20, 20, 20), np.eye(4), path)

    process = fork(save_all, before=allow_20000_bytes)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)
    for path in paths:
        check(load_ddf(path), smooth_field((5, 4, 3)), AFFINES["RAS"])


def test_gzip_is_gzip(tmp_path):
    save_ddf(smooth_field((5, 4, 3)), np.eye(4), tmp_path / "f.nii")
    save_ddf(smooth_field((5, 4, 3)), np.eye(4), tmp_path / "f.nii.gz")
    assert gzip.decompress((tmp_path / "f.nii.gz").read_bytes()) == (tmp_path / "f.nii").read_bytes()
