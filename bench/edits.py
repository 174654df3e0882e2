"""-m bench's topics of whole edits, from pictures and words to the edited picture: Differential Diffusion, what its
skipping saves, Magic Fixup.

With the shipped toy's weights, and at Stable Diffusion 1.4's size with random ones and few steps: an edit of 100 steps
takes a hundred times as long, and nothing is learned by waiting for it.

Ours and the peer's run in processes of their own, each as it is run elsewhere: ours holds on to the memory that it
frees, as sample.py does (winograd.py), the peer's does what PyTorch does.
"""

import importlib.util
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffdiff
import mfx
import pairs
from bench import peers as bench_peers
from bench.clock import compare, difference, held, in_own_process, side_by_side, synchronize, turns
from bench.models import NAMES, SIDES, precisions, stable_diffusion, without_text
from common.cli import TOY_MFX
from common.devices import choose_precision, make_fast
from common.pictures import picture_to_tensor, tensor_to_picture
from kernels.winograd import hold_memory
from sample import edit, fixup

MEADOW = Path(__file__).parent.parent / "examples" / "meadow.png"
STEPS = {"toy": 50, "full": 4}
PROMPT = "snow at night"
STRENGTH = 0.6


def sizes(o):
    """-> [(toy or full, its name for a row, pixels along a side, steps)]"""
    for kind in (o.model,) if o.model else ("toy", "full"):
        side, steps = o.size or SIDES[kind], o.steps or STEPS[kind]
        yield kind, f"{NAMES[kind]}, {side}x{side}, {steps} steps", side, steps


def meadow(side):
    return picture_to_tensor(Image.open(MEADOW), (side, side))


def ramp(side, low=0.0):
    """A change map (1, 1, side, side): `low` over the left quarter, then rising to 1, which it does not quite reach."""
    x = ((torch.arange(side) + 0.5) / side - 0.25).clamp(min=0) / 0.75
    return (low + (1 - low) * x).expand(1, 1, side, side)


# ---------------------------------------------------------------------------------------------------------------------
# In processes of their own

CALLS, ENOUGH = 5, 5.0  # of a process: at most so many, and no more once they have taken so many seconds


def edit_once(who, what, kind, dtype, device, side, steps, folder):
    """Edits after a short one to warm up -> seconds of each. In a process of its own; the result is left in folder."""
    if who == "ours":
        hold_memory()
    device, seconds = torch.device(device), []
    run = MAKE[what](who, kind, getattr(torch, dtype), device, side)
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


def both(o, what, kind, dtypes, side, steps, name, at_most=None, same=True):
    """The figures of a row. dtypes: ours and the peer's"""
    who = ("ours", "peer") if importlib.util.find_spec("diffusers") else ("ours",)
    with tempfile.TemporaryDirectory(dir=o.tmp) as folder:
        common = dict(what=what, kind=kind, device=str(o.device), side=side, steps=steps, folder=folder)
        once = {one: partial(in_own_process, "bench.edits.edit_once", who=one, dtype=str(dtype)[6:], **common)
                for one, dtype in zip(who, dtypes)}
        done = turns(once, o, warm=lambda name: None)  # each warms itself up
        x = {one: load_file(Path(folder) / one)["x"] for one in who}
    seconds = {one: [s for r in rounds for s in r["seconds"]] for one, rounds in done.items()}
    apart = difference(x["ours"], x["peer"]) if same and "peer" in x else None
    return side_by_side(seconds["ours"], seconds.get("peer"), name, at_most, apart)


# ---------------------------------------------------------------------------------------------------------------------
# Differential Diffusion


def change_map_edit(who, kind, dtype, device, side):
    """-> a function of the number of steps"""
    model, picture, mu = stable_diffusion(kind, dtype, device), meadow(side), ramp(side)
    if who == "ours":
        return partial(edit, model, PROMPT, picture, mu)
    config = model.vae.config
    latent = 1, config.latent_channels, side // config.factor, side // config.factor
    noise = torch.randn(latent, generator=torch.Generator().manual_seed(0))  # what `edit` draws from seed 0
    return partial(bench_peers.published_change_map, bench_peers.pipeline(model, dtype), PROMPT, picture, mu, noise)


def strength_edit(who, kind, dtype, device, side):
    model, picture = stable_diffusion(kind, dtype, device), meadow(side)
    if who == "ours":
        return partial(edit, model, PROMPT, picture, diffdiff.strength_fan_map([STRENGTH], side, side))
    pipe, picture = bench_peers.pipeline(model, dtype), tensor_to_picture(picture[0] / 2 + 0.5)
    return lambda steps: pipe(PROMPT, picture, STRENGTH, steps, output_type="pt").images


def change_maps(o):
    """A whole edit: the text encoded, the picture too, guided steps, the result decoded. Beside a change map's edit
    stands the loop that its authors published, on diffusers' networks; beside that of one strength for all (SDEdit)
    diffusers' own image-to-image pipeline. By default ours computes in the precision that suits the machine, and
    diffusers in fp32. No step can be skipped under this map; the topic `skipping` is about those that can. Each in a
    process of its own: ours holds on to the memory that it frees, as sample.py does.
    """
    rows = {}
    for kind, name, side, steps in sizes(o):
        exact = {p: (dtype, dtype) for p, dtype in precisions(o).items() if o.dtype != "auto"}
        auto = {"by default": (choose_precision("auto", o.device), torch.float32)} if o.dtype in (None, "auto") else {}
        for precision, dtypes in (auto | exact).items():
            limit = 0.4 if precision == "by default" else 0.8
            rows[f"change map, {name}, {precision}"] = partial(
                both, o, "change map", kind, dtypes, side, steps, "published loop, diffusers", limit)
            if precision != "by default":  # it draws other noise
                rows[f"one strength, {name}, {precision}"] = partial(
                    both, o, "one strength", kind, dtypes, side, steps, "diffusers, img2img", same=False)
    return rows


def skipping(o):
    """Algorithm 2 of Differential Diffusion against Algorithm 1: whole edits under maps of a growing least value. What
    is left at the end is the text, the autoencoder, and one step in ten."""
    rows = {}
    for kind, name, side, steps in sizes(o):
        for precision, dtype in precisions(o, "auto").items():
            for low in (0.0, 0.25, 0.5, 0.75, 0.9):
                row = partial(skipping_row, o, kind, dtype, side, steps, low)
                rows[f"least value {low:g}, {name}, {precision}"] = row
    return rows


def skipping_row(o, kind, dtype, side, steps, low):
    model, mu = held(stable_diffusion, kind, dtype, o.device), ramp(side, low)
    mu_s = diffdiff.down_sample(mu, (side // model.vae.config.factor,) * 2)
    two = (partial(edit, model, PROMPT, meadow(side), mu, steps=steps, skip=skip) for skip in (True, False))
    ran = diffdiff.steps_to_run(mu_s, steps)
    return {"steps run": ran} | compare(o, *two, "ours, without skipping", same=False)


# ---------------------------------------------------------------------------------------------------------------------
# Magic Fixup


def magic_fixup(kind, dtype, device):
    """The shipped toy, or random weights at full size."""
    if kind == "toy":
        return make_fast(mfx.load(TOY_MFX, dtype, device), device)
    model = mfx.from_stable_diffusion(without_text(kind)).requires_grad_(False).eval().to(device, dtype)
    return make_fast(model, device)


def fixup_edit(who, kind, dtype, device, side):
    model, pair = magic_fixup(kind, dtype, device), pairs.toy_pairs(1, torch.Generator().manual_seed(0), size=side)
    pictures = [pair[name] for name in ("reference", "coarse", "mask")]
    if who == "ours":
        return partial(fixup, model, *pictures)
    return partial(bench_peers.straightforward_fixup, bench_peers.fixup_peer(model), *pictures)


def fixups(o):
    """A whole Magic Fixup edit: two pictures encoded, the steps, one decoded. Ours runs the extractor for many steps in
    one batch, up to its last feature, and keeps keys and values; the loop beside it runs both UNets (diffusers', joined
    by hooks) at every step, as the method reads. Each in a process of its own: ours holds on to the memory that it
    frees, as sample.py does."""
    return {f"{name}, {precision}": partial(both, o, "fixup", kind, (dtype, dtype), side, steps,
                                            "straightforward loop, diffusers", 0.7)
            for kind, name, side, steps in sizes(o) for precision, dtype in precisions(o).items()}


MAKE = {"change map": change_map_edit, "one strength": strength_edit, "fixup": fixup_edit}
TOPICS = {
    "edit": ("A whole edit under a change map", change_maps), "skipping": ("Skipping", skipping),
    "mfx": ("A whole Magic Fixup edit", fixups),
}
