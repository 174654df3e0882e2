"""Training pairs of Magic Fixup: what one is, and two sources of them. Paper: section 3.5; data.py makes the shards.

A pair is two frames of one video. The first is the reference I, the second the target I_gt; I warped towards I_gt is
the coarse edit. The model learns to turn the coarse edit into the target. Every source yields the same dictionary:

    reference, target, coarse    (3, H, W) float32 in [-1, 1]; the holes of `coarse` are painted in
    mask                         (1, H, W) float32: 1 where a pixel of the reference landed, 0 in the holes (M)

    toy_pairs(n, generator)      a batch of them out of the toy world, where flow, segments and depth are exact
    ToyPairs(length, seed)       the same, item by item
    ShardPairs(path)             out of the shards that data.py wrote
"""

import functools
import json
import math
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import collage
import warp
from toy import world as toyworld

MODELS = ("flow", "affine", "both")  # the motion model of the coarse edit; both: either one, half of the time

# ---------------------------------------------------------------------------------------------------------------------
# The two motion models


def flow_edit(image, target, flow):
    """Model 1: every pixel goes where the flow leads. (B, 3, H, W) twice in [0, 1], (B, 2, H, W) in pixels.

      ->  coarse edit (B, 3, H, W), 0 in holes;  holes (B, 1, H, W) bool
    """
    return warp.softsplat(image, flow, warp.importance(image, target, flow), "soft", holes=True)


def affine_edit(image, target, flow, segments, depth):
    """Model 2: a collage of segments (B, H, W), laid from far to near by depth (B, H, W). As `flow_edit`."""
    metric = warp.importance(image, target, flow)[:, 0]
    edits = [warp.piecewise_affine_warp(*one)[:2] for one in zip(image, flow, segments, depth, metric)]
    coarse, holes = (torch.stack(part) for part in zip(*edits))
    return coarse, holes[:, None]


def painted(coarse, holes):
    """coarse (H, W, 3) uint8, holes (H, W) bool -> (3, H, W) in [-1, 1], as the model sees a coarse edit."""
    return torch.from_numpy(collage.fill_holes(coarse, holes)).permute(2, 0, 1) / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# The toy world

# Who moves. The objects alone, over a background that stays, is what users do at test time: there the flow leaves
# shadows and reflections behind, because it counts them as ground, and the model learns to send them after.
OBJECTS_ALONE, CAMERA_ALONE = 0.6, 0.2  # shares of the pairs; in the rest both
LEAVES = 0.15  # share of the moving objects that go out of the picture: what remains is a shadow without its object
REVERSED = 0.15  # share of the pairs that run backwards, so that now and then an object enters


def toy_motion(n, generator):
    """n random toy scenes, and the same scenes some time later. Objects go 0 to 100 % of the picture's width aside and
    come up to 1.6 times as near or as far, the camera a good half of its own height. -> Scene, Scene
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    a = toyworld.random_scenes(n, generator)
    who = uniform(0, 1, n)
    moves = uniform(0, 1, *a.x.shape) < 0.6
    moves[:, 0] = True  # at least one; there always is an object number 0
    moves &= (who > CAMERA_ALONE)[:, None]
    z = (a.z * torch.exp(uniform(-0.5, 0.5, *a.z.shape))).clamp(2.0, 5.2)  # twice as large at most, or splatting tears
    px = uniform(0.05, 0.95, *a.x.shape)
    outside = torch.where(px < 0.5, 0.0, 1.0) + (px - 0.5).sign() * 0.7 * a.size / z  # an object is 1.3 sizes wide
    px = torch.where(uniform(0, 1, *a.x.shape) < LEAVES, outside, px)
    velocity = torch.stack([(px - 0.5) * z - a.x, z - a.z], -1) * moves[..., None]
    camera = torch.stack([uniform(-0.6, 0.6, n), uniform(-0.4, 0.4, n)], 1)
    camera *= ((who < CAMERA_ALONE) | (who > CAMERA_ALONE + OBJECTS_ALONE))[:, None]
    begin = (uniform(0, 1, n, 1) < REVERSED).float()
    return toyworld.moved(a, velocity, camera, begin), toyworld.moved(a, velocity, camera, 1 - begin)


def toy_pairs(n, generator, model="both", size=128):
    """n pairs from the toy world, a function of the generator's state alone.

    model  'flow', 'affine', or 'both': either, at random. The segments of the toy are its objects
      ->   dict of reference, target, coarse (n, 3, size, size), mask (n, 1, size, size). ValueError: unknown model
    """
    check_model(model)
    a, b = toy_motion(n, generator)
    frames, target = toyworld.render(a, size), toyworld.render(b, size).image
    flow = toyworld.flow_between(a, b, frames)
    affine = torch.rand(n, generator=generator) < {"flow": 0, "affine": 1, "both": 0.5}[model]
    coarse, holes = flow_edit(frames.image, target, flow)
    if affine.any():
        truth = (frames.image, target, flow, frames.segments, frames.depth)
        coarse[affine], holes[affine] = affine_edit(*(t[affine] for t in truth))
    pictures = (coarse * 255).round().byte().permute(0, 2, 3, 1).numpy()
    coarse = torch.stack([painted(*one) for one in zip(pictures, holes[:, 0].numpy())])
    return dict(reference=frames.image * 2 - 1, target=target * 2 - 1, coarse=coarse, mask=(~holes).float())


class ToyPairs(Dataset):
    """`length` pairs of the toy world; item i depends on `seed` and i alone. (A batch at once: `toy_pairs`, faster.)"""

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


def check_model(model):
    if model not in MODELS:
        raise ValueError(f"unknown motion model {model!r}: choose {', '.join(MODELS)}")


# ---------------------------------------------------------------------------------------------------------------------
# Shards


class ShardPairs(IterableDataset):
    """The pairs in a folder of shards, in an order that is a function of the seed: shuffled anew in every epoch.

    path          what data.py wrote to. A shard counts once its .json lies beside it
    model         'flow', 'affine', or 'both': either, at random for each pair and epoch
    batch         the batch size of the DataLoader that reads this. Ranks take turns batch by batch, and so do workers:
                  the batches come in the same order with any number of workers
    shuffle       how far a pair may go from its place, in pairs; whole shards are shuffled as well. 0: as they lie
    epochs        None: without end. Otherwise the last batch may be smaller
    rank, world   this process among how many; None: what torchrun says
    start         batches that this rank has already had: to resume, set it to the training step. Costs nothing

    Yields the dictionary above. ValueError: no shards, one that is damaged, an unknown model.
    """

    def __init__(self, path, model="both", batch=1, *, seed=0, shuffle=4096, epochs=None, rank=None, world=None,
                 start=0):
        check_model(model)
        self.model, self.batch, self.start = model, batch, start
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        self.world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
        if not 0 <= self.rank < self.world:
            raise ValueError(f"there is no rank {self.rank} among {self.world}")
        self.shards = []  # (path, pairs)
        for told in sorted(Path(path).glob("pairs-*.json")):
            try:
                kept = int(json.loads(told.read_bytes())["kept"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{told} is damaged: delete it, and let data.py make its shard again") from None
            self.shards += [(told.with_suffix(".tar"), kept)] if kept else []
        if not self.shards:
            raise ValueError(f"{path} holds no finished shards: python data.py VIDEO_OR_FOLDER ... --out {path}")
        self.pairs = sum(kept for _, kept in self.shards)  # in an epoch

    def state_dict(self):
        return {"start": self.start}

    def load_state_dict(self, state):
        self.start = state["start"]

    def order(self, epoch):
        """-> which shard (pairs,), which pair in it (pairs,), whether piecewise affine (pairs,) bool"""
        rng = np.random.default_rng([self.seed, epoch])
        counts = np.array([kept for _, kept in self.shards])
        shards = rng.permutation(len(counts)) if self.shuffle else np.arange(len(counts))
        shard = np.repeat(shards, counts[shards])
        pair = np.concatenate([np.arange(n) for n in counts[shards]])
        near = np.argsort(np.arange(self.pairs) + self.shuffle * rng.random(self.pairs), kind="stable")
        affine = rng.random(self.pairs) < {"flow": 0, "affine": 1, "both": 0.5}[self.model]
        return shard[near], pair[near], affine

    def __iter__(self):
        worker = get_worker_info()
        worker, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        end = math.inf if self.epochs is None else self.epochs * self.pairs
        turn, current = self.start + worker, None
        while (first := (turn * self.world + self.rank) * self.batch) < end:
            for place in range(first, min(first + self.batch, end)):
                epoch, i = divmod(place, self.pairs)
                if epoch != current:
                    current, (shard, pair, affine) = epoch, self.order(epoch)
                yield read_pair(self.shards[shard[i]][0], int(pair[i]), "affine" if affine[i] else "flow")
            turn += workers


@functools.lru_cache(maxsize=512)
def contents(path):
    """A shard -> [{extension: (offset, bytes)}] of its pairs, in order. ValueError if it is damaged."""
    pairs = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                pairs.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, EOFError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete its .json, and let data.py make it again") from None
    return list(pairs.values())


def read_pair(path, i, model):
    """Pair number i of a shard, with the coarse edit of `model`, as the dictionary above."""
    try:
        files, pictures = contents(path)[i], []
        with open(path, "rb") as shard:
            for extension in ("ref.jpg", "gt.jpg", f"{model}.png"):
                offset, size = files[extension]
                shard.seek(offset)
                picture = cv2.imdecode(np.frombuffer(shard.read(size), np.uint8), cv2.IMREAD_UNCHANGED)
                order = (2, 1, 0, 3)[: picture.shape[2]]  # OpenCV keeps blue first
                pictures.append(torch.from_numpy(np.stack([picture[..., c] for c in order])))
    except (IndexError, KeyError, AttributeError, cv2.error):
        raise ValueError(f"{path} is damaged: pair {i} cannot be read. Delete its .json and make it again") from None
    reference, target, coarse = (p[:3].float().div_(127.5).sub_(1) for p in pictures)
    return dict(reference=reference, target=target, coarse=coarse, mask=(pictures[2][3:] > 127).float())
