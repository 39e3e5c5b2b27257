import io

import numpy as np
import pytest
import torch

from monai_drdm.fields import fold_fraction, identity_grid, warp

matplotlib_figure = pytest.importorskip("matplotlib.figure")

from monai_drdm.viz import deformation_figure, plot_jacobian, plot_labels, plot_warped_grid, show_image  # noqa: E402
from monai_drdm.viz.figures import grey_range  # noqa: E402


@pytest.fixture
def axis():
    return matplotlib_figure.Figure().subplots()


def gentle_field(*shape):
    x = identity_grid(shape)
    return torch.stack([1.5 * torch.sin(x[1] / 6), torch.cos(x[0] / 7)])


def folded_field(*shape):
    """Two columns swapped: the cells between them fold, no others."""
    ddf = torch.zeros(2, *shape)
    ddf[1, :, 10], ddf[1, :, 11] = 1.0, -1.0
    return ddf


def figure_of(*shape, **options):
    x = identity_grid(shape)
    image, ddf = torch.sin(x[0] / 5) * torch.cos(x[1] / 4), gentle_field(*shape)
    label = ((x[0] > 5) & (x[1] > 5)).long() + (x[0] > 12).long()
    moved = [warp(one[None, None], ddf[None], mode)[0, 0] for one, mode in ((image, "bilinear"), (label, "nearest"))]
    return deformation_figure(image, moved[0], moved[0], ddf, label, moved[1], **options)


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=30)
    return buffer.getvalue()


@pytest.mark.parametrize(("shape", "spacing"), [((24, 24), (1.0, 1.0)), ((32, 20), (1.0, 1.0)), ((20, 33), (0.7, 2.0))])
def test_renders_six_panels(shape, spacing):
    figure = figure_of(*shape, spacing=spacing, title="a title")
    assert png(figure).startswith(b"\x89PNG\r\n\x1a\n")
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert len(panels) == 6
    assert figure.get_suptitle() == "a title"
    for panel in panels:
        assert panel.get_xlim() == (-0.5, shape[0] - 0.5)
        assert panel.get_ylim() == (-0.5, shape[1] - 0.5)
        assert panel.get_aspect() == pytest.approx(spacing[1] / spacing[0])


def test_renders_without_labels():
    image = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    assert png(deformation_figure(image, image, image, torch.zeros(2, 16, 16)))


def test_renders_integers_and_constant_images():
    image = torch.full((16, 12), 7, dtype=torch.int16)
    assert png(deformation_figure(image, image, image, torch.zeros(2, 16, 12), image, image))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int64, torch.bfloat16, torch.bool])
def test_grey_range_of_any_type(dtype):
    assert grey_range(torch.tensor([[0, 1], [1, 1]]).to(dtype)) == (0.0, 1.0)


def test_grey_range_of_a_large_plane():
    """Of more values than torch takes quantiles of."""
    low, high = grey_range(torch.arange(4100).view(1, -1).expand(4100, -1))
    assert (low, high) == (0.0, pytest.approx(0.998 * 4099, abs=1))


def test_a_line_of_voxels_is_drawn():
    png(figure_of(1, 30))


def test_labels_are_outlined_before_and_after():
    axis = figure_of(24, 24).axes[3]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["before", "after"]
    assert len(axis.collections) == 4  # two labels, before and after


def test_every_image_has_its_labels_in_the_same_colours():
    """Two classes, outlined in the panels of the three images, each in one colour."""
    axes = figure_of(24, 24).axes
    colours = [[tuple(one.get_edgecolor()[0]) for one in axis.collections] for axis in axes[:3]]
    assert colours[0] == colours[2]
    assert len(set(colours[0])) == 2
    assert colours[1] == []  # no label was given for the diffused image


def test_many_classes_are_filled_in_their_own_place():
    label = torch.zeros(20, 16, dtype=torch.int64)
    label[2:15, 3:9] = torch.arange(10, 23)[:, None]
    shown = matplotlib_figure.Figure().subplots()
    plot_labels(shown, label)
    (filled,) = shown.images
    np.testing.assert_array_equal(np.ma.getmaskarray(filled.get_array()), label.numpy().T == 0)
    assert len(shown.collections) == 0


def test_colours_are_shown_as_colours(axis):
    image = torch.zeros(3, 8, 6, dtype=torch.uint8)
    image[0, 5, 1] = 200
    show_image(axis, image, (1.0, 2.0), "red", vmin=0, vmax=200)
    shown = np.asarray(axis.images[0].get_array())
    assert shown.shape == (6, 8, 3)
    np.testing.assert_array_equal(np.argwhere(shown > 0), [[1, 5, 0]])
    assert axis.get_aspect() == 2.0


def test_images_share_the_grey_scale_of_the_original():
    limits = {axis.images[0].get_clim() for axis in figure_of(24, 24).axes[:4]}
    assert len(limits) == 1


def test_first_array_axis_points_right():
    image = torch.zeros(16, 12)
    image[3, 7] = 1.0
    figure = deformation_figure(image, image, image, torch.zeros(2, 16, 12))
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (12, 16)
    assert float(shown[7, 3]) == 1.0
    assert figure.axes[0].images[0].origin == "lower"


def test_folds_are_drawn(axis):
    ddf = folded_field(20, 24)
    mappable = plot_jacobian(axis, ddf)
    folded = np.ma.getmaskarray(mappable.get_array())
    assert folded.shape == (23, 19)  # cells, second array axis upwards
    assert folded.mean() == pytest.approx(float(fold_fraction(ddf[None])[0]))
    assert folded[10].all()
    assert folded.sum() == 19
    assert f"{folded.mean():.2%} of cells fold" in axis.get_title()
    assert tuple(mappable.cmap.get_bad()) == (0.0, 0.0, 0.0, 1.0)


def test_no_folds_no_black(axis):
    mappable = plot_jacobian(axis, gentle_field(20, 24))
    assert not np.ma.getmaskarray(mappable.get_array()).any()
    assert "0.00% of cells fold" in axis.get_title()


def test_jacobian_map_holds_the_logarithm_of_the_determinant(axis):
    ddf = torch.stack([0.5 * identity_grid((12, 10))[0], torch.zeros(12, 10)])
    shown = plot_jacobian(axis, ddf).get_array()
    np.testing.assert_allclose(shown, np.log(1.5), atol=1e-5)


def test_grid_lines_are_where_the_original_grid_ends_up(axis):
    """Under a constant shift the line ``x = k`` of the original appears at ``x = k - shift``."""
    ddf = torch.zeros(2, 32, 32)
    ddf[0], ddf[1] = 2.5, -0.75
    plot_warped_grid(axis, ddf, lines=8)
    for collection, across, shift in zip(axis.collections, (0, 1), (2.5, -0.75)):
        lines = [path.vertices[:, across] for path in collection.get_paths() if len(path.vertices)]
        for line in lines:
            assert np.ptp(line) == pytest.approx(0, abs=1e-4)
        seen = sorted(float(line[0]) for line in lines)
        expected = [k - shift for k in range(0, 32, 4) if 0 <= k - shift <= 31]
        assert seen == pytest.approx(expected, abs=1e-4)


def test_grid_spacing_is_physical(axis):
    plot_warped_grid(axis, torch.zeros(2, 40, 20), spacing=(1.0, 2.0), lines=10)
    along = [len([path for path in collection.get_paths() if len(path.vertices)]) for collection in axis.collections]
    assert along[0] == pytest.approx(along[1], abs=1)


def test_field_is_not_modified(axis):
    ddf = folded_field(16, 20).requires_grad_(True)
    before = ddf.detach().clone()
    plot_warped_grid(axis, ddf)
    plot_jacobian(axis, ddf)
    assert torch.equal(ddf, before)
