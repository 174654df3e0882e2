"""bench.py's topics of whole edits, from pictures and words to the edited picture: Differential Diffusion, what its
skipping saves, Magic Fixup.

With the shipped toy's weights, and at Stable Diffusion 1.4's size with random ones and few steps: an edit of 100 steps
takes a hundred times as long, and nothing is learned by waiting for it.
"""

from functools import partial
from pathlib import Path

import torch
from PIL import Image

import bench_peers
import diffdiff
import mfx
import pairs
from bench_clock import compare, held, installed
from bench_models import NAMES, SIDES, precisions, stable_diffusion, without_text
from pictures import picture_to_tensor, tensor_to_picture
from programs import choose_precision, make_fast
from sample import TOY_MFX, edit, fixup

MEADOW = Path(__file__).parent / "examples" / "meadow.png"
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
# Differential Diffusion


def model_and_pipeline(kind, dtype, peer_dtype, device):
    model = stable_diffusion(kind, dtype, device)
    return model, installed(bench_peers.pipeline, model, peer_dtype)


def change_maps(o):
    """A whole edit: the text encoded, the picture too, guided steps, the result decoded. Beside a change map's edit
    stands the loop that its authors published, on diffusers' networks; beside that of one strength for all (SDEdit)
    diffusers' own image-to-image pipeline. By default ours computes in the precision that suits the machine, and
    diffusers in fp32. No step can be skipped under this map; the topic `skipping` is about those that can.
    """
    rows = {}
    for kind, name, side, steps in sizes(o):
        exact = {p: (dtype, dtype) for p, dtype in precisions(o).items() if o.dtype != "auto"}
        auto = {"by default": (choose_precision("auto", o.device), torch.float32)} if o.dtype in (None, "auto") else {}
        for precision, dtypes in (auto | exact).items():  # bf16 last: no model need be made twice
            limit = 0.4 if precision == "by default" else 0.8
            rows[f"change map, {name}, {precision}"] = partial(change_map_row, o, kind, dtypes, side, steps, limit)
            if precision != "by default":
                rows[f"one strength, {name}, {precision}"] = partial(strength_row, o, kind, dtypes, side, steps)
    return rows


def change_map_row(o, kind, dtypes, side, steps, limit):
    model, pipe = held(model_and_pipeline, kind, *dtypes, o.device)
    picture, mu, factor = meadow(side), ramp(side), model.vae.config.factor
    latent = model.vae.config.latent_channels, side // factor, side // factor
    noise = torch.randn(1, *latent, generator=torch.Generator().manual_seed(0))  # what `edit` draws from seed 0
    ours = partial(edit, model, PROMPT, picture, mu, steps=steps)
    peer = pipe and partial(bench_peers.published_change_map, pipe, PROMPT, picture, mu, noise, steps)
    return compare(o, ours, peer, "published loop, diffusers", limit)


def strength_row(o, kind, dtypes, side, steps):
    model, pipe = held(model_and_pipeline, kind, *dtypes, o.device)
    picture, flat = meadow(side), diffdiff.strength_fan_map([STRENGTH], side, side)
    ours = partial(edit, model, PROMPT, picture, flat, steps=steps)
    peer = pipe and partial(pipe, PROMPT, tensor_to_picture(picture[0] / 2 + 0.5), STRENGTH, steps, output_type="pt")
    return compare(o, ours, peer, "diffusers, img2img", same=False)  # it draws other noise


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
    both = (partial(edit, model, PROMPT, meadow(side), mu, steps=steps, skip=skip) for skip in (True, False))
    ran = diffdiff.steps_to_run(mu_s, steps)
    return {"steps run": ran} | compare(o, *both, "ours, without skipping", same=False)


# ---------------------------------------------------------------------------------------------------------------------
# Magic Fixup


def magic_fixup(kind, dtype, device):
    """The shipped toy, or random weights at full size."""
    if kind == "toy":
        return make_fast(mfx.load(TOY_MFX, dtype, device), device)
    model = mfx.from_stable_diffusion(without_text(kind)).requires_grad_(False).eval().to(device, dtype)
    return make_fast(model, device)


def fixup_and_peer(kind, dtype, device):
    model = magic_fixup(kind, dtype, device)
    return model, installed(bench_peers.fixup_peer, model)


def fixups(o):
    """A whole Magic Fixup edit: two pictures encoded, the steps, one decoded. Ours runs the extractor for many steps in
    one batch, up to its last feature, and keeps keys and values; the loop beside it runs both UNets (diffusers', joined
    by hooks) at every step, as the method reads."""
    rows = {}
    for kind, name, side, steps in sizes(o):
        for precision, dtype in precisions(o).items():
            rows[f"{name}, {precision}"] = partial(fixup_row, o, kind, dtype, side, steps)
    return rows


def fixup_row(o, kind, dtype, side, steps):
    model, peer = held(fixup_and_peer, kind, dtype, o.device)
    pair = pairs.toy_pairs(1, torch.Generator().manual_seed(0), size=side)
    pictures = [pair[name] for name in ("reference", "coarse", "mask")]
    ours = partial(fixup, model, *pictures, steps=steps)
    loop = peer and partial(bench_peers.straightforward_fixup, peer, *pictures, steps=steps)
    return compare(o, ours, loop, "straightforward loop, diffusers", at_most=0.7)


TOPICS = {
    "edit": ("A whole edit under a change map", change_maps), "skipping": ("Skipping", skipping),
    "mfx": ("A whole Magic Fixup edit", fixups),
}
