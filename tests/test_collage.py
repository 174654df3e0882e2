"""Collages: what is moved arrives unharmed, and what it leaves is a hole."""

import numpy as np
import pytest

from collage import Collage, composite, fill_holes, is_seen
from tests.pictures import box, disc, noise, smooth

# --- The verbs ------------------------------------------------------------------------------------


def test_nothing_done_changes_nothing():
    image = noise()
    edit = Collage(image)
    edit.segment(disc(40, 48, 20, 20, 9))
    edit.segment(box(40, 48, 15, 15, 40, 40))  # they may overlap
    coarse = edit.coarse()
    assert (coarse[..., :3] == image).all() and (coarse[..., 3] == 255).all()


def test_whole_pixels_move_exactly_and_leave_a_hole():
    image, mask = noise(), disc(40, 48, 14, 20, 9)
    edit = Collage(image)
    edit.segment(mask).translate(20, -3)
    coarse = edit.coarse()
    there = np.roll(mask, (-3, 20), (0, 1))
    assert (coarse[there][:, :3] == image[mask]).all()
    assert (coarse[..., 3] == np.where(mask & ~there, 0, 255)).all()
    assert (coarse[~mask & ~there][:, :3] == image[~mask & ~there]).all()


@pytest.mark.parametrize("verbs, expected", [
    (lambda s: s.mirror(), lambda p: p[:, ::-1]),
    (lambda s: s.mirror("vertical"), lambda p: p[::-1]),
    (lambda s: s.rotate(90), lambda p: np.rot90(p, -1)),  # clockwise
    (lambda s: s.rotate(-90), lambda p: np.rot90(p)),
    (lambda s: s.rotate(30).scale(1.7).rotate(150).scale(1 / 1.7), lambda p: p[::-1, ::-1]),
    (lambda s: s.mirror().translate(8, 3).rotate(90).rotate(-90).translate(-8, -3).mirror(), lambda p: p),
])  # fmt: skip
def test_what_turns_about_its_centre_fits_its_place(verbs, expected):
    image = noise()
    edit = Collage(image)
    verbs(edit.segment(box(40, 48, 12, 8, 32, 28)))
    assert np.abs(edit.coarse()[8:28, 12:32, :3].astype(int) - expected(image[8:28, 12:32])).max() <= 1
    assert (edit.coarse()[..., 3] == 255).all()


def test_duplicates_delete_and_order():
    image = noise()
    mask = box(40, 48, 2, 2, 10, 10)
    edit = Collage(image)
    edit.segment(mask).duplicate().translate(12, 0).duplicate().translate(12, 5)
    coarse = edit.coarse()
    assert (coarse[2:10, 2:10] == coarse[2:10, 14:22]).all() and (coarse[2:10, 2:10] == coarse[7:15, 26:34]).all()
    assert (coarse[..., 3] == 255).all() and (coarse[2:10, 2:10, :3] == image[2:10, 2:10]).all()
    edit = Collage(image)
    edit.segment(mask).delete()
    assert ((edit.coarse()[..., 3] > 0) == ~mask).all()
    with pytest.raises(ValueError, match="is deleted"):
        edit.segments[0].translate(1, 1)
    for z, front in ((0, "moved"), (-1, "other")):
        edit = Collage(image)
        edit.segment(box(40, 48, 14, 2, 22, 10))
        edit.segment(mask, z=z).translate(12, 0)
        expected = image[2:10, 2:10] if front == "moved" else image[2:10, 14:22]
        assert (edit.coarse()[2:10, 14:22, :3] == expected).all()


# --- Seams ----------------------------------------------------------------------------------------


def test_no_fringe_of_what_was_around_it():
    """A red disc, cut out of green and laid on green, blue beneath it where it lands: no green comes along."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[..., 1], mask = 200, disc(64, 96, 24, 32, 15)
    image[:, 48:] = 0, 0, 200
    image[mask] = 200, 0, 0
    for verbs in (lambda s: s.translate(44.4, 1.7), lambda s: s.translate(46, 0).rotate(33).scale(1.2),
                  lambda s: s.translate(46, 0).scale(0.37)):
        edit = Collage(image)
        verbs(edit.segment(mask))
        right = edit.coarse()[:, 48:, :3].astype(int)
        assert right[..., 1].max() == 0 and np.abs(right.sum(2) - 200).max() <= 1  # mixtures of red and blue alone
        assert ((right[..., 0] > 20) & (right[..., 0] < 180)).any()  # the seam is soft


def test_half_covered_over_a_hole_is_kept_in_its_own_colour():
    image = np.full((32, 32, 3), 100, np.uint8)
    mask = box(32, 32, 8, 8, 16, 16)
    image[mask] = 250, 10, 30
    for shift, first in ((0.4, 8), (0.7, 9)):
        coarse = composite(image, [(mask, [[1, 0, shift], [0, 1, 0]])])
        assert set(np.unique(coarse[..., 3])) <= {0, 255}
        assert (coarse[10, first:15] == [250, 10, 30, 255]).all() and (coarse[10, 8:first] == 0).all()
        assert 100 <= coarse[10, 16, 0] < 250  # towards the background it is blended


def test_shrinking_averages():
    image = np.zeros((64, 64, 3), np.uint8)
    image[::2, ::2] = image[1::2, 1::2] = 200  # a checkerboard, grey from afar
    for factor in (0.5, 0.26, 0.2, 0.13):
        edit = Collage(image)
        edit.segment(box(64, 64, 0, 0, 64, 64)).scale(factor)
        r = int(32 * factor) - 2
        assert np.abs(edit.coarse()[32 - r : 32 + r, 32 - r : 32 + r, :3].astype(int) - 100).max() <= 12


# --- Holes ----------------------------------------------------------------------------------------


def test_holes_are_filled_from_around_and_nothing_else_changes():
    image, holes = smooth(), disc(64, 64, 30, 34, 9)
    broken = np.where(holes[..., None], 0, image).astype(np.uint8)
    before = broken.copy()
    filled = fill_holes(broken, holes, dilate=7)
    wide = disc(64, 64, 30, 34, 9 + 3 * 2**0.5 + 0.1)  # what a 7x7 kernel can reach
    assert (broken == before).all() and (filled[~wide] == image[~wide]).all()
    error, black = (np.abs(x[holes].astype(int) - image[holes]).mean() for x in (filled, broken))
    assert error < black / 4
    one = np.zeros((64, 64), bool)
    one[20, 20] = True
    changed = (fill_holes(noise(64, 64), one, dilate=7) != noise(64, 64)).any(2)
    assert changed[17:24, 17:24].mean() > 0.9 and changed.sum() == changed[17:24, 17:24].sum()


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


def test_a_piece_that_is_seen():
    """Its pixels' centres may all lie outside, where it has grown; or it is seen in one of the strips alone."""
    image = noise()
    edit = Collage(image)
    edit.segment(box(40, 48, 20, 10, 30, 20)).scale(200, about=(26, 16.4))
    coarse = edit.coarse()
    assert coarse[..., 3].min() == 255 and np.abs(coarse[:, :, :3] - image[16, 26].astype(int)).max() < 60
    mask = box(40, 48, 20, 10, 30, 20)
    for shift, seen in ((-19.9, True), (-29.4, True), (-29.6, False), (27.4, True), (27.6, False)):
        assert is_seen(mask, np.array([[1, 0, shift], [0, 1, 0]])) == seen
    tall = box(1100, 8, 2, 1060, 4, 1062)
    assert is_seen(tall, np.eye(2, 3)) and not is_seen(tall, np.array([[1, 0, 0], [0, 1, 40]]))


def test_wrong_pictures_and_masks():
    with pytest.raises(ValueError, match="uint8"):
        Collage(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="the mask is empty"):
        Collage(noise()).segment(np.zeros((40, 48)))
