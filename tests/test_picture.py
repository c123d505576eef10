"""The README's picture: what is drawn of detections, and its file."""
import numpy as np

from benchmarks.picture import (GAP, OUT, SCALE, TITLE_HEIGHT, Detections,
                                color_of, draw, side_by_side)
from isvit_det.datasets.drawing import CLASSES
from tests.engine.tiny import REPO

MAX_BYTES = 200_000


def test_masks_have_the_colour_of_their_class_and_the_rest_none():
    pixels = np.full((60, 80, 3), 100, np.uint8)
    masks = np.zeros((1, 60, 80), bool)
    masks[0, 30:50, 20:60] = True
    found = Detections(
        np.array([[20., 10., 60., 50.]]), masks, np.array([3]), np.array([.9]))
    panel = draw(pixels, found, 'w4a4')
    assert panel.shape == (TITLE_HEIGHT + 60 * SCALE, 80 * SCALE, 3)
    body = panel[TITLE_HEIGHT:]
    inside = body[40 * SCALE, 40 * SCALE].astype(float)
    assert np.abs(inside - (60 + .4 * color_of(3))).max() <= 2
    assert (body[:, 65 * SCALE:] == 100).all()


def test_every_class_has_a_colour_of_its_own():
    colors = {tuple(color_of(label)) for label in range(len(CLASSES))}
    assert len(colors) == len(CLASSES)


def test_panels_stand_side_by_side():
    panels = [np.full((5, width, 3), width, np.uint8) for width in (4, 6)]
    joined = side_by_side(panels)
    assert joined.shape == (5, 10 + GAP, 3)
    assert (joined[:, :4] == 4).all() and (joined[:, -6:] == 6).all()
    assert (joined[:, 4:-6] == 255).all()


def test_the_readme_shows_a_small_file():
    assert f']({OUT})' in (REPO / 'README.md').read_text()
    assert (REPO / OUT).stat().st_size < MAX_BYTES
