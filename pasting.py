"""The pixels of a collage: pieces lifted out of a picture and laid down elsewhere, and the holes that remain, filled.

Which pieces, and where to, is collage.py's business. Points are in pixels, x to the right and y down, and the first
pixel's centre is at (0.5, 0.5).
"""

import math

import cv2
import numpy as np


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

    Navier-Stokes inpainting (Bertalmio et al. 2001; the paper's [8]) at a radius of 3 pixels, kernel and radius as in
    the Magic Fixup release, which does it at 512x512. Everything else is as it was. No picture left at all: mid-grey.
    """
    holes = np.ascontiguousarray(holes, np.uint8)
    if not holes.any():
        return image.copy()
    if dilate is None:
        dilate = max(3, 2 * round((7 * holes.size**0.5 / 512 - 1) / 2) + 1)  # odd
    wide = cv2.dilate(holes, np.ones((dilate, dilate), np.uint8))
    wide = holes if wide.all() else wide  # keep what little there is to start from
    return np.full_like(image, 128) if wide.all() else cv2.inpaint(np.ascontiguousarray(image), wide, 3, cv2.INPAINT_NS)
