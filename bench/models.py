"""python -m bench's topics of single networks: one pass of the UNet, and of the autoencoder.

The weights are random, so nothing is downloaded. The other topics build their models here as well.
"""

from functools import partial

import torch

import clip
import diffusion
import sd
import unet
import vae
from bench import peers
from bench.clock import compare
from checkpoints.parts import PARTS, build_part
from common.cli import TOY
from common.devices import choose_precision, make_fast
from kernels.winograd import quicken
from toy.vocabulary import learn_bpe

CONFIGS = {
    "toy": {"unet": unet.CONFIGS["toy"], "vae": vae.CONFIGS["toy"], "text_encoder": clip.CONFIGS["toy"]},
    "full": {"unet": unet.CONFIGS["sd1"], "vae": vae.CONFIGS["sd"], "text_encoder": clip.CONFIGS["clip-vit-l"]},
}
NAMES = {"toy": "the toy", "full": "Stable Diffusion 1.4"}
SIDES = {"toy": 128, "full": 512}  # pixels along a side of the pictures that a model is for
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_dtypes(o):
    """-> {name: dtype} to measure: the one of --dtype, else both"""
    if o.dtype == "auto":
        return {"automatic precision": choose_precision("auto", o.device)}
    return {name: dtype for name, dtype in DTYPES.items() if o.dtype in (None, name)}


def make_part(name, kind, dtype, device):
    """'unet', 'vae' or 'text_encoder' of a 'toy' or a 'full' Stable Diffusion, random, built as a loaded one is."""
    torch.manual_seed(0)
    network = PARTS[name][0]
    config = CONFIGS[kind][name]
    return build_part(name, network(config).state_dict(), "random weights", config, dtype, device)


def make_stable_diffusion(kind, dtype, device):
    """The shipped toy, or random weights at full size with a small vocabulary; fast, as sample.py makes it."""
    if kind == "toy":
        return make_fast(sd.load(TOY, dtype, device), device)
    parts = [make_part(name, kind, dtype, device) for name in CONFIGS[kind]]
    tokenizer = clip.Tokenizer(*learn_bpe(["a photo of snow at night", "a red ball on grass"], 560))
    model = sd.StableDiffusion(*parts, diffusion.Schedule(), tokenizer, SIDES[kind])
    return make_fast(model, device)


def make_without_text(kind):
    """The Stable Diffusion that a Magic Fixup starts from, in fp32: the shipped toy, or random weights at full size."""
    if kind == "toy":
        return sd.load(TOY, torch.float32)
    network, autoencoder = (make_part(name, kind, torch.float32, "cpu") for name in ("unet", "vae"))
    return sd.StableDiffusion(network, autoencoder, None, diffusion.Schedule(), None, SIDES[kind])


# ---------------------------------------------------------------------------------------------------------------------
# One pass


def compare_passes(o, name, batches, ways):
    """Rows of the UNet or the autoencoder beside diffusers', for each precision, batch size and way.

    ways  {name: (inputs, ours, the peer's)}: a function (kind, batch) -> tensors, of which the floating ones get the
          precision, and two functions (model, *inputs) -> tensor
    """
    kind = o.model or "full"

    def compare_at(precision, dtype):  # a function of its own, so that one precision's models go before the next's come
        model = make_part(name, kind, dtype, o.device)
        peer = None
        if peers.is_installed():
            peer = peers.make_unet_peer(model) if name == "unet" else peers.make_vae_peer(model)
        if o.device.type == "cpu":  # as make_fast has it
            quicken(model, keep=name == "unet")
        for batch in o.batch or batches:
            for way, (make_inputs, run_ours, run_theirs) in ways.items():
                torch.manual_seed(1)
                inputs = [x.to(o.device, dtype if x.is_floating_point() else None) for x in make_inputs(kind, batch)]
                ours = partial(run_ours, model, *inputs)
                theirs = partial(run_theirs, peer, *inputs) if peer else None
                what = f"{NAMES[kind]}, {SIDES[kind]}x{SIDES[kind]}, {way}, {precision}, batch {batch}"
                yield compare(o, what, ours, theirs, "diffusers")

    for precision, dtype in choose_dtypes(o).items():
        yield from compare_at(precision, dtype)


def make_latents(kind, batch):
    config = CONFIGS[kind]["vae"]
    side = SIDES[kind] // config.factor
    return torch.randn(batch, config.latent_channels, side, side)


def unet_step(o):
    """One step of the UNet, on latents of pictures of that size, with a text of 77 tokens."""

    def make_inputs(kind, batch):
        text = torch.randn(batch, 77, CONFIGS[kind]["unet"].context)
        return make_latents(kind, batch), torch.full((batch,), 500), text

    step = make_inputs, lambda model, *x: model(*x), lambda peer, *x: peer(*x).sample
    return compare_passes(o, "unet", (1, 2, 8), {"a step": step})


def autoencoder(o):
    """The autoencoder: to the mean of a picture's latent, and back."""

    def make_pictures(kind, batch):
        return [torch.rand(batch, 3, SIDES[kind], SIDES[kind]) * 2 - 1]

    ways = {
        "encode": (make_pictures, lambda model, x: model.encode(x)[0], lambda peer, x: peer.encode(x).latent_dist.mean),
        "decode": (lambda *given: [make_latents(*given)], lambda model, z: model.decode(z),
                   lambda peer, z: peer.decode(z).sample),
    }
    return compare_passes(o, "vae", (1, 2), ways)


TOPICS = {"unet": unet_step, "vae": autoencoder}
