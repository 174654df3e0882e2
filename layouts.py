"""Checkpoint files: reading them without running anything in them, and one table of names for their two layouts.

A Stable Diffusion lies on disk in one of two layouts. Hugging Face's is a folder per part, whose tensors are named as
our modules' attributes are. The original latent-diffusion layout is one file for all parts, with names of its own.
Everything here is about {name: tensor}; what networks the tensors make is the business of sd.py.
"""

import contextlib
import gc
import json
import os
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

# ---------------------------------------------------------------------------------------------------------------------
# Files


class Inert(dict):
    """Stands for whatever a training framework left in a pickle: it takes any arguments and state, and does nothing."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, _):
        pass


BYSTANDERS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "numpy", "collections", "typing")


def read(path):
    """A .safetensors file or a pickled state dict -> {name: tensor}, on the CPU, mapped into memory.

    Nothing in a pickle is executed: names of known training frameworks become `Inert`, any other name but a tensor's
    is refused. FileNotFoundError if there is no file, ValueError if it is empty, damaged, refused or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: download it again")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as f:
                return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, it is no dict
        except SafetensorError as e:
            raise ValueError(f"{path} is not a whole safetensors file ({e}): download it again") from None
    if path.suffix not in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path} is not a checkpoint: expected a folder, .safetensors, .ckpt, .pt, .pth or .bin")
    zipped = zipfile.is_zipfile(path)  # torch.save's format since 2020, the one that can be mapped
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        refused = [name for name in names if name.split(".")[0] not in BYSTANDERS]
        if not refused:
            with torch.serialization.safe_globals([(Inert, name) for name in names]):
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # a damaged file can fail in any way
        refused = re.findall(r"GLOBAL (\S+)", str(e))
        if not refused:
            raise ValueError(f"{path} is damaged, or no checkpoint ({str(e).splitlines()[0]})") from None
    if refused:
        raise ValueError(f"{path} is refused: a pickle that refers to {', '.join(refused[:3])} could run code. Get the "
                         ".safetensors version, or convert it on a machine where you trust it")
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    named = tensors.items() if isinstance(tensors, dict) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and torch.is_tensor(value)}
    if not tensors:
        raise ValueError(f"{path} is not a checkpoint: there are no tensors in it")
    return tensors


def misfits(model, shapes):
    """What keeps tensors of these {name: shape} from being the model's, in words with a few names; "" if nothing."""
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": [n for n in want if n not in shapes],
        "unexpected": [n for n in shapes if n not in want],
        "misshapen": [f"{n} {shapes[n]} instead of {s}" for n, s in want.items() if shapes.get(n, s) != s],
    }
    return "; ".join(f"{len(n)} {kind} tensors, e.g. {', '.join(n[:3])}" for kind, n in problems.items() if n)


def read_folder(folder):
    """The weights in one part's folder, whole or in shards, full or half precision -> {name: tensor}, as `read`."""
    folder = Path(folder)
    for kind in ("safetensors", "bin"):
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            for variant in ("", ".fp16"):
                if (file := folder / f"{stem}{variant}.{kind}").is_file():
                    return read(file)
                for index in (f"{stem}.{kind}.index{variant}.json", f"{stem}{variant}.{kind}.index.json"):
                    if (folder / index).is_file():
                        files = read_json(folder / index).get("weight_map")
                        if not (isinstance(files, dict) and all(isinstance(file, str) for file in files.values())):
                            raise ValueError(f"{folder / index} does not say where each tensor is: copy it again")
                        return {k: v for file in sorted(set(files.values())) for k, v in read(folder / file).items()}
    raise FileNotFoundError(f"there are no weights in {folder}: expected diffusion_pytorch_model.safetensors, "
                            "model.safetensors, or the same as .bin")


@contextlib.contextmanager
def uncollected():
    """No garbage collection inside: a model is half a million objects that stay, through which Python would go again
    and again for garbage, half of the time that a checkpoint takes to load."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path):
    """-> the object {name: value} in that file. FileNotFoundError, or ValueError for anything else that is in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({e}): copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it should hold {{...}}, not a {type(found).__name__}. Copy it again")
    return found


@contextlib.contextmanager
def whole(path):
    """A name to write to, which becomes `path` if nothing goes wrong: the file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # on the disk before it has the name, also if the power fails
        os.replace(temporary, path)  # also where the old file is mapped: the map keeps the old contents
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    with whole(path) as out:
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Names: the original latent-diffusion layout -> Hugging Face
#
# Each row says what stands for what, from left to right within a name, wherever a component of the name begins. N is a
# number. The original UNet counts its blocks straight through, the step to the next resolution included: with 2
# residual blocks per level, input_blocks 1, 2, 3 are level 0's resnets and its downsampler, 4, 5, 6 are level 1's.
# {down} and {up} turn such a count into (level, place). The original decoder counts resolutions from the finest up, in
# the order of the encoder; {reversed} counts them as they are run.

PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
NAMES = {
    "unet": {
        "time_embed.0.": "time_embedding.linear_1.",
        "time_embed.2.": "time_embedding.linear_2.",
        "label_emb.0.0.": "add_embedding.linear_1.",
        "label_emb.0.2.": "add_embedding.linear_2.",
        "input_blocks.0.0.": "conv_in.",
        "input_blocks.N.0.op.": "down_blocks.{down[0]}.downsamplers.0.conv.",
        "input_blocks.N.0.": "down_blocks.{down[0]}.resnets.{down[1]}.",
        "input_blocks.N.1.": "down_blocks.{down[0]}.attentions.{down[1]}.",
        "middle_block.0.": "mid_block.resnets.0.",
        "middle_block.1.": "mid_block.attentions.0.",
        "middle_block.2.": "mid_block.resnets.1.",
        "output_blocks.N.1.conv.": "up_blocks.{up[0]}.upsamplers.0.conv.",  # after a resnet alone ...
        "output_blocks.N.2.conv.": "up_blocks.{up[0]}.upsamplers.0.conv.",  # ... or after a resnet and a transformer
        "output_blocks.N.0.": "up_blocks.{up[0]}.resnets.{up[1]}.",
        "output_blocks.N.1.": "up_blocks.{up[0]}.attentions.{up[1]}.",
        "out.0.": "conv_norm_out.",
        "out.2.": "conv_out.",
        # inside a residual block; transformers have the same names in both layouts
        "in_layers.0.": "norm1.",
        "in_layers.2.": "conv1.",
        "emb_layers.1.": "time_emb_proj.",
        "out_layers.0.": "norm2.",
        "out_layers.3.": "conv2.",
        "skip_connection.": "conv_shortcut.",
    },
    "vae": {
        "encoder.down.N.block.": "encoder.down_blocks.{n}.resnets.",
        "encoder.down.N.downsample.": "encoder.down_blocks.{n}.downsamplers.0.",
        "decoder.up.N.block.": "decoder.up_blocks.{reversed}.resnets.",
        "decoder.up.N.upsample.": "decoder.up_blocks.{reversed}.upsamplers.0.",
        "mid.block_1.": "mid_block.resnets.0.",
        "mid.block_2.": "mid_block.resnets.1.",
        "mid.attn_1.": "mid_block.attentions.0.",
        "norm_out.": "conv_norm_out.",
        "nin_shortcut.": "conv_shortcut.",
        # inside the attention
        "norm.": "group_norm.",
        "q.": "to_q.",
        "k.": "to_k.",
        "v.": "to_v.",
        "proj_out.": "to_out.0.",
        # and what Hugging Face called them until 2023
        "query.": "to_q.",
        "key.": "to_k.",
        "value.": "to_v.",
        "proj_attn.": "to_out.0.",
    },
    "text_encoder": {
        # SD 2: OpenCLIP. Its fused attn.in_proj_weight is cut into q, k, v in `translate`.
        "model.token_embedding.": "embeddings.token_embedding.",
        "model.positional_embedding": "embeddings.position_embedding.weight",
        "model.ln_final.": "final_layer_norm.",
        "model.transformer.resblocks.": "encoder.layers.",
        "attn.": "self_attn.",
        "ln_1.": "layer_norm1.",
        "ln_2.": "layer_norm2.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
        # SD 1: Hugging Face's own encoder, whose names begin with text_model. or, in some versions, do not
        "transformer.": "",
        "text_model.": "",
        "embeddings.": "text_model.embeddings.",
        "encoder.": "text_model.encoder.",
        "final_layer_norm.": "text_model.final_layer_norm.",
    },
}
# What checkpoints hold besides, and nobody needs here: moving averages (the plain weights are there as well), the noise
# schedule as buffers, the autoencoder's training loss, and what CLIP compares pictures with.
IGNORED = re.compile(
    r"model_ema\..*|first_stage_model\.loss\..*|(\w+_)?alphas_cumprod(_prev)?|betas|posterior_\w+|lvlb_weights|logvar"
    r"|(.*\.)?(position_ids|logit_scale)|cond_stage_model\..*\.text_projection(\.weight)?"
)


def translate(part, tensors):
    """{original name, without its prefix: tensor} of one part -> {Hugging Face name: tensor}, as views.

    part is 'unet', 'vae' or 'text_encoder'. Names that are Hugging Face's already stay as they are.
    """

    def count(pattern):
        return [int(m[1]) for name in tensors if (m := re.match(pattern, name))]

    per_level = min(count(r"input_blocks\.(\d+)\.0\.op\."), default=3)  # residual blocks and a step, on the way down
    finest = max(count(r"decoder\.up\.(\d+)\."), default=0)

    def fields(n):
        return {"n": n, "down": divmod(n - 1, per_level), "up": divmod(n, per_level), "reversed": finest - n}

    def replacement(new):
        return lambda m: new.format(**fields(int(m[1]))) if m.groups() else new

    rows = [(old.split("N")[0], re.compile(r"(?<![^.])" + re.escape(old).replace("N", r"(\d+)")), replacement(new))
            for old, new in NAMES[part].items()]
    out = {}
    for name, tensor in tensors.items():
        for begin, pattern, new in rows:
            if begin in name:  # a quick look spares most of a thousand names most of thirty patterns
                name = pattern.sub(new, name)
        if part == "vae" and ".attentions." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # (c, c, 1, 1), a convolution, -> (c, c)
        if ".in_proj_" in name:  # (3 D, D) or (3 D,)
            for letter, third in zip("qkv", tensor.chunk(3)):
                out[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            out[name] = tensor
    return out


def split_parts(path, tensors):
    """The tensors of a single-file checkpoint -> {part: {Hugging Face name: tensor}}, and whether its text encoder is
    OpenCLIP. `path` is for the errors: ValueError if this is not Stable Diffusion 1 or 2, or holds something else too.
    """
    if any(name.startswith("conditioner.") for name in tensors):
        raise ValueError(f"{path} is a Stable Diffusion XL checkpoint, whose two text encoders load() does not read")
    names = [name for name in tensors if not IGNORED.fullmatch(name)]
    parts = {
        part: translate(part, {n.removeprefix(prefix): tensors[n] for n in names if n.startswith(prefix)})
        for part, prefix in PREFIX.items()
    }
    absent = [f"{PREFIX[part]}*" for part, found in parts.items() if not found]
    if absent:
        raise ValueError(f"{path} is not a whole Stable Diffusion checkpoint: it has no tensors {' or '.join(absent)}; "
                         f"its first is {next(iter(tensors))}")
    unknown = [name for name in names if not name.startswith(tuple(PREFIX.values()))]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} unexpected tensors, e.g. {', '.join(unknown[:3])}")
    openclip = "cond_stage_model.model.ln_final.weight" in tensors
    if openclip:  # SD 2 reads its penultimate layer. The Hugging Face folder stores one layer less, and so do we.
        text = parts["text_encoder"]
        last = sum(name.endswith(".layer_norm1.weight") for name in text) - 1
        parts["text_encoder"] = {n: t for n, t in text.items() if f".encoder.layers.{last}." not in n}
    return parts, openclip
