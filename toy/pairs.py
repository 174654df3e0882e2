"""Training pairs of Magic Fixup out of the toy world, where flow, segments and depth are exact.

    toy_pairs(n, generator)      a batch of pairs, of two moments of a scene
    user_pairs(n, generator)     a batch of a user's edits and what they truly look like: what no video shows
    ToyPairs(length, seed)       a data set, item by item

data.py says what a pair is, and makes them of videos.
"""

import torch
from torch.utils.data import Dataset

import collage
from toy.edits import edit_pictures
from toy.motion import flow_between, move
from toy.world import random_scenes, render
from video.motion import MODELS, affine_edit, check_model, flow_edit

# Who moves. The objects alone, over a background that stays, is what users do at test time: there the flow leaves
# shadows and reflections behind, because it counts them as ground, and the model learns to send them after.
OBJECTS_ALONE, CAMERA_ALONE = 0.6, 0.2  # shares of the pairs; in the rest both move
LEAVES = 0.15  # share of the moving objects that go out of the picture: what remains is a shadow without its object
REVERSED = 0.15  # share of the pairs that run backwards, so that now and then an object enters


def toy_motion(n, generator):
    """n random scenes, and the same scenes some time later. -> Scene, Scene

    Objects go 0 to 100 % of the picture's width aside and come up to 1.6 times as near or as far. The camera goes a
    good half of its own height.
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    a = random_scenes(n, generator)
    who = uniform(0, 1, n)
    moves = uniform(0, 1, *a.x.shape) < 0.6  # (n, K)
    moves[:, 0] = True  # at least one; there always is an object number 0
    moves &= (who > CAMERA_ALONE)[:, None]

    # Where the objects go, in the picture and in depth. Nearer than 2.0, splatting would tear them.
    z = (a.z * torch.exp(uniform(-0.5, 0.5, *a.z.shape))).clamp(2.0, 5.2)
    px = uniform(0.05, 0.95, *a.x.shape)
    outside = torch.where(px < 0.5, 0.0, 1.0) + (px - 0.5).sign() * 0.7 * a.size / z  # an object is 1.3 sizes wide
    px = torch.where(uniform(0, 1, *a.x.shape) < LEAVES, outside, px)
    velocity = torch.stack([(px - 0.5) * z - a.x, z - a.z], -1) * moves[..., None]  # (n, K, 2)

    camera = torch.stack([uniform(-0.6, 0.6, n), uniform(-0.4, 0.4, n)], 1)  # (n, 2)
    camera *= ((who < CAMERA_ALONE) | (who > CAMERA_ALONE + OBJECTS_ALONE))[:, None]
    begin = (uniform(0, 1, n, 1) < REVERSED).float()
    return move(a, velocity, camera, begin), move(a, velocity, camera, 1 - begin)


def toy_pairs(n, generator, model="both", size=128):
    """n pairs from the toy world, a function of the generator's state alone.

    model  'flow', 'affine', or 'both': either, at random. The segments are the toy's objects
      ->   dict of reference, target, coarse (n, 3, size, size) in [-1, 1], mask (n, 1, size, size), 1 = kept
    ValueError: unknown model.
    """
    check_model(model)
    a, b = toy_motion(n, generator)
    frames = render(a, size)
    target = render(b, size).image
    flow = flow_between(a, b, frames)

    affine = torch.rand(n, generator=generator) < MODELS[model]
    coarse, holes = flow_edit(frames.image, target, flow)
    if affine.any():
        truth = (frames.image, target, flow, frames.segments, frames.depth)
        coarse[affine], holes[affine] = affine_edit(*(t[affine] for t in truth))

    # In whole grey levels and with its holes painted in, as data.py stores a coarse edit.
    pictures = (coarse * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (n, size, size, 3)
    painted = [collage.fill_holes(*one) for one in zip(pictures, holes[:, 0].numpy())]
    coarse = torch.stack([torch.from_numpy(p).permute(2, 0, 1) / 127.5 - 1 for p in painted])
    return dict(reference=frames.image * 2 - 1, target=target * 2 - 1, coarse=coarse, mask=(~holes).float())


def user_pairs(n, generator, size=128):
    """n pairs of random scenes, each with one object moved, scaled, duplicated or deleted -> as `toy_pairs`"""
    _, _, before, after, coarse, mask = edit_pictures(random_scenes(n, generator), generator, size)
    return dict(reference=before.image * 2 - 1, target=after.image * 2 - 1, coarse=coarse * 2 - 1, mask=mask)


class ToyPairs(Dataset):
    """`length` pairs of the toy world; item i depends on `seed` and i alone. A whole batch by `toy_pairs` is faster."""

    def __init__(self, length, seed=0, model="both", size=128):
        check_model(model)
        self.length, self.seed, self.model, self.size = length, seed, model, size

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(f"there are {self.length} pairs, and none has the number {i}")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        return {name: value[0] for name, value in toy_pairs(1, generator, self.model, self.size).items()}
