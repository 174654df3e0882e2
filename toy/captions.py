"""What is in a picture of the toy world, in words: `--prompt auto`, and a small network that learns to see it.

    encoder = load_part("weights/toy-captioner", "toy_image_encoder")
    words = describe(encoder, x)        x (B, 3, H, W) in [-1, 1] -> ["a red ball and a blue cone on grass at noon"]

The network's numbers are scores: of times, of grounds, and for each of three objects from left to right of kinds, the
first of which is none, and of colours.
"""

import torch
import torch.nn.functional as F

from toy.world import COLOURS, GROUNDS, KINDS, TIMES

OBJECTS = 3
SIZES = len(TIMES), len(GROUNDS), OBJECTS * (len(KINDS) + 1), OBJECTS * len(COLOURS)


def split_scores(y):
    """(B, sum(SIZES)) -> scores of times (B, 3), grounds (B, 4), kinds (B, 3, 7), colours (B, 3, 6)"""
    time, ground, kind, colour = y.float().split(SIZES, dim=1)
    return time, ground, kind.unflatten(1, (OBJECTS, -1)), colour.unflatten(1, (OBJECTS, -1))


def read_scenes(scenes):
    """What the scores should say: time (B,), ground (B,), kind (B, 3), 0 = none, and colour (B, 3), from the left on"""
    place = torch.where(scenes.kind >= 0, scenes.x / scenes.z, torch.inf)
    order = place.argsort(1)
    return scenes.time, scenes.ground, scenes.kind.gather(1, order) + 1, scenes.colour.gather(1, order)


def caption_loss(y, scenes):
    """Cross-entropies, an object's colour where there is one -> scalar"""
    time, ground, kind, colour = split_scores(y)
    true_time, true_ground, true_kind, true_colour = read_scenes(scenes)
    there = true_kind > 0
    kinds = F.cross_entropy(kind.flatten(0, 1), true_kind.flatten())
    colours = F.cross_entropy(colour[there], true_colour[there])
    return F.cross_entropy(time, true_time) + F.cross_entropy(ground, true_ground) + OBJECTS * (kinds + colours)


def caption(time, ground, kinds, colours):
    """Numbers, as of `read_scenes` -> the words: all objects from left to right, ground and time"""
    things = [f"a {COLOURS[c]} {KINDS[k - 1]}" for k, c in zip(kinds, colours) if k]
    things = " and ".join(filter(None, [", ".join(things[:-1]), *things[-1:]]))
    where = f"{GROUNDS[ground]} at {TIMES[time]}"
    return f"{things} on {where}" if things else where


def caption_scenes(scenes):
    """-> [what a scene shows, in words]"""
    return [caption(*one) for one in zip(*(x.tolist() for x in read_scenes(scenes)))]


@torch.no_grad()
def describe(encoder, x):
    """Pictures (B, 3, H, W) in [-1, 1] -> [what the encoder sees, in words]"""
    scores = split_scores(encoder.embed(x.to(encoder.projection.weight.device)))
    return [caption(*one) for one in zip(*(s.argmax(-1).tolist() for s in scores))]
