import math

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

from monai_drdm.fields import identity_grid, warp
from monai_drdm.io import save_ddf, save_image

SHAPE = (14, 11, 9)


def rotation(*degrees):
    out = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        out = out @ turn
    return out


def affine(matrix, origin):
    return np.block(
        [[np.asarray(matrix, dtype=float), np.reshape(origin, (3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]]
    )


AFFINES = {
    "identity": np.eye(4),
    "RAS": affine(np.diag([1.5, 0.8, 2.5]), [-10, 5, 30]),
    "LAS": affine(np.diag([-2.0, 2.0, 2.0]), [4, 5, 6]),
    "LPS": affine(np.diag([-1.5, -0.8, 2.5]), [12, -7, 3]),
    "PIR": affine([[0, 0, 2.5], [-1.5, 0, 0], [0, -0.8, 0]], [1, 2, 3]),
    "oblique": affine(rotation(20, -15, 35) @ np.diag([1.5, 0.8, 2.5]), [-8, 40, 11]),
    "oblique LPS": affine(np.diag([-1, -1, 1]) @ rotation(-10, 25, 5) @ np.diag([0.7, 1.1, 3.0]), [100, -3, 0]),
}
each_affine = pytest.mark.parametrize("matrix", AFFINES.values(), ids=AFFINES.keys())


def smooth_field(shape):
    """A field of about 1 voxel that differs from axis to axis."""
    x = identity_grid(shape)
    waves = [torch.sin(0.4 * x[d] + d) * torch.cos(0.3 * x[d - 1]) for d in range(len(shape))]
    return torch.stack([(1.2 - 0.3 * d) * wave + 0.2 * d for d, wave in enumerate(waves)])


def texture(shape):
    k = torch.arange(float(math.prod(shape)))
    return (100 * torch.sin(0.37 * k) + k / 10).reshape(shape)


@each_affine
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_image_read_back(tmp_path, matrix, suffix):
    path, image = tmp_path / f"image{suffix}", texture(SHAPE)
    save_image(image, matrix, path)
    read = nib.load(path)
    assert read.shape == SHAPE
    assert np.array_equal(read.get_fdata(dtype=np.float32), image.numpy())
    np.testing.assert_allclose(read.affine, matrix, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "written"),
    [
        (torch.bool, np.uint8),
        (torch.uint8, np.uint8),
        (torch.int16, np.int16),
        (torch.int32, np.int32),
        (torch.int64, np.int32),
        (torch.float32, np.float32),
        (torch.float64, np.float64),
    ],
)
def test_image_dtypes(tmp_path, dtype, written):
    image = torch.arange(24).reshape(2, 3, 4).to(dtype)
    save_image(image, np.eye(4), tmp_path / "image.nii")
    read = nib.load(tmp_path / "image.nii")
    assert read.get_data_dtype() == written
    assert np.array_equal(np.asarray(read.dataobj), image.numpy())


def test_large_labels_are_exact(tmp_path):
    label = torch.tensor([[0, 2**24 + 1], [-(2**31), 2**31 - 1]])
    save_image(label, np.eye(4), tmp_path / "label.nii.gz")
    assert np.array_equal(np.asarray(nib.load(tmp_path / "label.nii.gz").dataobj), label.numpy())


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40])
def test_labels_beyond_32_bits(tmp_path, value):
    with pytest.raises(ValueError, match="integers beyond 32 bits"):
        save_image(torch.tensor([[0, value]]), np.eye(4), tmp_path / "label.nii")
    assert not (tmp_path / "label.nii").exists()


@pytest.mark.parametrize("shape", [(4,), (1, 4, 4, 4)])
def test_image_of_the_wrong_shape(tmp_path, shape):
    with pytest.raises(ValueError, match="image must have 2 or 3 axes"):
        save_image(torch.zeros(shape), np.eye(4), tmp_path / "image.nii")


@each_affine
def test_field_read_back(tmp_path, matrix):
    path, ddf = tmp_path / "field.nii.gz", smooth_field(SHAPE)
    save_ddf(ddf, matrix, path)
    read = nib.load(path)
    assert read.shape == (*SHAPE, 1, 3)
    assert int(read.header["intent_code"]) == 1006
    assert read.get_data_dtype() == np.float32
    np.testing.assert_allclose(read.affine, matrix, atol=1e-5)
    world = np.einsum("ij,jxyz->xyzi", matrix[:3, :3], ddf.numpy())
    np.testing.assert_allclose(read.get_fdata()[:, :, :, 0], world, atol=1e-5)


def test_2d_field_read_back(tmp_path):
    ddf, matrix = smooth_field((8, 6)), affine(np.diag([-1.5, 2.0, 4.0]), [1, 2, 3])
    save_ddf(ddf, matrix, tmp_path / "field.nii")
    read = nib.load(tmp_path / "field.nii")
    assert read.shape == (8, 6, 1, 1, 3)
    vectors = read.get_fdata()[:, :, 0, 0]
    np.testing.assert_allclose(vectors[..., 0], -1.5 * ddf[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(vectors[..., 1], 2.0 * ddf[1].numpy(), atol=1e-6)
    assert not vectors[..., 2].any()


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (3, 4, 4), (1, 3, 4, 4, 4), (2, 4), (1, 4)])
def test_field_of_the_wrong_shape(tmp_path, shape):
    with pytest.raises(ValueError, match=r"ddf must have shape \(D, \*S\)"):
        save_ddf(torch.zeros(shape), np.eye(4), tmp_path / "field.nii")


def read_transform(path):
    """SimpleITK turns intent 1006 into its own LPS on reading."""
    field = SimpleITK.ReadImage(str(path), SimpleITK.sitkVectorFloat64)
    return SimpleITK.DisplacementFieldTransform(field)


@each_affine
def test_simpleitk_moves_points_alike(tmp_path, matrix):
    ddf = smooth_field(SHAPE)
    save_ddf(ddf, matrix, tmp_path / "field.nii")
    transform = read_transform(tmp_path / "field.nii")
    to_lps = np.diag([-1, -1, 1, 1]) @ matrix
    for voxel in ((0, 0, 0), (7, 5, 4), (12, 1, 6), (3, 9, 8)):
        moved = np.array(voxel) + ddf[(slice(None), *voxel)].numpy()
        start, end = (to_lps @ np.append(point, 1.0) for point in (voxel, moved))
        np.testing.assert_allclose(transform.TransformPoint(start[:3]), end[:3], atol=1e-3)


@each_affine
def test_simpleitk_warps_alike(tmp_path, matrix):
    image, ddf = texture(SHAPE), smooth_field(SHAPE)
    save_image(image, matrix, tmp_path / "image.nii")
    save_ddf(ddf, matrix, tmp_path / "field.nii")
    moving = SimpleITK.ReadImage(str(tmp_path / "image.nii"), SimpleITK.sitkFloat64)
    warped = SimpleITK.Resample(moving, moving, read_transform(tmp_path / "field.nii"), SimpleITK.sitkLinear, 0.0)
    theirs = torch.from_numpy(SimpleITK.GetArrayFromImage(warped).T.copy()).float()
    ours = warp(image[None, None], ddf[None])[0, 0]
    position = identity_grid(SHAPE) + ddf
    last = torch.tensor(SHAPE).view(3, 1, 1, 1) - 1
    inside = ((position > 0.01) & (position < last - 0.01)).all(dim=0)  # outside, paddings differ
    assert float(inside.float().mean()) > 0.5
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=0.02)


def test_path_may_be_a_string(tmp_path):
    save_image(texture((4, 5)), np.eye(4), str(tmp_path / "image.nii"))
    save_ddf(smooth_field((4, 5)), np.eye(4), str(tmp_path / "field.nii"))
    assert nib.load(tmp_path / "image.nii").shape == (4, 5)
    assert SimpleITK.ReadImage(str(tmp_path / "field.nii")).GetNumberOfComponentsPerPixel() == 3
