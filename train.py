"""Train Magic Fixup, and the toys that it starts from: autoencoder, text-conditional base model, inpainting model.

    python train.py                        Magic Fixup from weights/toy, on pairs from the toy world; two CPU cores
    python train.py --resume               goes on exactly where it stopped, with the recipe that it was started with
    python train.py --init sd-v1-4.ckpt --data pairs/         the paper's recipe, on pairs that data.py made of videos
    torchrun --nproc-per-node 8 train.py --init sd-v1-4.ckpt --data pairs/                    the same on eight A100s

    python train.py --stage vae            the toys: an hour or two each, minutes on a GPU
    python train.py --stage base
    python train.py --stage inpainting     from weights/toy, which gets more inputs: a mask, and what is left beside it

The weights' size chooses the recipe: Stable Diffusion's gets the paper's, anything narrower the toy's. At full size the
micro-batch is the largest that the card's free memory holds.

While it runs, OUT holds the loss curve and a sheet of samples as PNG, and the last three training states. Every batch
is a function of (seed, step) alone, so a resumed run sees the very same data and noise as one that never stopped, and
--micro-batch and the number of processes change no result. The loop itself is in loop.py, the toys' stages in
train_toys.py, and that of Magic Fixup here.

Memory of the latter at 512x512, in GiB, as tests/test_train_mfx.py counts it on tensors of shapes without content:

                                                        an A100, --micro-batch 4      one sample on a CPU
    weights in fp32, 865 M and 816 M numbers                       6.3                        6.3
    Adam's two moments of each                                    12.5                       12.5
    gradients                                                      6.3                        0    see loop.py, at_once
    autoencoder, frozen                                            0.3                        0.3
    activations with --checkpointing, were all fp32                4.8                        1.2
    together                                                      30.2, and the card 37      20.3

One more sample takes 1.1, or half as much in bf16: 40 GB hold micro-batches of 8, and 80 GB 16 with
--no-checkpointing. A state file has 18.8. One step on a CPU, from any checkpoint of that size, validation left out:

    python train.py --init sd-v1-4.ckpt --steps 1 --batch 1 --held-out 0 --out runs/one
"""

import argparse
import itertools
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import diffdiff
import diffusion
import loop
import mfx
import sd
from common.cli import TOY, Parser, number, report_errors
from common.devices import choose_device
from kernels.winograd import hold_memory
from loop import at, channels_last, digest, made_once, stratified
from pairs import MODELS, ShardPairs, ToyPairs, toy_pairs
from reproduce.train_toys import train_base, train_inpainting, train_vae

# ---------------------------------------------------------------------------------------------------------------------
# Recipes. What can be changed from the command line is changed by the option of the same name.


@dataclass
class Recipe:
    steps: int
    batch: int  # of all processes together
    lr: float  # Adam's, after a linear warm-up
    warmup: int  # steps
    ema: float  # decay of the weight average that is shipped; ramped up, so that early weights are soon forgotten
    seed: int = 0
    save_every: int = 500
    # Stage base: distinct scenes; their captions are worded anew every time. Stage inpainting: the same, each with a
    # mask of its own. Stage mfx: pairs that are encoded once and kept, to be seen several times under new noise; 0 =
    # pairs without end, encoded as they come.
    scenes: int = 24_000
    # Stages base, inpainting: noise of one value per channel and picture, beside the white noise. Stable Diffusion's
    # noisiest level still shows a picture's mean, which a model learns to trust over the words: noon would never turn
    # into night.
    offset: float = 0.2
    # Stage mfx
    motion: str = "both"  # how the first frame is warped to the second, 'flow', 'affine' or half of each
    cross_reference: bool = True  # False: an ablation, without the detail extractor; see mfx.MagicFixup
    prediction: str | None = None  # 'epsilon', 'v_prediction'; None: that of the weights to start from
    held_out: int = 64  # pairs, never trained on, for the validation loss and the sheet; 0 = neither of them
    data: str = "toy"  # or a folder of shards
    init: str | None = None  # the weights to start from
    # How the optimizer works
    beta2: float = 0.99  # shorter memory than Adam's usual 0.999: the toys' few thousand steps change fast
    weight_decay: float = 0.01
    clip: float | None = 1.0  # largest norm of the gradient; None: as it is
    cosine: bool = True  # the rate falls to zero along half a cosine; False: it stays
    # What changes time and memory, but no number
    micro_batch: int | None = None  # samples that a process computes at once; their gradients add up. None: its share
    checkpointing: bool = False
    compile: bool = False


RECIPES = {
    "toy": {
        "vae": Recipe(steps=3600, batch=16, lr=1.2e-3, warmup=200, ema=0.998),
        "base": Recipe(steps=6300, batch=32, lr=1e-3, warmup=300, ema=0.9995),
        "inpainting": Recipe(steps=1500, batch=16, lr=5e-4, warmup=100, ema=0.995, scenes=8000),
        "mfx": Recipe(steps=5000, batch=16, lr=8e-4, warmup=300, ema=0.9995, scenes=12_000, prediction="v_prediction"),
    },
    "a100": {  # Section 3.6, with the release's warm-up; no clipping and no average of weights, as in both. The weight
        # decay of the paper's Adam is 0 (the release's AdamW leaves it at 0.01). The noise schedule is that of the
        # weights to start from; the paper's text says DDPM's linear, the release has Stable Diffusion's, rescaled.
        "mfx": Recipe(
            steps=120_000, batch=32, lr=1e-5, warmup=10_000, ema=0, save_every=2000, scenes=0, beta2=0.999,
            weight_decay=0, clip=None, cosine=False, checkpointing=True,
        ),
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# Stage mfx


def shards(recipe, held_out=False, **more):
    """The pairs in the folder recipe.data: those to train on, or those held out, which are in the last shard, because
    the others are of other clips."""
    pairs = ShardPairs(recipe.data, recipe.motion, seed=recipe.seed + 4, **more)
    if recipe.held_out:
        if len(pairs.shards) == 1:
            raise ValueError(f"{recipe.data} has one shard, and no other to hold out for validation: --held-out 0")
        pairs.shards = pairs.shards[-1:] if held_out else pairs.shards[:-1]
        pairs.pairs = sum(n for _, n in pairs.shards)
    return pairs


def held_out_pairs(recipe, size):
    if recipe.data == "toy":
        return toy_pairs(recipe.held_out, at(recipe.seed + 2, 0), recipe.motion, size)
    pairs = shards(recipe, held_out=True, shuffle=0, epochs=1, rank=0, world=1)
    return next(iter(DataLoader(pairs, recipe.held_out)))


def pair_stream(recipe, size, step, device):
    """This process's micro-batches of pictures, from those of `step` on: an iterator over dicts of (B, .., H, W)"""
    parts = loop.micro_batches(recipe)
    n = parts[0].stop - parts[0].start
    # On a CPU the training has all cores. On a GPU they decode pictures ahead, in processes of their own.
    workers = min(8, (os.cpu_count() or 1) // loop.world()) if device.type == "cuda" else 0
    how = dict(num_workers=workers, pin_memory=device.type == "cuda")
    if recipe.data == "toy":  # number k of the run is the toy world's pair number k
        places = (range(s * recipe.batch + p.start, s * recipe.batch + p.stop)
                  for s in range(step, recipe.steps) for p in parts)
        pairs = ToyPairs(recipe.steps * recipe.batch, recipe.seed + 4, recipe.motion, size)
        return iter(DataLoader(pairs, batch_sampler=places, **how))
    pairs = shards(recipe, batch=n, rank=loop.rank(), world=loop.world(), start=step * len(parts))
    return iter(DataLoader(pairs, n, **how))


def pair_latents(recipe, path, autoencoder, size, device):
    """recipe.scenes pairs as Magic Fixup sees them, encoded once and kept in a file: a dict of (N, ...) in fp16.

    The run shows each of them several times, under new noise; encoding them again would cost as much as the training.
    """

    if recipe.data == "toy":
        batches = (toy_pairs(32, at(recipe.seed + 4, i), recipe.motion, size) for i in range(0, recipe.scenes, 32))
        of = ()
    else:
        pairs = shards(recipe, batch=32, rank=0, world=1)
        batches, of = DataLoader(pairs, 32), (recipe.data, [(path.name, n) for path, n in pairs.shards])

    def make():
        parts, count = [], math.ceil(recipe.scenes / 32)
        for pairs in tqdm(itertools.islice(batches, count), "pairs", count, unit="batch", mininterval=1):
            parts.append({name: t.half().cpu() for name, t in encode_pairs(pairs, autoencoder, device).items()})
        return {name: torch.cat([p[name] for p in parts]).contiguous() for name in parts[0]}

    return made_once(path, digest(autoencoder, recipe.scenes, recipe.seed, recipe.motion, *of), make)


@torch.no_grad()
def encode_pairs(pairs, autoencoder, device):
    """reference, target, coarse (B, 3, H, W) and mask (B, 1, H, W) -> latents (B, C, h, w), mask (B, 1, h, w)"""
    factor, latents = autoencoder.config.scaling_factor, {}
    few = max(1, 32 * 128**2 // pairs["mask"][0].numel())  # pictures whose activations fit beside a large model
    for name in ("reference", "target", "coarse"):
        x = channels_last(pairs[name].to(device, non_blocking=True))
        latents[name] = torch.cat([autoencoder.encode(some)[0].float() for some in x.split(few)]) * factor
    return latents | {"mask": diffdiff.down_sample(pairs["mask"], latents["target"].shape[-2:]).to(device)}


def train_mfx(recipe, out, resume, device):
    """Both UNets together, from a Stable Diffusion, on pairs of frames: section 3.6 -> OUT/model, as fp16"""
    loop.micro_batches(recipe)  # what does not fit is told before the weights are read
    stable = sd.load(recipe.init or TOY)  # as stored: it stays in its file, of which the model is a copy in fp32
    schedule = diffusion.Schedule(stable.schedule.name, recipe.prediction or stable.schedule.prediction)
    model = mfx.from_stable_diffusion(stable, recipe.cross_reference, schedule)
    model = model.float().to(device, memory_format=torch.channels_last)
    model.unfreeze()
    latents = recipe.scenes and pair_latents(recipe, out / "pairs.safetensors", model.vae, model.size, device)
    stream = None

    def loss(step, part):
        nonlocal stream
        g = at(recipe.seed + 1, step)
        if latents:
            index = torch.randint(len(latents["mask"]), (recipe.batch,), generator=g)[part]
            batch = {name: t[index].float() for name, t in latents.items()}
        else:
            if stream is None:
                stream = pair_stream(recipe, model.size, step, device)
            batch = encode_pairs(next(stream), model.vae, device)
        drawn = mfx.draws((recipe.batch, *batch["target"].shape[1:]), g) | {"t": stratified(recipe.batch, g)}
        batch |= {name: t[part] for name, t in drawn.items()}
        return model.loss({name: channels_last(t.to(device)) for name, t in batch.items()})

    validate = sheet = None
    if recipe.held_out and loop.rank() == 0:
        shown = held_out_pairs(recipe, model.size)
        edits = encode_pairs(shown, model.vae, device)
        n, g = len(edits["mask"]), at(recipe.seed + 2, 1)
        edits |= mfx.draws(edits["target"].shape, g, drop=0.0) | {"t": stratified(n, g)}
        shown = torch.stack([shown[name][:8] for name in ("reference", "coarse", "target")])  # (3, 8, 3, H, W)

        def validate(average):
            few = recipe.micro_batch or recipe.batch
            parts = [{name: x[i : i + few] for name, x in edits.items()} for i in range(0, n, few)]
            return sum(average.loss(part) * len(part["t"]) for part in parts) / n

        @torch.no_grad()
        def sheet(average):
            z = average.sample(*(edits[name][:8] for name in ("reference", "coarse", "mask")), steps=25)
            x = torch.cat([average.decode(one) for one in z.split(1)])
            return torch.stack([shown[0], shown[1], x.cpu(), shown[2]]) / 2 + 0.5

    average = loop.fit("mfx", model, loss, sheet, recipe, out, resume, validate)
    if loop.rank() == 0:
        mfx.save(average, out / "model", torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def saved_recipe(out, stage):
    """The recipe of the run that left its state in `out`: what --resume goes on with."""
    path, told = loop.newest(out, stage)
    try:
        return Recipe(**told["recipe"])
    except TypeError as e:
        raise ValueError(f"{path} is the state of another version of this program ({e})") from None


# Stages that an option is for; any other is for all of them.
ONLY_FOR = dict.fromkeys(
    ("data", "motion", "cross_reference", "prediction", "held_out", "micro_batch", "checkpointing", "compile"), ("mfx",)
) | {"offset": ("base", "inpainting"), "scenes": ("base", "inpainting", "mfx")}


FULL_WIDTH = 320  # channels of Stable Diffusion's first level: weights from this width on get the paper's recipe


def choose_preset(args):
    """The recipe's name by the weights' size: 'a100' for Stable Diffusion's, 'toy' for anything narrower."""
    if args.stage != "mfx" or not args.init:
        return "toy"
    return "a100" if sd.load(args.init).unet.config.channels[0] >= FULL_WIDTH else "toy"


def fitting_micro_batch(recipe, device):
    """The largest micro-batch of the paper's recipe that fits into a GPU's free memory; on a CPU one sample.

    GiB by the table above: 25.4 for weights, moments, gradients and autoencoder, and 1.2 for each sample.
    """
    share = max(1, recipe.batch // int(os.environ.get("WORLD_SIZE", 1)))
    free = torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else 0
    most = max(1, int((0.95 * free - 25.4) / 1.2))
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)


def choose_recipe(args):
    preset = args.preset or ("toy" if args.resume else choose_preset(args))
    if args.resume:
        recipe = saved_recipe(args.out, args.stage)
    elif args.stage in RECIPES[preset]:
        recipe = RECIPES[preset][args.stage]
    else:
        raise ValueError(f"--preset {preset} is for stage mfx, not {args.stage}")
    told = {k: v for k in asdict(recipe) if (v := getattr(args, k, None)) is not None}
    for name in told:
        if args.stage not in (stages := ONLY_FOR.get(name, RECIPES["toy"])):
            raise ValueError(f"--{name.replace('_', '-')} is for stage {' and '.join(stages)}, not {args.stage}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.stage != "mfx":
        raise ValueError(f"stage {args.stage} runs in one process: only mfx can be shared by many")
    recipe = replace(recipe, **told)
    if preset == "a100" and not recipe.init:
        raise ValueError("--preset a100 starts from Stable Diffusion 1.4: say where it is, --init sd-v1-4.ckpt")
    if args.stage in ("base", "inpainting") and not recipe.scenes:
        default = RECIPES["toy"][args.stage].scenes
        raise ValueError(f"stage {args.stage} needs scenes to learn from: --scenes {default}")
    if recipe.checkpointing and not recipe.micro_batch:
        recipe.micro_batch = fitting_micro_batch(recipe, choose_device(args.device))
    return recipe


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(RECIPES["toy"]), default="mfx")
    parser.add_argument("--preset", choices=list(RECIPES), help="a100: the paper's (default: by the size of --init)")
    parser.add_argument("--data", help="toy, or a folder of pairs that data.py wrote (stage mfx)")
    parser.add_argument("--init", help="start from these weights, e.g. weights/toy, the default of inpainting and mfx")
    parser.add_argument("--out", type=Path, help="default: runs/mfx; runs/toy and runs/toy-inpainting of the toys")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    for name in ("steps", "batch", "save-every", "warmup"):
        parser.add_argument(f"--{name}", type=number(int, 1, 9_999_999))
    parser.add_argument("--scenes", type=number(int, 0, 10**9), help="stage mfx: pairs to encode once; 0: as they come")
    parser.add_argument("--lr", type=number(float, 1e-9, 1))
    parser.add_argument("--offset", type=number(float, 0, 1))
    parser.add_argument("--seed", type=number(int, 0, 900))  # the seeds above belong to -m reproduce's held-out scenes
    parser.add_argument("--motion", choices=MODELS, help="stage mfx: of the coarse edits (default: both)")
    parser.add_argument("--prediction", choices=["epsilon", "v_prediction"], help="stage mfx: what to learn")
    parser.add_argument("--held-out", type=number(int, 0, 4096), help="stage mfx: pairs to validate on; 0: don't")
    parser.add_argument("--micro-batch", type=number(int, 1, 4096), help="samples in memory at once, per process")
    for name, what in (
        ("cross-reference", "stage mfx: the detail extractor; without is the paper's ablation"),
        ("checkpointing", "less memory for a third more work"), ("compile", "torch.compile, block by block"),
    ):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=what)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(argv)
    if args.out is None:  # a folder of its own: it would write its model over the one that it was made of
        args.out = Path({"mfx": "runs/mfx", "inpainting": "runs/toy-inpainting"}.get(args.stage, "runs/toy"))
    try:
        with report_errors(parser, "try a smaller --micro-batch or --batch, or --checkpointing"):
            recipe = choose_recipe(args)
            device = loop.join(choose_device(args.device))
            args.out.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(recipe.seed)
            stages = {"vae": train_vae, "base": train_base, "inpainting": train_inpainting, "mfx": train_mfx}
            stages[args.stage](recipe, args.out, args.resume, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    hold_memory()
    main()
