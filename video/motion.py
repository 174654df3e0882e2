"""The two motion models of Magic Fixup (section 3.5): the reference, warped towards the target.

Both take pictures (B, 3, H, W) in [0, 1] and a flow (B, 2, H, W) in pixels from the first to the second. Both give

    coarse    (B, 3, H, W), the coarse edit, 0 in holes
    holes     (B, 1, H, W) bool, where no pixel of the reference lands

Pairs from videos (data.py) and pairs from the toy world (toy/pairs.py) are warped by these functions.
"""

import torch

import warp

# A choice of motion model, and the share of pairs that it warps by the second: 'both' takes either.
MODELS = {"flow": 0.0, "affine": 1.0, "both": 0.5}


def flow_edit(reference, target, flow):
    """Model 1: every pixel goes where the flow leads. -> coarse, holes"""
    metric = warp.importance(reference, target, flow)
    return warp.softsplat(reference, flow, metric, "soft", holes=True)


def affine_edit(reference, target, flow, segments, depth):
    """Model 2: a collage of segments (B, H, W), laid from far to near by depth (B, H, W). -> coarse, holes"""
    metric = warp.importance(reference, target, flow)[:, 0]
    coarse = []
    holes = []
    for one in zip(reference, flow, segments, depth, metric):
        picture, hole, _ = warp.piecewise_affine_warp(*one)
        coarse.append(picture)
        holes.append(hole)
    return torch.stack(coarse), torch.stack(holes)[:, None]


def check_model(model):
    """ValueError, unless it is one of MODELS."""
    if model not in MODELS:
        raise ValueError(f"unknown motion model {model!r}: choose {', '.join(MODELS)}")
