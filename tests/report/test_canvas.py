"""What all figures share: looks that differ, and labels that keep apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sodfast.report.canvas import OVERLAID, spread, standalone, style_of, swatch


def test_more_groups_than_can_be_told_apart_look_alike() -> None:
    assert style_of(3, OVERLAID) == style_of(3) != style_of(4)
    assert style_of(3, OVERLAID + 1) == style_of(4, OVERLAID + 1)


def test_a_figure_as_a_file_has_a_white_ground() -> None:
    text = standalone(swatch(0))
    assert text.startswith('<svg style="background: white') and text.endswith("</svg>\n")


def test_styles_differ_in_grey() -> None:
    """Neighbouring groups of equal lightness still differ by line and marker; and no colour is
    too light to be seen on white."""
    for index in range(OVERLAID):
        red, green, blue = (int(style_of(index)["color"][i : i + 2], 16) for i in (1, 3, 5))
        assert 0.299 * red + 0.587 * green + 0.114 * blue < 190


BOXES = st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.1)), min_size=1, max_size=9)


@given(BOXES)
def test_labels_never_overlap_and_stay_in_the_plot(boxes: list[tuple[float, float]]) -> None:
    boxes.sort()
    centers, heights = [c for c, _ in boxes], [h for _, h in boxes]
    placed = spread(centers, heights)
    for index in range(1, len(placed)):
        gap = (heights[index - 1] + heights[index]) / 2
        assert placed[index] - placed[index - 1] >= gap - 1e-9
    assert placed[0] >= heights[0] / 2 - 1e-9
    assert placed[-1] <= 1 - heights[-1] / 2 + 1e-9


def test_labels_that_keep_apart_stay_where_they_are() -> None:
    assert spread([0.2, 0.5, 0.8], [0.1, 0.1, 0.1]) == pytest.approx([0.2, 0.5, 0.8])
    assert spread([0.5, 0.5], [0.1, 0.1]) == pytest.approx([0.45, 0.55])
    assert spread([], []) == []
