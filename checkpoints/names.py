"""The names of a Stable Diffusion's tensors: the original layout -> Hugging Face's.

Hugging Face's layout is a folder per part, whose tensors are named as our networks' attributes are.
The original latent-diffusion layout is one file for all parts, with names of its own. Everything
here is about {name: tensor}; checkpoints/parts.py makes networks of them.
"""

import re
import warnings

# Each row says what stands for what, from left to right within a name, wherever a component of the
# name begins. N is a number. The original UNet counts its blocks straight through, the step to the
# next resolution included: with 2 residual blocks per level, input_blocks 1, 2, 3 are level 0's
# resnets and its downsampler, 4, 5, 6 are level 1's. {down} and {up} turn such a count into (level,
# place). The original decoder counts resolutions from the finest up, in the order of the encoder;
# {reversed} counts them as they are run.

# What Hugging Face called the layers of an autoencoder's attention until 2023
OLD_ATTENTION = {
    "query.": "to_q.",
    "key.": "to_k.",
    "value.": "to_v.",
    "proj_attn.": "to_out.0.",
}

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
# In place of the last row: XL's two text encoders, CLIP's and OpenCLIP's; a refiner has the latter.
XL_TEXT = {
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}
REFINER_TEXT = {"text_encoder_2": "conditioner.embedders.0."}
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
        "output_blocks.N.1.conv.": "up_blocks.{up[0]}.upsamplers.0.conv.",  # after a resnet,
        "output_blocks.N.2.conv.": "up_blocks.{up[0]}.upsamplers.0.conv.",  # or a transformer
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
        **OLD_ATTENTION,
    },
    "text_encoder": {
        # SD 2 and XL: OpenCLIP. In `translate` its fused attn.in_proj_weight is cut into q, k, v,
        # and its projection, which it has as (width, projection), is transposed.
        "model.token_embedding.": "embeddings.token_embedding.",
        "model.positional_embedding": "embeddings.position_embedding.weight",
        "model.ln_final.": "final_layer_norm.",
        "model.text_projection.weight": "text_projection.weight",  # diffusers' converter of 2023
        "model.text_projection": "text_projection.weight",
        "model.transformer.resblocks.": "encoder.layers.",
        "attn.": "self_attn.",
        "ln_1.": "layer_norm1.",
        "ln_2.": "layer_norm2.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
        # SD 1: Hugging Face's own encoder; text_model. is missing in some versions
        "transformer.": "",
        "text_model.": "",
        "embeddings.": "text_model.embeddings.",
        "encoder.": "text_model.encoder.",
        "final_layer_norm.": "text_model.final_layer_norm.",
    },
    "movq": {"spatial_norm.": "group_norm.", **OLD_ATTENTION},  # which is vae.Attention's name for it
}

# What checkpoints hold besides, and nobody needs here: moving averages (the plain weights are there
# as well), the noise schedule as buffers, signs of it (sd.py looks at them), the autoencoder's
# training loss, and what CLIP sees and compares pictures with.
IGNORED = re.compile(
    r"model_ema\..*|(first_stage_model\.)?loss\..*|(\w+_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
    r"|lvlb_weights|logvar|(.*\.)?(position_ids|logit_scale)|v_pred|ztsnr|encoder\.embed_tokens\.weight"
    r"|(.*\.)?(vision_model|visual_projection)\..*"
    r"|cond_stage_model\..*\.text_projection(\.weight)?|denoiser\.sigmas|quantize\..*"
    r"|conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)?"
)
IGNORED_BESIDE_IMAGES = re.compile(r".*\.position_ids|logit_scale|text_(model|projection)\..*")  # Kandinsky's


def translate(part, tensors, per_level=None):
    """{original name, without its prefix: tensor} of one part -> {Hugging Face name: tensor}.

    part is 'unet', 'vae', 'text_encoder' or 'text_encoder_2'. The tensors are views of those given.
    Names that are Hugging Face's already stay as they are. per_level is how many blocks make a
    level of the UNet on the way down, its residual blocks and the step; None: see in the names.
    """
    steps_down = find_numbers(r"input_blocks\.([1-9]\d*)\.0\.op\.", tensors)
    per_level = per_level or min(steps_down, default=3)
    finest = max(find_numbers(r"decoder\.up\.(\d+)\.", tensors), default=0)

    rows = []
    for old, new in NAMES.get(part.removesuffix("_2"), {}).items():
        rows.append((re.compile(r"(?<![^.])" + re.escape(old).replace("N", r"(\d+)")), new))

    out = {}
    for name, tensor in tensors.items():
        for pattern, new in rows:
            match = pattern.search(name)
            if match and match.groups():
                n = int(match[1])
                down, up = divmod(n - 1, per_level), divmod(n, per_level)
                new = new.format(n=n, down=down, up=up, reversed=finest - n)
            if match:
                name = name[: match.start()] + new + name[match.end() :]
        if part == "vae" and ".attentions." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # (c, c, 1, 1), a convolution, -> (c, c)
        if name == "text_projection.weight" and "model.text_projection" in tensors:
            tensor = tensor.T
        if ".in_proj_" in name and tensor.ndim:  # OpenCLIP's q, k and v in one: (3 D, D) or (3 D,)
            for letter, third in zip("qkv", tensor.chunk(3)):
                out[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            out[name] = tensor
    return out


def find_numbers(pattern, names):
    """The number in each of the names that begin with the pattern."""
    matches = [re.match(pattern, name) for name in names]
    return [int(match[1]) for match in matches if match]


def split_parts(path, tensors, prefixes, what, ignored=IGNORED):
    """The tensors of a file, by {part: what their names begin with} -> {part: {the rest of the name: tensor}}

    path and what, the kind of file, are for the errors: ValueError if a part is not there, or for a network beside
    the UNet. A warning if the file holds more, as training programs leave it.
    """
    names = [name for name in tensors if not ignored.fullmatch(name)]
    parts = {}
    for part, prefix in prefixes.items():
        parts[part] = {name.removeprefix(prefix): tensors[name] for name in names if name.startswith(prefix)}

    absent = [f"{prefixes[part]}*" for part, found in parts.items() if not found]
    if absent:
        other = "; sample.py --vae names another autoencoder" if absent == [f"{PREFIX['vae']}*"] else ""
        raise ValueError(f"{path} is not a whole {what} checkpoint: it has no tensors {' or '.join(absent)}; its first "
                         f"is {next(iter(tensors))}{other}")
    unknown = [name for name in names if not name.startswith(tuple(prefixes.values()))]
    if networks := [name for name in unknown if name.startswith("model.")]:
        raise ValueError(f"{path}: {len(networks)} unexpected tensors, e.g. {networks[0]:.200}")
    if unknown:
        warnings.warn(f"{path}: {len(unknown)} tensors are of no part of the model and left out, e.g. "
                      f"{', '.join(unknown[:3]):.200}", stacklevel=2)
    return parts


def list_prefixes(names):
    """{part: what its tensors' names begin with} in the original layout: of SD 1 and 2, or XL's."""
    if not any(name.startswith("conditioner.") for name in names):
        return PREFIX
    both = any(name.startswith(XL_TEXT["text_encoder_2"]) for name in names)
    networks = {part: PREFIX[part] for part in ("unet", "vae")}
    return networks | (XL_TEXT if both else REFINER_TEXT)


def split_stable_diffusion(path, tensors):
    """The tensors of a file in the original layout
      -> {part: {Hugging Face name: tensor}}, and whether the text encoder of an SD 1 or 2 is
         OpenCLIP. An XL has a part 'text_encoder_2'; its base has a 'text_encoder' as well
    """
    parts = split_parts(path, tensors, list_prefixes(tensors), "Stable Diffusion")
    parts = {part: translate(part, found) for part, found in parts.items()}
    if any(name.startswith("model_ema.diffusion_model") for name in tensors):
        warnings.warn(f"{path} holds a moving average of the UNet as well, model_ema.*: it is not read", stacklevel=2)

    # SD 2 reads OpenCLIP's penultimate layer. Hugging Face's folder stores one layer less, and so
    # do we. A file that was converted from such a folder has no more: 23, and no projection.
    openclip = "cond_stage_model.model.ln_final.weight" in tensors
    if openclip:
        text = parts["text_encoder"]
        layers = sum(name.endswith(".layer_norm1.weight") for name in text)
        if layers == 24 or "cond_stage_model.model.text_projection" in tensors:
            last = f".encoder.layers.{layers - 1}."
            parts["text_encoder"] = {n: text[n] for n in text if last not in n}
    return parts, openclip
