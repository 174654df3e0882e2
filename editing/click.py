"""What a click in a photo means, found without a network. (networks/sam.py knows more.)"""

import cv2
import numpy as np

WORK = 256  # pixels on the longer side: finer detail misleads the search, and costs seconds


def segment_at(image, at):
    """What stands out at a point (x, y) of the image (H, W, 3) uint8. -> (H, W) bool

    GrabCut (Rother et al. 2004) starts from the connected region of similar colour, which Otsu's
    threshold tells apart. What is connected to the click remains. It finds things that have colours
    of their own.
    """
    H, W = image.shape[:2]
    shrink = min(1, WORK / max(H, W))
    h, w = max(1, round(H * shrink)), max(1, round(W * shrink))
    small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)

    # A small disc around the click belongs to the segment for certain.
    x, y = int(at[0] * w / W), int(at[1] * h / H)
    r = max(1, round(max(h, w) / 50))
    clicked = np.hypot(*np.ogrid[-y : h - y, -x : w - x]) <= r

    def connected(region):
        labels = cv2.connectedComponents((region | clicked).astype(np.uint8), connectivity=4)[1]
        return labels == labels[y, x]

    # How far each colour is from the click's; lightness counts half, because of shading.
    flat = cv2.pyrMeanShiftFiltering(small, 5, 14)
    flat = cv2.cvtColor(flat, cv2.COLOR_RGB2LAB).astype(np.float32)
    far = np.linalg.norm((flat - np.median(flat[clicked], 0)) * [0.5, 1, 1], axis=2).clip(0, 255)
    threshold, _ = cv2.threshold(far.astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    region = connected(far <= threshold)
    if region.all():
        return np.ones((H, W), bool)

    # GrabCut: the region is probably in, the rest probably out, and the rim of the picture out.
    trimap = np.where(region, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    rim = np.ones((h, w), bool)
    rim[r : max(r, h - r), r : max(r, w - r)] = False
    trimap[rim & ~region] = cv2.GC_BGD
    trimap[clicked] = cv2.GC_FGD
    cv2.setRNGSeed(0)  # it begins with k-means: the same click, the same segment
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(small, trimap, None, *models, 4, cv2.GC_INIT_WITH_MASK)
    mask = connected((trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD))

    # Specks of another colour inside belong to it.
    _, gaps, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    mask |= (stats[:, cv2.CC_STAT_AREA] < 0.05 * mask.sum())[gaps]
    return cv2.resize(mask.astype(np.float32), (W, H), interpolation=cv2.INTER_LINEAR) > 0.5
