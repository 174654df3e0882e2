"""What tests build on: small models with random weights, and their files in the layouts that people download.

The original layout is written here by `to_original`, which counts blocks as the original program does, and is read by
us and by diffusers' own conversion; neither knows the table in checkpoints/names.py.
"""

from dataclasses import replace

import torch
from safetensors.torch import save_file

import clip
import diffusion
import mfx
import samplers
import sd
import unet
import vae
from models import image_encoder, xl
from toy.vocabulary import learn_bpe

CAPTIONS = ["a red circle on a sandy beach", "Two blue squares, one in front of the other", "a photo of 12 cats!!",
            "the dog's ball isn't here; they've taken it, I'm sure we'll see", "a red circle and a green circle"]
VOCAB, MERGES = learn_bpe(CAPTIONS, 560)
TOKENIZER = clip.Tokenizer(VOCAB, MERGES)
SD1 = unet.UNetConfig(channels=(32, 64), depth=(1, 0), heads=8, context=64)
UNETS = {
    "sd1": SD1,
    "inpainting": replace(SD1, in_channels=9),
    "pix2pix": replace(SD1, in_channels=8),
    "sd2": unet.UNetConfig(channels=(64, 128), depth=(1, 0), heads=None, head_width=64, context=64, linear_proj=True),
}
TEXT = clip.TextConfig(len(VOCAB), 64, 2, 1, 77, 128, "quick_gelu", eos=len(VOCAB) - 1)
TEXTS = {"sd1": TEXT, "inpainting": TEXT, "pix2pix": TEXT, "sd2": replace(TEXT, activation="gelu")}
VAE = vae.VAEConfig((32, 64))
XL_TEXTS = {  # CLIP's, and OpenCLIP's
    "text_encoder": replace(TEXT, skip_last=1, final_norm=False),
    "text_encoder_2": replace(TEXT, width=128, heads=2, layers=3, activation="gelu", skip_last=1, final_norm=False,
                              projection=48),
}
XL = unet.UNetConfig(channels=(64, 128), layers=1, depth=(0, 2), mid_depth=2, heads=None, head_width=64,
                     linear_proj=True)
XLS = {
    "base": replace(XL, context=64 + 128, added=48 + 6 * 256),
    "refiner": replace(XL, context=128, added=48 + 5 * 256),
    "xl inpainting": replace(XL, in_channels=9, context=64 + 128, added=48 + 6 * 256),
}
XL_VAE = vae.VAEConfig((32, 64), scaling_factor=0.13025)


def randomise(model, seed=0):
    torch.manual_seed(seed)
    for p in model.parameters():  # every bias and norm gets a value of its own
        p.data += 0.05 * torch.randn(p.shape)
    return model.eval().requires_grad_(False)


def fill(ours, theirs):
    """One set of random tensors for two networks that were built on the meta device"""
    tensors = {}
    for i, (name, tensor) in enumerate(ours.state_dict().items()):
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 100
        tensors[name] = randn(*tensor.shape, seed=i) * fan_in**-0.5
        if tensor.ndim == 1 and name.endswith("weight"):
            tensors[name] += 1
    ours.eval().load_state_dict(tensors, assign=True)
    theirs.eval().load_state_dict(tensors, assign=True, strict=False)  # a T5's has one tensor under two names


def stable_diffusion(kind="sd1", prediction="epsilon"):
    """A whole Stable Diffusion on random weights: one of UNETS, pictures of 16x16 pixels."""
    torch.manual_seed(1)
    parts = unet.UNet(UNETS[kind]), vae.VAE(VAE), clip.TextEncoder(TEXTS[kind])
    tokenizer = clip.Tokenizer(VOCAB, MERGES, pad="!" if kind == "sd2" else clip.END)
    return sd.StableDiffusion(*map(randomise, parts), diffusion.Schedule(prediction=prediction), tokenizer, size=16)


def stable_diffusion_xl(kind="base", size_width=256):
    """A whole Stable Diffusion XL on random weights: one of XLS. The encoders and the autoencoder of all are equal."""
    config = XLS[kind]
    config = replace(config, added=48 + (config.added - 48) // 256 * size_width, size_width=size_width)
    torch.manual_seed(2)
    parts = vae.VAE(XL_VAE), *map(clip.TextEncoder, XL_TEXTS.values()), unet.UNet(config)
    v, first, second, u = map(randomise, parts)
    pads = [clip.Tokenizer(VOCAB, MERGES, pad=pad) for pad in (clip.END, "!")]
    model = sd.StableDiffusion(u, v, second, diffusion.Schedule(), pads[1], size=16)
    model.xl = xl.XL(None, None, False) if kind == "refiner" else xl.XL(first, pads[0], True)
    return model


def random_ids(config, batch=3, length=77, seed=0):
    """Start, words, end, then padding with the end token, of different lengths."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.eos - 1, (batch, length), generator=g)
    ids[:, 0] = config.eos - 1
    for i, row in enumerate(ids):
        row[length // (i + 2) :] = config.eos
    return ids


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def compute(model):
    """What the three networks make of fixed inputs."""
    g = torch.Generator().manual_seed(2)
    z = torch.randn(1, model.unet.config.in_channels, 8, 8, generator=g)
    x = torch.rand(1, 3, 16, 16, generator=g) * 2 - 1
    context = model.encode_prompt(["a blue circle"])
    encoded = model.encode_image(x)
    C = model.vae.config.latent_channels
    denoise = model.denoiser("a blue circle", channels=z[:, C:] if z.shape[1] > C else None, size=(16, 16))
    return context, denoise(z[:, :C], torch.tensor([500])), encoded, model.decode(encoded)


def weights(model):
    """{name: tensor} of all networks, but for the text encoders' last layers where these are not run."""
    out = {}
    for part, network in (("unet", model.unet), ("vae", model.vae)):
        out |= {f"{part}.{name}": tensor for name, tensor in network.state_dict().items()}
    for i, (text, _) in enumerate(model.readers()):
        skipped = range(text.config.layers)[::-1][: 0 if text.config.projection else text.config.skip_last]
        for name, tensor in text.state_dict().items():
            if not any(f".layers.{layer}." in name for layer in skipped):
                out[f"text {i}.{name}"] = tensor
    return out


def same_model(a, b):
    """The weights are equal bit for bit. What is made of them is so to a tolerance: they lie at other addresses, and
    BLAS chooses its path by alignment."""
    ours, theirs = weights(a), weights(b)
    return (ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
            and all(relative_error(x, y) <= 1e-5 for x, y in zip(compute(a), compute(b), strict=True)))


# --- The original layout, as the original program names it ----------------------------------------


def to_original(model, openclip=False):
    """StableDiffusion -> {name: tensor} as a training program of 2022 would have saved it."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    blocks = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "out": "out",
              "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
              "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}
    n = 0
    for i, level in enumerate(model.unet.down_blocks):
        for j in range(len(level.resnets)):
            n += 1
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
        n += 1
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
    n = 0
    for i, level in enumerate(model.unet.up_blocks):
        for j in range(len(level.resnets)):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        third = 2 if hasattr(level, "attentions") else 1
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{third}.conv"
    out = {}
    for name, tensor in model.unet.state_dict().items():
        block = next(b for b in sorted(blocks, key=len, reverse=True) if name.startswith(b + "."))
        inner = name.removeprefix(block + ".")
        if "resnets" in block:
            layer, kind = inner.rsplit(".", 1)
            inner = f"{resnet[layer]}.{kind}"
        out[f"model.diffusion_model.{blocks[block]}.{inner}"] = tensor

    levels = len(model.vae.config.channels)
    for name, tensor in model.vae.state_dict().items():
        for i in range(levels):
            name = name.replace(f"down_blocks.{i}.", f"down.{i}.").replace(f"up_blocks.{i}.", f"up.{levels - 1 - i}.")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        for new, old in (("resnets", "block"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                         ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
                         ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_q", "q"),
                         ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(new, old)
        if "attn_1" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[f"first_stage_model.{name}"] = tensor.contiguous()

    if model.xl:
        if not model.xl.refines:
            out |= clip_to_original(model.xl.text, "conditioner.embedders.0.transformer.text_model.")
        out |= openclip_to_original(model.text, f"conditioner.embedders.{len(model.readers()) - 1}.model.")
        out["denoiser.sigmas"] = torch.zeros(1000)
    elif openclip:
        out |= openclip_to_original(model.text, "cond_stage_model.model.")
    else:
        out |= clip_to_original(model.text, "cond_stage_model.transformer.text_model.")
    out |= {"betas": torch.zeros(1000), "alphas_cumprod_prev": torch.zeros(1000), "sqrt_recipm1_alphas_cumprod":
            torch.zeros(1000), "log_one_minus_alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9),
            "posterior_mean_coef1": torch.zeros(1000), "sqrt_one_minus_alphas_cumprod": torch.zeros(1000)}
    return out


def clip_to_original(encoder, prefix):
    text = {prefix + k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    return text | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}


def openclip_to_original(encoder, prefix):
    text = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    out = {prefix + "token_embedding.weight": text["embeddings.token_embedding.weight"],
           prefix + "positional_embedding": text["embeddings.position_embedding.weight"],
           prefix + "logit_scale": torch.tensor(4.6)}
    projection = text.get("text_projection.weight", torch.randn(64, 64))
    out[prefix + "text_projection"] = projection.T.contiguous()
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        out[f"{prefix}ln_final.{kind}"] = text[f"final_layer_norm.{kind}"]
        for i in range(encoder.config.layers):
            here, there = f"encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            out |= {f"{there}{old}.{kind}": text[f"{here}{new}.{kind}"] for new, old in names.items()}
            qkv = [text[f"{here}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            out[f"{there}attn.in_proj_{kind}"] = torch.cat(qkv)
    return out


def write_tokenizer(folder):
    TOKENIZER.save(folder)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()  # as it lies beside a single file: without a word on padding


def original_file(folder, kind, suffix):
    """The file, and the model that is in it as diffusers' own conversion reads it."""
    model = stable_diffusion(kind)
    if kind == "sd2":  # three layers in the file, of which the second is read
        model.text = randomise(clip.TextEncoder(replace(TEXTS[kind], layers=3, skip_last=1)))
    tensors = to_original(model, openclip=kind == "sd2")
    file = folder / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors, "epoch": 3, "global_step": 470000}, file)
    write_tokenizer(folder)
    return file, tensors, model


# --- Magic Fixup ----------------------------------------------------------------------------------


TOY = unet.UNetConfig(12, 12, (32, 64), layers=1, depth=(1, 1), heads=4, context=16, groups=8)


def without_text(config=TOY, prediction="epsilon"):
    torch.manual_seed(3)
    parts = unet.UNet(config), vae.VAE(vae.VAEConfig((8, 16), 1, config.out_channels, groups=8))
    return sd.StableDiffusion(*map(randomise, parts), None, diffusion.Schedule(prediction=prediction), None, 16)


def magic_fixup(prediction="epsilon"):
    made = mfx.from_stable_diffusion(without_text(prediction=prediction))
    for network in (made.synthesizer, made.extractor):
        randomise(network, seed=4)
    return made


def small_image_encoder():
    """A random one of the toy world's kind, narrow"""
    torch.manual_seed(0)
    made = image_encoder.ToyImageEncoder(image_encoder.ToyImageConfig(5, (8, 8), hidden=8, side=16))
    return made.eval().requires_grad_(False)


def edit(C=12, batch=1, h=8, w=8, seed=0):
    """reference, coarse, mask"""
    g = torch.Generator().manual_seed(seed)
    reference, coarse = torch.randn(2, batch, C, h, w, generator=g)
    return reference, coarse, (torch.rand(batch, 1, h, w, generator=g) > 0.3).float()


def training_batch(seed=0, batch=4):
    reference, coarse, mask = edit(batch=batch, seed=seed)
    target = torch.randn(coarse.shape, generator=torch.Generator().manual_seed(seed + 1))
    return {"reference": reference, "coarse": coarse, "mask": mask, "target": target}


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def count_calls(module, do):
    """How many samples each call of a module had while `do()` ran."""
    seen = []
    hook = module.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    result = do()
    hook.remove()
    return seen, result


# --- Samplers, of one-line denoisers --------------------------------------------------------------

EVERY_SAMPLER = [(name, {}) for name in samplers.SAMPLERS] + [("ddim", {"eta": 1.0})]
SHAPE = (2, 4, 3, 5)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(schedule, means=(-1.0, 1.5), std=0.5):
    """The exact denoiser of pixels that are independent draws from an even mixture of two Gaussians: nonlinear in z,
    pointwise, and of either prediction type."""
    means = torch.tensor(means)

    def model(z, t):
        alpha, sigma = schedule.alpha_sigma(t, z)
        var = alpha**2 * std**2 + sigma**2
        delta = z[..., None] - alpha[..., None] * means  # (B, C, h, w, 2)
        r = torch.softmax(-(delta**2) / (2 * var[..., None]), dim=-1)
        x0 = (r * (means + (alpha * std**2 / var)[..., None] * delta)).sum(-1)
        eps = (z - alpha * x0) / sigma
        return eps if schedule.prediction == "epsilon" else alpha * eps - sigma * x0

    return model


def trajectory(model, z, sampler, **options):
    steps = []
    samplers.run_sampler(model, z, sampler, callback=lambda i, z: steps.append(z), **options)
    return steps
