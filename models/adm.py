"""The UNet of Kandinsky 2.2 and of both stages of DeepFloyd IF. It is guided diffusion's (ADM, Dhariwal & Nichol 2021,
arXiv 2105.05233), with a text or picture to look at (GLIDE, 2112.10741), and Imagen's super-resolution (2205.11487).

    z (B, C, h, w), t (B,), states  -->  (B, 2 C', h, w)     the predicted noise, and how random the step is

`states` are a T5's (B, L, 4096) in IF, and a CLIP image embedding (B, 1280) in Kandinsky. Attribute names are Hugging
Face's key names. What is other than in unet.py:

    time        scales and shifts the second norm of a residual block
    resolution  residual blocks change it, in both of their ways
    attention   pixels look at the context and at each other in one softmax. No feed-forward layers follow
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoints.configs import list_per_level, read_number, refuse_other_options
from unet import Embedding, UNet, timestep_embedding

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
TOKENS = 32  # that Kandinsky makes of an image embedding


@dataclass(frozen=True)
class ADMConfig:
    """The defaults are Kandinsky 2.2's."""

    in_channels: int = 4  # IF: 3; its super-resolution: 6, with the small picture beside z
    out_channels: int = 8
    channels: tuple = (384, 768, 1152, 1536)  # per level, from the full resolution down
    layers: tuple = (3, 3, 3, 3)  # residual blocks per level on the way down; one more on the way up
    attention: tuple = (False, True, True, True)
    head_width: int = 64
    states: int = 1280  # width of what it is conditioned on
    context: int = 768  # and of the tokens that this becomes
    text: bool = False  # the states are a text's, and are pooled by attention; else an image embedding
    pool_heads: int = 64
    activation: str = "silu"  # IF: gelu
    time_width: int = 1536
    noised: bool = False  # super-resolution is told how much noise is in its small picture
    self_attention: bool = True  # False: pixels look at the text alone
    scale: float = 1.0  # what the sum at the end of a residual block is divided by
    groups: int = 32  # of every GroupNorm but that of the context


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


class TextVector(nn.Module):
    """A text's states (B, L, c_in) -> (B, c_out), which is added to the time: what their mean finds among them"""

    def __init__(self, c_in, c_out, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(c_in)
        self.pool = nn.ModuleDict({name: nn.Linear(c_in, c_in) for name in ("k_proj", "q_proj", "v_proj")})
        self.pool.positional_embedding = nn.Parameter(torch.zeros(1, c_in))
        self.proj = nn.Linear(c_in, c_out)
        self.norm2 = nn.LayerNorm(c_out)

    def forward(self, x):
        x = self.norm1(x)
        mean = x.mean(1, keepdim=True) + self.pool.positional_embedding
        x = torch.cat([mean, x], dim=1)
        qkv = self.pool.q_proj(mean), self.pool.k_proj(x), self.pool.v_proj(x)
        pooled = F.scaled_dot_product_attention(*(split_heads(y, self.heads) for y in qkv))  # (B, heads, 1, d)
        return self.norm2(self.proj(pooled.flatten(1)))


class ResnetBlock(nn.Module):
    """Two convolutions and a skip. Between them the time scales and shifts."""

    index = None  # its place among the network's blocks, which ADM gives it

    def __init__(self, c_in, c_out, cfg, resize=None):
        super().__init__()
        self.activation = ACTIVATIONS[cfg.activation]
        self.scale = cfg.scale
        self.resize = resize  # "down": half the side; "up": the side of the feature map that comes next; None
        self.norm1 = nn.GroupNorm(cfg.groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(cfg.time_width, 2 * c_out)  # `ADM.embed_time` calls it
        self.norm2 = nn.GroupNorm(cfg.groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time, size=None):
        """x (B, c_in, h, w), time (B or 1, 2 c_out), size (height, width) on the way up -> (B, c_out, .., ..)"""
        h = self.activation(self.norm1(x))
        if self.resize == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resize == "up":
            x, h = F.interpolate(x, size=size, mode="nearest"), F.interpolate(h, size=size, mode="nearest")
        scale, shift = time[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(h)) * (1 + scale) + shift
        h = self.conv2(self.activation(h))
        return (h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)) / self.scale


def split_heads(x, heads):
    """(B, L, heads * d) -> (B, heads, L, d)"""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Pixels look at the context and, in the same softmax, at each other, as a residual."""

    index = None  # its entry of `keys_values`, numbered by ADM

    def __init__(self, width, cfg):
        super().__init__()
        self.heads = width // cfg.head_width
        self.group_norm = nn.GroupNorm(cfg.groups, width, eps=1e-5)
        if cfg.text:
            self.norm_cross = nn.GroupNorm(32, cfg.context, eps=1e-5)  # each group over all tokens
        self.to_q = nn.Linear(width, width)
        if cfg.self_attention:
            self.to_k = nn.Linear(width, width)
            self.to_v = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(cfg.context, width)
        self.add_v_proj = nn.Linear(cfg.context, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def keys_values(self, context):
        """context (B, L, D) -> keys, values (B, heads, L, d)"""
        if hasattr(self, "norm_cross"):
            context = self.norm_cross(context.mT).mT
        return split_heads(self.add_k_proj(context), self.heads), split_heads(self.add_v_proj(context), self.heads)

    def forward(self, x, keys_values):
        """x (B, width, h, w) -> (B, width, h, w)"""
        h = self.group_norm(x).flatten(2).mT  # (B, h w, width)
        keys, values = keys_values
        if hasattr(self, "to_k"):
            keys = torch.cat([keys, split_heads(self.to_k(h), self.heads)], dim=2)
            values = torch.cat([values, split_heads(self.to_v(h), self.heads)], dim=2)
        out = F.scaled_dot_product_attention(split_heads(self.to_q(h), self.heads), keys, values)
        return x + self.to_out[0](out.transpose(1, 2).flatten(2)).mT.reshape(x.shape)


class Level(nn.Module):
    """Residual blocks at one resolution, with an attention behind each, or none; and a step to the next resolution.

    The middle has no step, and no attention behind its last block.
    """

    def __init__(self, widths_in, width, cfg, attentions, step=None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, width, cfg) for c in widths_in)
        if attentions:
            self.attentions = nn.ModuleList(Attention(width, cfg) for _ in range(attentions))
        if step:
            setattr(self, f"{step}samplers", nn.ModuleList([ResnetBlock(width, width, cfg, step)]))

    def apply_block(self, i, x, times, keys_values):
        x = self.resnets[i](x, times[self.resnets[i].index])
        if i < len(getattr(self, "attentions", ())):
            x = self.attentions[i](x, keys_values[self.attentions[i].index])
        return x


# ----------------------------------------------------------------------------------------------------------------------
# The network


class ADM(nn.Module):
    """The network for an `ADMConfig`."""

    times_of = UNet.times_of

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        ch = cfg.channels
        self.activation = ACTIVATIONS[cfg.activation]
        self.conv_in = nn.Conv2d(cfg.in_channels, ch[0], 3, padding=1)
        self.time_embedding = Embedding(ch[0], cfg.time_width, self.activation)
        if cfg.noised:
            self.class_embedding = Embedding(ch[0], cfg.time_width, self.activation)
        if cfg.text:
            self.encoder_hid_proj = nn.Linear(cfg.states, cfg.context)
            self.add_embedding = TextVector(cfg.states, cfg.time_width, cfg.pool_heads)
        else:
            tokens, vector = nn.Linear(cfg.states, TOKENS * cfg.context), nn.Linear(cfg.states, cfg.time_width)
            self.encoder_hid_proj = nn.ModuleDict({"image_embeds": tokens, "norm": nn.LayerNorm(cfg.context)})
            self.add_embedding = nn.ModuleDict({"image_proj": vector, "image_norm": nn.LayerNorm(cfg.time_width)})

        # `skips` are the widths of the feature maps that the way up takes back, as in unet.py.
        skips = [ch[0]]
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(ch):
            layers, step = cfg.layers[i], "down" if i < len(ch) - 1 else None
            widths_in = [skips[-1]] + [width] * (layers - 1)
            self.down_blocks.append(Level(widths_in, width, cfg, layers * cfg.attention[i], step))
            skips += [width] * (layers + bool(step))

        self.mid_block = Level([ch[-1]] * 2, ch[-1], cfg, attentions=1)

        below = ch[-1]
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(ch))):
            widths_in = []
            for _ in range(cfg.layers[i] + 1):
                widths_in.append(below + skips.pop())
                below = ch[i]
            step = "up" if i else None
            self.up_blocks.append(Level(widths_in, ch[i], cfg, len(widths_in) * cfg.attention[i], step))

        self.conv_norm_out = nn.GroupNorm(cfg.groups, ch[0], eps=1e-5)
        self.conv_out = nn.Conv2d(ch[0], cfg.out_channels, 3, padding=1)
        for kind in (ResnetBlock, Attention):
            for index, block in enumerate(self.list_blocks(kind)):
                block.index = index

    def list_blocks(self, kind):
        return [m for m in self.modules() if isinstance(m, kind)]

    def condition(self, states, noise_level=None):
        """What does not change over the steps.

        states       (B, L, config.states) of a text, or (B, config.states) of a picture
        noise_level  (B,) as timesteps, of the small picture of a super-resolution
          ->         keys_values, a pair for each attention; added (B, config.time_width)
        """
        tokens, vector = self.encoder_hid_proj, self.add_embedding
        if self.config.text:
            context = tokens(states)
            added = vector(states)
        else:
            context = tokens.norm(tokens.image_embeds(states).unflatten(1, (TOKENS, -1)))
            added = vector.image_norm(vector.image_proj(states))
        if self.config.noised:
            level = timestep_embedding(noise_level, self.config.channels[0])
            added = added + self.class_embedding(level.to(added))
        return [attention.keys_values(context) for attention in self.list_blocks(Attention)], added

    def embed_time(self, t, added):
        """t (B or 1,), added (B, time_width) -> [(B, 2 c_out)]: what scales and shifts in each residual block"""
        time = timestep_embedding(t, self.config.channels[0]).to(self.conv_in.weight)
        time = self.activation(self.time_embedding(time) + added)
        return [resnet.time_emb_proj(time) for resnet in self.list_blocks(ResnetBlock)]

    def forward(self, z, t, keys_values, added):
        """One denoising step.

        z                   (B, in_channels, h, w), any h and w
        t                   (B,) timesteps, 0 .. 999, or what `embed_time` makes of them
        keys_values, added  of `condition`
          ->                (B, out_channels, h, w)
        """
        times = self.embed_time(t, added) if torch.is_tensor(t) else t
        x = self.conv_in(z)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.apply_block(i, x, times, keys_values)
                skips.append(x)
            for step in getattr(level, "downsamplers", ()):
                x = step(x, times[step.index])
                skips.append(x)
        for i in range(2):
            x = self.mid_block.apply_block(i, x, times, keys_values)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.apply_block(i, torch.cat([x, skips.pop()], dim=1), times, keys_values)
            for step in getattr(level, "upsamplers", ()):
                x = step(x, times[step.index], skips[-1].shape[-2:])
        return self.conv_out(self.activation(self.conv_norm_out(x)))


def make_denoiser(unet, states, guidance, timesteps=(), beside=None, noise_level=None):
    """What samplers and Algorithm 1 call: (z, t) -> guided noise and variance (B, 2 C', h, w), t (B,) all equal.

    states       for `ADM.condition`: of B prompts; for a guidance other than 1, of B negative ones and B prompts
    guidance     w of classifier-free guidance, which goes for the noise. The variance is the prompt's
    timesteps    a sampler's, made ready here
    beside       (B, C'', h, w), put beside z at every step
    noise_level  of `beside`, a timestep
    """
    level = None if noise_level is None else torch.full((len(states),), noise_level, device=states.device)
    keys_values, added = unet.condition(states.to(unet.conv_in.weight), level)
    times = unet.times_of(timesteps, added)

    def denoise(z, t):
        x = z if beside is None else torch.cat([z, beside.to(z).expand(len(z), -1, -1, -1)], dim=1)
        if guidance == 1:
            return unet(x.to(added.dtype), times(t), keys_values, added)
        x, t = torch.cat([x, x]), torch.cat([t, t])
        output = unet(x.to(added.dtype), times(t), keys_values, added).float()
        noise, variance = output.split(unet.config.out_channels // 2, dim=1)
        unconditional, conditional = noise.chunk(2)
        return torch.cat([unconditional + guidance * (conditional - unconditional), variance.chunk(2)[1]], dim=1)

    return denoise


# ----------------------------------------------------------------------------------------------------------------------
# config.json of diffusers' UNet2DConditionModel, whose attention_head_dim is here what it says: a width

OPTIONS = {  # options of that class which these models leave at these values
    "_class_name": "UNet2DConditionModel", "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift", "norm_eps": 1e-5, "dropout": 0.0, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "dual_cross_attention": False, "num_class_embeds": None, "flip_sin_to_cos": True,
    "freq_shift": 0, "time_embedding_type": "positional", "time_cond_proj_dim": None, "timestep_post_act": None,
    "center_input_sample": False, "class_embeddings_concat": False,
}
DOWN_BLOCKS = "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"  # a level without, with attention
UP_BLOCKS = "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"


def config_from_json(c):
    """The content of a config.json -> ADMConfig. KeyError where a size is missing, ValueError where it is no ADM."""
    channels = tuple(c["block_out_channels"])
    attention = tuple("SimpleCrossAttn" in kind for kind in c["down_block_types"])
    text = c.get("addition_embed_type") == "text"
    activation = c.get("act_fn", "silu")
    noised = c.get("class_embed_type") == "timestep"
    only_cross = c.get("only_cross_attention", False)
    middle = c.get("mid_block_only_cross_attention")  # null: as the others
    scale = read_number(c.get("resnet_out_scale_factor", 1.0))
    if activation not in ACTIVATIONS:
        raise ValueError(f"its act_fn is silu or gelu, not {activation!r:.60}")

    refuse_other_options(c, OPTIONS | {
        "down_block_types": [DOWN_BLOCKS[x] for x in attention],
        "up_block_types": [UP_BLOCKS[x] for x in reversed(attention)],
        "addition_embed_type": "text" if text else "image",
        "encoder_hid_dim_type": (c.get("encoder_hid_dim_type") and "text_proj") if text else "image_proj",
        "cross_attention_norm": "group_norm" if text else None,
        "class_embed_type": "timestep" if noised else None,
        "mid_block_only_cross_attention": None if middle is None else only_cross,
        "mid_block_scale_factor": scale,
        # IF's second stage applies it once, before the blocks, the others in each block, which is the same.
        "time_embedding_act_fn": activation if c.get("resnet_skip_time_act") else None,
    })
    config = ADMConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        channels=channels,
        layers=tuple(list_per_level(c["layers_per_block"], channels)),
        attention=attention,
        head_width=c["attention_head_dim"],
        states=c["encoder_hid_dim"],
        context=c["cross_attention_dim"],
        text=text,
        pool_heads=c.get("addition_embed_type_num_heads", 64),
        activation=activation,
        time_width=c.get("time_embedding_dim") or 4 * channels[0],
        noised=noised,
        self_attention=not only_cross,
        scale=scale,
        groups=c.get("norm_num_groups", 32),
    )
    for width, attends in zip(channels, attention[:-1] + (True,)):
        if attends and width % config.head_width:
            raise ValueError(f"heads of {config.head_width} do not share a width of {width}")
    return config
