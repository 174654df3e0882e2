"""toy/edits.py: edits of scenes, as collages of pictures and as they truly look."""

import dataclasses
import functools
import math

import numpy as np
import torch

import collage
from tests.toy import seeded
from toy.edits import VERBS, random_edits, to_collage
from toy.world import random_scenes, render


@functools.cache
def edited_by_hand(n, seed):
    """n scenes, their pictures before, random edits, the truth after (Frames), and the coarse edits (n, H, W, 4)."""
    g = seeded(seed)
    scenes = random_scenes(n, g)
    before = render(scenes)
    edited, edits = random_edits(scenes, g)
    images = (before.image * 255).round().byte().permute(0, 2, 3, 1).numpy()
    coarse = []
    for i, image in enumerate(images):
        pieces = to_collage(edited[i : i + 1], edits[i], before.segments[i])
        coarse.append(torch.from_numpy(collage.composite(image, pieces)))
    return scenes, before, edited, edits, render(edited), torch.stack(coarse)


def test_edits_depend_on_the_generator_alone():
    a, b, c = (edited_by_hand.__wrapped__(12, seed) for seed in (1, 1, 2))
    assert torch.equal(a[4].image, b[4].image) and torch.equal(a[5], b[5])
    assert [e.verb for e in a[3]] == [e.verb for e in b[3]] and not torch.equal(a[4].image, c[4].image)


def test_what_is_dragged_looks_as_it_truly_does():
    """Shading is the object's own: wherever a coarse edit and the truth show the same object, they agree."""
    _, before, edited, edits, after, coarse = edited_by_hand(90, 0)
    truth = (after.image * 255).permute(0, 2, 3, 1)
    assert {e.verb for e in edits} == set(VERBS)
    for verb in ("move", "scale", "duplicate"):
        errors, shown = [], 0
        for i in (i for i, e in enumerate(edits) if e.verb == verb):
            k = edits[i].k if verb != "duplicate" else edited.kind.shape[1] - 1
            mask = before.segments[i] == edits[i].k + 1
            opaque = np.dstack([coarse[i, ..., :3].numpy(), np.full((128, 128), 255, np.uint8)])
            piece, where = collage.lay(opaque, mask.numpy(), edits[i].matrix.numpy())
            cover = torch.zeros(128, 128)
            cover[where] = torch.from_numpy(piece[..., 3])
            covered = -torch.nn.functional.max_pool2d(-cover[None], 3, 1, 1)[0] > 254  # a pixel off its outline
            inside = covered & (after.segments[i] == k + 1)
            errors.append((coarse[i, ..., :3][inside] - truth[i][inside]).square())
            shown += (inside.sum() / (after.segments[i] == k + 1).sum()).item()
        psnr = 10 * math.log10(255**2 / torch.cat(errors).mean())
        assert psnr > 40 and shown / len(errors) > 0.65  # the rest was hidden, or is outline


def test_deleting_leaves_a_hole_and_nothing_else_changes():
    _, before, _, edits, _, coarse = edited_by_hand(120, 4)
    for i in (i for i, e in enumerate(edits) if e.verb == "delete"):
        hole = before.segments[i] == edits[i].k + 1
        assert hole.any() and torch.equal(coarse[i, ..., 3] == 0, hole)
        image = (before.image[i] * 255).round().byte().permute(1, 2, 0)
        assert torch.equal(coarse[i, ..., :3][~hole], image[~hole])
    for i in (i for i, e in enumerate(edits) if e.verb == "duplicate"):
        assert (coarse[i, ..., 3] == 255).all()


def test_edited_objects_are_seen():
    scenes, _, edited, edits, after, _ = edited_by_hand(120, 4)
    K = scenes.kind.shape[1]
    change = [{"duplicate": 1, "delete": -1}.get(e.verb, 0) for e in edits]
    assert ((edited.kind >= 0).sum(1) - (scenes.kind >= 0).sum(1)).tolist() == change
    slot = torch.tensor([K if e.verb == "duplicate" else e.k for e in edits])[:, None]
    there = torch.tensor([e.verb != "delete" for e in edits])
    alone = dataclasses.replace(edited, kind=edited.kind.where(torch.arange(K + 1) == slot, -1))
    seen = (after.segments == slot[..., None] + 1).sum((1, 2)) / (render(alone).segments > 0).sum((1, 2))
    assert seen[there].min() > 0.05 and (seen[there] < 0.5).float().mean() < 0.05  # hidden at times, but never wholly
    x, z = (field.gather(1, slot)[there] for field in (edited.x, edited.z))
    assert ((x / z).abs() < 0.45).all() and (z >= 2.1).all() and (z <= 4.6).all()
