"""edits.json: a collage written down, and the one place that checks what a person wrote in it.

    {"image": "photo.png",
     "segments": [{"click": [150, 220],
                   "edits": [{"translate": [60, 0]}, {"rotate": 20, "about": [x, y]}],
                   "z": 1},
                  {"mask": "bin.png", "edits": [{"delete": true}]}]}

    image     a path, relative to the JSON file. Points are in pixels of it, turned upright
    segments  what to cut out, one of
                  "mask"     a picture of the same size, white or opaque where the segment is
                  "polygon"  three points or more
                  "box"      [x0, y0, x1, y1]
                  "click"    a point in it: a segmenter finds the rest
    edits     done one after another as they are listed: translate, scale, rotate, mirror
              ("horizontal" or "vertical"), duplicate, delete, with what collage.Segment takes; "about" a
              point if not the segment's centre. Left out: the segment stays, and hides what is behind
    z         what is larger lies in front; 0 if left out
"""

import json
import math
from pathlib import Path

import numpy as np

from collage import Collage
from common.colours import to_srgb
from common.pictures import open_picture, to_rgb
from editing.click import segment_at

CUTS = {"mask", "polygon", "box", "click"}
PIECES, MEMORY = 10000, 2 * 2**30  # at most so many segments and duplicates; bytes of their masks
VERBS = {"translate", "scale", "rotate", "mirror", "duplicate", "delete"}


def read_edits(path, segmenter=None):
    """The file -> Collage. ValueError, in one line, for anything that is not as above.

    segmenter(image (H, W, 3) uint8, (x, y)) -> (H, W) bool resolves clicks; None: `segment_at`
    """
    path = Path(path)
    edits = read_json(path)
    try:
        return make_collage(edits, path.parent, segmenter)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def make_collage(edits, folder, segmenter=None):
    """What a file in `folder` holds -> Collage. Otherwise as `read_edits`"""
    where = ""  # the place in the file, for the message
    try:
        check_keys(edits, "the file", {"image", "segments"}, needed={"image", "segments"})
        picture = read_picture(folder, edits["image"])
        collage = Collage(np.array(picture))
        collage.info = picture.info  # its colour profile
        collage.files = [folder / edits["image"]]  # all that are read
        seen = np.array(to_srgb(picture))
        if not isinstance(edits["segments"], list) or not edits["segments"]:
            raise ValueError('"segments" is a list of one segment or more')
        H, W = seen.shape[:2]
        if len(edits["segments"]) * H * W > MEMORY:  # each has a mask of the whole picture
            many = f"{len(edits['segments'])} segments of a picture of {W} x {H}"
            raise ValueError(f"{many} do not fit into memory: {MEMORY // (H * W)} do")
        pieces = 0
        for n, spec in enumerate(edits["segments"], 1):
            where = f"segment {n}: "
            check_keys(spec, "a segment", CUTS | {"edits", "z"})
            cut = only_one_of(CUTS, spec, "a segment")
            mask = read_mask(seen, folder, cut, spec[cut], segmenter or segment_at)
            if cut == "mask":
                collage.files.append(folder / spec[cut])
            segment = collage.segment(mask, check_number(spec.get("z", 0), "z"))
            if not isinstance(spec.get("edits", []), list):
                raise ValueError('"edits" is a list')
            for m, edit in enumerate(spec.get("edits", []), 1):
                where = f"segment {n}, edit {m}: "
                apply_edit(segment, edit)
            pieces += len(segment.places) or 1
            if pieces > PIECES:
                raise ValueError(f"that makes more than {PIECES} segments and duplicates")
        where = ""
        collage.pieces()  # raises for a segment that is out of sight
    except ValueError as e:
        raise ValueError(f"{where}{e}") from None
    return collage


def read_json(path):
    try:
        return json.loads(path.read_text("utf-8-sig"), object_pairs_hook=read_object)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {e.lineno}, column {e.colno}: not JSON: {e.msg}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not a JSON file that can be read ({e})") from None


def read_object(pairs):
    found = {}
    for name, value in pairs:
        if name in found:  # JSON itself takes the last
            raise ValueError(f"{shorten(name)} stands twice in one {{...}}")
        found[name] = value
    return found


def apply_edit(segment, edit):
    """One entry of "edits", done to the segment."""
    check_keys(edit, "an edit", VERBS | {"about"})
    verb = only_one_of(VERBS, edit, "an edit")
    value = edit[verb]
    if "about" in edit and verb not in ("scale", "rotate", "mirror"):
        raise ValueError(f'"about" goes with scale, rotate and mirror, not with {verb}')
    about = check_point(edit["about"], "about") if "about" in edit else None
    if verb == "translate":
        segment.translate(*check_point(value, "translate"))
    elif verb == "scale":
        segment.scale(check_number(value, "a scale"), about)
    elif verb == "rotate":
        segment.rotate(check_number(value, "an angle"), about)
    elif verb == "mirror":
        segment.mirror(value, about)
    elif value is not True:
        raise ValueError(f'"{verb}" is true or left out, not {shorten(value)}')
    elif verb == "duplicate":
        segment.duplicate()
    else:
        segment.delete()


# --------------------------------------------------------------------------------------------------
# What to cut out


def read_mask(image, folder, cut, value, segmenter):
    """One of "mask", "polygon", "box", "click" -> (H, W) bool"""
    H, W = image.shape[:2]
    if cut == "mask":
        return read_picture(folder, value, mask=True)
    if cut == "click":
        x, y = check_point(value, "a click")
        if not (0 <= x < W and 0 <= y < H):
            raise ValueError(f"the click {x:g}, {y:g} is outside the picture of {W} x {H}")
        return segmenter(image, (x, y))

    # A box is a polygon of four points.
    if not isinstance(value, list):
        raise ValueError(f"a {cut} is a list, not {shorten(value)}")
    if cut == "polygon" and len(value) < 3:
        raise ValueError(f"a polygon has three points or more, not {len(value)}")
    if cut == "box":
        if len(value) != 4:
            raise ValueError(f"a box is four numbers, x0, y0, x1, y1, not {shorten(value)}")
        x0, y0, x1, y1 = value
        value = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    points = [check_point(p, f"a point of a {cut}") for p in value]
    for x, y in points:
        if not (0 <= x <= W and 0 <= y <= H):
            what = f"the point {x:g}, {y:g} of a {cut}"
            raise ValueError(f"{what} is outside the picture of {W} x {H}")
    mask = fill_polygon((H, W), points)
    if not mask.any():
        raise ValueError(f"the {cut} has no pixel inside")
    return mask


def fill_polygon(size, points):
    """size (H, W), points (n, 2) -> bool: whose centres lie inside, by the even-odd rule."""
    H, W = size
    y, x = np.arange(H) + 0.5, np.arange(W) + 0.5
    starts = np.asarray(points, float)
    ends = np.roll(starts, -1, 0)
    flips = np.zeros((H, W + 1), bool)  # a crossing turns all to its right from outside to inside, or back
    for some in (slice(i, i + 1000) for i in range(0, len(starts), 1000)):
        (x0, y0), (x1, y1) = starts[some].T, ends[some].T
        # The rows that each edge crosses, from the upper end on, before the lower end.
        start, stop = np.searchsorted(y, np.minimum(y0, y1)), np.searchsorted(y, np.maximum(y0, y1))
        n = stop - start
        edge = np.repeat(np.arange(len(n)), n)
        row = np.arange(n.sum()) - np.repeat(n.cumsum() - n - start, n)
        slope = (x1 - x0)[edge] / (y1 - y0)[edge]
        column = np.searchsorted(x, x0[edge] + (y[row] - y0[edge]) * slope, side="right")
        np.logical_xor.at(flips, (row, column), True)
    return np.logical_xor.accumulate(flips[:, :W], axis=1)


def read_picture(folder, name, mask=False):
    """A picture, turned upright -> RGB, on white; or with mask=True (H, W) bool."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"a picture is named by its path, not {shorten(name)}")
    path = folder / name
    picture = open_picture(path)
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has mode {picture.mode}: save it with 8 bits per channel")
    if not mask:
        return to_rgb(picture)
    # A cut-out is opaque where the segment is, and any other mask is white there.
    rgba = picture.convert("RGBA")
    alpha = np.asarray(rgba)[..., 3]
    found = (alpha if (alpha < 255).any() else np.asarray(rgba.convert("L"))) > 127
    if not found.any():
        why = "it should be white (over 127) where the segment is"
        raise ValueError(f"{path} is an empty mask: {why}")
    return found


# --------------------------------------------------------------------------------------------------
# What is wrong


def check_keys(x, what, known, needed=frozenset()):
    if not isinstance(x, dict):
        raise ValueError(f"{what} is an object {{...}} with {list_words(known)}, not {shorten(x)}")
    if unknown := sorted(x.keys() - known):
        raise ValueError(f"{what} has no {shorten(unknown[0])}: known are {list_words(known)}")
    if missing := sorted(needed - x.keys()):
        raise ValueError(f'{what} lacks "{missing[0]}"')


def only_one_of(words, x, what):
    found = words & x.keys()
    if len(found) != 1:
        raise ValueError(f"{what} has one of {list_words(words)}, not {len(found)} of them")
    return found.pop()


def check_number(x, what):
    try:
        if not isinstance(x, (bool, str)) and math.isfinite(x):
            return float(x)
    except (TypeError, OverflowError):
        pass
    raise ValueError(f"{what} is a finite number, not {shorten(x)}")


def check_point(p, what):
    if not isinstance(p, list) or len(p) != 2:
        raise ValueError(f"{what} is two numbers, x and y, not {shorten(p)}")
    return check_number(p[0], f"x of {what}"), check_number(p[1], f"y of {what}")


def shorten(x):
    text = repr(x)
    return text if len(text) < 50 else text[:46] + " ..."


def list_words(words):
    return ", ".join(sorted(words))
