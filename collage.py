"""The Collage Transform of Magic Fixup, section 3.1: cut a photo up, rearrange it, keep the holes.

    collage = Collage(image)                            # (H, W, 3) uint8
    dog = collage.segment(mask)                         # (H, W) bool
    dog.translate(60, -10).scale(1.2).rotate(15).mirror()
    dog.duplicate().translate(80, 0)                    # what was there stays, and a copy goes on
    collage.segment(bin_mask).delete()
    coarse = collage.coarse()                           # (H, W, 4) uint8, alpha 0 = holes

    M = coarse[..., 3] > 0                              # what Magic Fixup takes, and
    I_coarse = fill_holes(coarse[..., :3], ~M)

editing/edits_json.py reads the same from a file. Points are in pixels, x to the right and y down.
The picture spans 0 .. W and 0 .. H: its first pixel's centre is at (0.5, 0.5). Angles are in
degrees and turn clockwise as seen on the screen.
"""

import math

import cv2
import numpy as np

import warp

# --------------------------------------------------------------------------------------------------
# Pixels


def composite(image, pieces):
    """Lift pieces out of a picture and lay them down elsewhere. -> the coarse edit (H, W, 4) uint8

    image   (H, W, 3) uint8
    pieces  from back to front, each (mask (H, W) bool, matrix). The matrix, a 2x3 similarity, takes
            points of the picture to where they go; None only lifts. A mask may come several times:
            once with the identity is "it stays".

    Alpha is 0 in holes, from which something was lifted and nothing laid there, and 255 elsewhere.
    Seams are blended by how much of a pixel is covered. Over a hole there is nothing to blend with,
    and M is binary in the paper: a pixel that is half covered or more shows the piece's own colour,
    and one that is less is a hole. Holes are black.
    """
    # The canvas holds colours times coverage, and coverage, both times 255.
    H, W, _ = image.shape
    canvas = np.full((H, W, 4), 255, np.float32)
    canvas[..., :3] = image

    # Lift everything first, so that a piece which lands in another's old place is not lifted again.
    for mask, _ in pieces:
        canvas[np.asarray(mask, bool)] = 0

    # Lay down from back to front: the "over" operator of premultiplied colours.
    opaque = np.dstack([image, np.full_like(image[..., :1], 255)])
    for mask, matrix in pieces:
        if matrix is None:
            continue
        found = lay(opaque, np.asarray(mask, bool), np.asarray(matrix, float))
        if found is not None:
            layer, where = found
            canvas[where] = layer + canvas[where] * (1 - layer[..., 3:] / 255)

    # Divide by coverage again. Less than half a pixel is a hole. In strips, because a large photo
    # takes much memory.
    coarse = np.empty((H, W, 4), np.uint8)
    for y in range(0, H, 512):
        strip = canvas[y : y + 512]
        cover = strip[..., 3:]
        kept = cover >= 127.5
        colour = np.where(kept, strip[..., :3] * 255 / np.maximum(cover, 1), 0)
        coarse[y : y + 512] = np.concatenate([colour.round().clip(0, 255), 255 * kept], 2)
    return coarse


def lay(opaque, mask, matrix):
    """One piece of (H, W, 4) uint8 where it goes. None if that is outside the picture.

      ->  (h, w, 4) float32: colours times coverage, and coverage, both times 255
          its place: slices of y and x

    The pixels are resampled once, however many verbs the matrix is made of.
    """
    lifted = warp.lift(opaque, mask, matrix)
    if lifted is None:
        return None
    piece, (x0, y0), (v, u) = lifted
    piece = piece.astype(np.float32)

    # A piece that shrinks is averaged over blocks first; interpolation alone would skip pixels.
    scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    block = min(max(1, round(1 / max(scale, 1e-9))), *mask.shape)
    if block > 1:
        h = math.ceil(piece.shape[0] / block)
        w = math.ceil(piece.shape[1] / block)
        more = (0, h * block - piece.shape[0]), (0, w * block - piece.shape[1]), (0, 0)
        piece = np.pad(piece, more).reshape(h, block, w, block, 4)
        piece = np.ascontiguousarray(piece.mean((1, 3)))

    # From indices of `piece` to indices of the result: an index is a position less a half.
    unpack = np.array([[block, 0, x0 + block / 2], [0, block, y0 + block / 2], [0, 0, 1]])
    A = matrix @ unpack - [[0, 0, u.start + 0.5], [0, 0, v.start + 0.5]]
    size = u.stop - u.start, v.stop - v.start
    return cv2.warpAffine(piece, A, size, flags=cv2.INTER_LINEAR), (v, u)


def is_seen(mask, matrix):
    """Does a pixel of the mask (H, W) come to lie over the centre of one of the picture's?"""
    H, W = mask.shape
    wider = max(0, np.abs(matrix[0, :2]).sum() / 2 - 0.5)  # half of what a pixel grows by
    for top in range(0, H, 64):  # in strips, as above: these are 80 bytes a pixel
        y, x = mask[top : top + 64].nonzero()
        u, v = matrix[:, :2] @ [x + 0.5, y + top + 0.5] + matrix[:, 2:]
        if ((u > -wider) & (u < W + wider) & (v > -wider) & (v < H + wider)).any():
            return True
    return False


def fill_holes(image, holes, dilate=None):
    """A copy of the image with its holes painted in from around them, as Magic Fixup starts from.

    image   (H, W, 3) uint8, RGB
    holes   (H, W) bool
    dilate  widens them by a kernel of dilate x dilate pixels, which takes the seams along. None: 7
            for a picture of 512x512 as in the release, in proportion for others, and 3 at least

    Navier-Stokes inpainting (Bertalmio et al. 2001; the paper's [8]) at a radius of 3 pixels, as
    the Magic Fixup release samples with. With no picture left: mid-grey.
    """
    holes = np.ascontiguousarray(holes, np.uint8)
    if not holes.any():
        return image.copy()
    if dilate is None:
        dilate = max(3, 2 * round((7 * holes.size**0.5 / 512 - 1) / 2) + 1)  # odd
    wide = cv2.dilate(holes, np.ones((dilate, dilate), np.uint8))
    if wide.all():
        wide = holes  # keep what little there is to start from
    if wide.all():
        return np.full_like(image, 128)
    return cv2.inpaint(np.ascontiguousarray(image), wide, 3, cv2.INPAINT_NS)


# --------------------------------------------------------------------------------------------------
# The verbs


class Segment:
    """One part of the picture, and where it is seen. `Collage.segment` makes them.

    Every verb returns the segment, so that verbs chain. ValueError for what cannot be done.
    """

    def __init__(self, mask, z):
        self.mask = mask
        self.z = z
        self.places = [np.eye(2, 3)]  # a matrix for each time it is seen; verbs change the last
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = [columns[0] + columns[-1] + 1, rows[0] + rows[-1] + 1]
        self.middle = np.array(box) / 2  # x, y of its bounding box, before any verb

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
        return self.transform(np.eye(2), shift=(dx, dy))

    def scale(self, factor, about=None):
        """`factor` times as large, about a point (x, y); None: about its centre."""
        if factor <= 0:
            why = "say mirror to mirror it, delete to remove it"
            raise ValueError(f"a scale is larger than 0, not {factor:g}: {why}")
        return self.transform(factor * np.eye(2), about)

    def rotate(self, degrees, about=None):
        """Turned clockwise about a point (x, y); None: about its centre."""
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return self.transform(np.array([[c, -s], [s, c]]), about)

    def mirror(self, direction="horizontal", about=None):
        """'horizontal': left becomes right; 'vertical': top becomes bottom."""
        if direction not in ("horizontal", "vertical"):
            what = "mirror is 'horizontal' (left becomes right) or 'vertical'"
            raise ValueError(f"{what}, not {direction!r:.60}")
        signs = [-1.0, 1.0] if direction == "horizontal" else [1.0, -1.0]
        return self.transform(np.diag(signs), about)

    def duplicate(self):
        """It stays as it is now, and what follows is done to a copy."""
        self.places.append(self.last.copy())
        return self

    def delete(self):
        """It is taken away: a hole remains."""
        _ = self.last  # raises if it is gone already
        self.places.pop()
        return self

    def transform(self, linear, about=None, shift=(0.0, 0.0)):
        """A 2x2 matrix about a point, and a shift, after all that was done before."""
        about = self.centre if about is None else np.array(about)
        offset = about - linear @ about + shift
        with np.errstate(all="ignore"):
            before = self.last
            matrix = np.column_stack([linear @ before[:, :2], linear @ before[:, 2] + offset])
        if not np.isfinite(matrix).all():
            raise ValueError("the numbers are too large")
        self.places[-1] = matrix
        return self


class Collage:
    """A picture (H, W, 3) uint8 and its segments, to be rearranged. ValueError for another kind."""

    def __init__(self, image):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            what = f"{tuple(image.shape)} {image.dtype}"
            raise ValueError(f"a collage is made of (H, W, 3) uint8, not {what}")
        self.image = image
        self.segments = []

    def segment(self, mask, z=0):
        """Cut out mask (H, W) bool. -> Segment. Larger z lies in front; at the same z, what was cut
        out later does."""
        mask = np.asarray(mask, bool)
        H, W = self.image.shape[:2]
        if mask.shape != (H, W):
            sizes = f"{' x '.join(map(str, mask.shape[::-1]))} and the picture {W} x {H}"
            raise ValueError(f"the mask is {sizes}: they must be of one size")
        if not mask.any():
            raise ValueError("the mask is empty: there is nothing to cut out")
        self.segments.append(Segment(mask, z))
        return self.segments[-1]

    def pieces(self):
        """What `composite` takes. ValueError if a segment is out of sight, but not deleted."""
        for n, segment in enumerate(self.segments, 1):
            area = np.count_nonzero(segment.mask)
            for A in segment.places:
                if not is_seen(segment.mask, A):
                    where = "outside the picture"
                elif abs(np.linalg.det(A[:, :2])) * area < 0.5:
                    where = "smaller than a pixel"
                else:
                    continue
                raise ValueError(f"segment {n} ends up {where}: to remove it, say delete")
        order = sorted(self.segments, key=lambda segment: segment.z)
        return [(segment.mask, A) for segment in order for A in segment.places or [None]]

    def coarse(self):
        """The coarse edit (H, W, 4) uint8; alpha is 0 in holes and 255 elsewhere."""
        return composite(self.image, self.pieces())
