"""-m bench's topics of single models: loading a checkpoint; one pass of the UNet, the autoencoder, the text encoder.

The weights are random, so nothing is downloaded; `part` and `stable_diffusion` make them for the other topics as well.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch

import clip
import diffusion
import sd
import unet
import vae
from bench import peers as bench_peers
from bench.clock import Watch, compare, held, in_own_process, installed, ratio, summary, turns
from common.cli import TOY
from common.devices import choose_precision, make_fast
from kernels.winograd import quicken

CONFIGS = {
    "toy": {"unet": unet.CONFIGS["toy"], "vae": vae.CONFIGS["toy"], "text_encoder": clip.CONFIGS["toy"]},
    "full": {"unet": unet.CONFIGS["sd1"], "vae": vae.CONFIGS["sd"], "text_encoder": clip.CONFIGS["clip-vit-l"]},
}
NAMES = {"toy": "the toy", "full": "Stable Diffusion 1.4"}
SIDES = {"toy": 128, "full": 512}  # pixels along a side of the pictures that a model is for
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precisions(o, default=None):
    """-> {name: dtype}, those to measure: as --dtype says, else as the default does, else both."""
    asked = o.dtype or default
    if asked == "auto":
        return {"automatic precision": choose_precision("auto", o.device)}
    return {name: dtype for name, dtype in DTYPES.items() if asked in (None, name)}


def part(name, kind, dtype, device):
    """'unet', 'vae' or 'text_encoder' of a 'toy' or a 'full' Stable Diffusion, random, made as a loaded one is."""
    torch.manual_seed(0)
    network, config = sd.PARTS[name][0], CONFIGS[kind][name]
    return sd.build(name, network(config).state_dict(), "random weights", config, dtype, device)


def quick(network, keep=True):
    """As sample.py uses it: its convolutions go the fastest way on a CPU."""
    return quicken(network, keep) if next(network.parameters()).device.type == "cpu" else network


def stable_diffusion(kind, dtype, device):
    """The shipped toy, or one of Stable Diffusion 1.4's size with random weights and a small vocabulary. As sample.py
    uses it."""
    if kind == "toy":
        return make_fast(sd.load(TOY, dtype, device), device)
    parts = [part(name, kind, dtype, device) for name in sd.PARTS]
    tokenizer = clip.Tokenizer(*clip.learn_bpe(["a photo of snow at night", "a red ball on grass"], 560))
    return make_fast(sd.StableDiffusion(*parts, diffusion.Schedule(), tokenizer, SIDES[kind]), device)


def without_text(kind):
    """What a Magic Fixup starts from, in fp32: the shipped toy, or random weights at full size."""
    if kind == "toy":
        return sd.load(TOY, torch.float32)
    parts = [part(name, kind, torch.float32, "cpu") for name in ("unet", "vae")]
    return sd.StableDiffusion(*parts, None, diffusion.Schedule(), None, SIDES[kind])


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def make_checkpoints(tmp, kind, dtype):
    """A random Stable Diffusion in three layouts -> {layout: path}, and the folder, which goes when nobody holds it."""
    from tests.small import to_original  # the original layout, written independently of sd.py

    torch.manual_seed(0)
    temporary = tempfile.TemporaryDirectory(dir=tmp)
    folder = Path(temporary.name)

    def random_model(name):
        network, config = sd.PARTS[name][0], CONFIGS[kind][name]
        with torch.device("meta"):
            model = network(config)
        model = model.to(dtype).to_empty(device="cpu")
        for p in model.parameters():
            p.data.uniform_(-0.02, 0.02)
        return model

    tokenizer = clip.Tokenizer(*clip.learn_bpe(["a red circle on a sandy beach"], 540))
    model = sd.StableDiffusion(*map(random_model, sd.PARTS), diffusion.Schedule(), tokenizer, SIDES[kind])
    paths = {"folder": folder / "folder", ".safetensors": folder / "sd.safetensors", ".ckpt": folder / "sd.ckpt"}
    sd.save(model, paths["folder"])
    tensors = to_original(model)
    sd.save_file(tensors, paths[".safetensors"])
    torch.save({"state_dict": tensors}, paths[".ckpt"])
    model.tokenizer.save(folder / "tokenizer")
    return paths, temporary


def load_once(who, path, dtype, configs):
    """Load, then one step of the UNet, both measured. In a process of its own."""
    if who == "ours":
        with Watch() as loading:
            network = sd.load(path).unet
        channels, width = network.config.in_channels, network.config.context
    else:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        options = {"torch_dtype": getattr(torch, dtype), "safety_checker": None, "local_files_only": True}
        read = diffusers.StableDiffusionPipeline.from_pretrained
        if Path(path).is_file():
            read, options["config"] = diffusers.StableDiffusionPipeline.from_single_file, configs
        with Watch() as loading:
            network = read(path, **options).unet
        channels, width = network.config.in_channels, network.config.cross_attention_dim
    torch.manual_seed(0)
    with torch.no_grad(), Watch() as step:  # includes reading the file's pages, where loading only mapped them
        network.float()  # half precision is slow on many CPUs
        out = network(torch.randn(1, channels, 64, 64), torch.tensor([500]), torch.randn(1, 77, width))
    out = out if torch.is_tensor(out) else out.sample
    return {"load": loading.seconds, "private": loading.private, "both": loading.seconds + step.seconds,
            "peak": step.total + step.start - loading.start, "norm": out.norm().item()}


def load(o):
    """Loading a random checkpoint of Stable Diffusion 1.4's size (fp16 without --dtype), and then one step of its UNet
    in fp32, which is when a file that was only mapped is read. Each in a process of its own. Private memory is what the
    process has beside the file's pages, at the worst moment of loading; the file is the whole of the checkpoint.
    """
    kind, dtype = o.model or "full", DTYPES.get(o.dtype, torch.float16)

    def row(layout):
        paths, _ = held(make_checkpoints, o.tmp, kind, dtype)
        common = dict(path=str(paths[layout]), dtype=str(dtype)[6:], configs=str(paths["folder"]))
        once = {who: partial(in_own_process, "bench.models.load_once", who=who, **common)
                for who in ("ours", "diffusers")}
        done = turns(once, o)
        megabytes = paths[".safetensors"].stat().st_size / 2**20
        ours, peer = ({key: [r[key] for r in done[who]] for key in done[who][0]} for who in once)
        norms = ours["norm"][0], peer["norm"][0]
        return {
            "file MiB": megabytes, "ours": summary(ours["load"], "s"), "peer": "diffusers",
            "its time": summary(peer["load"], "s"), "ours / peer": ratio(ours["load"], peer["load"]), "at most": 0.5,
            "private MiB": summary(ours["private"]), "its private MiB": summary(peer["private"]),
            "private / file": max(ours["private"]) / megabytes, "may be": 1.1,
            "load and step": summary(ours["both"], "s"), "its load and step": summary(peer["both"], "s"),
            "peak MiB": summary(ours["peak"]), "its peak MiB": summary(peer["peak"]),
            "difference": abs(norms[0] - norms[1]) / norms[1],
        }

    return {f"{NAMES[kind]}, {layout}": partial(row, layout) for layout in ("folder", ".safetensors", ".ckpt")}


# ---------------------------------------------------------------------------------------------------------------------
# One pass


def with_peer(name, kind, dtype, device):
    """-> a part of ours, and the same of the peer's or None"""
    make = {"unet": bench_peers.unet_peer, "vae": bench_peers.vae_peer, "text_encoder": bench_peers.text_peer}[name]
    model = part(name, kind, dtype, device)
    peer = installed(make, model)
    return quick(model, keep=name == "unet"), peer


def passes(o, name, batches, inputs, ways):
    """The rows of one part: for each precision and batch, for each of ways {what: (ours, peer's)}, functions of (model,
    *inputs) that return a tensor. inputs(kind, batch, what) -> tensors, the floating ones get the precision."""
    kind = o.model or "full"
    peer_name, limit = ("transformers", None) if name == "text_encoder" else ("diffusers", 1.0)

    def row(dtype, batch, what):
        model, peer = held(with_peer, name, kind, dtype, o.device)
        torch.manual_seed(1)
        x = [t.to(o.device, dtype if t.is_floating_point() else None) for t in inputs(kind, batch, what)]
        ours, theirs = (partial(f, m, *x) for f, m in zip(ways[what], (model, peer)))
        return compare(o, ours, theirs if peer else None, peer_name, limit)

    pixels = o.size or SIDES[kind]
    of = f"{NAMES[kind]}, 77 tokens" if name == "text_encoder" else f"{NAMES[kind]}, {pixels}x{pixels}"
    return {
        f"{of}, {f'{what}, ' if what else ''}{precision}, batch {batch}": partial(row, dtype, batch, what)
        for precision, dtype in precisions(o).items() for batch in o.batch or batches for what in ways
    }


def side(o, kind):
    return (o.size or SIDES[kind]) // CONFIGS[kind]["vae"].factor


def unet_step(o):
    """One step of the UNet, on latents of pictures of that size, 64x64 for 512x512, with a text of 77 tokens."""

    def inputs(kind, batch, _):
        c, s = CONFIGS[kind]["unet"], side(o, kind)
        return torch.randn(batch, c.in_channels, s, s), torch.full((batch,), 500), torch.randn(batch, 77, c.context)

    ways = {"": (lambda model, z, t, context: model(z, t, context), lambda peer, *x: peer(*x).sample)}
    return passes(o, "unet", (1, 2, 8), inputs, ways)


def autoencoder(o):
    """The autoencoder: to the mean of a picture's latent, and back."""

    def inputs(kind, batch, what):
        s, f = side(o, kind), CONFIGS[kind]["vae"].factor
        latent = batch, CONFIGS[kind]["vae"].latent_channels, s, s
        return [torch.rand(batch, 3, f * s, f * s) * 2 - 1] if what == "encode" else [torch.randn(latent)]

    return passes(o, "vae", (1, 2), inputs, {
        "encode": (lambda model, x: model.encode(x)[0], lambda peer, x: peer.encode(x).latent_dist.mean),
        "decode": (lambda model, z: model.decode(z), lambda peer, z: peer.decode(z).sample),
    })


def text(o):
    """The text encoder. Two texts are what classifier-free guidance asks for."""

    def inputs(kind, batch, _):
        eos = CONFIGS[kind]["text_encoder"].eos
        ids = torch.randint(0, eos - 1, (batch, 77))
        ids[:, 0], ids[:, 20:] = eos - 1, eos
        return [ids]

    ways = {"": (lambda model, ids: model(ids), lambda peer, ids: peer(ids).last_hidden_state)}
    return passes(o, "text_encoder", (1, 2, 8), inputs, ways)


TOPICS = {
    "load": ("Loading a checkpoint", load), "unet": ("The UNet", unet_step), "vae": ("The autoencoder", autoencoder),
    "text": ("The text encoder", text),
}
