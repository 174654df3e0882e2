"""What a UNet of unet.py is built from: its configuration, the table of the published ones, and where another is read.

A configuration is read off the tensors' shapes, or from the config.json that stands beside them, and is written as one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4  # 9 for inpainting: latent, mask, latent of the masked image
    out_channels: int = 4
    channels: tuple = (320, 640, 1280, 1280)  # per level, from the full resolution down
    layers: int = 2  # residual blocks per level on the way down; one more on the way up
    depth: tuple = (1, 1, 1, 0)  # transformer blocks after each residual block, per level; 0 = none
    mid_depth: int = 1  # the same at the bottom
    heads: int | None = 8  # attention heads, the same at every width (SD 1) ...
    head_width: int | None = None  # ... or as many heads of this width as fit (SD 2, XL)
    # What the second attention reads: states of this width D, a text encoder's; None: features as wide as the block
    # itself, from another UNet; 0: nothing, there is no second attention.
    context: int | None = 768
    linear_proj: bool = False  # tokens are projected by a linear layer (SD 2, XL) or by a 1x1 convolution (SD 1)
    groups: int = 32  # of every GroupNorm
    added: int = 0  # width of XL's vector of pooled text and picture sizes, joined to the time embedding; 0 = none

    def heads_at(self, width):
        return self.heads or width // self.head_width


SD2 = dict(heads=None, head_width=64, context=1024, linear_proj=True)
XL = dict(heads=None, head_width=64, linear_proj=True)
CONFIGS = {
    "sd1": UNetConfig(),
    "sd1-inpainting": UNetConfig(in_channels=9),
    "sd2": UNetConfig(**SD2),  # both 512-base, which predicts the noise, and 768-v
    "sd2-inpainting": UNetConfig(**SD2, in_channels=9),
    "sdxl": UNetConfig(**XL, channels=(320, 640, 1280), depth=(0, 2, 10), mid_depth=10, context=2048, added=2816),
    "sdxl-refiner": UNetConfig(
        **XL, channels=(384, 768, 1536, 1536), depth=(0, 4, 4, 0), mid_depth=4, context=1280, added=2560
    ),
    "toy": UNetConfig(
        in_channels=12, out_channels=12, channels=(64, 128), layers=1, depth=(1, 1), heads=4, context=128
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# From the tensors


def config_from_shapes(shapes):
    """Read the configuration off the tensors. shapes: {Hugging Face key: shape}, of the UNet alone.

    Heads cannot be read off shapes: SD 1 projects tokens by a convolution and has 8 heads, its successors project by a
    linear layer and have heads of 64. A config.json wins where there is one.
    """

    def depth(prefix):
        prefix += ".transformer_blocks."
        return len({k.removeprefix(prefix).split(".")[0] for k in shapes if k.startswith(prefix)})

    levels = 1 + max(int(k.split(".")[1]) for k in shapes if k.startswith("down_blocks."))
    mid = "mid_block.attentions.0"
    linear = len(shapes[f"{mid}.proj_in.weight"]) == 2
    channels = tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels))
    return UNetConfig(
        in_channels=shapes["conv_in.weight"][1],
        out_channels=shapes["conv_out.weight"][0],
        channels=channels,
        layers=len({k.split(".")[3] for k in shapes if k.startswith("down_blocks.0.resnets.")}),
        depth=tuple(depth(f"down_blocks.{i}.attentions.0") for i in range(levels)),
        mid_depth=depth(mid),
        heads=None if linear else 8,
        head_width=64 if linear else None,
        context=shapes.get(f"{mid}.transformer_blocks.0.attn2.to_k.weight", (0, 0))[1],
        linear_proj=linear,
        groups=32 if all(c % 32 == 0 for c in channels) else 8,
        added=shapes["add_embedding.linear_1.weight"][1] if "add_embedding.linear_1.weight" in shapes else 0,
    )


# ---------------------------------------------------------------------------------------------------------------------
# config.json of diffusers' UNet2DConditionModel. Its attention_head_dim is, by an old mistake that every checkpoint
# relies on, the *number* of heads: 8 in SD 1; in SD 2 and XL a list of numbers, which makes all heads equally wide.

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")  # without, with transformers
FIXED = {  # options of that class which the published Stable Diffusions leave at these values, and unet.py has not
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": 1e-5, "downsample_padding": 1, "dropout": 0.0,
    "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "dual_cross_attention": False,
    "mid_block_only_cross_attention": None, "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_cond_proj_dim": None,
    "resnet_time_scale_shift": "default", "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
}


def config_from_json(c):
    """The content of a config.json -> UNetConfig. KeyError if a size is missing, ValueError for what we do not have."""
    c = {"addition_embed_type": None} | c
    cross = ["CrossAttn" in kind for kind in c["down_block_types"]]
    must = FIXED | {
        "down_block_types": [DOWN[x] for x in cross], "up_block_types": [UP[x] for x in reversed(cross)],
        "addition_embed_type": c["addition_embed_type"] and "text_time",
    }
    for option, value in must.items():
        if c.get(option, value) != value and (c[option] or value):  # false is as good as null
            raise ValueError(f"its config.json has {option} = {c[option]!r}; only {value!r} is implemented")
    channels = tuple(c["block_out_channels"])

    def per_level(value):
        return tuple(value) if isinstance(value, list) else (value,) * len(channels)

    depth = per_level(c.get("transformer_layers_per_block", 1))
    heads = per_level(c.get("num_attention_heads") or c.get("attention_head_dim", 8))
    widths = {width // n for width, n in zip(channels, heads)}
    if len(set(heads)) > 1 and len(widths) > 1:
        raise ValueError(f"its config.json has {heads} attention heads; only an equal number or width is implemented")
    same = len(set(heads)) == 1
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        channels=channels,
        layers=c["layers_per_block"],
        depth=tuple(d if x else 0 for d, x in zip(depth, cross)),
        mid_depth=depth[-1],
        heads=heads[0] if same else None,
        head_width=None if same else widths.pop(),
        context=c["cross_attention_dim"],
        linear_proj=c.get("use_linear_projection", False),
        groups=c.get("norm_num_groups", 32),
        added=c["projection_class_embeddings_input_dim"] if c["addition_embed_type"] else 0,
    )


def config_to_json(config):
    """UNetConfig -> the content of a config.json with which diffusers opens these weights."""
    c = config
    depth = [d or 1 for d in c.depth[:-1]] + [c.mid_depth]  # where there are no transformers, any number will do
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "block_out_channels": c.channels,
        "layers_per_block": c.layers,
        "down_block_types": [DOWN[d > 0] for d in c.depth],
        "up_block_types": [UP[d > 0] for d in reversed(c.depth)],
        "transformer_layers_per_block": depth if len(set(depth)) > 1 else depth[0],
        "attention_head_dim": c.heads or [c.heads_at(width) for width in c.channels],
        "cross_attention_dim": c.context,
        "use_linear_projection": c.linear_proj,
        "norm_num_groups": c.groups,
        **({"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": c.added} if c.added else {}),
    }
