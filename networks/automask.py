"""Segment Anything without a prompt: a grid of clicks over the picture, and of what they give, what is good and new.

Kirillov et al. 2023, section 5 and appendix B, *Automatic mask generation*. The model is an argument (sam.SAM).

    click at every point of a grid, in the picture and in crops of it                       3 masks for each
    keep those that the model expects to be good                                            predicted IoU
    keep those that stay the same if the threshold moves a little                           stability
    drop those that a crop has cut off, and those that have a better one's box              non-maximum suppression
    fill small holes, remove small islands

The results are the published generator's, in its order. It is faster by what it leaves out: masks that do not pass the
first test are never drawn, and those that pass are kept as bits, not as run lengths.
"""

import cv2
import numpy as np
import torch

AT_ONCE = 1 << 21  # pixels of logits that are handled together: they should stay in a CPU's cache


def automatic_masks(
    sam, image, points_per_side=32, points_per_batch=16, pred_iou_thresh=0.88, stability_score_thresh=0.95,
    stability_score_offset=1.0, box_nms_thresh=0.7, crop_n_layers=0, crop_nms_thresh=0.7,
    crop_overlap_ratio=512 / 1500, crop_n_points_downscale_factor=1, min_mask_region_area=0,
):
    """image (H, W, 3) uint8 -> a list of records, those with the highest predicted IoU first (in crops: smaller first)

    points_per_side, points_per_batch      the grid, and how many of its points are decoded together
    pred_iou_thresh                        keep masks whose IoU the model predicts to be higher than this
    stability_score_thresh, _offset        keep those whose areas at logits > offset and > -offset have this ratio
    box_nms_thresh, crop_nms_thresh        of two boxes that overlap with a higher IoU, one is dropped; within a crop
                                           by predicted IoU, between crops that of the larger crop
    crop_n_layers, crop_overlap_ratio      layer i has 2^i x 2^i crops; the overlap, of the shorter side, in layer 1
    crop_n_points_downscale_factor         layer i's grid has this to the power of i fewer points per side
    min_mask_region_area                   pixels; smaller holes are filled and smaller islands removed. 0: neither

    A record, as the published generator's: segmentation (H, W) bool; area in pixels; bbox [x, y, w, h] of the outermost
    pixels' centres; predicted_iou; stability_score; point_coords [[x, y]], the click; crop_box [x, y, w, h].
    ValueError for a picture that is none (see SAM.encode).
    """
    H, W = image.shape[:2]
    crops = list_crops(H, W, crop_n_layers, crop_overlap_ratio)

    # What the clicks in each crop find, without those that have a better one's box; then the same between crops.
    found = []
    for crop, layer in crops:
        n = int(points_per_side / crop_n_points_downscale_factor**layer)
        candidates = find_masks_in_crop(sam, image, crop, n, points_per_batch, pred_iou_thresh, stability_score_thresh,
                                stability_score_offset)
        found += suppress(candidates, [c["predicted_iou"] for c in candidates], box_nms_thresh)
    if len(crops) > 1:
        found = suppress(found, [1 / compute_area(c["crop"]) for c in found], crop_nms_thresh)

    # From here on masks are whole pictures, not bits of a crop.
    for c in found:
        c["mask"] = unpack_mask(c["mask"], c["crop"], H, W)
    if min_mask_region_area > 0:
        for c in found:
            mask = remove_small_regions(c["mask"], min_mask_region_area)
            c["changed"] = mask is not c["mask"]
            if c["changed"]:
                c["mask"] = mask
                c["box"] = find_box(mask)
        # Of two that have become alike, prefer one that was so before.
        found = suppress(found, [float(not c["changed"]) for c in found], max(box_nms_thresh, crop_nms_thresh))
    return [{"segmentation": c["mask"], "area": int(np.count_nonzero(c["mask"])), "bbox": to_xywh(c["box"]),
             "predicted_iou": c["predicted_iou"], "point_coords": [c["point"]],
             "stability_score": c["stability_score"], "crop_box": to_xywh(c["crop"])} for c in found]


def segments(sam, image, smallest=0, **options):
    """A picture's segments, for data.py: image (H, W, 3) uint8 -> (H, W) int32, 0 = in none.

    The automatic masks, numbered and painted from the largest to the smallest, so that a part is seen on the whole.
    smallest: pixels; masks of fewer are left out. options: those of automatic_masks.
    """
    records = [record for record in automatic_masks(sam, image, **options) if record["area"] >= smallest]
    records.sort(key=lambda record: -record["area"])
    labels = np.zeros(image.shape[:2], np.int32)
    for n, record in enumerate(records, 1):
        labels[record["segmentation"]] = n
    seen = np.bincount(labels.ravel(), minlength=len(records) + 1) > 0  # a mask can be covered by smaller ones
    seen[0] = False
    return (np.cumsum(seen) * seen)[labels].astype(np.int32)


def find_masks_in_crop(sam, image, crop, n, batch, iou_thresh, stability_thresh, offset):
    """What a grid of n x n clicks in a crop (x0, y0, x1, y1) gives -> candidates, their coordinates the picture's"""
    (H, W), (x0, y0, x1, y1) = image.shape[:2], crop
    encoded = sam.encode(image[y0:y1, x0:x1])
    found = []
    for points in np.split(make_point_grid(n) * [x1 - x0, y1 - y0], range(batch, n * n, batch)):
        iou, hyper, embedding = sam.attend(encoded, points[:, None])
        iou = iou[:, 1:].float()  # a click may mean several things: the three masks, not the one
        good = iou > iou_thresh
        drawn = good.any(1)
        if not drawn.any():
            continue

        # Draw the good ones, some at a time, and keep those that are stable and whole.
        low_res = sam.mask_decoder.draw(embedding[drawn], hyper[drawn, 1:]).float()[good[drawn]]  # (k, 4 g, 4 g)
        scores = iou[good].tolist()
        clicks = points[good.nonzero()[:, 0].cpu().numpy()] + [x0, y0]
        few = max(1, AT_ONCE // max(sam.config.size**2, (x1 - x0) * (y1 - y0)))
        for first in range(0, len(low_res), few):
            logits = sam.upscale(low_res[None, first:first + few], encoded)[0]
            inner, outer = ((logits > at).sum(2, dtype=torch.int32).sum(1) for at in (offset, -offset))
            stability = inner / outer
            stable = ((stability >= stability_thresh) & (inner > 0)).nonzero()[:, 0]  # and not empty
            masks = (logits[stable] > 0).cpu().numpy()
            stability = stability.tolist()
            for i, mask in zip(stable.tolist(), masks):
                box = find_box(mask) + [x0, y0, x0, y0]
                if not is_cut_off(box, crop, (0, 0, W, H)):
                    found.append({
                        "mask": np.packbits(mask, axis=1), "box": box, "crop": crop, "stability_score": stability[i],
                        "predicted_iou": scores[first + i], "point": clicks[first + i].tolist()})
    return found


def make_point_grid(n):
    """(n n, 2): x, y in 0 .. 1, row by row"""
    centres = np.linspace(1 / (2 * n), 1 - 1 / (2 * n), n)
    return np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)


def list_crops(H, W, layers, overlap_ratio):
    """The picture and then its crops, from the largest to the smallest: a list of ((x0, y0, x1, y1), layer)"""
    boxes = [((0, 0, W, H), 0)]
    for layer in range(1, layers + 1):
        n = 2**layer
        overlap = int(overlap_ratio * min(H, W) * (2 / n))
        w, h = (-(-(overlap * (n - 1) + side) // n) for side in (W, H))
        starts = [((w - overlap) * i, (h - overlap) * j) for i in range(n) for j in range(n)]
        boxes += [((x, y, min(x + w, W), min(y + h, H)), layer) for x, y in starts]
    return boxes


def is_cut_off(box, crop, picture, margin=20):
    """Whether a box reaches an edge of its crop, to within `margin` pixels, which is not an edge of the picture."""
    box, crop, picture = map(np.asarray, (box, crop, picture))
    return bool(((abs(box - crop) <= margin) & (abs(box - picture) > margin)).any())


def find_box(mask):
    """(H, W) bool, not empty -> x0, y0, x1, y1 of its outermost pixels"""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return np.array([columns[0], rows[0], columns[-1], rows[-1]])


def to_xywh(box):
    x0, y0, x1, y1 = map(int, box)
    return [x0, y0, x1 - x0, y1 - y0]


def compute_area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def unpack_mask(bits, crop, H, W):
    """A crop's mask as bits -> (H, W) bool"""
    x0, y0, x1, y1 = crop
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = np.unpackbits(bits, axis=1, count=x1 - x0)
    return mask


def suppress(candidates, scores, threshold):
    """Non-maximum suppression: candidates by falling score, without those whose box has IoU > threshold with the box
    of one that is kept. Equal scores: in the order that they have."""
    if not candidates:
        return []
    boxes = np.stack([c["box"] for c in candidates]).astype(np.float32)
    order = np.argsort(-np.asarray(scores, np.float32), kind="stable")
    kept = []
    while len(order):
        best = order[0]
        order = order[1:]
        kept.append(candidates[best])
        others = boxes[order]
        sides = np.minimum(others[:, 2:], boxes[best, 2:]) - np.maximum(others[:, :2], boxes[best, :2])
        common = sides.clip(0).prod(1)
        with np.errstate(invalid="ignore"):  # two boxes without an area: 0 / 0, and both stay
            iou = common / (compute_area(boxes[best]) + compute_area(others.T) - common)
        order = order[~(iou > threshold)]
    return kept


def remove_small_regions(mask, smallest):
    """Holes, then islands, of fewer than `smallest` pixels are gone -> (H, W) bool, the same object if there are none.

    Diagonal neighbours are connected. If every island is small, the largest stays.
    """
    # Holes are regions of what is not the mask. Region 0 is what they are holes in: the mask itself.
    _, regions, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=8)
    small = stats[:, cv2.CC_STAT_AREA] < smallest
    small[0] = False
    if small.any():
        mask = mask | small[regions]

    # Islands are regions of the mask.
    _, regions, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    areas[0] = 0
    large = areas >= smallest
    if large[1:].all():
        return mask
    if not large.any():
        large[areas.argmax()] = True
    return large[regions]
