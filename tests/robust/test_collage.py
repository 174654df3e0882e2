"""collage.py in finer detail: points, interpolation, holes that are nothing or everything, wrong arguments."""

import math

import numpy as np
import pytest

from collage import Collage, composite, fill_holes
from tests.pictures import box, disc, noise, smooth


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


def test_smooth_pictures_follow_the_matrix():
    image = smooth()
    for scale, angle in ((1.0, 0.4), (1.5, -1.0), (0.6, 2.0)):
        c, s = scale * math.cos(angle), scale * math.sin(angle)
        A = np.array([[c, -s, 32 - 32 * c + 32 * s], [s, c, 32 - 32 * s - 32 * c]])
        coarse = composite(image, [(disc(64, 64, 32, 32, 16), A)]).astype(float)
        for x, y in ((32.5, 32.5), (36.5, 30.5), (29.5, 37.5)):
            u, v = A @ [x, y, 1]
            i, j = int(v), int(u)
            u, v = np.linalg.inv(A[:, :2]) @ (np.array([j + 0.5, i + 0.5]) - A[:, 2])
            assert np.abs(coarse[i, j, :3] - image[int(v), int(u)]).max() < 12


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
