"""Segment Anything without a prompt: a grid of clicks over the picture, and of what they give, what is good and new.

Kirillov et al. 2023, section 5 and appendix B, *Automatic mask generation*. The model is an argument (sam.SAM).

    click at every point of a grid                                                          3 masks for each
    keep those that the model expects to be good                                            predicted IoU
    keep those that stay the same if the threshold moves a little                           stability
    drop those that have a better one's box                                                 non-maximum suppression

The results are the published generator's, in its order, without the crops and the cleaning that it leaves out by
default. It is faster by what it leaves out: masks that do not pass the first test are never drawn.
"""

import cv2
import numpy as np
import torch

AT_ONCE = 1 << 21  # pixels of logits that are handled together: they should stay in a CPU's cache


def automatic_masks(
    sam, image, points_per_side=32, points_per_batch=16, pred_iou_thresh=0.88, stability_score_thresh=0.95,
    stability_score_offset=1.0, box_nms_thresh=0.7,
):
    """image (H, W, 3) uint8 -> a list of records, those with the highest predicted IoU first

    points_per_side, points_per_batch      the grid, and how many of its points are decoded together
    pred_iou_thresh                        keep masks whose IoU the model predicts to be higher than this
    stability_score_thresh, _offset        keep those whose areas at logits > offset and > -offset have this ratio
    box_nms_thresh                         of two boxes that overlap with a higher IoU, the one of the lower predicted
                                           IoU is dropped

    A record, as the published generator's: segmentation (H, W) bool; area in pixels; bbox [x, y, w, h] of the outermost
    pixels' centres; predicted_iou; stability_score; point_coords [[x, y]], the click.
    ValueError for a picture that is none (see SAM.encode).
    """
    found = find_masks(sam, image, points_per_side, points_per_batch, pred_iou_thresh, stability_score_thresh,
                       stability_score_offset)
    records = []
    for c in suppress(found, [c["predicted_iou"] for c in found], box_nms_thresh):
        mask = np.unpackbits(c["mask"], axis=1, count=image.shape[1]).astype(bool)
        x0, y0, x1, y1 = map(int, c["box"])
        records.append({
            "segmentation": mask, "area": int(np.count_nonzero(mask)), "bbox": [x0, y0, x1 - x0, y1 - y0],
            "predicted_iou": c["predicted_iou"], "point_coords": [c["point"]],
            "stability_score": c["stability_score"]})
    return records


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


def find_masks(sam, image, n, batch, iou_thresh, stability_thresh, offset):
    """What a grid of n x n clicks gives -> candidates, whose masks are kept as bits"""
    H, W = image.shape[:2]
    encoded = sam.encode(image)
    found = []
    for points in np.split(make_point_grid(n) * [W, H], range(batch, n * n, batch)):
        iou, hyper, embedding = sam.attend(encoded, points[:, None])
        iou = iou[:, 1:].float()  # a click may mean several things: the three masks, not the one
        good = iou > iou_thresh
        drawn = good.any(1)
        if not drawn.any():
            continue

        # Draw the good ones, some at a time, and keep those that are stable.
        low_res = sam.mask_decoder.draw(embedding[drawn], hyper[drawn, 1:]).float()[good[drawn]]  # (k, 4 g, 4 g)
        scores = iou[good].tolist()
        clicks = points[good.nonzero()[:, 0].cpu().numpy()]
        few = max(1, AT_ONCE // max(sam.config.size**2, H * W))
        for first in range(0, len(low_res), few):
            logits = sam.upscale(low_res[None, first:first + few], encoded)[0]
            inner, outer = ((logits > at).sum(2, dtype=torch.int32).sum(1) for at in (offset, -offset))
            stability = inner / outer
            stable = ((stability >= stability_thresh) & (inner > 0)).nonzero()[:, 0]  # and not empty
            masks = (logits[stable] > 0).cpu().numpy()
            stability = stability.tolist()
            for i, mask in zip(stable.tolist(), masks):
                x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
                found.append({
                    "mask": np.packbits(mask, axis=1), "box": np.array([x, y, x + w - 1, y + h - 1]),
                    "stability_score": stability[i], "predicted_iou": scores[first + i],
                    "point": clicks[first + i].tolist()})
    return found


def make_point_grid(n):
    """(n n, 2): x, y in 0 .. 1, row by row"""
    centres = np.linspace(1 / (2 * n), 1 - 1 / (2 * n), n)
    return np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)


def suppress(candidates, scores, threshold):
    """Non-maximum suppression: candidates by falling score, without those whose box has IoU > threshold with the box
    of one that is kept. Equal scores: in the order that they have."""
    if not candidates:
        return []
    boxes = np.stack([c["box"] for c in candidates]).astype(np.float32)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order = np.argsort(-np.asarray(scores, np.float32), kind="stable")
    kept = []
    while len(order):
        best = order[0]
        order = order[1:]
        kept.append(candidates[best])
        sides = np.minimum(boxes[order, 2:], boxes[best, 2:]) - np.maximum(boxes[order, :2], boxes[best, :2])
        common = sides.clip(0).prod(1)
        with np.errstate(invalid="ignore"):  # two boxes without an area: 0 / 0, and both stay
            iou = common / (areas[best] + areas[order] - common)
        order = order[~(iou > threshold)]
    return kept
