"""-m bench's topics of training: a step of Magic Fixup; the toy world's pictures, pairs of them, pairs in shards.

Nobody else's program does the same, so that these figures stand alone.
"""

import contextlib
import itertools
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
import diffusion
import mfx
import pairs
import train
import unet
import vae
from bench.clock import Watch, alternate, in_own_process, rates, summary, synchronize
from bench.models import CONFIGS, NAMES, SIDES, without_text
from common.pictures import tensor_to_picture
from toy import world as toyworld

PEAK = {  # bf16 operations a second, without sparsity, of their makers' data sheets: what a GPU's name has in it
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
}


def peak_flops(gpu):
    """A GPU's name, as PyTorch says it -> operations a second in bf16, or None"""
    return next((flops for name, flops in PEAK.items() if name in gpu), None)


# ---------------------------------------------------------------------------------------------------------------------
# A step


class Enough(Exception):
    """Ends train.fit before it saves anything."""


def step_once(kind, batch, checkpointing, device, rounds):
    """The real loop, stopped after some steps: the time from loss to loss, and the peak of memory. In its own process.

    The first two steps are not counted: they make the optimizer's state, and whatever else is made once.
    """
    device, times = torch.device(device), []
    torch.manual_seed(0)
    model = mfx.from_stable_diffusion(without_text(kind))
    shape = batch, 3, SIDES[kind], SIDES[kind]
    pictures = {name: torch.rand(shape) * 2 - 1 for name in ("reference", "target", "coarse")}
    pictures["mask"] = (torch.rand(batch, 1, *shape[2:]) > 0.3).float()
    recipe = train.RECIPES["toy" if kind == "toy" else "paper"]
    recipe = replace(recipe, batch=batch, micro_batch=None, checkpointing=checkpointing, save_every=recipe.steps)

    with tempfile.TemporaryDirectory() as out, Watch(device) as watch:
        model = model.to(device, memory_format=torch.channels_last)
        model.unfreeze()
        latents = train.encode_pairs(pictures, model.vae, device)

        def loss(step, part):
            synchronize(device)
            times.append(time.perf_counter())
            if len(times) > rounds + 2:
                raise Enough
            # As the recipes have it: the toy's pairs are encoded once and kept, the paper's as they come.
            encoded = train.encode_pairs(pictures, model.vae, device) if recipe.pairs == 0 else latents
            return model.loss(dict(encoded), train.generator_at(0, step))

        with contextlib.suppress(Enough):
            train.fit("mfx", model, loss, None, recipe, Path(out), False)
    return {"seconds": [b - a for a, b in itertools.pairwise(times)][2:], "MiB": watch.total}


def step_flops(kind):
    """Operations of one sample's forward and backward pass, a multiplication and an addition counting as two; without
    what checkpointing computes again, and without the autoencoder. Counted on tensors without content."""
    c = CONFIGS[kind]["unet"]
    channels = c.out_channels
    c = replace(c, in_channels=2 * channels + 1)
    with torch.device("meta"):
        parts = unet.UNet(replace(c, context=None)), unet.UNet(replace(c, context=0)), vae.VAE(CONFIGS[kind]["vae"])
        model = mfx.MagicFixup(*parts, diffusion.Schedule())
        side = SIDES[kind] // parts[2].config.factor
        batch = {name: torch.empty(1, channels, side, side) for name in ("reference", "target", "coarse")}
        batch["mask"] = torch.empty(1, 1, side, side)
    model.unfreeze()
    with FlopCounterMode(display=False) as counter:
        model.loss(batch).backward()
    return counter.get_total_flops()


def steps(o):
    """A training step of Magic Fixup, both UNets, in the real loop with its recipe: the toy's on latents that were
    encoded before, the paper's with encoding the pictures, in bf16 on a GPU. Memory above the bare program's. On a GPU
    also how much of its peak in bf16 that is; encoding, and what checkpointing computes again, do not count as work."""
    kind = o.model or ("full" if o.device.type == "cuda" else "toy")
    gpu = torch.cuda.get_device_name(o.device) if o.device.type == "cuda" else ""
    defaults = ((16, False),) if kind == "toy" else ((4, True), (16, True), (16, False))
    plans = [(batch, kind == "full") for batch in o.batch] if o.batch else defaults

    def row(batch, checkpointing):
        done = in_own_process("bench.training.step_once", kind=kind, batch=batch, checkpointing=checkpointing,
                              device=str(o.device), rounds=o.rounds or 5)
        per_second, flops = rates(batch, done["seconds"]), step_flops(kind)
        figures = {"a step": summary(done["seconds"], "s"), "samples a second": per_second,
                   "peak GiB": done["MiB"] / 1024, "GFLOP a sample": flops / 1e9}
        if peak_flops(gpu):
            figures["of peak FLOPs"] = summary([batch * flops / s / peak_flops(gpu) for s in done["seconds"]], "%")
        return figures

    return {f"{NAMES[kind]}, batch {batch}{', checkpointing' if less else ''}": partial(row, batch, less)
            for batch, less in plans}


# ---------------------------------------------------------------------------------------------------------------------
# Data


@contextlib.contextmanager
def one_thread():
    """As a data loader's worker has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pictures(o):
    """Pictures of the toy world, rendered 64 at a time."""
    size, n = o.size or 128, 64

    def row():
        scenes = toyworld.random_scenes(n, torch.Generator().manual_seed(0))
        s, _ = alternate({"render": lambda: toyworld.render(scenes, size)}, o)
        return {"pictures a second": rates(n, s["render"])}

    return {f"{size}x{size}": row}


def toy_row(o, n=32):
    with one_thread():
        s, _ = alternate({"toy": lambda: pairs.toy_pairs(n, torch.Generator().manual_seed(0))}, o)
    return {"pairs a second": rates(n, s["toy"])}


def clips(folder, n, frames=13):
    """n clips of two seconds and 512x512 out of the toy world, as folders of frames."""
    a, b = pairs.toy_motion(n, torch.Generator().manual_seed(1))
    velocity, camera = torch.stack([b.x - a.x, b.z - a.z], -1), b.camera - a.camera
    for i in range(n):
        (folder / f"clip{i}").mkdir()
    for k in range(frames):
        scenes = toyworld.moved(a, velocity, camera, k / (frames - 1))
        for i, image in enumerate(toyworld.render(scenes, 512).image):
            tensor_to_picture(image).save(folder / f"clip{i}" / f"{k:03d}.png")


def shards_row(o, n=8, batch=4):
    with one_thread(), tempfile.TemporaryDirectory(dir=o.tmp) as folder:
        clips(Path(folder), n)
        start = time.perf_counter()
        data.main([folder, "--out", f"{folder}/pairs", "--fps", "6", "--pairs", "4"])
        cut = time.perf_counter() - start
        reader = iter(DataLoader(pairs.ShardPairs(f"{folder}/pairs", batch=batch), batch_size=batch))
        s, _ = alternate({"read": lambda: [next(reader) for _ in range(8)]}, o)
    return {"clips cut a second": rates(n, [cut]), "pairs read a second": rates(8 * batch, s["read"])}


def training_pairs(o):
    """Training pairs, by one thread: out of the toy world, as they are needed; and cut out of clips of 13 frames, four
    pairs of each, by data.py with its classical estimators, into shards, and read from there."""
    return {"toy pairs of 128x128": partial(toy_row, o), "clips and shards of 512x512": partial(shards_row, o)}


TOPICS = {
    "train": ("Training", steps), "toyworld": ("Pictures of the toy world", pictures),
    "pairs": ("Training pairs", training_pairs),
}
