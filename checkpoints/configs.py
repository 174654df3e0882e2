"""Configurations of networks: read off shapes, read from config.json, written to config.json.

A Hugging Face folder has a config.json beside each part's weights, a single file has none. So there
are three functions for each of UNet, VAE and text encoder:

    unet_config_from_shapes({name: shape})   names are Hugging Face's, of that part alone
    unet_config_from_json(c)                 the content of diffusers' config.json
    unet_config_to_json(config)              the same, for diffusers to open weights that we write

Reading raises KeyError where a size is missing, ValueError where the network is not one of ours.
What our names of sizes are called there, a table says for both ways: UNET_KEYS, VAE_KEYS, TEXT_KEYS.
"""

import math

from clip import TextConfig
from diffusion import BETAS, LCM_TIMESTEPS, Schedule, T
from unet import UNetConfig
from vae import VAEConfig


def read_sizes(c, keys):
    """{our name: what a config.json says of it}, by {our name: the name there}"""
    return {ours: c[theirs] for ours, theirs in keys.items()}


def write_sizes(config, keys):
    return {theirs: getattr(config, ours) for ours, theirs in keys.items()}


def count_modules(shapes, prefix):
    """How many modules are in a list: down_blocks.0.x and down_blocks.1.y show 2 'down_blocks.'"""
    rest = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
    return len({name.split(".")[0] for name in rest})


def read_widths(shapes, prefix):
    """The width of each level, from the full resolution down, of its first residual block."""
    levels = range(max(1, count_modules(shapes, prefix)))  # of none, the first is missing
    return tuple(shapes[f"{prefix}{level}.resnets.0.conv1.weight"][0] for level in levels)


def guess_groups(channels):
    """Shapes do not say how many groups a GroupNorm has: 32, as published, where that divides."""
    return 32 if all(c % 32 == 0 for c in channels) else 8


def read_number(value):
    """A whole number as a float; anything else as it is, for `check_sizes` to look at"""
    return float(value) if type(value) is int and abs(value) < 2**31 else value


def read_side(c, default):
    """The sample_size of a config.json: pixels, or latent pixels. diffusers also writes two sides.

    ValueError where it says something else than a number.
    """
    side = c.get("sample_size") or default
    if isinstance(side, list):
        side = side[0]
    if not (type(side) is int and 1 <= side <= 2**16):
        raise ValueError(f"its sample_size is a number of pixels, not {show(side)}")
    return side


def refuse_other_options(c, options):
    """ValueError if a config.json sets an option to another value than our network has built in."""
    for option, value in options.items():
        if c.get(option, value) != value and (c[option] or value):  # false is as good as null
            said = f"its config.json has {option} = {show(c[option])}"
            raise ValueError(f"{said}; only {value!r} is implemented")


def show(value):
    """What a file says in place of something else, for an error: short, whatever it is."""
    inner = value[:9] if isinstance(value, list) else [value]
    nested = any(isinstance(x, (list, dict)) for x in inner)
    return f"a {type(value).__name__}" if nested else f"{value!r:.60}"


MAY_BE_ZERO = "depth", "context", "added", "skip_last", "eos"
NO_SIZES = "activation", "linear_proj", "final_norm", "attention", "text", "noised", "self_attention"


def check_sizes(config, tensors):
    """ValueError for sizes that no network has, or for more blocks than these tensors could fill.

    What a file says is checked before it is built. The names are those of our configurations.
    """
    for name, value in vars(config).items():
        if name in NO_SIZES:
            continue
        if name in ("scaling_factor", "scale"):
            if not (isinstance(value, float) and 1e-4 < value < 1e4):
                raise ValueError(f"its {name} should be a number about 1, not {show(value)}")
            continue
        least = 0 if name in MAY_BE_ZERO else 1
        for size in value if isinstance(value, tuple) else (value,):
            if size is not None and not (type(size) is int and least <= size < 2**31):
                raise ValueError(f"its {name} should be a whole number, {least} or more, not "
                                 f"{show(size)}")

    depth = getattr(config, "depth", (0,))
    levels = len(getattr(config, "channels", (0,)))
    layers = sum(config.layers) if isinstance(config.layers, tuple) else levels * config.layers
    blocks = layers * (1 + max(depth)) + getattr(config, "mid_depth", 0)
    if blocks > len(tensors):
        raise ValueError(f"{blocks} blocks are more than its {len(tensors)} tensors are for")

    # Heads share a width evenly. (A text encoder looks at that itself.)
    if hasattr(config, "heads_at"):
        for width, transformers in zip(config.channels, (*depth[:-1], config.mid_depth)):
            heads = config.heads_at(width)
            if transformers and (heads < 1 or width % heads):
                raise ValueError(f"{heads} attention heads do not share a width of {width}")


# --------------------------------------------------------------------------------------------------
# UNet: config.json of diffusers' UNet2DConditionModel
#
# Its attention_head_dim is, by an old mistake that every checkpoint relies on, the *number* of
# heads: 8 in SD 1; in SD 2 and XL a list of numbers, which makes all heads equally wide.

UNET_KEYS = {
    "in_channels": "in_channels", "out_channels": "out_channels", "channels": "block_out_channels",
    "layers": "layers_per_block", "context": "cross_attention_dim", "linear_proj": "use_linear_projection",
    "groups": "norm_num_groups",
}
DOWN_BLOCKS = "DownBlock2D", "CrossAttnDownBlock2D"  # a level without, with transformers
UP_BLOCKS = "UpBlock2D", "CrossAttnUpBlock2D"

UNET_OPTIONS = {  # options of that class which published Stable Diffusions leave at these values
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": 1e-5, "dropout": 0.0,
    "downsample_padding": 1, "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
    "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1,
    "mid_block_only_cross_attention": None, "only_cross_attention": False,
    "dual_cross_attention": False, "class_embed_type": None, "num_class_embeds": None,
    "encoder_hid_dim": None, "flip_sin_to_cos": True, "freq_shift": 0,
    "time_embedding_type": "positional", "time_embedding_dim": None,
    "resnet_time_scale_shift": "default", "center_input_sample": False,
}


def unet_config_from_shapes(shapes):
    """{name: shape} -> UNetConfig.

    Heads cannot be read off shapes: SD 1 projects tokens by a convolution and has 8 heads, its
    successors project by a linear layer and have heads of 64.
    """
    channels = read_widths(shapes, "down_blocks.")
    middle = "mid_block.attentions.0."
    linear = len(shapes[middle + "proj_in.weight"]) == 2
    depth = tuple(
        count_modules(shapes, f"down_blocks.{level}.attentions.0.transformer_blocks.")
        for level in range(len(channels))
    )
    # No second attention: width 0. No vector of XL's: likewise.
    keys = shapes.get(middle + "transformer_blocks.0.attn2.to_k.weight", (0, 0))
    added = shapes.get("add_embedding.linear_1.weight", (0, 0))
    return UNetConfig(
        in_channels=shapes["conv_in.weight"][1],
        out_channels=shapes["conv_out.weight"][0],
        channels=channels,
        layers=count_modules(shapes, "down_blocks.0.resnets."),
        depth=depth,
        mid_depth=count_modules(shapes, middle + "transformer_blocks."),
        heads=None if linear else 8,
        head_width=64 if linear else None,
        context=keys[1],
        linear_proj=linear,
        groups=guess_groups(channels),
        added=added[1],
    )


def unet_config_from_json(c):
    """The content of a config.json -> UNetConfig."""
    sizes = read_sizes({"use_linear_projection": False, "norm_num_groups": 32} | c, UNET_KEYS)
    channels = sizes["channels"] = tuple(sizes["channels"])
    cross = ["CrossAttn" in kind for kind in c["down_block_types"]]  # levels that have transformers
    added = c.get("addition_embed_type")
    refuse_other_options(c, UNET_OPTIONS | {
        "down_block_types": [DOWN_BLOCKS[x] for x in cross],
        "up_block_types": [UP_BLOCKS[x] for x in reversed(cross)],
        "addition_embed_type": added and "text_time",
    })

    # Depth and heads are a number for all levels, or a list of one per level.
    depth = list_per_level(c.get("transformer_layers_per_block", 1), channels)
    heads = list_per_level(c.get("num_attention_heads") or c.get("attention_head_dim", 8), channels)
    head_widths = {width // n for width, n in zip(channels, heads)}
    same_number = len(set(heads)) == 1
    if not same_number and len(head_widths) > 1:
        said = f"its config.json has {tuple(heads)} attention heads"
        raise ValueError(f"{said}; only an equal number or width is implemented")

    return UNetConfig(
        **sizes,
        depth=tuple(d if x else 0 for d, x in zip(depth, cross)),
        mid_depth=depth[-1],
        heads=heads[0] if same_number else None,
        head_width=None if same_number else head_widths.pop(),
        added=c["projection_class_embeddings_input_dim"] if added else 0,
        size_width=c.get("addition_time_embed_dim") or 256,
    )


def list_per_level(value, channels):
    return value if isinstance(value, list) else [value] * len(channels)


def unet_config_to_json(config):
    """UNetConfig -> the content of a config.json."""
    # A level without transformers needs a depth all the same: any number does.
    depth = [d or 1 for d in config.depth[:-1]] + [config.mid_depth]
    c = write_sizes(config, UNET_KEYS) | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": [DOWN_BLOCKS[d > 0] for d in config.depth],
        "up_block_types": [UP_BLOCKS[d > 0] for d in reversed(config.depth)],
        "transformer_layers_per_block": depth if len(set(depth)) > 1 else depth[0],
        "attention_head_dim": config.heads or [config.heads_at(width) for width in config.channels],
    }
    if config.added:  # XL: the pooled text, and sizes as embeddings
        c["addition_embed_type"] = "text_time"
        c["addition_time_embed_dim"] = config.size_width
        c["projection_class_embeddings_input_dim"] = config.added
    return c


# --------------------------------------------------------------------------------------------------
# VAE: config.json of diffusers' AutoencoderKL

VAE_KEYS = {
    "channels": "block_out_channels", "layers": "layers_per_block", "latent_channels": "latent_channels",
    "groups": "norm_num_groups", "scaling_factor": "scaling_factor",
}
VAE_OPTIONS = {  # likewise
    "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
    "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
    "shift_factor": None, "latents_mean": None, "latents_std": None,
}


def vae_config_from_shapes(shapes):
    """{name: shape} -> VAEConfig. `scaling_factor` and `size` are no shapes: Stable Diffusion's."""
    channels = read_widths(shapes, "encoder.down_blocks.")
    return VAEConfig(
        channels=channels,
        layers=count_modules(shapes, "encoder.down_blocks.0.resnets."),
        latent_channels=shapes["post_quant_conv.weight"][0],
        groups=guess_groups(channels),
    )


def vae_config_from_json(c):
    """The content of a config.json -> VAEConfig."""
    levels = len(c["block_out_channels"])
    refuse_other_options(c, VAE_OPTIONS | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    })
    # Older files lack the scaling factor.
    sizes = read_sizes({"norm_num_groups": 32, "scaling_factor": 0.18215} | c, VAE_KEYS)
    sizes["channels"] = tuple(sizes["channels"])
    sizes["scaling_factor"] = read_number(sizes["scaling_factor"])
    return VAEConfig(**sizes, size=read_side(c, 512))


def vae_config_to_json(config):
    """VAEConfig -> the content of a config.json."""
    levels = len(config.channels)
    return write_sizes(config, VAE_KEYS) | {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": config.size,
    }


# --------------------------------------------------------------------------------------------------
# Text encoder: config.json of transformers' CLIPTextModel and CLIPTextModelWithProjection
#
# Which layer the diffusion model reads (`skip_last`, `final_norm`) is in neither shapes nor
# config.json: SD 2 stores 23 of ViT-H's 24 layers instead.


TEXT_KEYS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "length": "max_position_embeddings", "mlp_width": "intermediate_size", "activation": "hidden_act",
}


def text_config_from_shapes(shapes):
    """{name: shape} -> TextConfig. ValueError if the tensors are no CLIP text encoder.

    Heads are 64 wide, and width 768 means quick_gelu, as in every released Stable Diffusion.
    """
    try:
        vocab_size, width = shapes["text_model.embeddings.token_embedding.weight"]
        length = shapes["text_model.embeddings.position_embedding.weight"][0]
        mlp_width = shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as missing:
        raise ValueError(f"these tensors are no CLIP text encoder: there is no {missing}") from None
    return TextConfig(
        vocab_size=vocab_size,
        width=width,
        layers=count_modules(shapes, "text_model.encoder.layers."),
        heads=max(1, width // 64),
        length=length,
        mlp_width=mlp_width,
        activation="quick_gelu" if width == 768 else "gelu",
        eos=find_end_token(vocab_size),
        projection=shapes.get("text_projection.weight", (None,))[0],
    )


def text_config_from_json(c):
    """The content of a config.json -> TextConfig."""
    eos = c.get("eos_token_id")
    if eos in (None, 2):  # files from before 2023 say 2, which no CLIP vocabulary ever meant
        eos = find_end_token(c["vocab_size"])
    sizes = read_sizes({"max_position_embeddings": 77, "hidden_act": "quick_gelu"} | c, TEXT_KEYS)
    projected = "CLIPTextModelWithProjection" in (c.get("architectures") or [])
    return TextConfig(**sizes, eos=eos, projection=c["projection_dim"] if projected else None)


def find_end_token(vocab_size):
    """CLIP's last token. Learned words (textual inversion) stand behind CLIP's own 49408."""
    return min(vocab_size, 49408) - 1


def text_config_to_json(config):
    """TextConfig -> the content of a config.json. It describes every stored layer."""
    return write_sizes(config, TEXT_KEYS) | {
        "architectures": ["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": config.projection or config.width,
        "bos_token_id": config.eos - 1,
        "eos_token_id": config.eos,
        "pad_token_id": config.eos,
    }


# --------------------------------------------------------------------------------------------------
# Noise schedule: scheduler_config.json of any of diffusers' schedulers


def schedule_from_json(c, prediction=None):
    """The content of a scheduler_config.json -> Schedule; `prediction` wins over what it says.

    ValueError for a noise schedule that is none of BETAS, and other timesteps than SPACINGS.
    """
    refuse_other_options(c, {"original_inference_steps": LCM_TIMESTEPS})
    spacing = c.get("timestep_spacing", "leading")
    if c.get("_class_name") == "LCMScheduler":
        spacing = "lcm"  # whatever its entry says: it has no other
    name = c.get("beta_schedule", "linear")
    if not isinstance(name, str):
        raise ValueError(f"beta_schedule should be a name, not {show(name)}")
    if name == "linear" and c.get("beta_start") == 0.00085:
        name = "linear_sd"
    if name in BETAS and name != "squaredcos_cap_v2":  # which is a formula, and has no ends to choose
        for key, beta in (("beta_start", BETAS[name][0]), ("beta_end", BETAS[name][-1])):
            said = c.get(key, float(beta))
            if not (isinstance(said, float) and abs(said - beta) <= 1e-6):
                raise ValueError(f"a {name!r} noise schedule with {key} = {show(said)} is not "
                                 "implemented")
    if c.get("rescale_betas_zero_snr") and name != "zero_snr":
        if name != "scaled_linear":
            raise ValueError(f"a {name!r} noise schedule rescaled to no signal at all is not implemented")
        name = "zero_snr"
    if c.get("num_train_timesteps", T) != T or c.get("trained_betas"):
        raise ValueError("a noise schedule of other than 1000 steps, or with betas of its own, is "
                         "not implemented")
    prediction = prediction or c.get("prediction_type", "epsilon")
    if prediction == "sample":
        raise ValueError("no Stable Diffusion predicts the sample: only epsilon and v_prediction are implemented")
    return Schedule(name, prediction, spacing, c.get("steps_offset", 1), threshold=read_threshold(c))


def read_threshold(c):
    """`Schedule.threshold` by a scheduler_config.json; None: it limits nothing"""
    if not c.get("thresholding"):
        return None
    ratio = read_number(c.get("dynamic_thresholding_ratio", 0.995))
    most = c.get("sample_max_value", 1.0)
    most = math.inf if most is None else read_number(most)
    if not (isinstance(ratio, float) and 0 <= ratio <= 1 and isinstance(most, float) and most >= 1):
        raise ValueError(f"dynamic thresholding at a ratio of {show(ratio)}, up to {show(most)}, is not implemented")
    return ratio, most


def schedule_to_json(schedule):
    """Schedule -> the content of a scheduler_config.json: DDIM, as Stable Diffusion runs it.

    It ends at the first noise level. Of a schedule for LCM the class has to be LCMScheduler.
    """
    rescaled = schedule.name == "zero_snr"
    name = {"zero_snr": "scaled_linear", "linear_sd": "linear"}.get(schedule.name, schedule.name)
    betas = BETAS[name if rescaled else schedule.name]
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": T,
        "beta_schedule": name,
        **({"rescale_betas_zero_snr": True} if rescaled else {}),
        "beta_start": round(float(betas[0]), 8),
        "beta_end": round(float(betas[-1]), 8),
        "prediction_type": schedule.prediction,
        "steps_offset": schedule.offset,
        "timestep_spacing": schedule.spacing.replace("lcm", "leading"),
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
