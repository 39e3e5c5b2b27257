import pytest
import torch

pytest.importorskip("matplotlib")

import itertools

from monai_drdm.viz import case_rows, CaseRow, Panel


def row(name, height, width, spacing, label=None):
    image = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    field = torch.zeros(2, height, width)
    return CaseRow(name, [Panel("original", image, label), Panel("field", ddf=field)], spacing)


@pytest.mark.parametrize(("shape", "spacing"), [((40, 40), (1, 1)), ((20, 200), (1, 1)), ((30, 30), (0.5, 4.0))])
def test_panels_have_physical_proportions(shape, spacing):
    figure = case_rows([row("a", *shape, spacing), row("b", 10, 10, (1, 1))])
    width, height = figure.get_size_inches()
    boxes = [axis.get_position() for axis in figure.axes]
    assert len(boxes) == 4
    wanted = shape[0] * spacing[0] / (shape[1] * spacing[1])
    for box in boxes[:2]:
        assert box.width * width / (box.height * height) == pytest.approx(wanted)
    for one, other in itertools.pairwise(boxes):
        assert not one.overlaps(other)
    assert all(min(box.x0, box.y0) >= 0 and max(box.x1, box.y1) <= 1 for box in boxes)
    assert [axis.get_title() for axis in figure.axes] == ["original", "field"] * 2
    assert [text.get_text() for text in figure.texts] == ["a", "b"]


def test_the_figure_is_filled():
    """Most of it is pictures, also where all of them are narrow."""
    for shape, share in (((40, 40), 0.74), ((20, 40), 0.6), ((40, 20), 0.6)):
        figure = case_rows([row(name, *shape, (1, 1)) for name in "ab"])
        boxes = [axis.get_position() for axis in figure.axes]
        assert sum(box.width * box.height for box in boxes) > share


def test_a_class_has_one_colour_in_all_rows():
    two, one = torch.zeros(12, 12), torch.zeros(12, 12)
    two[2:5, 2:5], two[7:9, 7:9], one[3:8, 3:8] = 1, 7, 7
    figure = case_rows([row("a", 12, 12, (1, 1), two), row("b", 12, 12, (1, 1), one)])
    first, second = (
        [tuple(c.get_edgecolor()[0]) for c in figure.axes[k].collections if len(c.get_edgecolor())] for k in (0, 2)
    )
    assert first[1] == second[0] != first[0]


@pytest.mark.parametrize("rows", [[], [CaseRow("a", [])], [CaseRow("a", [Panel("field", ddf=torch.zeros(2, 4, 4))])]])
def test_refuses_what_shows_no_image(rows):
    with pytest.raises(ValueError, match="each beginning with an image"):
        case_rows(rows)
