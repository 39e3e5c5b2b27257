import numpy as np
import pytest
import torch

from monai_drdm.registration import evaluate_registration


def shift(ddf):
    """A method that always gives the same field, and its opposite the other way round."""
    first = [True]

    def register(moving, fixed):
        sign = 1.0 if first[0] else -1.0
        first[0] = False
        return sign * ddf

    return register


@pytest.fixture
def pair():
    """A square, and the same square three voxels further along the second axis, with its corners as landmarks."""
    moving, fixed = torch.zeros(1, 1, 32, 40), torch.zeros(1, 1, 32, 40)
    moving[..., 8:20, 10:22], fixed[..., 8:20, 13:25] = 1, 1
    points = torch.tensor([[8.0, 13.0], [19.0, 24.0]])
    ddf = torch.zeros(1, 2, 32, 40)
    ddf[:, 1] = -3.0
    return moving, fixed, points, ddf


def test_the_right_field_scores_full_marks(pair):
    moving, fixed, points, ddf = pair
    score = evaluate_registration(
        shift(ddf),
        moving,
        fixed,
        moving_label=moving.to(torch.uint8),
        fixed_label=fixed.to(torch.uint8),
        structures=(1, 2),
        moving_points=points + torch.tensor([0.0, -3.0]),
        fixed_points=points,
        ddf=ddf,
    )
    assert score.dice[0] == 1.0
    assert score.hd95[0] == 0.0
    assert np.isnan(score.dice[1])
    assert np.isnan(score.hd95[1])
    assert score.tre == score.error_vox == score.fold_fraction == 0.0
    assert score.inverse_consistency_vox < 1e-5
    assert score.seconds > 0


def test_doing_nothing_scores_what_is_wrong(pair):
    moving, fixed, points, ddf = pair
    score = evaluate_registration(
        lambda a, b: torch.zeros_like(ddf),
        moving,
        fixed,
        moving_label=moving.to(torch.uint8),
        fixed_label=fixed.to(torch.uint8),
        structures=(1,),
        moving_points=points + torch.tensor([0.0, -3.0]),
        fixed_points=points,
        ddf=ddf,
        inside=fixed > 0,
        spacing=(1.0, 2.0),
    )
    assert score.dice[0] == pytest.approx(2 * 12 * 9 / (2 * 144))
    assert score.hd95[0] == pytest.approx(6.0)  # three voxels of 2 mm
    assert score.tre == pytest.approx(6.0)
    assert score.error_vox == pytest.approx(3.0)


def test_folds_are_counted_and_what_is_not_known_is_nan(pair):
    moving, fixed, _, ddf = pair
    folded = ddf.clone()
    folded[:, 1, :, 20:] = -9.0
    score = evaluate_registration(lambda a, b: folded, moving, fixed, both_ways=False)
    assert score.fold_fraction == pytest.approx(1 / 39)
    assert score.dice == score.hd95 == ()
    assert np.isnan([score.tre, score.error_vox, score.inverse_consistency_vox]).all()


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 1.0, 1.0), (1.0, 0.0)])
def test_wrong_spacings_are_refused(pair, spacing):
    moving, fixed, _, ddf = pair
    with pytest.raises(ValueError, match="spacing must be 2 positive numbers"):
        evaluate_registration(lambda a, b: ddf, moving, fixed, spacing=spacing)


def test_fields_of_another_shape_are_refused(pair):
    moving, fixed, _, _ = pair
    with pytest.raises(ValueError, match=r"\(1, 2, \*\(32, 40\)\)"):
        evaluate_registration(lambda a, b: torch.zeros(1, 2, 8, 8), moving, fixed)
