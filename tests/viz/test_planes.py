import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_drdm.fields import warp

pytest.importorskip("matplotlib")

from monai_drdm.viz import Plane

SIZES = np.array([2.0, 1.0, 3.0])  # millimetres to the right, the front and the head


def affines():
    """Voxel to world maps of all 48 ways in which a volume may lie."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = np.eye(3)[:, order] * (SIZES[list(order)] * signs)
            yield affine


@pytest.mark.parametrize("affine", list(affines())[::5], ids=lambda one: "".join(nib.aff2axcodes(one)))
@pytest.mark.parametrize("world", [0, 1, 2])
def test_slices_lie_as_radiologists_look_at_them(affine, world):
    """As nibabel turns the volume: the left side, or the front in sagittal slices, against the first axis."""
    rng = np.random.default_rng(0)
    array = rng.random((5, 7, 9)).astype(np.float32)
    standard = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    axis = nib.aff2axcodes(affine).index(next(c for c in nib.aff2axcodes(affine) if c in ("RL", "AP", "SI")[world]))
    plane = Plane.of(MetaTensor(array[None], affine=torch.from_numpy(affine)), axis)
    whole = standard.get_fdata()
    expected = whole.take(whole.shape[world] // 2, axis=world)[::-1]
    np.testing.assert_allclose(plane.cut(torch.from_numpy(array)[None]), expected)
    assert plane.spacing == pytest.approx(tuple(np.delete(SIZES, world)))


@pytest.mark.parametrize("affine", list(affines())[::7], ids=lambda one: "".join(nib.aff2axcodes(one)))
def test_fields_are_turned_with_their_images(affine):
    """A picture deformed by the turned field is the turned picture of the deformed volume."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 9, 11, 13, generator=generator)
    plane = Plane.of(MetaTensor(image, affine=torch.from_numpy(affine)))
    ddf = torch.rand(3, *image.shape[1:], generator=generator) - 0.5
    np.testing.assert_allclose(plane.cut_warped(image, ddf), plane.cut(warp(image[None], ddf[None])[0]), atol=1e-5)
    ddf[plane.axis] = 0  # what moves within the slice only, is all there
    inside = warp(plane.cut(image)[None, None], plane.cut_field(ddf)[None])[0, 0]
    np.testing.assert_allclose(plane.cut_warped(image, ddf), inside, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_are_turned_as_numbers_are(dtype):
    image = torch.arange(24).reshape(1, 6, 4)
    plane = Plane.of(image)
    np.testing.assert_array_equal(plane.cut(image.to(dtype)).numpy(), plane.cut(image).numpy())


def test_photographs_keep_their_top():
    photo = torch.zeros(3, 6, 4, dtype=torch.uint8)
    photo[1, 0, 0] = 9  # top left, with the second axis downwards
    plane = Plane.of(photo)
    picture = plane.cut(photo)
    assert picture.shape == (3, 6, 4)
    assert picture[1, 0, 3] == 9  # pictures have it upwards
    assert Plane.of(photo.float()).cut(photo.float()).shape == (6, 4)  # three series of a scan are no colours


def test_the_slice_is_the_thick_one_through_what_is_labelled():
    image = MetaTensor(torch.zeros(1, 8, 20, 8), affine=torch.diag(torch.tensor([1.0, 4.0, 1.0, 1.0])))
    label = torch.zeros(1, 8, 20, 8)
    label[:, 2:4, 3:6] = 1
    assert (Plane.of(image).axis, Plane.of(image).index) == (1, 10)
    assert Plane.of(image, label=label).index == 4
    assert Plane.of(image, label=0 * label).index == 10
    assert Plane.of(torch.zeros(1, 8, 8, 8)).axis == 2
