"""The Collage Transform of Magic Fixup, section 3.1: cut a photo into segments, rearrange them, keep track of holes.

    collage = Collage(image)                            # (H, W, 3) uint8
    dog = collage.segment(mask)                         # (H, W) bool
    dog.translate(60, -10).scale(1.2).rotate(15).mirror()
    dog.duplicate().translate(80, 0)                    # what was there stays, and a copy goes on from it
    collage.segment(bin_mask).delete()
    collage.coarse()                                    # (H, W, 4) uint8, alpha 0 = holes; for Magic Fixup then:
    collage.inpainted(), collage.mask()                 # (H, W, 3) uint8; (H, W) bool, True = kept

    read_edits("edits.json")                            # the same collage, written down; its docstring has the format
    composite(image, pieces), fill_holes(image, holes)  # the functions underneath

Points are in pixels, x to the right and y down, and the picture spans 0 .. W and 0 .. H: its first pixel's centre is at
(0.5, 0.5). Angles are in degrees and turn clockwise as seen on the screen.
"""

import json
import math
from pathlib import Path

import cv2
import numpy as np

from common.pictures import open_picture, to_rgb

# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def composite(image, pieces):
    """Lift pieces out of a picture and lay them down elsewhere. -> the coarse edit (H, W, 4) uint8

    image   (H, W, 3) uint8
    pieces  from back to front, each (mask (H, W) bool, matrix): the 2x3 similarity takes points of the picture to where
            they go; None only lifts. The same mask may come several times: once with the identity is "it stays".

    Alpha is 0 in holes, from which something was lifted and nothing laid there, and 255 elsewhere. Seams are blended by
    how much of a pixel is covered, but over a hole there is nothing to blend with: M is binary in the paper, so a pixel
    that is half covered or more shows the piece's own colour, and one that is less is a hole. Holes are black.
    """
    H, W, _ = image.shape
    canvas = np.full((H, W, 4), 255, np.float32)  # colours times coverage, and coverage, both times 255
    canvas[..., :3] = image
    for mask, _ in pieces:
        canvas[np.asarray(mask, bool)] = 0
    for mask, matrix in pieces:
        if matrix is not None and (layer := lay(image, np.asarray(mask, bool), np.asarray(matrix, float))) is not None:
            piece, where = layer
            canvas[where] = piece + canvas[where] * (1 - piece[..., 3:] / 255)
    cover = canvas[..., 3:]
    kept = cover >= 127.5
    colour = np.where(kept, canvas[..., :3] * 255 / np.maximum(cover, 1), 0)
    return np.concatenate([colour.round().clip(0, 255), 255 * kept], 2).astype(np.uint8)


def lay(image, mask, matrix):
    """One piece where it goes -> (h, w, 4) float32, colours times coverage and coverage; its place: slices of y, x.

    None if that is outside the picture. The pixels are resampled once, whatever the matrix is made of.
    """
    H, W = mask.shape
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return None
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    corners = matrix @ np.array([[x0, x1, x0, x1], [y0, y0, y1, y1], [1, 1, 1, 1]])
    (u0, v0), (u1, v1) = np.floor(corners.min(1)) - 1, np.ceil(corners.max(1)) + 1  # where it goes, at most
    u0, u1, v0, v1 = (int(np.clip(v, 0, n)) for v, n in ((u0, W), (u1, W), (v0, H), (v1, H)))
    if u0 >= u1 or v0 >= v1:
        return None
    # Cut out before it is resampled, so that nothing of its surroundings comes along: colours weighted by coverage.
    piece = np.full((y1 - y0, x1 - x0, 4), 255, np.float32)
    piece[..., :3] = image[y0:y1, x0:x1]
    piece *= mask[y0:y1, x0:x1, None]
    # A piece that shrinks is averaged over blocks first; linear interpolation alone would skip pixels.
    scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    block = min(max(1, round(1 / max(scale, 1e-9))), *mask.shape)
    if block > 1:
        h, w = (-(-n // block) for n in piece.shape[:2])
        piece = np.pad(piece, ((0, h * block - piece.shape[0]), (0, w * block - piece.shape[1]), (0, 0)))
        piece = np.ascontiguousarray(piece.reshape(h, block, w, block, 4).mean((1, 3)))
    # From indices of `piece` to indices of the result: an index is a position less a half.
    unpack = np.array([[block, 0, x0 + block / 2], [0, block, y0 + block / 2], [0, 0, 1]])
    A = matrix @ unpack - [[0, 0, u0 + 0.5], [0, 0, v0 + 0.5]]
    where = slice(v0, v1), slice(u0, u1)
    return cv2.warpAffine(piece, A, (u1 - u0, v1 - v0), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT), where


def fill_holes(image, holes, dilate=None):
    """A copy of the image with its holes painted in from what surrounds them, as Magic Fixup starts from.

    image   (H, W, 3) uint8, RGB
    holes   (H, W) bool. They are widened by a kernel of `dilate` x `dilate` pixels, which takes the seams along too.
            None: 7 for a picture of 512x512 as in the release, in proportion for others, and 3 at least

    Navier-Stokes inpainting (Bertalmio et al. 2001; the paper's [8]) at a radius of 3 pixels, kernel and radius as the
    Magic Fixup release samples with, at 512x512. Everything else is as it was. No picture left at all: mid-grey.
    """
    holes = np.ascontiguousarray(holes, np.uint8)
    if not holes.any():
        return image.copy()
    if dilate is None:
        dilate = max(3, 2 * round((7 * holes.size**0.5 / 512 - 1) / 2) + 1)  # odd
    wide = cv2.dilate(holes, np.ones((dilate, dilate), np.uint8))
    wide = holes if wide.all() else wide  # keep what little there is to start from
    return np.full_like(image, 128) if wide.all() else cv2.inpaint(np.ascontiguousarray(image), wide, 3, cv2.INPAINT_NS)


# ---------------------------------------------------------------------------------------------------------------------
# The verbs


class Segment:
    """One part of the picture and where it is seen. Every verb returns the segment; `Collage.segment` makes them."""

    def __init__(self, mask, z):
        self.mask, self.z = mask, z
        self.places = [np.eye(2, 3)]  # a matrix for each time that it is seen; the verbs change the last
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        self.middle = np.array([columns[0] + columns[-1] + 1, rows[0] + rows[-1] + 1]) / 2  # of its bounding box

    @property
    def centre(self):
        """x, y of the middle of its bounding box, wherever it has come to by now."""
        return self.last[:, :2] @ self.middle + self.last[:, 2]

    @property
    def last(self):
        if not self.places:
            raise ValueError("the segment is deleted: nothing can follow")
        return self.places[-1]

    def translate(self, dx, dy):
        """To the right by dx and down by dy pixels."""
        return self.then(np.eye(2), shift=[number(dx, "dx"), number(dy, "dy")])

    def scale(self, factor, about=None):
        """`factor` times as large, about a point (x, y); None: about its centre."""
        if number(factor, "a scale") <= 0:
            raise ValueError(f"a scale is larger than 0, not {factor:g}: say mirror to mirror it, delete to remove it")
        return self.then(factor * np.eye(2), about)

    def rotate(self, degrees, about=None):
        """Turned clockwise about a point (x, y); None: about its centre."""
        angle = math.radians(number(degrees, "an angle"))
        return self.then(np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]), about)

    def mirror(self, direction="horizontal", about=None):
        """"horizontal": left becomes right; "vertical": top becomes bottom. About a point (x, y) or its centre."""
        if direction not in ("horizontal", "vertical"):
            raise ValueError(f"mirror is 'horizontal' (left becomes right) or 'vertical', not {direction!r}")
        return self.then(np.diag([-1.0, 1.0] if direction == "horizontal" else [1.0, -1.0]), about)

    def duplicate(self):
        """It stays as it is now, and what follows is done to a copy."""
        self.places.append(self.last.copy())
        return self

    def delete(self):
        """It is taken away: a hole remains."""
        _ = self.last  # raises if it is gone already
        self.places.pop()
        return self

    def then(self, linear, about=None, shift=(0.0, 0.0)):
        about = self.centre if about is None else np.array(point(about, "about"))
        offset = about - linear @ about + shift
        with np.errstate(all="ignore"):
            matrix = np.column_stack([linear @ self.last[:, :2], linear @ self.last[:, 2] + offset])
        if not np.isfinite(matrix).all():
            raise ValueError("the numbers are too large")
        self.places[-1] = matrix
        return self


class Collage:
    """A picture (H, W, 3) uint8 and its segments, to be rearranged. ValueError for another kind of picture."""

    def __init__(self, image):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"a collage is made of (H, W, 3) uint8, not {tuple(image.shape)} {image.dtype}")
        self.image, self.segments = image, []

    def segment(self, mask, z=0):
        """Cut out mask (H, W) bool. -> Segment. Larger z lies in front; at the same z, what was cut out later does."""
        mask, (H, W) = np.asarray(mask, bool), self.image.shape[:2]
        if mask.shape != (H, W):
            sizes = " x ".join(map(str, mask.shape[::-1]))
            raise ValueError(f"the mask is {sizes} and the picture {W} x {H}: they must be of one size")
        if not mask.any():
            raise ValueError("the mask is empty: there is nothing to cut out")
        self.segments.append(Segment(mask, number(z, "z")))
        return self.segments[-1]

    def pieces(self):
        """What `composite` takes. ValueError if a segment is nowhere to be seen though nobody deleted it."""
        H, W = self.image.shape[:2]
        for n, segment in enumerate(self.segments, 1):
            y, x = segment.mask.nonzero()
            for A in segment.places:
                u, v = A[:, :2] @ [x + 0.5, y + 0.5] + A[:, 2:]
                if not ((u > 0) & (u < W) & (v > 0) & (v < H)).any():
                    raise ValueError(f"segment {n} ends up outside the picture: to remove it, say delete")
                if abs(np.linalg.det(A[:, :2])) * len(x) < 0.5:
                    raise ValueError(f"segment {n} ends up smaller than a pixel: to remove it, say delete")
        order = sorted(self.segments, key=lambda segment: segment.z)
        return [(segment.mask, A) for segment in order for A in segment.places or [None]]

    def coarse(self):
        """The coarse edit (H, W, 4) uint8; alpha is 0 in holes and 255 elsewhere. See `composite` about the seams."""
        return composite(self.image, self.pieces())

    def mask(self):
        """Magic Fixup's M, (H, W) bool: True where there is content, False in holes."""
        return self.coarse()[..., 3] > 0

    def inpainted(self):
        """I_coarse (H, W, 3) uint8: the coarse edit with its holes filled."""
        coarse = self.coarse()
        return fill_holes(coarse[..., :3], coarse[..., 3] == 0)


def number(x, what):
    try:
        if not isinstance(x, (bool, str)) and math.isfinite(x):
            return float(x)
    except (TypeError, OverflowError):
        pass
    raise ValueError(f"{what} is a finite number, not {short(x)}")


def point(p, what):
    if isinstance(p, (str, dict)) or not hasattr(p, "__len__") or len(p) != 2:
        raise ValueError(f"{what} is two numbers, x and y, not {short(p)}")
    return number(p[0], f"x of {what}"), number(p[1], f"y of {what}")


def short(x):
    text = repr(x)
    return text if len(text) < 50 else text[:46] + " ..."


# ---------------------------------------------------------------------------------------------------------------------
# What to cut out


def polygon_mask(size, points):
    """size (H, W), points (n, 2) -> bool: the pixels whose centres lie inside, by the even-odd rule."""
    H, W = size
    mask, x, y = np.zeros((H, W), bool), np.arange(W) + 0.5, np.arange(H) + 0.5
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
        rows = ((y0 <= y) != (y1 <= y)).nonzero()[0]  # those that this edge crosses
        if len(rows):
            mask[rows] ^= x > (x0 + (y[rows] - y0) * ((x1 - x0) / (y1 - y0)))[:, None]
    return mask


def segment_at(image, at):
    """What stands out at a point (x, y) of the image (H, W, 3) uint8, with no network. -> (H, W) bool

    The connected region of similar colour, told apart by Otsu's threshold, is where GrabCut (Rother et al. 2004) starts
    from; what is connected to the click remains. Good for a thing in colours of its own; SAM knows more.
    """
    (H, W), work = image.shape[:2], 256  # on a small copy: finer detail than that misleads it, and costs seconds
    h, w = (max(1, round(n * min(1, work / max(H, W)))) for n in (H, W))
    small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    x, y, r = int(at[0] * w / W), int(at[1] * h / H), max(1, round(max(h, w) / 50))
    clicked = np.hypot(*np.ogrid[-y:h - y, -x:w - x]) <= r

    def connected(region):
        labels = cv2.connectedComponents((region | clicked).astype(np.uint8), connectivity=4)[1]
        return labels == labels[y, x]

    flat = cv2.cvtColor(cv2.pyrMeanShiftFiltering(small, 5, 14), cv2.COLOR_RGB2LAB).astype(np.float32)
    far = np.linalg.norm((flat - np.median(flat[clicked], 0)) * [0.5, 1, 1], axis=2).clip(0, 255)  # shading counts less
    threshold, _ = cv2.threshold(far.astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    region = connected(far <= threshold)
    if region.all():
        return np.ones((H, W), bool)
    trimap = np.where(region, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    edge = np.pad(np.zeros((max(0, h - 2 * r), max(0, w - 2 * r)), bool), r, constant_values=True)[:h, :w]
    trimap[edge & ~region] = cv2.GC_BGD
    trimap[clicked] = cv2.GC_FGD
    cv2.setRNGSeed(0)  # it begins with k-means: the same click, the same segment
    cv2.grabCut(small, trimap, None, np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_MASK)
    mask = connected((trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD))
    _, gaps, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    mask |= (stats[:, cv2.CC_STAT_AREA] < 0.05 * mask.sum())[gaps]  # specks of another colour belong to it
    return cv2.resize(mask.astype(np.float32), (W, H), interpolation=cv2.INTER_LINEAR) > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# edits.json


def read_edits(path, segmenter=None):
    """A collage written down as JSON. -> Collage. ValueError, in one line, for anything that is not as here:

        {"image": "photo.png",
         "segments": [{"click": [150, 220],
                       "edits": [{"translate": [60, 0]}, {"scale": 1.3, "about": [x, y]}, {"rotate": 20}],
                       "z": 1},
                      {"mask": "bin.png", "edits": [{"delete": true}]}]}

    image     a path, relative to the JSON file. All points are in pixels of this picture, turned upright
    segments  what to cut out: "mask", a picture of the same size, white or opaque where the segment is; "polygon",
              three points or more; "box", [x0, y0, x1, y1]; or "click", a point in it, for which
              segmenter(image (H, W, 3) uint8, (x, y)) -> (H, W) bool is asked (None: `segment_at`)
    edits     in this order: translate, scale, rotate, mirror ("horizontal" or "vertical"), duplicate, delete, with what
              `Segment` takes; "about" a point if not the segment's centre. Left out: it stays, and hides what is behind
    z         what is larger lies in front; 0 if left out
    """
    path = Path(path)
    try:
        edits = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {e.lineno}, column {e.colno}: not JSON: {e.msg}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not a JSON file that can be read ({e})") from None
    where = ""
    try:
        keys(edits, "the file", {"image", "segments"}, {"image", "segments"})
        collage = Collage(read_picture(path.parent, edits["image"]))
        if not isinstance(edits["segments"], list) or not edits["segments"]:
            raise ValueError('"segments" is a list of one segment or more')
        for n, spec in enumerate(edits["segments"], 1):
            where = f"segment {n}: "
            keys(spec, "a segment", CUTS | {"edits", "z"})
            if len(cuts := CUTS & spec.keys()) != 1:
                raise ValueError(f"a segment has one of {listed(CUTS)}, not {len(cuts)} of them")
            (cut,) = cuts
            mask = cut_out(collage.image, path.parent, cut, spec[cut], segmenter or segment_at)
            segment = collage.segment(mask, spec.get("z", 0))
            if not isinstance(spec.get("edits", []), list):
                raise ValueError('"edits" is a list')
            for m, edit in enumerate(spec.get("edits", []), 1):
                where = f"segment {n}, edit {m}: "
                apply(segment, edit)
        where = ""
        collage.pieces()
    except ValueError as e:
        raise ValueError(f"{path}: {where}{e}") from None
    return collage


CUTS = {"mask", "polygon", "box", "click"}
VERBS = {"translate", "scale", "rotate", "mirror", "duplicate", "delete"}


def apply(segment, edit):
    """One entry of "edits"."""
    keys(edit, "an edit", VERBS | {"about"})
    if len(verbs := VERBS & edit.keys()) != 1:
        raise ValueError(f"an edit has one of {listed(VERBS)}, not {len(verbs)} of them")
    (verb,) = verbs
    value = edit[verb]
    if verb in ("scale", "rotate", "mirror"):
        getattr(segment, verb)(value, point(edit["about"], "about") if "about" in edit else None)
    elif "about" in edit:
        raise ValueError(f'"about" goes with scale, rotate and mirror, not with {verb}')
    elif verb == "translate":
        segment.translate(*point(value, "translate"))
    elif value is not True:
        raise ValueError(f'"{verb}" is true or left out, not {short(value)}')
    else:
        getattr(segment, verb)()


def cut_out(image, folder, cut, value, segmenter):
    """One of "mask", "polygon", "box", "click" -> (H, W) bool"""
    H, W = image.shape[:2]
    if cut == "mask":
        return read_picture(folder, value, mask=True)
    if cut == "click":
        x, y = point(value, "a click")
        if not (0 <= x < W and 0 <= y < H):
            raise ValueError(f"the click {x:g}, {y:g} is outside the picture of {W} x {H}")
        return segmenter(image, (x, y))
    if not isinstance(value, list):
        raise ValueError(f"a {cut} is a list, not {short(value)}")
    if cut == "polygon" and len(value) < 3:
        raise ValueError(f"a polygon has three points or more, not {len(value)}")
    if cut == "box":
        if len(value) != 4:
            raise ValueError(f"a box is four numbers, x0, y0, x1, y1, not {short(value)}")
        x0, y0, x1, y1 = value
        value = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    points = [point(p, f"a point of a {cut}") for p in value]
    for x, y in points:
        if not (0 <= x <= W and 0 <= y <= H):
            raise ValueError(f"the point {x:g}, {y:g} of a {cut} is outside the picture of {W} x {H}")
    if not (mask := polygon_mask((H, W), points)).any():
        raise ValueError(f"the {cut} has no pixel inside")
    return mask


def read_picture(folder, name, mask=False):
    """A picture, turned upright -> (H, W, 3) uint8, on white where transparent; or a mask (H, W) bool. ValueError."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"a picture is named by its path, not {short(name)}")
    picture = open_picture(folder / name)
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{folder / name} has mode {picture.mode}: save it with 8 bits per channel")
    if not mask:
        return np.array(to_rgb(picture))
    rgba = picture.convert("RGBA")
    alpha = np.asarray(rgba)[..., 3]
    # A cut-out is opaque where the segment is, and any other mask is white there.
    found = (alpha if (alpha < 255).any() else np.asarray(rgba.convert("L"))) > 127
    if not found.any():
        raise ValueError(f"{folder / name} is an empty mask: it should be white (over 127) where the segment is")
    return found


def keys(x, what, known, needed=frozenset()):
    if not isinstance(x, dict):
        raise ValueError(f"{what} is an object {{...}} with {listed(known)}, not {short(x)}")
    if unknown := sorted(x.keys() - known):
        raise ValueError(f"{what} has no {short(unknown[0])}: known are {listed(known)}")
    if missing := sorted(needed - x.keys()):
        raise ValueError(f'{what} lacks "{missing[0]}"')


def listed(words):
    return ", ".join(sorted(words))
