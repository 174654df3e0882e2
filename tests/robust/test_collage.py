"""collage.py in finer detail: points, interpolation, holes that are nothing or everything, wrong arguments."""


import numpy as np
import pytest

from collage import Collage, fill_holes
from tests.pictures import box, noise


def test_about_a_point():
    image = noise()
    edit = Collage(image)
    edit.segment(box(40, 48, 0, 0, 10, 10)).rotate(180, about=(24, 20))  # of the picture's centre
    assert (edit.coarse()[30:, 38:, :3] == image[9::-1, 9::-1][:10, :10]).all()
    edit = Collage(image)
    edit.segment(box(40, 48, 0, 0, 10, 10)).scale(2, about=(0, 0))
    assert (edit.segments[0].centre == [10, 10]).all()
    blocks = edit.coarse()[:20, :20, :3].reshape(10, 2, 10, 2, 3).mean((1, 3))
    assert np.corrcoef(blocks.ravel(), image[:10, :10].ravel())[0, 1] > 0.9  # interpolated noise: 0.947


def test_no_holes_all_holes_and_nearly_all():
    image = noise()
    none = np.zeros((40, 48), bool)
    copy = fill_holes(image, none)
    assert (copy == image).all() and copy is not image
    assert (fill_holes(image, ~none) == 128).all()
    nearly = ~none
    nearly[5, 5] = False
    assert (fill_holes(image, nearly)[5, 5] == image[5, 5]).all()
    edges = ~box(40, 48, 10, 10, 38, 30)
    assert fill_holes(np.full((40, 48, 3), 90, np.uint8) * ~edges[..., None], edges).min() > 0


def test_wrong_pictures_and_masks():
    with pytest.raises(ValueError, match="uint8"):
        Collage(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="the mask is empty"):
        Collage(noise()).segment(np.zeros((40, 48)))
