"""python -m bench's topics of whole edits, from pictures and words to the edited picture.

They run with the shipped toy's weights, and at Stable Diffusion 1.4's size with random ones and few steps: an edit of
100 steps takes a hundred times as long, and says nothing more.

Ours and the peer's run in processes of their own, each as it is run elsewhere: ours keeps the memory that it frees, as
sample.py does (kernels/memory.py); the peer does what PyTorch does.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffdiff
import mfx
from bench import peers
from bench.clock import Row, call_in_turn, compute_difference, run_in_own_process, synchronize
from bench.models import NAMES, SIDES, choose_dtypes, make_stable_diffusion, make_without_text
from common.cli import TOY_MFX
from common.devices import choose_precision, make_fast
from common.pictures import picture_to_tensor, tensor_to_picture
from kernels.memory import hold_memory
from sample import edit, fixup
from toy.pairs import toy_pairs

MEADOW = Path(__file__).parent.parent / "examples" / "meadow.png"
STEPS = {"toy": 50, "full": 4}
PROMPT = "snow at night"
STRENGTH = 0.6
CALLS, ENOUGH = 5, 5.0  # of one process: at most so many, and no more once they have taken so many seconds


# ---------------------------------------------------------------------------------------------------------------------
# Edits: ('ours' or 'peer', 'toy' or 'full', dtype, device) -> a function of the number of steps


def make_change_map_edit(who, kind, dtype, device):
    side = SIDES[kind]
    model = make_stable_diffusion(kind, dtype, device)
    picture = picture_to_tensor(Image.open(MEADOW), (side, side))
    mu = make_ramp(side)
    if who == "ours":
        return partial(edit, model, PROMPT, picture, mu)
    config = model.vae.config
    latent = 1, config.latent_channels, side // config.factor, side // config.factor
    noise = torch.randn(latent, generator=torch.Generator().manual_seed(0))  # what `edit` draws from seed 0
    return partial(peers.run_published_loop, peers.make_pipeline(model, dtype), PROMPT, picture, mu, noise)


def make_ramp(side):
    """A change map (1, 1, side, side): 0 over the left quarter, then rising to nearly 1."""
    x = ((torch.arange(side) + 0.5) / side - 0.25).clamp(min=0) / 0.75
    return x.expand(1, 1, side, side)


def make_strength_edit(who, kind, dtype, device):
    side = SIDES[kind]
    model = make_stable_diffusion(kind, dtype, device)
    picture = picture_to_tensor(Image.open(MEADOW), (side, side))
    if who == "ours":
        return partial(edit, model, PROMPT, picture, diffdiff.strength_fan_map([STRENGTH], side, side))
    pipe = peers.make_pipeline(model, dtype)
    picture = tensor_to_picture(picture[0] / 2 + 0.5)
    return lambda steps: pipe(PROMPT, picture, STRENGTH, steps, output_type="pt").images


def make_fixup_edit(who, kind, dtype, device):
    if kind == "toy":
        model = mfx.load(TOY_MFX, dtype, device)
    else:
        model = mfx.from_stable_diffusion(make_without_text(kind))
        model = model.requires_grad_(False).eval().to(device, dtype)
    model = make_fast(model, device)
    pair = toy_pairs(1, torch.Generator().manual_seed(0), size=SIDES[kind])
    pictures = [pair[name] for name in ("reference", "coarse", "mask")]
    if who == "ours":
        return partial(fixup, model, *pictures)
    return partial(peers.run_straightforward_loop, peers.make_fixup_peer(model), *pictures)


MAKE = {"change map": make_change_map_edit, "one strength": make_strength_edit, "Magic Fixup": make_fixup_edit}

# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def edit_once(who, what, kind, dtype, device, steps, folder):
    """Edits, after a short one to warm up -> seconds of each. In a process of its own; the result is left in folder."""
    if who == "ours":
        hold_memory()
    device = torch.device(device)
    run = MAKE[what](who, kind, getattr(torch, dtype), device)
    seconds = []
    with torch.inference_mode():
        run(steps=2)
        while len(seconds) < CALLS and sum(seconds) < ENOUGH:
            synchronize(device)
            start = time.perf_counter()
            x = run(steps=steps)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    save_file({"x": x.float().cpu().contiguous()}, Path(folder) / who)
    return {"seconds": seconds}


def compare_edits(o, what, kind, precision, dtypes, peer, same=True):
    """-> Row. dtypes: ours and the peer's"""
    steps = o.steps or STEPS[kind]
    who = ("ours", "peer") if peers.is_installed() else ("ours",)
    with tempfile.TemporaryDirectory() as folder:
        common = dict(what=what, kind=kind, device=str(o.device), steps=steps, folder=folder)
        runs = {one: partial(run_in_own_process, "bench.edits.edit_once", who=one,
                             dtype=str(dtype).removeprefix("torch."), **common) for one, dtype in zip(who, dtypes)}
        done = call_in_turn(runs, o, warm=0)  # each warms itself up
        results = [load_file(Path(folder) / one)["x"] for one in who]
    ours, theirs = ([statistics.median(made["seconds"]) for made in done.get(one, ())] for one in ("ours", "peer"))
    apart = compute_difference(*results) if theirs and same else None
    return Row(f"{what}, {NAMES[kind]}, {SIDES[kind]}x{SIDES[kind]}, {steps} steps, {precision}", ours, theirs, peer,
               difference=apart)


def change_maps(o):
    """A whole edit: text and picture encoded, guided steps, the result decoded.

    A change map's edit stands beside the loop that its authors published, on diffusers' networks. An edit of one
    strength for all (SDEdit) stands beside diffusers' image-to-image pipeline, which draws other noise. By default ours
    computes in the precision that suits the machine, and diffusers in fp32. No step can be skipped under this map.
    """
    for kind in (o.model,) if o.model else ("toy", "full"):
        if o.dtype in (None, "auto"):
            dtypes = choose_precision("auto", o.device), torch.float32
            default = f"by default: {str(dtypes[0]).removeprefix('torch.').replace('bfloat', 'bf')}"
            yield compare_edits(o, "change map", kind, default, dtypes, "published loop, diffusers")
        if o.dtype != "auto":
            for precision, dtype in choose_dtypes(o).items():
                dtypes = dtype, dtype
                yield compare_edits(o, "change map", kind, precision, dtypes, "published loop, diffusers")
                yield compare_edits(o, "one strength", kind, precision, dtypes, "diffusers, img2img", same=False)


def fixups(o):
    """A whole Magic Fixup edit: two pictures encoded, the steps, one decoded.

    Ours runs the extractor for many steps in one batch and keeps keys and values. The loop beside it runs both UNets
    (diffusers', joined by hooks) at every step, as the method reads.
    """
    for kind in (o.model,) if o.model else ("toy", "full"):
        for precision, dtype in choose_dtypes(o).items():
            yield compare_edits(o, "Magic Fixup", kind, precision, (dtype, dtype), "straightforward loop, diffusers")


TOPICS = {"edit": change_maps, "mfx": fixups}
