"""Flow, segments and depth of pictures, for data.py's pairs. Each by name, in the tables at the end.

Classical estimators need no weights. The networks that the paper uses, RAFT-Large, Segment Anything and MiDaS, give
the same kind of result, and need a file each (checkpoints/published.py). Pictures are (H, W, 3) uint8 RGB.
"""

import functools
import heapq
import os

import cv2
import numpy as np
import torch

from checkpoints import published
from networks import automask, midas, raft

SMALLEST = 300  # pixels of a 512x512 picture; the release drops smaller segments
CPU_MEMORY = 2**29  # bytes for RAFT on a CPU: one pair of frames at a time, where several at once are no faster


def to_grey(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


@functools.cache
def make_dis(preset):
    return cv2.DISOpticalFlow_create(preset)


def dis_flow(first, second, preset=cv2.DISOPTICAL_FLOW_PRESET_MEDIUM):
    """Dense inverse search, Kroeger et al. 2016. -> flow (2, H, W) float32"""
    return torch.from_numpy(make_dis(preset).calc(to_grey(first), to_grey(second), None)).permute(2, 0, 1)


def dis_flows(frames):
    return [dis_flow(*two) for two in zip(frames, frames[1:])]


def classical_segments(image):
    """Pieces of similar colour: a watershed, then region merging. -> (H, W) int32, 0 = in no piece of useful size

    Regions merge in the order of how little is lost by seeing both as one colour, for each pixel of border saved
    (Koepfler, Lopez & Morel 1994, for the functional of Mumford & Shah):

        cost(i, j) = |i| |j| / (|i| + |j|) * |mean_i - mean_j|^2 / border(i, j)
    """
    H, W = image.shape[:2]
    scale = max(H, W) / 512
    lab = cv2.cvtColor(cv2.bilateralFilter(cv2.medianBlur(image, 5), 7, 25, 5), cv2.COLOR_RGB2LAB)

    # A watershed from where the picture is flattest.
    slope = sum(np.abs(cv2.Sobel(lab, cv2.CV_32F, dx, 1 - dx)).sum(2) for dx in (0, 1))
    slope = cv2.GaussianBlur(slope, (0, 0), 1.5)
    seeds = slope <= cv2.erode(slope, np.ones((9, 9)))
    labels = cv2.watershed(lab, cv2.connectedComponents(seeds.astype(np.uint8))[1])
    while (labels <= 0).any():  # lines between the basins, one pixel wide: to a neighbour
        grown = cv2.dilate(labels.clip(0).astype(np.float32), np.ones((3, 3))).astype(np.int32)
        labels = np.where(labels > 0, labels, grown)
    labels -= 1

    # Of each region: how many pixels, the sum of their colours, and {neighbour: how many pixels of border}.
    n = int(labels.max()) + 1
    area = np.bincount(labels.ravel(), minlength=n).astype(float).tolist()
    total = np.stack([np.bincount(labels.ravel(), lab[..., c].ravel(), n) for c in range(3)], 1)  # (n, 3)
    a, b = (np.concatenate([down.ravel(), right.ravel()])
            for down, right in ((labels[1:], labels[:, 1:]), (labels[:-1], labels[:, :-1])))
    edges, lengths = np.unique((np.minimum(a, b) * n + np.maximum(a, b))[a != b], return_counts=True)
    border = [{} for _ in range(n)]
    for edge, length in zip(edges.tolist(), lengths.tolist()):
        i, j = divmod(edge, n)
        border[i][j] = border[j][i] = length

    def cost(i, j):
        difference = total[i] / area[i] - total[j] / area[j]
        return area[i] * area[j] / (area[i] + area[j]) * float(difference @ difference) / border[i][j]

    # Merge the two that cost least, until none is cheap. A region's age changes with its colour: what the queue says
    # of another age is out of date. -1: merged away.
    age = [0] * n
    queue = [(cost(i, j), i, j, 0, 0) for i in range(n) for j in border[i] if i < j]
    heapq.heapify(queue)
    into = np.arange(n)
    while queue and queue[0][0] < 4000 * scale:
        _, i, j, age_i, age_j = heapq.heappop(queue)
        if (age[i], age[j]) != (age_i, age_j):
            continue
        into[into == j] = i
        area[i] += area[j]
        total[i] += total[j]
        age[i] += 1
        age[j] = -1
        for k, length in border[j].items():
            del border[k][j]
            if k != i:
                border[i][k] = border[k][i] = border[i].get(k, 0) + length
        for k in border[i]:
            heapq.heappush(queue, (cost(i, k), i, k, age[i], age[k]))

    # Number those that are large enough.
    labels = into[labels]
    useful = np.bincount(labels.ravel(), minlength=n) >= SMALLEST * scale**2
    return ((np.cumsum(useful) * useful)[labels]).astype(np.int32)


def no_depth(image, flow):
    """All at the same distance: segments lie over each other in reading order. -> (H, W), larger = farther"""
    return np.zeros(image.shape[:2], np.float32)


def flow_depth(image, flow):
    """A guess from motion and position: what moves otherwise than most, and what is lower in the picture, is nearer."""
    H, W = image.shape[:2]
    own = np.linalg.norm(flow - np.median(flow, (1, 2), keepdims=True), axis=0)
    return -(own / max(float(np.percentile(own, 95)), 1e-3)).clip(0, 1) - np.linspace(0, 1, H)[:, None]


def raft_flows(model, frames):
    memory = CPU_MEMORY if next(model.parameters()).device.type == "cpu" else raft.MEMORY
    return check_finite(raft.clip_flows(model, frames, memory=memory), "RAFT")


def sam_segments(sam, image):
    return automask.segments(sam, image, smallest=SMALLEST * (max(image.shape[:2]) / 512) ** 2)


def midas_depth(dpt, image, flow):
    """Inverse depth, negated. Not 1 / x, as its shift is unknown: only the order means anything."""
    return -check_finite(midas.depth(dpt, image), "MiDaS").numpy()


def check_finite(x, network):
    """-> x. ValueError where it is not finite: it would be taken for a fault of the pair, or for none."""
    if not x.isfinite().all():
        raise ValueError(f"what {network} computes is not finite: its file is damaged, or stored in a precision that "
                         "it overflows in")
    return x


# ---------------------------------------------------------------------------------------------------------------------
# By name. A network takes its model before the rest, and has the name that its file has in checkpoints/published.py.


FLOW = {"dis": dis_flows, "raft": raft_flows}  # (N frames) -> N - 1 flows to the next, (2, H, W) float32 in pixels
SEGMENTS = {"classical": classical_segments, "sam": sam_segments}  # (image) -> (H, W) int32, 0 = none
DEPTH = {"none": no_depth, "flow": flow_depth, "midas": midas_depth}  # (image, flow) -> (H, W), larger = farther


def find_weights(recipe, folder):
    """{name: path} for the networks in a data.PairRecipe, loaded on trial: errors as `published.find` and `load`."""
    weights = {}
    for name in (recipe.flow, recipe.segments, recipe.depth):
        if name in published.PUBLISHED:
            weights[name] = published.find(name, folder)
    for name, path in weights.items():
        published.load(name, path)  # mapped, so that it costs next to nothing
    return weights


@functools.cache
def load_model(kind, path, device):
    """On the device. Processes take GPUs in turn, by the LOCAL_RANK of torchrun or `shards.start_worker`."""
    if str(device) == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return published.load(kind, path, device=device)


def get_estimators(recipe, weights=None, device="cpu"):
    """The functions of a data.PairRecipe in FLOW, SEGMENTS and DEPTH. A network's has its model, which a process reads
    once, from what `find_weights` found."""
    functions = []
    for table, name in ((FLOW, recipe.flow), (SEGMENTS, recipe.segments), (DEPTH, recipe.depth)):
        function = table[name]
        if name in published.PUBLISHED:
            function = functools.partial(function, load_model(name, weights[name], device))
        functions.append(function)
    return functions
