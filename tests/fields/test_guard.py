import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_drdm.fields import fold_fraction, mend_folds, shrink_to_fold_limit


def squeeze(shape, slope, dtype=torch.float64):
    """Displacement ``-slope x`` along the first axis: the determinant is ``1 - slope`` everywhere."""
    ddf = torch.zeros(1, len(shape), *shape, dtype=dtype)
    x = torch.arange(shape[0], dtype=dtype) - (shape[0] - 1) / 2
    ddf[:, 0] = -slope * x.view(-1, *(1,) * (len(shape) - 1))
    return ddf


@pytest.fixture
def smooth(smooth_ddf):
    """A large smooth deformation without folds, and the same with a local fold in its middle."""

    def make(shape, dtype=torch.float64):
        clean = smooth_ddf(shape, 3.0, sigma_vox=7.0, dtype=dtype, seed=4)
        folded = clean.clone()
        middle = tuple(n // 2 for n in shape)
        folded[(0, 0, *middle)] += 2.5
        folded[(0, 1, *(m + 1 for m in middle))] -= 2.0
        assert fold_fraction(clean).item() == 0
        assert fold_fraction(folded).item() > 0
        return clean, folded

    return make


def corner_determinants(ddf):
    """Of a field ``(D, *S)`` in numpy: at every corner of every cell the edges that meet there; the smallest counts."""
    dims, moved = len(ddf), ddf + np.indices(ddf.shape[1:])
    at_corners = []
    for corner in product((0, 1), repeat=dims):
        rows = []
        for axis in range(dims):
            edges = np.diff(moved, axis=axis + 1)
            for other in (d for d in range(dims) if d != axis):
                edges = np.take(edges, np.arange(edges.shape[other + 1] - 1) + corner[other], axis=other + 1)
            rows.append(edges)
        at_corners.append(np.linalg.det(np.moveaxis(np.array(rows), (0, 1), (-2, -1))))
    return np.min(at_corners, axis=0)


def mended_by_hand(ddf, *, min_determinant=0.05, sigma=2.0, rounds=80):
    """``mend_folds`` of a field ``(D, *S)`` in numpy and SciPy: cells marked one by one, wider from the 51st round."""
    for done in range(rounds):
        determinant = corner_determinants(ddf)
        if (determinant > 0).all():
            break
        marked = np.zeros(ddf.shape[1:])
        for cell in np.argwhere(determinant < min_determinant):
            marked[tuple(slice(c, c + 2) for c in cell)] = 1
        width = sigma * 1.1 ** max(0, done - 50)
        marked, *smooth = (
            ndimage.gaussian_filter(one, width, mode="nearest", radius=math.ceil(3 * width)) for one in (marked, *ddf)
        )
        ddf = ddf + np.minimum(4 * marked, 1) * (np.stack(smooth) - ddf)
    return ddf


# shrinking


@pytest.mark.parametrize("slope", [1.3, 2.0, 7.7])
@pytest.mark.parametrize("halvings", [3, 6, 10])
def test_shrinking_finds_the_analytic_limit(shape, dtype, slope, halvings):
    ddf = squeeze(shape, slope, dtype)
    shrunk, scale = shrink_to_fold_limit(ddf, halvings=halvings)
    assert 1 / slope - 2**-halvings - 1e-6 <= scale.item() <= 1 / slope  # folds where scale * slope >= 1
    assert fold_fraction(shrunk).item() == 0
    torch.testing.assert_close(shrunk, ddf * scale.item())
    assert shrunk.dtype == scale.dtype == dtype


def test_fields_within_the_limit_come_back_bit_identical(shape, smooth_ddf, dtype):
    ddf = smooth_ddf(shape, 2.0, batch=2, sigma_vox=6.0, dtype=dtype)
    shrunk, scale = shrink_to_fold_limit(ddf)
    assert torch.equal(shrunk, ddf)
    assert scale.tolist() == [1.0, 1.0]


def test_the_limit_is_a_fraction_of_cells():
    ddf = torch.zeros(1, 2, 25, 11)
    ddf[0, 0, 1:] = -1.5 * ((torch.arange(24) >= 6) & (torch.arange(24) < 9)).cumsum(0)[:, None]  # 3 of 24 rows
    assert shrink_to_fold_limit(ddf, 3 / 24 + 1e-3)[1].item() == 1.0
    assert shrink_to_fold_limit(ddf, 3 / 24 - 1e-3)[1].item() == pytest.approx(1 / 1.5, abs=2**-6)


def test_a_fraction_that_equals_the_limit_is_within_it():
    """Three of 24 rows fold from a scale of 2/3 on, three more from 1/4 on."""
    steps = torch.zeros(24)
    steps[3:6], steps[9:12] = -1.5, -4.0
    ddf = torch.zeros(1, 2, 25, 11)
    ddf[0, 0, 1:] = steps.cumsum(0)[:, None]
    assert fold_fraction(ddf).item() == 6 / 24
    assert shrink_to_fold_limit(ddf, 6 / 24)[1].item() == 1.0
    assert shrink_to_fold_limit(ddf, 3 / 24)[1].item() == pytest.approx(2 / 3, abs=2**-6)
    assert shrink_to_fold_limit(ddf, 0.0)[1].item() == pytest.approx(1 / 4, abs=2**-6)
    assert shrink_to_fold_limit(ddf, 1.0)[1].item() == 1.0


def test_a_determinant_of_nothing_is_a_fold():
    ddf = squeeze((17, 9), 1.0)
    assert fold_fraction(ddf).item() == 1
    assert shrink_to_fold_limit(ddf, 0.0)[1].item() == 63 / 64  # six halvings unless told otherwise


@pytest.mark.parametrize(("size", "scale"), [((102, 101), 1.0), ((97, 101), 42 / 64)])
def test_one_cell_of_ten_thousand_may_fold(size, scale):
    """One of 10,100 cells, and one of 9,600: 0.99 and 1.04 in ten thousand. It folds where 1.5 times the scale is 1."""
    ddf = torch.zeros(1, 2, *size)
    ddf[0, 0, 0, 0] = 1.5  # the corner of a single cell
    assert fold_fraction(ddf).item() == pytest.approx(1 / ((size[0] - 1) * (size[1] - 1)))
    assert shrink_to_fold_limit(ddf)[1].item() == scale


def test_each_field_of_a_batch_shrinks_alone(shape, smooth_ddf):
    ddf = torch.cat((squeeze(shape, 1.5), smooth_ddf(shape, 1.0, dtype=torch.float64), squeeze(shape, 4.0)))
    shrunk, scale = shrink_to_fold_limit(ddf)
    assert scale.shape == (3,)
    for b in range(3):
        alone, its_scale = shrink_to_fold_limit(ddf[b : b + 1])
        assert torch.equal(shrunk[b : b + 1], alone)
        assert scale[b] == its_scale[0]


def test_shrinking_does_not_modify_its_input(shape):
    ddf = squeeze(shape, 3.0)
    before = ddf.clone()
    shrink_to_fold_limit(ddf)[0].zero_()
    assert torch.equal(ddf, before)


@pytest.mark.parametrize("limit", [-0.1, 1.1, float("nan")])
def test_a_limit_that_is_no_fraction_is_refused(limit):
    with pytest.raises(ValueError, match=r"shrink_to_fold_limit: max_fold_fraction must be in \[0, 1\]"):
        shrink_to_fold_limit(torch.zeros(1, 2, 4, 4), limit)


def test_shrinking_checks_the_field():
    with pytest.raises(TypeError, match="shrink_to_fold_limit: ddf"):
        shrink_to_fold_limit(torch.zeros(1, 2, 4, 4).int())


# mending


@pytest.mark.parametrize("size", [(15, 21), (9, 11, 10)], ids=["2d", "3d"])
@pytest.mark.parametrize("rounds", [1, 4])
def test_mending_by_hand(smooth, size, rounds):
    """Folds in the middle, on the border and in a corner, and a cell whose determinant is exactly 0."""
    ddf = smooth(size)[1]
    ddf[(0, 0, 0, *(n // 3 for n in size[1:]))] += 1.4
    ddf[(0, 1, *(-1 for _ in size))] -= 1.8
    expected = mended_by_hand(ddf[0].numpy(), rounds=rounds)
    np.testing.assert_allclose(mend_folds(ddf, rounds=rounds)[0].numpy(), expected, atol=1e-12)
    assert np.abs(expected - ddf[0].numpy()).max() > 0.5


def test_mending_by_hand_with_other_settings(smooth):
    ddf = smooth((15, 21))[1]
    settings = {"min_determinant": 0.4, "rounds": 3}
    expected = mended_by_hand(ddf[0].numpy(), sigma=1.3, **settings)
    np.testing.assert_allclose(mend_folds(ddf, sigma_vox=1.3, **settings)[0].numpy(), expected, atol=1e-12)


def test_what_withstands_fifty_rounds_is_smoothed_more_widely():
    """A fold on the largest scale, for as many rounds as are made unless told otherwise."""
    ddf = squeeze((21, 13), 3.0)
    for rounds in (50, 51, 52, 55):
        expected = mended_by_hand(ddf[0].numpy(), rounds=rounds)
        np.testing.assert_allclose(mend_folds(ddf, rounds=rounds)[0].numpy(), expected, atol=1e-12)
    wide = squeeze((161, 3), 3.0)
    assert fold_fraction(mend_folds(wide)).item() > 0  # else the number of rounds would not show
    np.testing.assert_allclose(mend_folds(wide)[0].numpy(), mended_by_hand(wide[0].numpy()), atol=1e-12)


def test_a_cell_of_no_area_is_mended():
    """A determinant of exactly 0 beside ones of 1: no cell is turned over, and one has no inverse."""
    ddf = torch.zeros(1, 2, 12, 12, dtype=torch.float64)
    ddf[0, 0, :6] = 1.0  # one row of cells loses its height
    assert corner_determinants(ddf[0].numpy()).min() == 0
    mended = mend_folds(ddf)
    np.testing.assert_allclose(mended[0].numpy(), mended_by_hand(ddf[0].numpy()), atol=1e-12)
    assert corner_determinants(mended[0].numpy()).min() > 0


def test_a_determinant_at_the_limit_of_low_ones_is_left_alone():
    """Of three rows of cells, far apart, one folds and two are squeezed, to 1/4 and to less."""
    ddf = torch.zeros(1, 2, 60, 4, dtype=torch.float64)
    ddf[0, 0, :10], ddf[0, 0, 30:], ddf[0, 0, 50:] = 1.5, -0.75, -0.75 - 0.8
    before = ddf.clone()
    mended = mend_folds(ddf, min_determinant=0.25, sigma_vox=1.0, rounds=1)
    assert torch.equal(mended[..., 22:38, :], before[..., 22:38, :])
    assert not torch.equal(mended[..., 45:55, :], before[..., 45:55, :])


@pytest.mark.parametrize("size", [(48, 61), (24, 30, 27)], ids=["2d", "3d"])
def test_mending_removes_a_local_fold_and_keeps_the_rest(smooth, dtype, size):
    clean, folded = smooth(size, dtype)
    mended = mend_folds(folded)
    assert mended.dtype == dtype
    assert fold_fraction(mended).item() == 0
    distance = np.linalg.norm(np.indices(size) - np.array(size).reshape(-1, *(1,) * len(size)) // 2, axis=0)
    far = torch.from_numpy(distance > 11)
    assert far.float().mean() > 0.2
    assert (mended - folded).norm(dim=1)[0][far].max() < 1e-4
    assert mended.norm(dim=1).mean() > 0.95 * clean.norm(dim=1).mean()


def test_mending_a_comb_restores_the_smooth_field_below_it(smooth_ddf):
    smooth = smooth_ddf((40, 45), 3.0, sigma_vox=7.0, dtype=torch.float64)
    folded = smooth.clone()
    folded[:, 0] += 0.6 * (1 - 2 * (torch.arange(40) % 2))[:, None]
    assert fold_fraction(folded).item() > 0.2
    mended = mend_folds(folded)
    assert fold_fraction(mended).item() == 0
    assert (mended - smooth)[..., 4:-4, 4:-4].abs().max() < 0.5
    assert mended.norm(dim=1).mean() > 0.9 * smooth.norm(dim=1).mean()


def test_fields_without_folds_are_not_mended(shape, dtype, smooth_ddf):
    ddf = smooth_ddf(shape, 2.0, batch=2, sigma_vox=6.0, dtype=dtype)
    assert torch.equal(mend_folds(ddf), ddf)


def test_low_determinants_alone_are_not_mended(shape):
    ddf = squeeze(shape, 0.99)  # a determinant of 0.01 everywhere, below min_determinant, but no fold
    assert torch.equal(mend_folds(ddf), ddf)


def test_each_field_of_a_batch_is_mended_alone(smooth):
    clean, folded = smooth((30, 37))
    ddf = torch.cat((clean, folded, folded.flip(2)))
    together = mend_folds(ddf)
    assert torch.equal(together[0], clean[0])
    for b in range(3):
        assert torch.equal(together[b : b + 1], mend_folds(ddf[b : b + 1]))


def test_low_determinants_are_not_mended_beside_a_folding_neighbour(smooth):
    low = squeeze((30, 37), 0.99)
    together = mend_folds(torch.cat((low, smooth((30, 37))[1])))
    assert torch.equal(together[:1], low)


def test_mending_stops_after_its_rounds(shape):
    ddf = squeeze(shape, 3.0)  # folds on the largest scale
    assert torch.equal(mend_folds(ddf, rounds=0), ddf)
    assert fold_fraction(mend_folds(ddf, rounds=1)).item() > 0


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 20, 22)])
def test_mending_with_an_axis_of_length_1(size):
    ddf = torch.zeros(1, len(size), *size, dtype=torch.float64)
    axis = next(d for d, n in enumerate(size) if n > 1)
    ddf[0, axis].select(axis, 12).add_(1.5)
    assert fold_fraction(ddf).item() > 0
    mended = mend_folds(ddf)
    assert mended.shape == ddf.shape
    assert fold_fraction(mended).item() == 0


def test_mending_does_not_modify_its_input(smooth):
    _, folded = smooth((30, 37))
    before = folded.clone()
    mend_folds(folded).zero_()
    assert torch.equal(folded, before)


def test_mending_checks_the_field():
    with pytest.raises(TypeError, match="mend_folds: ddf"):
        mend_folds(torch.zeros(1, 2, 4, 4).int())
    with pytest.raises(ValueError, match="mend_folds: ddf"):
        mend_folds(torch.zeros(2, 4, 4))
