"""The segments of a whole photo, found without a network, and a segment's outline for edits.json.

(networks/automask.py finds better ones. Those of video.estimators are for pairs: of one mean colour,
so that a shaded thing, which is one segment here, is many there.)
"""

import heapq

import cv2
import numpy as np

WORK = 256  # pixels on the longer side: finer detail is texture
FINE = 40.0  # of the first regions: the larger, the fewer
CONTRAST = 7.0  # in CIELAB: across a weaker border, two regions are one
LEAST = 0.004  # of the picture: a region's borders count as weaker if its inside is smaller


def find_segments(image):
    """Cut a photo (H, W, 3) uint8 up. -> labels (H, W) int32, 0 .. n - 1: each pixel has one

    First come small regions, by Felzenszwalb & Huttenlocher 2004. Then neighbours are joined, those
    with the weakest border between them first. What is of one colour, or whose colour changes
    slowly, is one segment.
    """
    H, W = image.shape[:2]
    shrink = min(1, WORK / max(H, W))
    h, w = max(1, round(H * shrink)), max(1, round(W * shrink))
    small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    lab = cv2.bilateralFilter(cv2.bilateralFilter(lab, 7, 12, 3), 7, 12, 3)
    lab *= np.float32([0.7, 1, 1])  # shading is mostly lightness
    lab *= 12 / np.clip(lab.std((0, 1)).max(), 4, 12)  # at night all contrasts are weaker

    # Pairs of neighbours, side by side and one below the other, and the contrast between them;
    # for the border of two regions, between the pixels around them
    place = np.arange(h * w).reshape(h, w)
    wide = np.pad(lab, ((1, 1), (1, 1), (0, 0)), mode="edge")
    pairs = [
        (place[:, :-1], place[:, 1:], lab[:, 1:] - lab[:, :-1], wide[1:-1, 3:] - wide[1:-1, :-3]),
        (place[:-1], place[1:], lab[1:] - lab[:-1], wide[3:, 1:-1] - wide[:-3, 1:-1]),
    ]
    a, b = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    near, far = (
        np.concatenate([np.linalg.norm(pair[i], axis=2).ravel() for pair in pairs]) for i in (2, 3)
    )
    labels = find_regions(a, b, near, h * w)
    labels = join_regions(labels, labels[a], labels[b], far)
    return enlarge_labels(labels.reshape(h, w), (H, W))


def find_root(parent, i):
    """Regions are trees: a member's parent is another of them, and the root its own."""
    while parent[i] != i:
        parent[i] = i = parent[parent[i]]
    return i


def find_regions(a, b, contrast, n):
    """Pixels a[i] and b[i] of n are neighbours. -> (n,) the region of each, in 0 .. number - 1"""
    parent, size, inside = list(range(n)), [1] * n, [0.0] * n
    order = np.argsort(contrast, kind="stable")
    for i, j, weight in zip(a[order].tolist(), b[order].tolist(), contrast[order].tolist()):
        i, j = find_root(parent, i), find_root(parent, j)
        # No stronger than the strongest edge inside either
        if i != j and weight <= min(inside[i] + FINE / size[i], inside[j] + FINE / size[j]):
            parent[j] = i
            size[i] += size[j]
            inside[i] = weight
    return np.unique([find_root(parent, i) for i in range(n)], return_inverse=True)[1]


def join_regions(labels, a, b, contrast):
    """Join neighbours until each border left is strong -> (n,) the segment of each pixel

    labels       (n,) the region of each pixel
    a, b         regions on the two sides of each pair of neighbouring pixels
    contrast     across each pair
    """
    size = np.bincount(labels).tolist()
    parent = list(range(len(size)))
    borders = [{} for _ in size]  # of each region: {its neighbour: [sum of contrasts, pairs]}

    def lengthen(i, j, total, pairs):
        border = borders[i].setdefault(j, [0.0, 0])
        border[0] += total
        border[1] += pairs

    for i, j, weight in zip(a.tolist(), b.tolist(), contrast.tolist()):
        if i != j:
            lengthen(i, j, weight, 1)
            lengthen(j, i, weight, 1)

    rim = [sum(pairs for _, pairs in beside.values()) for beside in borders]

    def strength(i, j):
        total, pairs = borders[i][j]
        inner = min(size[n] - rim[n] / 2 for n in (i, j))  # a thin strip has nearly none
        return total / pairs * min(1, max(0, inner) / (LEAST * len(labels))) ** 2

    # An entry that is no longer true is passed over: a new one was made when it changed.
    heap = [(strength(i, j), i, j) for i in parent for j in borders[i]]
    heapq.heapify(heap)
    while heap and heap[0][0] < CONTRAST:
        weight, i, j = heapq.heappop(heap)
        if j not in borders[i] or weight != strength(i, j):
            continue
        parent[j] = i
        size[i] += size[j]
        rim[i] += rim[j] - 2 * borders[i][j][1]
        for k, (total, pairs) in borders[j].items():
            del borders[k][j]
            if k != i:
                lengthen(i, k, total, pairs)
                lengthen(k, i, total, pairs)
        borders[j] = {}
        for k in borders[i]:
            heapq.heappush(heap, (strength(i, k), i, k))
    roots = np.array([find_root(parent, i) for i in range(len(parent))])
    return np.unique(roots[labels], return_inverse=True)[1]


def enlarge_labels(labels, size):
    """labels (h, w) -> (H, W), size = (H, W): the label that a smooth enlargement has most of"""
    best, found = np.zeros(size, np.float32), np.zeros(size, np.int32)
    for n in range(labels.max() + 1):
        share = (labels == n).astype(np.float32)
        share = cv2.resize(share, size[::-1], interpolation=cv2.INTER_LINEAR)
        found[share > best] = n
        np.maximum(best, share, out=best)
    return found


# -------------------------------------------------------------------------------------------------
# Outlines


def outlines(labels):
    """labels (H, W), < 0 where there is nothing -> the polygon of each, the largest segment first"""
    polygons = []
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    for n in values[np.argsort(-counts, kind="stable")]:
        mask = labels == n
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        y, x = int(rows[0]), int(columns[0])
        polygon = outline(mask[y : rows[-1] + 1, x : columns[-1] + 1])
        polygons.append([[x + dx, y + dy] for dx, dy in polygon])
    return polygons


def outline(mask):
    """mask (H, W) bool, not empty -> [[x, y], ...]: a polygon of edits.json with just these pixels

    It runs along the pixels' borders. From its first corner it goes to other parts of the mask, and
    to holes, and back the same way: what is passed twice encloses nothing.
    """
    # Borders of pixels, each directed so that the mask is at its right: a start -> its ends
    inside = np.pad(mask, 1)
    ends = {}
    for dy, dx, start, end in (
        (-1, 0, (0, 0), (1, 0)), (0, 1, (1, 0), (1, 1)), (1, 0, (1, 1), (0, 1)), (0, -1, (0, 1), (0, 0))
    ):
        outside = ~np.roll(inside, (-dy, -dx), (0, 1))
        y, x = (inside & outside).nonzero()
        for i, j in zip((x - 1).tolist(), (y - 1).tolist()):
            ends.setdefault((i + start[0], j + start[1]), []).append((i + end[0], j + end[1]))

    polygon = []
    while ends:
        loop = [next(iter(ends))]
        while loop[-1] in ends:
            following = ends[loop[-1]]
            loop.append(following.pop())
            if not following:
                del ends[loop[-2]]
        if not polygon:
            polygon += drop_straight(loop)
            continue
        corner = loop[0][0], polygon[0][1]
        polygon += [polygon[0], corner, *drop_straight(loop), loop[0], corner]
    return [list(point) for point in polygon]


def drop_straight(loop):
    """A loop of corners, the first at its end again -> without the last, and those on straight lines"""
    kept = [loop[0]]
    for before, here, after in zip(loop, loop[1:], loop[2:]):
        if before[0] != after[0] and before[1] != after[1]:
            kept.append(here)
    return kept
