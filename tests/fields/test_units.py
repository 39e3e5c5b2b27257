import numpy as np
import pytest
import torch

from monai_drdm.fields import fractions_to_voxels, mm_to_voxels, voxels_to_fractions, voxels_to_mm

SPACINGS = {2: (0.5, 2.0), 3: (0.8, 1.0, 3.0)}


def test_millimetres_are_voxels_times_spacing(shape, dtype, smooth_ddf):
    ddf, spacing = smooth_ddf(shape, batch=2, dtype=dtype), SPACINGS[len(shape)]
    mm = voxels_to_mm(ddf, spacing)
    assert mm.dtype == dtype
    for d, size in enumerate(spacing):
        np.testing.assert_allclose(mm[:, d].numpy(), ddf[:, d].numpy() * size, rtol=1e-6)


def test_voxels_are_millimetres_over_spacing(shape, dtype, smooth_ddf):
    ddf, spacing = smooth_ddf(shape, batch=2, dtype=dtype), SPACINGS[len(shape)]
    voxels = mm_to_voxels(ddf, spacing)
    assert voxels.dtype == dtype
    for d, size in enumerate(spacing):
        np.testing.assert_allclose(voxels[:, d].numpy(), ddf[:, d].numpy() / size, rtol=1e-6)


@pytest.mark.parametrize(("size", "longest"), [((4, 10), 10), ((12, 3), 12), ((4, 6, 5), 6)])
def test_a_fraction_of_one_is_the_longest_side_along_every_axis(size, longest):
    ddf = torch.full((1, len(size), *size), 3.0)
    np.testing.assert_allclose(voxels_to_fractions(ddf).numpy(), 3.0 / longest, rtol=1e-6)
    np.testing.assert_allclose(fractions_to_voxels(ddf).numpy(), 3.0 * longest, rtol=1e-6)


def test_there_and_back_is_the_identity(shape, dtype, smooth_ddf):
    ddf, spacing = smooth_ddf(shape, dtype=dtype), SPACINGS[len(shape)]
    torch.testing.assert_close(mm_to_voxels(voxels_to_mm(ddf, spacing), spacing), ddf)
    torch.testing.assert_close(fractions_to_voxels(voxels_to_fractions(ddf)), ddf)


@pytest.mark.parametrize("convert", [voxels_to_mm, mm_to_voxels])
@pytest.mark.parametrize(
    "spacing", [(1.0,), (1.0, 1.0, 1.0), (1.0, 0.0), (1.0, -2.0), (1.0, float("inf")), (float("nan"), 1.0)]
)
def test_spacing_must_be_positive_and_fit(convert, spacing):
    with pytest.raises(ValueError, match=rf"{convert.__name__}: spacing must be 2 positive numbers in mm"):
        convert(torch.zeros(1, 2, 4, 4), spacing)


@pytest.mark.parametrize("convert", [voxels_to_mm, mm_to_voxels])
def test_millimetres_check_the_field(convert):
    with pytest.raises(TypeError, match=f"{convert.__name__}: ddf"):
        convert(torch.zeros(1, 2, 4, 4).int(), (1, 1))
    with pytest.raises(ValueError, match=f"{convert.__name__}: ddf"):
        convert(torch.zeros(2, 4, 4), (1, 1))


@pytest.mark.parametrize("convert", [voxels_to_fractions, fractions_to_voxels])
def test_fractions_check_the_field(convert):
    with pytest.raises(TypeError, match=f"{convert.__name__}: ddf"):
        convert(torch.zeros(1, 2, 4, 4).int())
    with pytest.raises(ValueError, match=f"{convert.__name__}: ddf"):
        convert(torch.zeros(1, 3, 4, 4))


def test_inputs_are_not_modified(smooth_ddf):
    ddf = smooth_ddf((6, 7))
    before = ddf.clone()
    for result in (voxels_to_mm(ddf, (1, 1)), mm_to_voxels(ddf, (1, 1)), voxels_to_fractions(ddf)):
        result.zero_()
    fractions_to_voxels(ddf).zero_()
    assert torch.equal(ddf, before)
