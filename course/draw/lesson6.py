"""Lesson 6's figures: pairs of frames with both coarse edits, and what composing a flow costs."""

import numpy as np
import torch

import collage
import data
import warp
from common.canvas import Canvas, heat
from common.run_state import generator_at
from toy.clips import FRAMES, Clip
from toy.motion import flow_between, move
from toy.world import random_scenes, render
from video.estimators import classical_segments, dis_flow, flow_depth

PAIRS = 3  # rows of the first figure


def draw(folder, dark):
    return [draw_pairs(folder, dark), draw_composed(folder, dark)]


def to_bytes(images):
    """(n, 3, H, W) in [0, 1] -> [(H, W, 3) uint8]"""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())


def draw_pairs(folder, dark):
    """The first pairs of clips that data.py's rules keep: what goes in, and both coarse edits."""
    clip = Clip(8, generator_at(0, 0))
    films = list(zip(*[to_bytes(render(clip(k / (FRAMES - 1))).image) for k in range(0, FRAMES, 2)]))
    heads = "reference I", "target", "flow", "importance", "model 1, flow", "model 2, affine", "its holes filled"
    canvas = Canvas(20 + 108 * len(heads), 30 + 108 * PAIRS, dark)
    for j, head in enumerate(heads):
        canvas.text(16 + 108 * j + 51, 14, head, 13, "mm")
    row = 0
    for frames in films:
        try:
            flow = data.compose_steps([dis_flow(*two) for two in zip(frames, frames[1:])])
            data.measure_motion(flow)
            edits, _ = data.warp_frames(frames[0], frames[-1], flow, classical_segments, flow_depth)
        except data.Rejected:
            continue
        I, I_gt = (torch.from_numpy(frames[i]).permute(2, 0, 1)[None] / 255 for i in (0, -1))
        shown = [I[0] * 2 - 1, I_gt[0] * 2 - 1, warp.flow_to_colour(flow[None])[0] * 2 - 1]
        shown.append(heat(warp.importance(I, I_gt, flow[None])[0, 0], 10.0))
        for coarse, holes in edits.values():
            grey = np.where(holes[..., None], 128, coarse)
            shown.append(torch.from_numpy(grey).permute(2, 0, 1) / 127.5 - 1)
        painted = collage.fill_holes(*edits["affine"])
        shown.append(torch.from_numpy(painted).permute(2, 0, 1) / 127.5 - 1)
        for j, picture in enumerate(shown):
            canvas.picture(picture, 16 + 108 * j, 28 + 108 * row, 102)
        row += 1
        if row == PAIRS:
            return canvas.save(folder, "lesson6-pairs")
    raise ValueError(f"only {row} of {len(films)} pairs are kept")


def measure_errors(steps=10, count=24):
    """How far off, in pixels, the flow to a later moment is: the median over the objects that move.

    ->  {name: [error after 1, 2, .. steps]}, against the exact flow
    """
    g = torch.Generator().manual_seed(0)
    scenes = random_scenes(count, g)
    apart = 0.2 * scenes.z * (0.5 + torch.rand(scenes.x.shape, generator=g)) * -scenes.x.sign()  # towards the middle
    velocity = torch.stack([4 * apart, -0.25 * scenes.z], -1) / 4  # and a quarter nearer
    moments = [move(scenes, velocity, torch.zeros(count, 2), i / steps) for i in range(steps + 1)]
    frames = [render(moment) for moment in moments]
    films = list(zip(*[to_bytes(f.image) for f in frames]))
    exact = [flow_between(a, b, f) for a, b, f in zip(moments, moments[1:], frames)]
    found = [torch.stack([dis_flow(film[i], film[i + 1]) for film in films]) for i in range(steps)]
    inside = frames[0].segments > 0
    errors = {"exact steps, added": [], "exact steps, composed": [], "DIS steps, composed": [], "DIS in one step": []}
    ways = [exact[0], exact[0], found[0]]
    for i in range(steps):
        truth = flow_between(scenes, moments[i + 1], frames[0])
        if i:
            ways = [ways[0] + exact[i], warp.compose_flow(ways[1], exact[i], "border"),
                    warp.compose_flow(ways[2], found[i], "border")]
        direct = torch.stack([dis_flow(film[0], film[i + 1]) for film in films])
        for name, flow in zip(errors, [*ways, direct]):
            errors[name].append((flow - truth).norm(dim=1)[inside].median().item())
    return errors


def draw_composed(folder, dark):
    canvas = Canvas(640, 320, dark)
    errors = measure_errors()
    most = max(max(e) for e in errors.values())
    steps = len(next(iter(errors.values())))
    place = canvas.axes((60, 30, 440, 265), (1, steps), (0, 1.1 * most), "frames apart",
                        "median error of the flow on moving objects, pixels", ticks=4)
    for i, (colour, (name, error)) in enumerate(zip(canvas.lines, errors.items())):
        canvas.line([place(k + 1, e) for k, e in enumerate(error)], colour)
        canvas.dot(*place(steps, error[-1]), colour)
        canvas.text(455, 60 + 44 * i, f"{name}\nat the end {error[-1]:.2f}", 13, "la", colour)
    return canvas.save(folder, "lesson6-composed")
