"""python -m bench's topic of training: a step of Magic Fixup. No other program does the same; it stands alone."""

import contextlib
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import mfx
import train
from bench.clock import Row, run_in_own_process, synchronize, watch
from bench.models import NAMES, SIDES, make_without_text
from common.run_state import generator_at
from video.batches import encode_pairs


class Enough(Exception):
    """Ends train.fit before it saves anything."""


def train_for_some_steps(kind, batch, checkpointing, device, rounds):
    """The real loop, stopped after some steps: the time from loss to loss, and the peak of memory. In its own process.

    The first two steps do not count: they make the optimizer's state, and whatever else is made once.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    model = mfx.from_stable_diffusion(make_without_text(kind))
    shape = batch, 3, SIDES[kind], SIDES[kind]
    pictures = {name: torch.rand(shape) * 2 - 1 for name in ("reference", "target", "coarse")}
    pictures["mask"] = (torch.rand(batch, 1, *shape[2:]) > 0.3).float()
    recipe = train.RECIPES["toy" if kind == "toy" else "paper"]
    recipe = replace(recipe, batch=batch, micro_batch=None, checkpointing=checkpointing, save_every=recipe.steps)
    times = []

    with tempfile.TemporaryDirectory() as out, watch(device) as w:
        model = model.to(device, memory_format=torch.channels_last)
        model.unfreeze()
        latents = encode_pairs(pictures, model.vae, device)

        def loss(step, part):
            synchronize(device)
            times.append(time.perf_counter())
            if len(times) > rounds + 2:
                raise Enough
            # As the recipes have it: the toy's pairs are encoded once and kept, the paper's as they come.
            encoded = encode_pairs(pictures, model.vae, device) if recipe.pairs == 0 else latents
            return model.loss(dict(encoded), generator_at(0, step))

        with contextlib.suppress(Enough):
            train.fit("mfx", model, loss, None, recipe, Path(out), False)
    return {"seconds": [b - a for a, b in itertools.pairwise(times)][2:], "GiB": w.peak}


def steps(o):
    """A training step of Magic Fixup, both UNets, in the real loop with its recipe.

    The toy's pairs are encoded before, the paper's within the step; on a GPU in bf16. Memory is above the bare
    program's.
    """
    kind = o.model or ("full" if o.device.type == "cuda" else "toy")
    plans = [(16, False)] if kind == "toy" else [(4, True), (16, True), (16, False)]
    if o.batch:
        plans = [(batch, kind == "full") for batch in o.batch]
    for batch, checkpointing in plans:
        done = run_in_own_process("bench.training.train_for_some_steps", kind=kind, batch=batch,
                                  checkpointing=checkpointing, device=str(o.device), rounds=o.rounds or 5)
        what = f"{NAMES[kind]}, batch {batch}{', checkpointing' if checkpointing else ''}"
        yield Row(f"{what}: a step", done["seconds"])
        yield Row(f"{what}: samples a second", [batch / s for s in done["seconds"]], unit="")
        yield Row(f"{what}: peak GiB", [done["GiB"]], unit="")


TOPICS = {"train": steps}
