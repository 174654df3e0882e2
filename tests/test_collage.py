"""Collages: what is moved arrives unharmed, what it leaves is a hole, and what is wrong is said in one line."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import collage
from collage import Collage, composite, fill_holes, read_edits


def noise(H=40, W=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def smooth(H=64, W=64):
    y, x = np.mgrid[:H, :W] / max(H, W)
    return (127 + 100 * np.stack([np.sin(5 * x + y), np.cos(4 * y), np.sin(3 * x - 4 * y)], 2)).astype(np.uint8)


def box(H, W, x0, y0, x1, y1):
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def disc(H, W, x, y, r):
    return np.hypot(*np.ogrid[0.5 - y : H - y, 0.5 - x : W - x]) < r


# ---------------------------------------------------------------------------------------------------------------------
# The verbs


def test_nothing_done_changes_nothing():
    image = noise()
    edit = Collage(image)
    edit.segment(disc(40, 48, 20, 20, 9))
    edit.segment(box(40, 48, 15, 15, 40, 40))  # they may overlap
    assert (edit.coarse()[..., :3] == image).all() and edit.mask().all() and (edit.inpainted() == image).all()


def test_whole_pixels_move_exactly_and_leave_a_hole():
    image, mask = noise(), disc(40, 48, 14, 20, 9)
    edit = Collage(image)
    edit.segment(mask).translate(20, -3)
    coarse = edit.coarse()
    there = np.roll(mask, (-3, 20), (0, 1))
    assert (coarse[there][:, :3] == image[mask]).all()
    assert ((coarse[..., 3] == 0) == (mask & ~there)).all() and (edit.mask() == (coarse[..., 3] == 255)).all()
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
    assert edit.mask().all()


def test_many_small_turns_are_one_resampling():
    image = noise()
    edit = Collage(image)
    s = edit.segment(disc(40, 48, 24, 20, 12))
    for _ in range(360):
        s.rotate(1).translate(0.1, 0)
    s.translate(-36, 0)
    assert np.abs(edit.coarse()[..., :3].astype(int) - image).max() <= 1


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


def test_duplicates_delete_and_order():
    image = noise()
    mask = box(40, 48, 2, 2, 10, 10)
    edit = Collage(image)
    edit.segment(mask).duplicate().translate(12, 0).duplicate().translate(12, 5)
    coarse = edit.coarse()
    assert (coarse[2:10, 2:10] == coarse[2:10, 14:22]).all() and (coarse[2:10, 2:10] == coarse[7:15, 26:34]).all()
    assert edit.mask().all() and (coarse[2:10, 2:10, :3] == image[2:10, 2:10]).all()
    edit = Collage(image)
    edit.segment(mask).delete()
    assert (edit.mask() == ~mask).all()
    with pytest.raises(ValueError, match="is deleted"):
        edit.segments[0].translate(1, 1)
    for z, front in ((0, "moved"), (-1, "other")):
        edit = Collage(image)
        edit.segment(box(40, 48, 14, 2, 22, 10))
        edit.segment(mask, z=z).translate(12, 0)
        expected = image[2:10, 2:10] if front == "moved" else image[2:10, 14:22]
        assert (edit.coarse()[2:10, 14:22, :3] == expected).all()


# ---------------------------------------------------------------------------------------------------------------------
# Seams


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


# ---------------------------------------------------------------------------------------------------------------------
# Holes


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


# ---------------------------------------------------------------------------------------------------------------------
# What to cut out


def test_polygons_and_boxes_hold_the_pixels_whose_centres_are_inside():
    square = collage.polygon_mask((20, 30), [(3, 4), (10, 4), (10, 9), (3, 9)])
    assert (square == box(20, 30, 3, 4, 10, 9)).all()
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = np.stack([14 + 8 * np.cos(angles), 10 + 8 * np.sin(angles)], 1)
    assert (collage.polygon_mask((20, 30), circle) != disc(20, 30, 14, 10, 8)).sum() < 6
    assert collage.polygon_mask((20, 30), [(0, 0), (30, 0), (30, 20), (0, 20)]).all()


def test_a_click_finds_the_thing_that_is_there():
    rng = np.random.default_rng(0)
    image = np.clip(smooth(200, 300) * 0.3 + [20, 90, 30] + rng.normal(0, 6, (200, 300, 3)), 0, 255)
    thing = disc(200, 300, 90, 110, 40)
    image[thing] = [200, 60, 40] + rng.normal(0, 6, (thing.sum(), 3))
    image = image.clip(0, 255).astype(np.uint8)
    for at in ((90, 110), (70, 95)):
        mask = collage.segment_at(image, at)
        assert (mask & thing).sum() / (mask | thing).sum() > 0.93
        assert (collage.segment_at(image, at) == mask).all()
    assert not (collage.segment_at(image, (250, 30)) & thing).sum() > 0.05 * thing.sum()


@pytest.mark.parametrize("H, W", [(1, 1), (2, 3), (1, 50), (600, 5), (16, 16)])
def test_a_click_in_any_picture(H, W):
    for image in (noise(H, W), np.full((H, W, 3), 70, np.uint8)):
        mask = collage.segment_at(image, (W - 1, 0.5))
        assert mask.shape == (H, W) and mask.dtype == bool and mask.any()


# ---------------------------------------------------------------------------------------------------------------------
# edits.json


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "photo.png")
    Image.fromarray(disc(40, 48, 14, 20, 9)).save(tmp_path / "m.png")
    cutout = np.dstack([noise(), np.uint8(255) * disc(40, 48, 14, 20, 9)])
    Image.fromarray(cutout).save(tmp_path / "cutout.png")
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(tmp_path / "empty.png")
    Image.fromarray(np.full((20, 24), 255, np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(np.full((40, 48), 9999, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("not a picture")
    return tmp_path


def write(folder, content):
    path = folder / "edits.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_says_what_python_says(folder):
    path = write(folder, {"image": "photo.png", "segments": [
        {"mask": "m.png", "edits": [{"translate": [12, 3]}, {"scale": 1.3, "about": [20, 20]}, {"rotate": 20}], "z": 1},
        {"polygon": [[30, 5], [45, 5], [40, 20]], "edits": [{"duplicate": True}, {"mirror": "vertical"}]},
        {"box": [30, 25, 40, 35], "edits": [{"delete": True}]},
        {"click": [2, 3], "edits": []},
    ]})  # fmt: skip
    asked = []

    def segmenter(image, at):
        asked.append((image.shape, at))
        return box(40, 48, 0, 0, 5, 5)

    edit = Collage(noise())
    edit.segment(disc(40, 48, 14, 20, 9), z=1).translate(12, 3).scale(1.3, about=(20, 20)).rotate(20)
    edit.segment(collage.polygon_mask((40, 48), [[30, 5], [45, 5], [40, 20]])).duplicate().mirror("vertical")
    edit.segment(box(40, 48, 30, 25, 40, 35)).delete()
    assert (read_edits(path, segmenter).coarse() == edit.coarse()).all()
    assert asked == [((40, 48, 3), (2, 3))]
    read_edits(write(folder, {"image": "photo.png", "segments": [{"click": [2, 3]}]}))  # its own segmenter
    edit = read_edits(write(folder, {"image": "photo.png", "segments": [{"mask": "cutout.png"}]}))
    assert (edit.segments[0].mask == disc(40, 48, 14, 20, 9)).all()


def test_pictures_are_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(noise()).save(folder / "turned.png", exif=exif)
    path = write(folder, {"image": "turned.png", "segments": [{"box": [0, 0, 40, 48], "edits": []}]})
    assert (read_edits(path).image == np.rot90(noise(), -1)).all()


ONE = '{"image": "photo.png", "segments": [%s]}'
EDIT = ONE % '{"box": [4, 4, 20, 20], "edits": [%s]}'


@pytest.mark.parametrize("content, message", [
    ('{"image": "photo.png",\n "segments": [}', r"edits.json, line 2, column 15: not JSON"),
    ("", "line 1, column 1: not JSON"),
    ("[" * 100000, "not a JSON file that can be read|not JSON"),
    ("[]", r"the file is an object .* not \[\]"),
    ('{"image": "photo.png"}', 'lacks "segments"'),
    ('{"image": "photo.png", "segments": []}', "one segment or more"),
    ('{"image": "photo.png", "segments": [], "seed": 1}', "the file has no 'seed': known are image, segments"),
    ('{"image": "no.png", "segments": [{}]}', "no.png: there is no such file"),
    ('{"image": "text.png", "segments": [{}]}', "text.png is not a picture"),
    ('{"image": "deep.png", "segments": [{}]}', "8 bits per channel"),
    ('{"image": 7, "segments": [{}]}', "a picture is named by its path, not 7"),
    (ONE % "{}", "segment 1: a segment has one of box, click, mask, polygon, not 0"),
    (ONE % '{"box": [0, 0, 9, 9]}, {"box": [0, 0, 9, 9], "click": [1, 1]}', "segment 2: a segment has one of .* not 2"),
    (ONE % '{"circle": 1}', "a segment has no 'circle': known are box, click, edits, mask, polygon, z"),
    (ONE % '{"mask": "empty.png"}', "empty.png is an empty mask"),
    (ONE % '{"mask": "small.png"}', "the mask is 24 x 20 and the picture 48 x 40"),
    (ONE % '{"mask": "../no/m.png"}', "no such file"),
    (ONE % '{"polygon": [[0, 0], [9, 9]]}', "three points"),
    (ONE % '{"polygon": 3}', "a polygon is a list"),
    (ONE % '{"polygon": [[0, 0], [9, 9], [50, 3]]}', "the point 50, 3 of a polygon is outside the picture of 48 x 40"),
    (ONE % '{"polygon": [[0, 0], [9, 0], [5, 0]]}', "no pixel inside"),
    (ONE % '{"box": [9, 9, 9, 20]}', "no pixel inside"),
    (ONE % '{"box": [9, 9, 9]}', "a box is four numbers"),
    (ONE % '{"click": [48, 1]}', "the click 48, 1 is outside the picture"),
    (ONE % '{"click": [-1, 1]}', "the click -1, 1 is outside the picture"),
    (ONE % '{"click": "1, 2"}', "a click is two numbers"),
    (ONE % '{"box": [0, 0, 9, 9], "z": "top"}', "z is a finite number, not 'top'"),
    (ONE % '{"box": [0, 0, 9, 9], "edits": {}}', '"edits" is a list'),
    (EDIT % '{"move": [1, 2]}', "an edit has no 'move': known are about, delete, .* translate"),
    (EDIT % '{"rotate": 1, "scale": 2}', "segment 1, edit 1: an edit has one of .* not 2"),
    (EDIT % '{"about": [1, 1]}', "an edit has one of .* not 0"),
    (EDIT % '"delete"', "an edit is an object"),
    (EDIT % '{"translate": [1]}', r"translate is two numbers, x and y, not \[1\]"),
    (EDIT % '{"translate": [1, NaN]}', "finite number, not nan"),
    (EDIT % '{"translate": [1, 2], "about": [1, 1]}', '"about" goes with'),
    (EDIT % '{"rotate": 1, "about": 4}', "about is two numbers"),
    (EDIT % '{"rotate": 3}, {"scale": 0}', "segment 1, edit 2: a scale is larger than 0, not 0"),
    (EDIT % '{"scale": -1}', "larger than 0, not -1: say mirror"),
    (EDIT % '{"scale": 1e999}', "finite number, not inf"),
    (EDIT % ('{"scale": 1%s}' % ("0" * 400)), "finite number, not 1000"),
    (EDIT % '{"scale": 1e300}, {"scale": 1e300}', "edit 2: the numbers are too large"),
    (EDIT % '{"scale": true}', "finite number, not True"),
    (EDIT % '{"mirror": "left"}', "mirror is 'horizontal' .* not 'left'"),
    (EDIT % '{"mirror": ["horizontal"]}', "mirror is 'horizontal'"),
    (EDIT % '{"delete": false}', '"delete" is true or left out'),
    (EDIT % '{"delete": true}, {"rotate": 3}', "edit 2: the segment is deleted"),
    (EDIT % '{"translate": [44, 0]}', "edits.json: segment 1 ends up outside the picture: to remove it, say delete"),
    (EDIT % '{"translate": [1e300, 0]}', "outside the picture"),
    (EDIT % '{"duplicate": true}, {"translate": [0, -30]}', "outside the picture"),
    (EDIT % '{"scale": 0.02}', "smaller than a pixel"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(folder, content, message):
    with pytest.raises(ValueError, match=message) as e:
        read_edits(write(folder, content))
    assert "\n" not in str(e.value) and str(folder) in str(e.value) and len(str(e.value)) < 400


def test_a_missing_file_and_wrong_pictures(folder):
    with pytest.raises(ValueError, match="there is no such file"):
        read_edits(folder / "no.json")
    (folder / "latin.json").write_bytes(b'{"image": "\xff"}')
    with pytest.raises(ValueError, match="not a JSON file"):
        read_edits(folder / "latin.json")
    with pytest.raises(ValueError, match="uint8"):
        Collage(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="the mask is empty"):
        Collage(noise()).segment(np.zeros((40, 48)))
