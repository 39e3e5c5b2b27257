import json
import math

import pytest
import torch

from monai_drdm.metrics import field_statistics, FieldStatistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_translation_by_hand(dtype):
    ddf = torch.zeros(1, 2, 5, 7, dtype=dtype)
    ddf[:, 0], ddf[:, 1] = 3.0, -4.0
    numbers = field_statistics(ddf, (1.0, 2.0))
    mm = math.sqrt(3**2 + 8**2)
    assert numbers.to_dict() == pytest.approx(
        {
            "mean_displacement_vox": 5.0,
            "max_displacement_vox": 5.0,
            "mean_displacement_mm": mm,
            "max_displacement_mm": mm,
            "fold_fraction": 0.0,
            "log_jacobian_min": 0.0,
            "log_jacobian_mean": 0.0,
            "log_jacobian_std": 0.0,
        }
    )


def test_one_voxel_that_moves_by_hand():
    ddf = torch.zeros(1, 3, 4, 5, 2)
    ddf[0, 2, 0, 0, 0] = -0.5  # outwards through a corner of the grid: one cell, stretched to 1.5 along the last axis
    numbers = field_statistics(ddf, (1.0, 1.0, 4.0))
    assert numbers.max_displacement_vox == pytest.approx(0.5)
    assert numbers.mean_displacement_vox == pytest.approx(0.5 / 40)
    assert numbers.max_displacement_mm == pytest.approx(2.0)
    assert numbers.mean_displacement_mm == pytest.approx(2.0 / 40)
    assert numbers.fold_fraction == 0


@pytest.mark.parametrize("dims", [2, 3])
def test_a_uniform_scaling_by_hand(dims):
    shape = (6, 7, 5)[:dims]
    x = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))
    numbers = field_statistics(0.25 * x[None], (1.0,) * dims)
    assert numbers.log_jacobian_mean == pytest.approx(dims * math.log(1.25), rel=1e-5)
    assert numbers.log_jacobian_min == pytest.approx(dims * math.log(1.25), rel=1e-5)
    assert numbers.log_jacobian_std == pytest.approx(0, abs=1e-5)
    assert numbers.max_displacement_vox == pytest.approx(0.25 * math.sqrt(sum((n - 1) ** 2 for n in shape)), rel=1e-5)


def test_folds_by_hand():
    edges = torch.cat((torch.zeros(15), torch.full((5,), -1.5)))  # a quarter of the rows fold
    ddf = torch.zeros(1, 2, 21, 6)
    ddf[0, 0, 1:] = edges.cumsum(0)[:, None]
    numbers = field_statistics(ddf, (1.0, 1.0))
    floor = math.log(1e-3)
    assert numbers.fold_fraction == pytest.approx(0.25)
    assert numbers.log_jacobian_min == pytest.approx(floor, rel=1e-5)
    assert numbers.log_jacobian_mean == pytest.approx(floor / 4, rel=1e-5)
    assert numbers.log_jacobian_std == pytest.approx(-floor * math.sqrt(0.25 * 0.75), rel=1e-5)


def test_the_numbers_are_plain_floats_and_survive_json():
    numbers = field_statistics(torch.rand(1, 2, 5, 6), (1.0, 1.0))
    assert all(type(v) is float for v in numbers.to_dict().values())
    assert FieldStatistics(**json.loads(json.dumps(numbers.to_dict()))) == numbers


def test_the_numbers_are_frozen():
    numbers = field_statistics(torch.zeros(1, 2, 5, 6), (1.0, 1.0))
    with pytest.raises(AttributeError):
        numbers.fold_fraction = 1.0


def test_the_field_is_not_modified():
    ddf = torch.rand(1, 2, 5, 6)
    before = ddf.clone()
    field_statistics(ddf, (2.0, 3.0))
    assert torch.equal(ddf, before)


def test_more_than_one_field_is_refused():
    with pytest.raises(ValueError, match="field_statistics: ddf must hold one field"):
        field_statistics(torch.zeros(2, 2, 5, 6), (1.0, 1.0))


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 1.0, 1.0), (0.0, 1.0), (1.0, -1.0)])
def test_a_spacing_that_does_not_fit_is_refused(spacing):
    with pytest.raises(ValueError, match="spacing must be 2 positive numbers in mm"):
        field_statistics(torch.zeros(1, 2, 5, 6), spacing)
