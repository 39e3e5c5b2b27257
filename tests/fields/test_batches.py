"""A sample's result never depends on its neighbours in the batch."""

from __future__ import annotations

import pytest
import torch

from monai_drdm.fields import exp_svf, gaussian_smooth, invert, mend_folds, shrink_to_fold_limit, warp_points


@pytest.mark.parametrize("shape", [(32, 40), (14, 16, 12)])
@pytest.mark.parametrize(
    "operation",
    [
        exp_svf,
        mend_folds,
        lambda ddf: invert(ddf / 20, iterations=60).ddf,
        lambda ddf: shrink_to_fold_limit(ddf)[0],
    ],
    ids=["exp_svf", "mend_folds", "invert", "shrink_to_fold_limit"],
)
def test_batch_equals_each_alone(operation, shape):
    noise = torch.randn(3, len(shape), *shape, generator=torch.Generator().manual_seed(0))
    fields = gaussian_smooth(noise, 2.0) * torch.tensor([1.0, 8.0, 40.0]).view(3, *(1,) * (len(shape) + 1))
    together = operation(fields)
    for b in range(3):
        torch.testing.assert_close(together[b : b + 1], operation(fields[b : b + 1]), atol=1e-3, rtol=0)


def test_points_that_are_none_or_do_not_fit():
    ddf = torch.zeros(3, 2, 8, 8)
    assert warp_points(torch.zeros(1, 0, 2), ddf).shape == (3, 0, 2)
    with pytest.raises(ValueError, match="batch sizes"):
        warp_points(torch.zeros(2, 4, 2), ddf)


def test_nan_counts_as_folded():
    from monai_drdm.fields import fold_fraction

    assert fold_fraction(torch.full((1, 2, 5, 5), float("nan"))) == 1
