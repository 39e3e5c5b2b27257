import numpy as np
import pytest
import torch

from monai_drdm.viz import separability_figure


def test_draws_means_bands_and_stairs():
    values = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]])
    figure = separability_figure([0, 2, 5], {"field": values}, {"network": ((1, 4), (4, 12))})
    (axis,) = figure.axes
    curve, stairs = axis.get_lines()
    np.testing.assert_allclose(curve.get_ydata(), [0, 2, 3])
    np.testing.assert_allclose(stairs.get_xdata(), [0, 1, 4, 5])
    np.testing.assert_allclose(stairs.get_ydata(), [0, 4, 12, 12])
    band = axis.collections[0].get_paths()[0].vertices
    assert {(2.0, 1.0), (2.0, 3.0)} <= {tuple(point) for point in band}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["field", "network"]


@pytest.mark.parametrize("arguments", [([],), ([1, 2],), ([1, 2], {"field": torch.zeros(1, 3)})])
def test_refuses_nothing_and_what_does_not_fit(arguments):
    with pytest.raises(ValueError, match="separability_figure"):
        separability_figure(*arguments)
