"""python -m bench's topics of single models: loading a checkpoint; one pass of UNet, autoencoder, text encoder.

The weights are random, so nothing is downloaded. The other topics build their models here as well.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

import clip
import diffusion
import sd
import unet
import vae
from bench import peers
from bench.clock import Row, call_in_turn, compare, make_if_installed, run_in_own_process, watch
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


def make_random(kind, dtype, device):
    """A whole Stable Diffusion on random weights, with a small vocabulary."""
    parts = [make_part(name, kind, dtype, device) for name in PARTS]
    tokenizer = clip.Tokenizer(*learn_bpe(["a photo of snow at night", "a red ball on grass"], 560))
    return sd.StableDiffusion(*parts, diffusion.Schedule(), tokenizer, SIDES[kind])


def make_stable_diffusion(kind, dtype, device):
    """The shipped toy, or random weights at full size; fast, as sample.py makes it."""
    return make_fast(sd.load(TOY, dtype, device) if kind == "toy" else make_random(kind, dtype, device), device)


def make_without_text(kind):
    """The Stable Diffusion that a Magic Fixup starts from, in fp32: the shipped toy, or random weights at full size."""
    if kind == "toy":
        return sd.load(TOY, torch.float32)
    network, autoencoder = (make_part(name, kind, torch.float32, "cpu") for name in ("unet", "vae"))
    return sd.StableDiffusion(network, autoencoder, None, diffusion.Schedule(), None, SIDES[kind])


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def write_checkpoints(folder, kind, dtype):
    """A random Stable Diffusion in three layouts -> {layout: path}"""
    from tests.small import to_original  # the original layout, which this project reads and never writes

    model = make_random(kind, dtype, "cpu")
    paths = {"folder": folder / "folder", ".safetensors": folder / "sd.safetensors", ".ckpt": folder / "sd.ckpt"}
    sd.save(model, paths["folder"])
    tensors = to_original(model)
    save_file(tensors, paths[".safetensors"])
    torch.save({"state_dict": tensors}, paths[".ckpt"])
    model.tokenizer.save(folder / "tokenizer")
    return paths


def load_once(who, path, dtype, configs):
    """Load, then run one step of the UNet, both measured. In a process of its own."""
    if who == "ours":
        with watch() as loading:
            network = sd.load(path).unet
        channels, width = network.config.in_channels, network.config.context
    else:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        options = {"torch_dtype": getattr(torch, dtype), "safety_checker": None, "local_files_only": True}
        read = diffusers.StableDiffusionPipeline.from_pretrained
        if Path(path).is_file():
            read = diffusers.StableDiffusionPipeline.from_single_file
            options["config"] = configs
        with watch() as loading:
            network = read(path, **options).unet
        channels, width = network.config.in_channels, network.config.cross_attention_dim

    # The step reads the file's pages, which loading only mapped. Half precision is slow on many CPUs.
    torch.manual_seed(0)
    with torch.no_grad(), watch() as step:
        network.float()
        out = network(torch.randn(1, channels, 64, 64), torch.tensor([500]), torch.randn(1, 77, width))
    out = out if torch.is_tensor(out) else out.sample
    return {"load": loading.seconds, "load, peak GiB": loading.peak,
            "load and step": loading.seconds + step.seconds,
            "load and step, peak GiB": step.peak + step.start - loading.start,
            "norm": out.norm().item()}


def load(o):
    """Loading a random checkpoint of Stable Diffusion 1.4's size, and one step of its UNet in fp32.

    The file is in fp16 without --dtype. The step is there because loading only maps a file, and the step reads it.
    Each load has a process of its own. Peaks are above the bare program and include the pages that are read.
    """
    kind = o.model or "full"
    dtype = DTYPES.get(o.dtype, torch.float16)
    who = ("ours", "peer") if peers.is_installed() else ("ours",)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_checkpoints(Path(folder), kind, dtype)
        for layout, path in paths.items():
            common = dict(path=str(path), dtype=str(dtype).removeprefix("torch."), configs=str(paths["folder"]))
            runs = {one: partial(run_in_own_process, "bench.models.load_once", who=one, **common) for one in who}
            done = call_in_turn(runs, o)
            norms = [made[0].pop("norm") for made in done.values()]
            for key in done["ours"][0]:
                ours, theirs = ([made[key] for made in done.get(one, ())] for one in ("ours", "peer"))
                apart = abs(norms[0] / norms[-1] - 1) if theirs and key == "load and step" else None
                unit = "" if "GiB" in key else "s"
                yield Row(f"{NAMES[kind]}, {layout}: {key}", ours, theirs, "diffusers", unit, apart)


# ---------------------------------------------------------------------------------------------------------------------
# One pass


def compare_passes(o, name, batches, make_inputs, ways):
    """Rows of one part, for each precision, batch size and way.

    make_inputs  (kind, batch, way) -> tensors; the floating ones get the precision
    ways         {name: (ours, the peer's)}, functions of (model, *inputs) that return a tensor
    """
    kind = o.model or "full"
    make_peer = {"unet": peers.make_unet_peer, "vae": peers.make_vae_peer, "text_encoder": peers.make_text_peer}[name]
    peer_name = "transformers" if name == "text_encoder" else "diffusers"
    of = "77 tokens" if name == "text_encoder" else f"{SIDES[kind]}x{SIDES[kind]}"

    def compare_at(precision, dtype):  # a function of its own, so that one precision's models go before the next's come
        model = make_part(name, kind, dtype, o.device)
        peer = make_if_installed(make_peer, model)
        if o.device.type == "cpu":  # as make_fast has it
            quicken(model, keep=name == "unet")
        for batch in o.batch or batches:
            for way, functions in ways.items():
                torch.manual_seed(1)
                inputs = make_inputs(kind, batch, way)
                inputs = [x.to(o.device, dtype if x.is_floating_point() else None) for x in inputs]
                ours, theirs = (partial(f, m, *inputs) for f, m in zip(functions, (model, peer)))
                what = f"{NAMES[kind]}, {of}, {way + ', ' if way else ''}{precision}, batch {batch}"
                yield compare(o, what, ours, theirs if peer else None, peer_name)

    for precision, dtype in choose_dtypes(o).items():
        yield from compare_at(precision, dtype)


def unet_step(o):
    """One step of the UNet, on latents of pictures of that size, with a text of 77 tokens."""

    def make_inputs(kind, batch, _):
        config = CONFIGS[kind]["unet"]
        side = SIDES[kind] // CONFIGS[kind]["vae"].factor
        z = torch.randn(batch, config.in_channels, side, side)
        return z, torch.full((batch,), 500), torch.randn(batch, 77, config.context)

    ways = {"": (lambda model, *x: model(*x), lambda peer, *x: peer(*x).sample)}
    return compare_passes(o, "unet", (1, 2, 8), make_inputs, ways)


def autoencoder(o):
    """The autoencoder: to the mean of a picture's latent, and back."""

    def make_inputs(kind, batch, way):
        config = CONFIGS[kind]["vae"]
        if way == "encode":
            return [torch.rand(batch, 3, SIDES[kind], SIDES[kind]) * 2 - 1]
        side = SIDES[kind] // config.factor
        return [torch.randn(batch, config.latent_channels, side, side)]

    ways = {
        "encode": (lambda model, x: model.encode(x)[0], lambda peer, x: peer.encode(x).latent_dist.mean),
        "decode": (lambda model, z: model.decode(z), lambda peer, z: peer.decode(z).sample),
    }
    return compare_passes(o, "vae", (1, 2), make_inputs, ways)


def text(o):
    """The text encoder. Classifier-free guidance asks for two texts."""

    def make_inputs(kind, batch, _):
        end = CONFIGS[kind]["text_encoder"].eos
        ids = torch.randint(0, end - 1, (batch, 77))
        ids[:, 0] = end - 1
        ids[:, 20:] = end
        return [ids]

    ways = {"": (lambda model, ids: model(ids), lambda peer, ids: peer(ids).last_hidden_state)}
    return compare_passes(o, "text_encoder", (1, 2, 8), make_inputs, ways)


TOPICS = {"load": load, "unet": unet_step, "vae": autoencoder, "text": text}
