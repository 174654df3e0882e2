"""The pairs that training sees, from data.py's shards or from the toy world, in batches.

Each batch is a function of the seed and the step alone. `recipe` is train.FixupRecipe.
"""

import itertools
import math
import os

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common.processes import process_count, process_rank, slice_batch
from common.run_state import cache_batches, digest, generator_at
from kernels.blocks import to_channels_last
from toy.pairs import ToyPairs, toy_pairs, user_pairs
from video import shards
from video.motion import MODELS, check_model

# --------------------------------------------------------------------------------------------------
# Shards


class ShardPairs(IterableDataset):
    """The pairs in a folder of shards, in an order that is a function of the seed.

    path          the --out of data.py. A shard counts once its .json lies beside it
    model         'flow', 'affine', or 'both': one of them, at random, in an epoch, and the other in
                  the next
    batch         the batch size of the DataLoader that reads this. Ranks take turns batch by batch,
                  and so do workers: the batches come in the same order with any number of workers
    shuffle       how far a pair may go from its place, in pairs; whole shards are shuffled as well,
                  anew in every epoch. 0: as they lie
    epochs        None: without end. Otherwise the last batch may be smaller
    rank, world   this process among how many; None: what torchrun says
    start         batches that this rank has had: to resume, the training step. Costs nothing
    held_out      True: only the last shard; False: all others; None: all. No two shards share a
                  clip, but for one that is cut in two where data.py takes several pairs of each

    Yields dictionaries of

      reference, target, coarse    (3, H, W) float32 in [-1, 1]; `coarse` has its holes painted in
      mask                         (1, H, W) float32: 1 where a pixel of the reference landed, 0 in
                                   the holes (M)

    ValueError: no shards, one that is damaged or of pictures of another size, an unknown model.
    """

    def __init__(self, path, model="both", batch=1, *, seed=0, shuffle=4096, epochs=None,
                 rank=None, world=None, start=0, held_out=None):
        check_model(model)
        self.model, self.batch, self.start = model, batch, start
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        self.world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
        if not 0 <= self.rank < self.world:
            raise ValueError(f"there is no rank {self.rank} among {self.world}")
        self.shards = shards.find_shards(path)  # [(path, pairs)]
        self.first = self.shards[0][0]  # whose pictures say the size
        if held_out is not None:
            if len(self.shards) == 1:
                raise ValueError(f"{path} has one shard, and no other to hold out for validation: "
                                 "--held-out 0")
            self.shards = self.shards[-1:] if held_out else self.shards[:-1]
        self.pairs = sum(kept for _, kept in self.shards)  # in an epoch

    def picture_size(self):
        """-> height, width of its first pair's pictures"""
        return shards.read_pictures(self.first, 0, ["ref.jpg"])[0].shape[1:]

    def order(self, epoch):
        """-> which shard (pairs,), which pair in it (pairs,), whether model 2 (pairs,) bool"""
        rng = np.random.default_rng([self.seed, epoch])
        counts = np.array([kept for _, kept in self.shards])
        # Each pair's model: of two epochs that share their draws, the second takes the other one.
        draws = np.random.default_rng([self.seed, epoch // 2, 1]).random(self.pairs)
        affine = (draws + epoch % 2 / 2) % 1 < MODELS[self.model]
        order = rng.permutation(len(counts)) if self.shuffle else np.arange(len(counts))
        shard = np.repeat(order, counts[order])
        pair = np.concatenate([np.arange(n) for n in counts[order]])
        # Nobody moves farther than `shuffle`, so that a reader stays in few shards.
        place = np.arange(self.pairs) + self.shuffle * rng.random(self.pairs)
        near = np.argsort(place, kind="stable")
        shard, pair = shard[near], pair[near]
        return shard, pair, affine[(np.cumsum(counts) - counts)[shard] + pair]

    def __iter__(self):
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        turn += self.start
        end = math.inf if self.epochs is None else self.epochs * self.pairs
        current = None  # the epoch that shard, pair, affine are of
        size = self.picture_size()
        while (first := (turn * self.world + self.rank) * self.batch) < end:
            for place in range(first, min(first + self.batch, end)):
                epoch, i = divmod(place, self.pairs)
                if epoch != current:
                    current = epoch
                    shard, pair, affine = self.order(epoch)
                path, _ = self.shards[shard[i]]
                read = read_pair(path, int(pair[i]), "affine" if affine[i] else "flow")
                if (other := read["mask"].shape[1:]) != size:
                    sides = " and of ".join(f"{w}x{h}" for h, w in (size, other))
                    raise ValueError(f"{self.first} and {path} have pictures of {sides}: keep each "
                                     "size in a folder of its own")
                yield read
            turn += workers


def read_pair(path, i, model):
    """Pair number i of a shard, with the coarse edit of `model`, as `ShardPairs` yields it."""
    pictures = shards.read_pictures(path, i, ("ref.jpg", "gt.jpg", f"{model}.png"))
    reference, target, coarse = (p[:3].float().div_(127.5).sub_(1) for p in pictures)
    mask = (pictures[2][3:] > 127).float()
    return dict(reference=reference, target=target, coarse=coarse, mask=mask)


# --------------------------------------------------------------------------------------------------
# Batches of a training


def read_shards(recipe, batch, rank=0, world=1, start=0):
    """The pairs in the folder recipe.data to train on"""
    return ShardPairs(recipe.data, recipe.motion, batch, seed=recipe.seed + 4, rank=rank,
                      world=world, start=start, held_out=False if recipe.held_out else None)


def open_shards(recipe, resume):
    """-> pixels along a side of the pictures in the folder recipe.data. ValueError where a run is to
    go on with other shards than it began with: each of its batches would be another one."""
    pairs = read_shards(recipe, recipe.batch)
    there = f"{len(pairs.shards)} shards of {pairs.pairs} pairs"
    if resume and recipe.shards not in (None, there):
        raise ValueError(f"{recipe.data} has {there} to train on, and had {recipe.shards} when this run began: start "
                         "anew with another --out, or give it the folder as it was")
    recipe.shards = there
    return pairs.picture_size()[-1]


def make_held_out(recipe, size):
    """-> a dict of recipe.held_out pairs that training does not see"""
    if recipe.data == "toy":
        g = generator_at(recipe.seed + 2, 0)
        return toy_pairs(recipe.held_out, g, recipe.motion, size)
    pairs = ShardPairs(recipe.data, recipe.motion, shuffle=0, epochs=1, rank=0, world=1,
                       seed=recipe.seed + 4, held_out=True)
    return next(iter(DataLoader(pairs, recipe.held_out)))


def stream_pairs(recipe, size, step, device):
    """-> this process's micro-batches of pictures, from those of `step` on"""
    parts = slice_batch(recipe.batch, recipe.micro_batch)
    n = parts[0].stop - parts[0].start
    # On a CPU the training has all cores. On a GPU they decode pictures ahead, in processes of
    # their own.
    gpu = device.type == "cuda"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
    workers = min(8, (os.cpu_count() or 1) // here) if gpu else 0
    if recipe.data != "toy":
        pairs = read_shards(recipe, n, process_rank(), process_count(), start=step * len(parts))
        return iter(DataLoader(pairs, n, num_workers=workers, pin_memory=gpu))

    def number_pairs():  # sample i of the run is the toy world's pair i
        for s in range(step, recipe.steps):
            for part in parts:
                yield range(s * recipe.batch + part.start, s * recipe.batch + part.stop)

    pairs = ToyPairs(recipe.steps * recipe.batch, recipe.seed + 4, recipe.motion, size)
    return iter(DataLoader(pairs, batch_sampler=number_pairs(), num_workers=workers,
                           pin_memory=gpu))


def check_mixture(recipe):
    """ValueError for a share of pairs that there will not be."""
    if not recipe.pairs and (recipe.exact or recipe.edits):
        raise ValueError("--exact and --edits are shares of the pairs that are encoded once: say how many, --pairs")
    if recipe.edits and recipe.data != "toy" and not recipe.exact:
        raise ValueError("--edits is a share of the toy's exact pairs, of which --data has none: say how many, --exact")


def cache_latents(recipe, path, model, device):
    """recipe.pairs pairs, encoded once and kept in a file -> a dict of (N, ...) in fp16. To encode
    them again at every step would cost as much as the training. A short run gets fewer, and so do
    shards that hold fewer: each pair once, or once by either motion model. Shares stay."""
    size = model.size
    wanted = math.ceil(min(recipe.pairs, recipe.steps * recipe.batch) / 32)  # batches
    exact = wanted if recipe.data == "toy" else round(recipe.exact * wanted)
    if recipe.data != "toy":
        pairs = read_shards(recipe, batch=32)
        there = math.ceil(pairs.pairs * (2 if recipe.motion == "both" else 1) / 32)
        if there < wanted - exact:  # then fewer exact ones, too
            exact = round(there * recipe.exact / (1 - recipe.exact))
            wanted = exact + there
    edits = round(recipe.edits * exact)

    def make_exact(i):
        g = generator_at(recipe.seed + 4, 32 * i)
        return user_pairs(32, g, size) if i < edits else toy_pairs(32, g, recipe.motion, size)

    toys = map(make_exact, range(exact))
    batches, source = toys, ()
    if recipe.data != "toy":
        batches = itertools.chain(toys, itertools.islice(DataLoader(pairs, 32), wanted - exact))
        source = (exact, recipe.data, [(path.name, count) for path, count in pairs.shards])

    def encode(batch):
        return {name: x.half() for name, x in encode_pairs(batch, model, device).items()}

    encoder = model.image_encoder and digest(model.image_encoder)
    source = (*source, encoder) if encoder else source
    source = (*source, "edits", edits) if edits else source
    made_from = digest(model.vae, wanted, recipe.seed, recipe.motion, model.as_paper, *source)
    return cache_batches(path, made_from, batches, encode, wanted)


@torch.no_grad()
def encode_pairs(pairs, model, device):
    """reference, target, coarse (B, 3, H, W), mask (B, 1, H, W)
    -> as mfx.MagicFixup.encode_edit gives them, and the target's latents"""
    few = max(1, 32 * 128**2 // pairs["mask"][0].numel())  # pictures that fit beside a large model
    parts = []
    for i in range(0, len(pairs["mask"]), few):
        some = {name: x[i : i + few].to(device, non_blocking=True) for name, x in pairs.items()}
        x = [to_channels_last(some[name]) for name in ("reference", "coarse", "mask", "target")]
        with torch.autocast(device.type, enabled=False):  # bf16 errs by a third of the least noise
            parts.append((*model.encode_edit(*x[:3]), model.encode_image(x[3])))
    names = "reference", "coarse", "mask", "target"
    return {name: torch.cat(some) for name, some in zip(names, zip(*parts))}
