import math

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_drdm.io import save_image

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


def test_path_may_be_a_string(tmp_path):
    save_image(texture((4, 5)), np.eye(4), str(tmp_path / "image.nii"))
    assert nib.load(tmp_path / "image.nii").shape == (4, 5)
