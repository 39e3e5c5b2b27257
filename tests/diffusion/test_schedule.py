import math
from itertools import pairwise

import pytest

from monai_drdm.diffusion import composition_counts, integration_time, time_step


@pytest.mark.parametrize(
    ("t", "expected"), [(48, (102, 10)), (64, (148, 12)), (79, (195, 13)), (0, (1, 0)), (1, (1, 1))]
)
def test_composition_counts(t, expected):
    assert composition_counts(t) == expected


def test_composition_counts_follow_the_formula():
    for t in range(80):
        total, target = composition_counts(t)
        assert total == min(max(math.floor(2 * t**1.3 / 3), 1), 200)
        assert target == math.floor(t**0.6)


@pytest.mark.parametrize("t", [-1, 80, 1000])
def test_composition_counts_refuse(t):
    with pytest.raises(ValueError, match=rf"t must be in \[0, 80\), got {t}"):
        composition_counts(t)


@pytest.mark.parametrize(("level", "expected"), [(0.6, 48), (0.8, 64), (1.0, 79), (1e-6, 1), (1 / 80, 1), (0.5, 40)])
def test_time_step(level, expected):
    assert time_step(level) == expected


@pytest.mark.parametrize("dims", [2, 3])
def test_integration_time_grows_without_jumps(dims):
    times = [integration_time(i / 1000, dims) for i in range(1, 1001)]
    steps = [b - a for a, b in pairwise(times)]
    assert min(steps) > 0
    assert max(steps) < 10 * min(steps)
    assert times[0] < 0.01 * times[-1]


@pytest.mark.parametrize("dims", [2, 3])
def test_integration_time_is_linear_between_its_knots(dims):
    low, middle, high = (integration_time(level, dims) for level in (0.4, 0.45, 0.5))
    assert middle == pytest.approx((low + high) / 2)


@pytest.mark.parametrize("level", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
@pytest.mark.parametrize("function", [time_step, lambda level: integration_time(level, 2)])
def test_level_outside_its_range(function, level):
    with pytest.raises(ValueError, match=r"deformation_level must be in \(0, 1\], got"):
        function(level)
