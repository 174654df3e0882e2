"""edits.json and its clicks: a file says what Python says, and what is wrong is said in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from collage import Collage
from editing.click import segment_at
from editing.edits_json import fill_polygon, read_edits
from tests.pictures import box, disc, noise, smooth

# --- What to cut out ------------------------------------------------------------------------------


def test_polygons_and_boxes_hold_the_pixels_whose_centres_are_inside():
    square = fill_polygon((20, 30), [(3, 4), (10, 4), (10, 9), (3, 9)])
    assert (square == box(20, 30, 3, 4, 10, 9)).all()
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = np.stack([14 + 8 * np.cos(angles), 10 + 8 * np.sin(angles)], 1)
    assert (fill_polygon((20, 30), circle) != disc(20, 30, 14, 10, 8)).sum() < 6
    assert fill_polygon((20, 30), [(0, 0), (30, 0), (30, 20), (0, 20)]).all()


def test_polygons_follow_the_even_odd_rule_at_every_pixel():
    """One pixel after the other: how many edges are crossed on the way from it to the left."""
    rng = np.random.default_rng(0)
    for n in (3, 7, 40, 2500):
        points = (rng.random((n, 2)) * [23, 17] * 2).round() / 2  # many on pixels' centres and edges
        filled = fill_polygon((17, 23), points)
        for y, x in np.ndindex(17, 23) if n < 1000 else ((8, 11), (0, 22), (16, 5)):
            inside = False
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
                if (y0 <= y + 0.5) != (y1 <= y + 0.5):
                    inside ^= x + 0.5 > x0 + (y + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            assert filled[y, x] == inside


def test_a_click_finds_the_thing_that_is_there():
    rng = np.random.default_rng(0)
    image = np.clip(smooth(200, 300) * 0.3 + [20, 90, 30] + rng.normal(0, 6, (200, 300, 3)), 0, 255)
    thing = disc(200, 300, 90, 110, 40)
    image[thing] = [200, 60, 40] + rng.normal(0, 6, (thing.sum(), 3))
    image = image.clip(0, 255).astype(np.uint8)
    for at in ((90, 110), (70, 95)):
        mask = segment_at(image, at)
        assert (mask & thing).sum() / (mask | thing).sum() > 0.93
        assert (segment_at(image, at) == mask).all()
    assert not (segment_at(image, (250, 30)) & thing).sum() > 0.05 * thing.sum()


@pytest.mark.parametrize("H, W", [(1, 1), (2, 3), (1, 50), (600, 5), (16, 16)])
def test_a_click_in_any_picture(H, W):
    for image in (noise(H, W), np.full((H, W, 3), 70, np.uint8)):
        mask = segment_at(image, (W - 1, 0.5))
        assert mask.shape == (H, W) and mask.dtype == bool and mask.any()


# --- edits.json -----------------------------------------------------------------------------------


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
    edit.segment(fill_polygon((40, 48), [[30, 5], [45, 5], [40, 20]])).duplicate().mirror("vertical")
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


def test_ten_thousand_pieces_and_no_more(folder):
    box = '{"box": [4, 4, 20, 20], "edits": [%s]}'
    on = '{"duplicate": true}, {"translate": [0.001, 0]}, {"duplicate": true}'
    many = read_edits(write(folder, ONE % (box % ", ".join([on] * 1000))))
    assert many.coarse().shape == (40, 48, 4) and len(many.segments[0].places) == 2001
    for segments in (box % ", ".join([on] * 5000), ", ".join([box % ""] * 10001)):
        with pytest.raises(ValueError, match="more than 10000 segments and duplicates"):
            read_edits(write(folder, ONE % segments))
    with pytest.raises(ValueError, match="1200000 segments of a picture of 48 x 40 do not fit into memory: 1118481 do"):
        read_edits(write(folder, ONE % ", ".join(["0"] * 1200000)))


@pytest.mark.parametrize("content, message", [
    ('{"image": "photo.png",\n "segments": [}', r"edits.json, line 2, column 15: not JSON"),
    ("", "line 1, column 1: not JSON"),
    ("[" * 100000, "not a JSON file that can be read|not JSON"),
    ('{"image": "photo.png", "image": "m.png", "segments": []}', r"JSON file .* .'image' stands twice in one {\.\.\.}"),
    (EDIT % '{"scale": 2, "scale": 3}', "'scale' stands twice"),
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
    (ONE % '{"polygon": [[0, 0], [9, 9]]}', "three points"),
    (ONE % '{"polygon": [[0, 0], [9, 9], [50, 3]]}', "the point 50, 3 of a polygon is outside the picture of 48 x 40"),
    (ONE % '{"polygon": [[0, 0], [9, 0], [5, 0]]}', "no pixel inside"),
    (ONE % '{"box": [9, 9, 9]}', "a box is four numbers"),
    (ONE % '{"click": [48, 1]}', "the click 48, 1 is outside the picture"),
    (ONE % '{"click": "1, 2"}', "a click is two numbers"),
    (ONE % '{"box": [0, 0, 9, 9], "z": "top"}', "z is a finite number, not 'top'"),
    (ONE % '{"box": [0, 0, 9, 9], "edits": {}}', '"edits" is a list'),
    (EDIT % '{"move": [1, 2]}', "an edit has no 'move': known are about, delete, .* translate"),
    (EDIT % '{"rotate": 1, "scale": 2}', "segment 1, edit 1: an edit has one of .* not 2"),
    (EDIT % '{"translate": [1]}', r"translate is two numbers, x and y, not \[1\]"),
    (EDIT % '{"translate": [1, NaN]}', "finite number, not nan"),
    (EDIT % '{"translate": [1, 2], "about": [1, 1]}', '"about" goes with'),
    (EDIT % '{"rotate": 3}, {"scale": 0}', "segment 1, edit 2: a scale is larger than 0, not 0"),
    (EDIT % '{"scale": -1}', "larger than 0, not -1: say mirror"),
    (EDIT % '{"scale": 1e999}', "finite number, not inf"),
    (EDIT % ('{"scale": 1%s}' % ("0" * 400)), "finite number, not 1000"),
    (EDIT % '{"scale": 1e300}, {"scale": 1e300}', "edit 2: the numbers are too large"),
    (EDIT % f'{{"mirror": "{"x" * 10**6}"}}', r"mirror is .* not 'x{59}$"),
    (EDIT % '{"mirror": "left"}', "mirror is 'horizontal' .* not 'left'"),
    (EDIT % '{"delete": false}', '"delete" is true or left out'),
    (EDIT % '{"delete": true}, {"rotate": 3}', "edit 2: the segment is deleted"),
    (EDIT % '{"translate": [44, 0]}', "edits.json: segment 1 ends up outside the picture: to remove it, say delete"),
    (EDIT % '{"duplicate": true}, {"translate": [0, -30]}', "outside the picture"),
    (EDIT % '{"scale": 0.02}', "smaller than a pixel"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(folder, content, message):
    with pytest.raises(ValueError, match=message) as e:
        read_edits(write(folder, content))
    assert "\n" not in str(e.value) and str(folder) in str(e.value) and len(str(e.value)) < 400


def test_a_missing_file_and_a_wrong_encoding(folder):
    with pytest.raises(ValueError, match="there is no such file"):
        read_edits(folder / "no.json")
    (folder / "latin.json").write_bytes(b'{"image": "\xff"}')
    with pytest.raises(ValueError, match="not a JSON file"):
        read_edits(folder / "latin.json")
