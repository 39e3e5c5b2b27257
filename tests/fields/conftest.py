"""Shapes, dtypes and random smooth fields for the tests of the field algebra."""

import numpy as np
import pytest
import SimpleITK
import torch
from scipy import ndimage


@pytest.fixture(params=[(25, 34), (14, 21, 17)], ids=["2d", "3d"])
def shape(request):
    """A grid that is neither square nor a power of two."""
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture(scope="session")
def smooth_ddf():
    """Factory of smooth random fields whose largest component is ``magnitude_vox``."""

    def make(shape, magnitude_vox=2.0, *, batch=1, sigma_vox=4.0, seed=0, dtype=torch.float32, taper=False):
        noise = np.random.default_rng(seed).standard_normal((batch, len(shape), *shape))
        field = ndimage.gaussian_filter(noise, (0, 0, *(sigma_vox,) * len(shape)), mode="nearest")
        if taper:  # zero on the border, so that no point leaves the grid
            for axis, size in enumerate(shape):
                window = np.sin(np.pi * np.arange(size) / (size - 1))
                field *= window.reshape(-1, *(1,) * (len(shape) - 1 - axis))
        field *= magnitude_vox / np.abs(field).reshape(batch, -1).max(axis=1).reshape(-1, *(1,) * (len(shape) + 1))
        return torch.from_numpy(field).to(dtype)

    return make


@pytest.fixture(scope="session")
def voxel_grid():
    """Factory of voxel coordinates ``(D, *S)`` in numpy."""

    def make(shape):
        return np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij"))

    return make


@pytest.fixture(scope="session")
def affine_ddf(voxel_grid):
    """Factory of the field with ``x + ddf(x) = centre + matrix (x - centre) + shift``."""

    def make(matrix, shift, shape, dtype=torch.float64):
        centre = (np.array(shape) - 1) / 2
        offset = voxel_grid(shape) - centre.reshape(-1, *(1,) * len(shape))
        field = np.tensordot(np.asarray(matrix, dtype=np.float64) - np.eye(len(shape)), offset, axes=1)
        field += np.asarray(shift, dtype=np.float64).reshape(-1, *(1,) * len(shape))
        return torch.from_numpy(field)[None].to(dtype)

    return make


@pytest.fixture(scope="session")
def rotation():
    """Factory of rotation matrices: in the plane, or about the last axis."""

    def make(degrees, dims):
        angle = np.deg2rad(degrees)
        matrix = np.eye(dims)
        matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        return matrix

    return make


@pytest.fixture(scope="session")
def sitk_field():
    """Factory of the SimpleITK vector image of a field ``(D, *S)``; its vectors hold the last array axis first."""

    def make(ddf):
        vectors = np.moveaxis(ddf.numpy().astype(np.float64), 0, -1)[..., ::-1]
        return SimpleITK.GetImageFromArray(np.ascontiguousarray(vectors), isVector=True)

    return make


@pytest.fixture(scope="session")
def interior():
    """Factory of the index that leaves out ``margin`` voxels on every side of the spatial axes."""

    def make(dims, margin):
        return (..., *(slice(margin, -margin),) * dims)

    return make
