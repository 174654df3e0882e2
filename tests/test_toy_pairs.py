"""toy/pairs.py, video/motion.py: training pairs of the toy world, both motion models where the truth is known."""

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import warp
from tests.toy import seeded
from toy.motion import flow_between
from toy.pairs import ToyPairs, toy_motion, toy_pairs, user_pairs
from toy.world import GROUNDS, render
from video.motion import flow_edit


def psnr(error):
    return -10 * torch.log10(error.square().mean()).item()


# --- The toy world --------------------------------------------------------------------------------


def test_toy_pairs_are_a_function_of_the_generator():
    batch, again = toy_pairs(8, seeded(1)), toy_pairs(8, seeded(1))
    for name, channels in (("reference", 3), ("target", 3), ("coarse", 3), ("mask", 1)):
        assert batch[name].shape == (8, channels, 128, 128) and batch[name].dtype == torch.float32
        assert torch.equal(batch[name], again[name])
        assert batch[name].min() >= -1 and batch[name].max() <= 1
    assert set(batch["mask"].unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(batch["target"], toy_pairs(8, seeded(2))["target"])
    flow, affine = toy_pairs(8, seeded(1), "flow"), toy_pairs(8, seeded(1), "affine")
    assert torch.equal(flow["target"], batch["target"]) and torch.equal(affine["target"], batch["target"])
    of = [[torch.equal(batch["coarse"][i], one["coarse"][i]) for i in range(8)] for one in (flow, affine)]
    assert all(a or b for a, b in zip(*of)) and not all(of[0]) and not all(of[1])  # each is the one or the other
    with pytest.raises(ValueError, match="unknown motion model 'raft': choose flow, affine, both"):
        toy_pairs(1, seeded(0), "raft")


def test_toy_items():
    items = ToyPairs(5, seed=3, size=64)
    assert len(items) == 5 and len(list(items)) == 5
    assert torch.equal(items[4]["coarse"], ToyPairs(5, seed=3, size=64)[4]["coarse"])
    assert not torch.equal(items[4]["target"], items[3]["target"])
    assert next(iter(DataLoader(items, batch_size=5)))["mask"].shape == (5, 1, 64, 64)


def test_user_pairs_hold_what_no_video_shows():
    """Also a thing in two places: there the coarse edit has no hole, and only the copy's shadow is missing."""
    pairs, again = user_pairs(24, seeded(6), 64), user_pairs(24, seeded(6), 64)
    for name, batch in toy_pairs(1, seeded(0), size=64).items():
        assert pairs[name].shape[1:] == batch.shape[1:] and pairs[name].dtype == batch.dtype
        assert pairs[name].min() >= -1 and pairs[name].max() <= 1 and torch.equal(pairs[name], again[name])
    whole = (pairs["mask"] == 1).all((1, 2, 3))
    changed, missing = (((pairs[name] - pairs["target"]).abs().amax(1) > 0.1).float().mean((1, 2))
                        for name in ("reference", "coarse"))
    assert 0.1 < whole.float().mean() < 0.5
    assert (missing[whole] < changed[whole]).all() and missing[whole].max() > 0.005


def test_toy_motion_is_what_users_do():
    a, b = toy_motion(400, seeded(0))
    still = (a.camera == b.camera).all(1)
    there = a.kind >= 0
    moves = ((a.x != b.x) | (a.z != b.z)) & there
    assert 0.5 < still.float().mean() < 0.7 and moves.any(1)[still].all()  # something moves in every pair
    assert 0.1 < (~moves.any(1)).float().mean() < 0.3
    assert min(a.z.min(), b.z.min()) - max(a.camera.max(), b.camera.max()) > 1.3  # in front of the camera
    seen = [render(s, 64).segments for s in (a, b)]
    gone, new = (torch.tensor([[(f[i] == k + 1).any() and not (g[i] == k + 1).any() for k in range(3)]
                               for i in range(400)]) for f, g in (seen, seen[::-1]))
    assert 0.05 < gone.any(1).float().mean() < 0.4 and 0.01 < new.any(1).float().mean() < 0.25
    share = ((b.x / b.z - a.x / a.z).abs())[moves & still[:, None]]  # of the picture's width
    assert 0.1 < share.median() < 0.5


def test_exact_flow_splats_the_reference_onto_the_target():
    a, b = toy_motion(96, seeded(5))
    keep = (a.camera == b.camera).all(1) & (a.ground != GROUNDS.index("water"))
    a, b = a[keep], b[keep]
    first, second = render(a), render(b)
    flow = flow_between(a, b, first)
    coarse, holes = flow_edit(first.image, second.image, flow)
    ground = ((first.segments == 0) & (second.segments == 0))[:, None]
    shading = ground & ((first.image - second.image).abs().amax(1, keepdim=True) > 0.004)  # shadows that moved
    entered = torch.stack([~torch.isin(s, f.unique()) for s, f in zip(second.segments, first.segments)])[:, None]
    error = (coarse - second.image)[(~holes & ~shading & ~entered).expand(-1, 3, -1, -1)]
    assert psnr(error) > 30 and error.abs().median() < 1e-4
    assert (holes & (first.segments[:, None] == 0) & ground).float().mean() < 0.005  # holes are where objects were


def test_shadows_stay_where_they_were_in_the_coarse_edit():
    a, b = toy_motion(64, seeded(5))
    keep = (a.camera == b.camera).all(1)
    a, b = a[keep], b[keep]
    first, second = render(a), render(b)
    coarse, holes = flow_edit(first.image, second.image, flow_between(a, b, first))
    ground = ((first.segments == 0) & (second.segments == 0))[:, None] & ~holes
    assert (coarse - first.image).abs()[ground.expand(-1, 3, -1, -1)].median() < 1e-4
    assert ((second.image - first.image).abs().amax(1, keepdim=True) > 0.1)[ground].float().mean() > 0.005


def test_affine_edit_of_rigid_objects_is_exact_to_the_pixel():
    a, b = toy_motion(48, seeded(5))
    first, second = render(a), render(b)
    flow = flow_between(a, b, first)
    metric, offsets, colours = warp.importance(first.image, second.image, flow)[:, 0], [], []
    for i in range(len(a)):
        out, holes, source = warp.piecewise_affine_warp(first.image[i], flow[i], first.segments[i], first.depth[i],
                                                        metric[i])
        for k in range(3):
            both = torch.stack([(f.segments[i] == k + 1) for f in (first, second)]).numpy().astype(np.uint8)
            interior = torch.from_numpy(cv2.erode(both[1], np.ones((5, 5)))).bool() & ~holes
            if both[0].sum() < 30:  # a sliver at the edge of the picture says little of where the rest goes
                continue
            x, y = source[interior].T
            nearest = (y.round().long().clamp(0, 127), x.round().long().clamp(0, 127))
            inside = torch.from_numpy(cv2.erode(both[0], np.ones((3, 3)))).bool()[nearest]
            at = interior.nonzero().flip(1)[inside]
            back = (source.nan_to_num(0).permute(2, 0, 1) - grid(128))[None]
            land = (source + warp.backwarp(flow[i][None], back)[0].permute(1, 2, 0))[interior][inside]
            offsets.append((land - at).norm(dim=1))
            colours.append((out - second.image[i]).abs().amax(0)[interior][inside])
    offsets, colours = torch.cat(offsets), torch.cat(colours)
    assert len(offsets) > 5000 and offsets.quantile(0.99) < 0.5 and colours.median() < 0.02


def grid(size):
    return torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy")).float()
