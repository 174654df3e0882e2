"""Train Magic Fixup: section 3.6 of the paper, on pairs of video frames.

    python train.py                                         from weights/toy, on toy pairs
    python train.py --resume                                goes on exactly where it stopped
    python train.py --init sd-v1-4.ckpt --data pairs/       the paper's recipe, on data.py's pairs
    torchrun --nproc-per-node 8 train.py --init sd-v1-4.ckpt --data pairs/       on eight GPUs
    python train.py --init sd-v1-4.ckpt --data pairs/ --as-paper    its text, not the release's ways

The size of the weights chooses the recipe: Stable Diffusion's gets the paper's, anything narrower
the toy's. OUT holds the last three training states, a loss curve, a sheet of samples and, at the
end, the model, which `mfx.load` reads.

Every batch is a function of (seed, step) and of how many pairs are encoded. So a resumed run sees
what one that never stopped would; --micro-batch and processes change no more than rounding.
"""

if __name__ == "__main__":
    from common import interrupts

    interrupts.watch("train.py")

import argparse
import contextlib
import copy
import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import diffusion
import mfx
import sd
import unet
from checkpoints.magicfixup import looks_like_magic_fixup
from checkpoints.parts import CLIP_IMAGES, TOY_CAPTIONER, load_image_encoder
from common.cli import TOY, Parser, file_name, folder_name, number, report_errors
from common.devices import choose_device, choose_precision, find_unets
from common.interrupts import came, finish_steps
from common.processes import (
    join_processes,
    largest_over_processes,
    process_count,
    process_rank,
    read_losses,
    share_loss,
    slice_batch,
)
from common.run_state import (
    change_recipe,
    check_room,
    draw_sheet,
    generator_at,
    open_run,
    restore_state,
    resume_recipe,
    save_state,
    say_kept,
    trained_parameters,
)
from kernels.blocks import checkpoint_blocks, compile_blocks, to_channels_last
from kernels.memory import hold_memory
from kernels.muon import make_optimizers
from video import batches
from video.motion import MODELS

# --------------------------------------------------------------------------------------------------
# Recipes. An option of the same name, where there is one, changes a field.


@dataclass
class Recipe:
    """What the loop needs to know."""

    steps: int
    batch: int  # of all processes together
    lr: float  # Adam's, after a linear warm-up
    warmup: int  # steps
    ema: float  # decay of the weight average that is shipped; 0 = none
    seed: int = 0
    save_every: int = 500
    init: str | None = None  # the weights to start from
    # The optimizer
    beta2: float = 0.99  # forgets sooner than Adam's usual 0.999: a few thousand steps change fast
    weight_decay: float = 0.01
    muon: bool = False  # orthogonal steps for matrices, which small networks learn faster by
    clip: float | None = 1.0  # largest norm of the gradient; None = as it is
    cosine: bool = True  # the rate falls to zero along half a cosine; False = it stays
    precision: str = "auto"  # of matrix products: fp32 or bf16
    # What changes time and memory, but no number
    micro_batch: int | None = None  # samples computed at once; None = all of a process's share,
    #                                 0 = as many as fit a GPU at Stable Diffusion's size
    checkpointing: bool = False
    compile: bool = False


@dataclass
class FixupRecipe(Recipe):
    """The same for Magic Fixup."""
    data: str = "toy"  # or a folder of shards that data.py wrote
    shards: str | None = None  # how many these are
    pairs: int = 0  # encoded once, and seen often under new noise; 0 = encoded as they come
    exact: float = 0.0  # share of the toy world's exact pairs among those encoded from shards
    edits: float = 0.0  # share of a user's edits, with their truth, among the exact pairs
    motion: str = "both"  # what makes the coarse edits: 'flow', 'affine', or half of each
    cross_reference: bool = True  # False = the ablation: CLIP's embedding of the reference instead
    prediction: str | None = None  # 'epsilon' or 'v_prediction'; None = as the initial weights
    as_paper: bool = False  # its text where the release differs: linear noise; mfx.MagicFixup
    held_out: int = 64  # pairs for the validation loss and the sheet, never trained on


RECIPES = {
    "toy": FixupRecipe(
        steps=5000, batch=16, lr=1e-3, warmup=100, ema=0.999, muon=True, pairs=12_000,
        prediction="v_prediction",
    ),
    # Section 3.6, with the release's warm-up; neither of them clips or averages. The paper's Adam
    # has no weight decay (the release's AdamW leaves it at 0.01).
    "paper": FixupRecipe(
        steps=120_000, batch=32, lr=1e-5, warmup=10_000, ema=0, save_every=2000, beta2=0.999,
        weight_decay=0, clip=None, cosine=False, micro_batch=0, checkpointing=True,
    ),
}
FULL_WIDTH = 320  # channels of Stable Diffusion's first level: from here on the paper's recipe


def choose_recipe(init):
    """The recipe for these weights, by their width."""
    width = find_unets(read_init(init))[0].config.channels[0] if init else 0
    return replace(RECIPES["paper" if width >= FULL_WIDTH else "toy"], init=init)


def read_init(path):
    """-> a Magic Fixup, to be trained further, or a Stable Diffusion, to be made one"""
    return mfx.load(path, torch.float32) if looks_like_magic_fixup(path) else sd.load(path)


def fit_micro_batch(share, device):
    """The largest micro-batch that divides `share` and fits a GPU's free memory; 1 on a CPU.

    GiB at 512x512, counted by tests/test_train.py on tensors without content: weights 6.3, Adam's
    moments 12.5, gradients 6.3, autoencoder 0.3; 1.2 for the activations of a sample in fp32.
    """
    free = torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else 0
    most = max(1, int((0.95 * free - 25.4) / 1.2))
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)


# --------------------------------------------------------------------------------------------------
# Magic Fixup


def start_model(recipe):
    """The Magic Fixup to be trained. What the recipe leaves open is as in its initial weights.
    ValueError for what would make another network of a Magic Fixup."""
    given = read_init(recipe.init or TOY)
    recipe.prediction = recipe.prediction or given.schedule.prediction
    old = given.schedule
    name = "linear" if recipe.as_paper else old.name
    spacing = "leading" if name == "zero_snr" else old.spacing  # no sampler begins without signal
    schedule = diffusion.Schedule(name, recipe.prediction, spacing, old.offset)
    if isinstance(given, sd.StableDiffusion):
        where = CLIP_IMAGES if given.unet.config.channels[0] >= FULL_WIDTH else TOY_CAPTIONER
        encoder = None if recipe.cross_reference else load_image_encoder(where)
        return mfx.from_stable_diffusion(given, schedule, recipe.as_paper, encoder)
    if bool(given.extractor) != recipe.cross_reference:
        what, say = ("a", "leave out") if given.extractor else ("no", "it goes with")
        raise ValueError(f"{recipe.init} has {what} detail extractor: {say} --no-cross-reference")
    given.schedule = schedule
    given.as_paper |= recipe.as_paper
    return given


def train_mfx(recipe, out, resume, device):
    """Both UNets together, from a Stable Diffusion, on pairs of frames -> OUT/model, in fp16"""
    slice_batch(recipe.batch, recipe.micro_batch)  # errors before the weights are read
    batches.check_mixture(recipe)
    model = start_model(recipe)
    if recipe.data != "toy":
        model.size = batches.open_shards(recipe, resume)  # what it learns, it is for
    model = model.float().to(device, memory_format=torch.channels_last)
    model.unfreeze()
    latents = stream = None
    if recipe.pairs:
        latents = batches.cache_latents(recipe, out / "pairs.safetensors", model, device)

    def loss(step, part):
        nonlocal stream
        g = generator_at(recipe.seed + 1, step)
        if latents:
            index = torch.randint(len(latents["mask"]), (recipe.batch,), generator=g)[part]
            batch = {name: tensor[index].float() for name, tensor in latents.items()}
        else:
            if stream is None:
                stream = batches.stream_pairs(recipe, model.size, step, device)
            batch = batches.encode_pairs(next(stream), model, device)
        # Noise and times are drawn for the whole batch, of which each micro-batch takes its part.
        random = mfx.draws((recipe.batch, *batch["target"].shape[1:]), g, model.drop)
        batch |= {name: tensor[part] for name, tensor in random.items()}
        return model.loss({name: to_channels_last(x.to(device)) for name, x in batch.items()})

    validate = sheet = None
    if recipe.held_out and process_rank() == 0:
        validate, sheet = make_validation(recipe, model, device)
    average = fit("mfx", model, loss, sheet, recipe, out, resume, validate)
    if process_rank() == 0:
        mfx.save(average, out / "model", torch.float16)


def make_validation(recipe, model, device):
    """-> validate(model), the loss on held-out pairs; sheet(model), (4, 8, 3, H, W) in [0, 1]:
    references, coarse edits, results and targets of eight of them"""
    pairs = batches.make_held_out(recipe, model.size)
    batch = batches.encode_pairs(pairs, model, device)
    pairs = {name: x[:8].clone() for name, x in pairs.items()}  # the others' memory is freed
    n = len(batch["mask"])
    batch |= mfx.draws(batch["target"].shape, generator_at(recipe.seed + 2, 1), drop=0.0)
    few = recipe.micro_batch or recipe.batch

    def validate(average):
        total = 0
        for i in range(0, n, few):
            part = {name: x[i : i + few] for name, x in batch.items()}
            total += average.loss(part) * len(part["t"])
        return total / n

    def sheet(average):
        edits = (batch[name][:8] for name in ("reference", "coarse", "mask"))
        z = average.sample(*edits, steps=25)
        results = torch.cat([average.decode(one) for one in z.split(1)]).cpu()
        rows = pairs["reference"], pairs["coarse"], results, pairs["target"]
        return torch.stack(rows) / 2 + 0.5

    return validate, sheet


# --------------------------------------------------------------------------------------------------
# The loop. The toys' stages in reproduce/train_toys.py use it as well.

EVERY = 50  # steps between two looks at a GPU's losses: each look waits for all its work
BLOCKS = unet.ResnetBlock, unet.Attention, unet.FeedForward  # to be checkpointed or compiled


@finish_steps()  # after Ctrl-C the step that runs is finished, and its state saved
def fit(stage, model, loss, sheet, recipe, out, resume, validate=None):
    """Adam on `loss` for recipe.steps steps -> the average of the weights; without one, the model

    loss      (step, part) -> scalar, the mean over the slice `part` of this step's batch. It makes
              its own data and noise, as a function of the step
    sheet     average -> pictures (rows, columns, 3, H, W) in [0, 1], at every save; or None
    validate  average -> scalar, at every save; or None
    FloatingPointError if anything ceases to be finite, ValueError for a state of another model.
    """
    parameters = trained_parameters(model)
    device = next(iter(parameters.values())).device
    average = copy.deepcopy(model).eval().requires_grad_(False) if recipe.ema else model
    followers = dict(average.named_parameters())
    bf16 = choose_precision(recipe.precision, device) == torch.bfloat16
    optimizers = make_optimizers(recipe, parameters, torch.bfloat16 if bf16 else torch.float32)
    losses, validation = [], []
    if resume:
        losses, validation = restore_state(out, stage, model, average, optimizers)
    check_room(out, stage, model, average, recipe, done=len(losses))

    # Weights stay fp32; matrices are multiplied in bf16 where that is faster, or asked for. A
    # weight is cast once in a forward pass, so a cache of the casts would only hold memory.
    half = dict(device_type=device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)
    autocast = functools.partial(torch.autocast, **half)
    if recipe.compile:
        compile_blocks(model, BLOCKS)
    if recipe.checkpointing:
        checkpoint_blocks(model, BLOCKS)
    model_loss = share_loss(model, loss)
    parts = slice_batch(recipe.batch, recipe.micro_batch)
    pending = []  # losses and gradient norms that are still on the device
    bar = tqdm(range(len(losses), recipe.steps), stage, recipe.steps, initial=len(losses),
               mininterval=1, smoothing=0.02, disable=process_rank() > 0)
    for step in bar:
        # Forward and backward. Gradients of micro-batches add up, and processes average theirs
        # with the last one.
        total = torch.zeros((), device=device)
        for part in parts:
            alone = process_count() > 1 and part is not parts[-1]
            with model_loss.no_sync() if alone else contextlib.nullcontext():
                with autocast():
                    value = model_loss(step, part) / len(parts)
                value.backward()
            total += value.detach()
        norm = torch.ones_like(total)
        if recipe.clip:
            norm = nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)

        # On a CPU the losses are read before the weights change, so that a bad one changes nothing.
        pending.append(torch.stack([total, norm]))
        stop = largest_over_processes(came())
        planned = (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps
        save_now = planned or stop
        if save_now or device.type != "cuda" or (step + 1) % EVERY == 0:
            losses += read_losses(pending, len(losses))
            pending.clear()

        # The optimizer's step; then the average follows the weights.
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            optimizer.step()
            optimizer.zero_grad()
        if recipe.ema:
            decay = min(recipe.ema, (1 + step) / (10 + step))  # early weights are soon forgotten
            follow = [followers[name] for name in parameters]
            with torch.no_grad():
                torch._foreach_lerp_(follow, list(parameters.values()), 1 - decay)
        if process_rank() == 0 and losses:
            images_s = recipe.batch * (bar.format_dict["rate"] or 0)
            loss_now = f"{np.mean(losses[-100:]):.4f}"
            bar.set_postfix(loss=loss_now, images_s=f"{images_s:.1f}", refresh=False)

        # Validate, draw, save.
        if save_now:
            if not torch.stack([p.isfinite().all() for p in parameters.values()]).all():
                raise FloatingPointError(f"weights are not finite after step {step}: "
                                         "resume with a lower --lr")
            if process_rank() == 0:
                with torch.no_grad(), autocast():
                    if validate and planned:
                        validation.append([step + 1, float(validate(average))])
                    if sheet and planned:
                        draw_sheet(sheet(average), out / f"{stage}-samples.png")
                save_state(out, stage, model, average, optimizers, losses, validation, recipe)
        if stop:
            raise KeyboardInterrupt(stop)
    return average


def learning_rate(recipe, step):
    """A linear warm-up, then constant or half a cosine."""
    rate = recipe.lr * min(1, (step + 1) / recipe.warmup)
    if recipe.cosine:
        rate *= 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
    return rate


# --------------------------------------------------------------------------------------------------
# The command line


def add_loop_options(parser):
    """The options that the toys' stages have as well."""
    parser.add_argument("--init", type=file_name, help="weights to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    for name in ("steps", "batch", "save-every", "warmup"):
        parser.add_argument(f"--{name}", type=number(int, 1, 9_999_999))
    parser.add_argument("--lr", type=number(float, 1e-9, 1))
    parser.add_argument("--seed", type=number(int, 0, 900))  # reproduce's scenes have those above
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], help="of matrix products")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")


def main(argv=None):
    p = Parser(prog="train.py", description=__doc__)
    add_loop_options(p)
    p.add_argument("--out", type=folder_name, default="runs/mfx", help="default: runs/mfx")
    p.add_argument("--data", type=file_name, help="toy (default), or a folder that data.py wrote")
    p.add_argument("--pairs", type=number(int, 0, 10**9), help="to encode once; 0 = as they come")
    p.add_argument("--exact", type=number(float, 0, 1), help="share of the toy's pairs in them")
    p.add_argument("--edits", type=number(float, 0, 1), help="share of a user's edits in those")
    p.add_argument("--motion", choices=MODELS, help="what makes the coarse edits (default: both)")
    p.add_argument("--prediction", choices=["epsilon", "v_prediction"], help="what to learn")
    p.add_argument("--held-out", type=number(int, 0, 4096), help="pairs to validate on; 0 = none")
    p.add_argument("--micro-batch", type=number(int, 1, 4096), help="samples in memory at once")
    for name, what in (
        ("as-paper", "its text where the release differs: docs/training.md lists where"),
        ("cross-reference", "the detail extractor; without is the paper's ablation, with CLIP"),
        ("checkpointing", "less memory for a third more work"),
        ("compile", "torch.compile, block by block"),
    ):
        p.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=what)
    args = p.parse_args(argv)
    kept = functools.partial(say_kept, "python train.py", args.out, "mfx")
    run = open_run(args.out, "mfx", args.resume, args.out / "model")
    with report_errors(p, "try a smaller --micro-batch or --batch, or --checkpointing", kept), run:
        if args.resume:
            recipe = resume_recipe(args.out, "mfx", FixupRecipe, args, TOY)
        else:
            recipe = change_recipe(choose_recipe(args.init), args)
        device = join_processes(choose_device(args.device))
        if recipe.micro_batch == 0:
            share = max(1, recipe.batch // process_count())
            most = fit_micro_batch(share, device) if recipe.checkpointing else 1
            recipe.micro_batch = -largest_over_processes(-most)  # the smallest
        torch.manual_seed(recipe.seed)
        train_mfx(recipe, args.out, args.resume, device)


if __name__ == "__main__":
    hold_memory()
    main()
