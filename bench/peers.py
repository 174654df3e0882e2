"""What one would use instead: diffusers and transformers on our weights, and the two papers' loops around them.

    peer = make_unet_peer(model)                  diffusers' UNet with the weights of ours, without a copy of them
    pipe = make_pipeline(model, torch.float32)    diffusers' image-to-image pipeline for an sd.StableDiffusion
    x = run_published_loop(pipe, ...)             Differential Diffusion as its authors' program computes it
    x = run_straightforward_loop(peer, ...)       Magic Fixup, step by step: one UNet, then the other

Both loops give the pictures that ours give (tests/programs/test_bench.py): what differs is the time. ImportError where
a peer is not installed.
"""

import importlib.util
import tempfile
import types

import torch
import torch.nn.functional as F

import diffusion
import samplers
import sd
from checkpoints import configs

# ---------------------------------------------------------------------------------------------------------------------
# A torchvision that was built for another PyTorch than is here lacks two operators. Its import asks for them by name,
# and so do transformers' and diffusers'. They are declared here, and never run.

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def is_installed():
    """Whether whole pipelines of diffusers can be built here."""
    return all(importlib.util.find_spec(name) for name in ("diffusers", "transformers"))


def build_peer(build, model):
    """A peer's model, made by build() without memory of its own, takes the tensors of ours over.

    Tensors in another memory format than PyTorch's usual one are copied into that: ours alone is laid out for speed.
    """
    with torch.device("meta"):
        peer = build()
    peer.load_state_dict({k: v.detach().contiguous() for k, v in model.state_dict().items()}, assign=True)
    return peer.eval().requires_grad_(False)


def make_unet_peer(model):
    """unet.UNet -> diffusers.UNet2DConditionModel. Also one of Magic Fixup's: a second attention as wide as each block
    (config.context None), or none at all (0)."""
    import diffusers

    c = model.config
    options = configs.unet_config_to_json(c) | {"cross_attention_dim": c.context or c.channels, "sample_size": 64}

    def build():
        peer = diffusers.UNet2DConditionModel.from_config(options)
        for _, block in list_blocks(peer) if c.context == 0 else ():
            block.norm2 = block.attn2 = None
        return peer

    return build_peer(build, model)


def list_blocks(peer):
    """-> [(name, transformer block)] of a UNet of diffusers"""
    return [(name, m) for name, m in peer.named_modules() if type(m).__name__ == "BasicTransformerBlock"]


def make_vae_peer(model):
    """vae.VAE -> diffusers.AutoencoderKL"""
    import diffusers

    options = configs.vae_config_to_json(model.config)
    return build_peer(lambda: diffusers.AutoencoderKL.from_config(options), model)


def make_scheduler(schedule):
    import diffusers

    return diffusers.DDIMScheduler.from_config(configs.schedule_to_json(schedule))


def make_pipeline(model, dtype):
    """sd.StableDiffusion -> diffusers.StableDiffusionImg2ImgPipeline in that precision, where the model is: by the
    folder that we save and diffusers opens."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        sd.save(model, folder)
        pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(model.unet.conv_in.weight.device, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Differential Diffusion


@torch.no_grad()
def run_published_loop(pipe, prompt, picture, change_map, noise, steps, guidance=7.5):
    """Algorithm 1 as github.com/exx8/differential-diffusion runs it (SD2/diff_pipe.py): all noised originals and masks
    ahead, every step whatever the map, the map brought to the latent's size by bilinear interpolation.

    picture (1, 3, H, W) in [-1, 1], change_map (1, 1, H, W), noise (1, C, h, w) -> (1, 3, H, W) in about [0, 1]

    That program draws the latent from the encoder's distribution; here it is the mean. A pixel of exactly i / k comes
    from the edit at step i there, and still from the original in the paper and here. In half precision the result
    differs a little, because diffusers rounds the noise levels as well.
    """
    device = pipe.unet.device
    dtype = pipe.unet.dtype
    with_prompt, without = pipe.encode_prompt(prompt, device, 1, True)
    context = torch.cat([without, with_prompt])
    z_init = pipe.vae.encode(picture.to(device, dtype)).latent_dist.mode() * pipe.vae.config.scaling_factor

    # All noised originals and all masks, before the first step.
    pipe.scheduler.set_timesteps(steps, device=device)
    times = pipe.scheduler.timesteps
    originals = pipe.scheduler.add_noise(z_init.expand(steps, -1, -1, -1), noise.to(z_init), times)
    mu = F.interpolate(change_map.to(device), z_init.shape[-2:], mode="bilinear")
    kept = (mu > torch.arange(steps, device=device)[:, None, None, None] / steps).to(dtype)  # (k, 1, h, w)

    # Every step pastes its original under its mask, then denoises with guidance.
    z = originals[:1]
    for i, t in enumerate(times):
        if i:
            z = originals[i : i + 1] * kept[i] + z * (1 - kept[i])
        output = pipe.unet(pipe.scheduler.scale_model_input(torch.cat([z, z]), t), t, encoder_hidden_states=context)
        unconditional, conditional = output.sample.chunk(2)
        output = unconditional + guidance * (conditional - unconditional)
        z = pipe.scheduler.step(output, t, z).prev_sample
    return pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample / 2 + 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Magic Fixup


def make_fixup_peer(model):
    """mfx.MagicFixup -> two UNets and the autoencoder of diffusers, joined by hooks.

    What goes into a block's self-attention in the extractor is what the same block of the synthesizer attends to.
    """
    peer = types.SimpleNamespace(
        synthesizer=make_unet_peer(model.synthesizer), extractor=make_unet_peer(model.extractor),
        vae=make_vae_peer(model.vae), scheduler=make_scheduler(model.schedule))
    features = {}

    def keep(name):
        def hook(module, inputs, output):
            features[name] = output
        return hook

    def give(name):
        def hook(module, args, kwargs):
            return args, kwargs | {"encoder_hidden_states": features[name]}
        return hook

    for (name, reads), (_, asks) in zip(list_blocks(peer.extractor), list_blocks(peer.synthesizer), strict=True):
        reads.norm1.register_forward_hook(keep(name))
        asks.attn2.register_forward_pre_hook(give(name), with_kwargs=True)
    return peer


@torch.no_grad()
def run_straightforward_loop(peer, reference, coarse, mask, steps=50, seed=0):
    """A whole edit as the method reads: at every step the extractor, all of it, and then the synthesizer.

    reference, coarse (1, 3, H, W) in [-1, 1], mask (1, 1, H, W), 1 = kept -> (1, 3, H, W) in about [0, 1]

    All noise is that of mfx.MagicFixup.sample. Latents stay in fp32 between the steps, as ours do.
    """
    like = peer.synthesizer.conv_in.weight
    factor = peer.vae.config.scaling_factor

    def encode(x):
        return peer.vae.encode(x.to(like)).latent_dist.mode().float() * factor

    I = encode(reference)
    I_coarse = encode(coarse)
    M = F.interpolate(mask.to(I), I.shape[-2:], mode="area")

    # The noise of the start, of every step, and of the reference, as ours draws it.
    draw, reference_draw = (samplers.make_step_noise(I.shape[1:], [s]) for s in (seed, 0))
    peer.scheduler.set_timesteps(steps, device=like.device)
    times = peer.scheduler.timesteps
    x = torch.randn(I.shape, generator=torch.Generator().manual_seed(seed)).to(I)
    x = peer.scheduler.add_noise(I_coarse, x, times[:1])  # equation 4

    for i, (t, number) in enumerate(zip(times, times.tolist())):
        I_t = peer.scheduler.add_noise(I, reference_draw(diffusion.T + number).to(I), t[None])  # equation 2
        peer.extractor(torch.cat([I_t, I, M], dim=1).to(like.dtype), t, encoder_hidden_states=None)  # equation 3
        output = peer.synthesizer(torch.cat([x, I_coarse, M], dim=1).to(like.dtype), t, encoder_hidden_states=None)
        x = peer.scheduler.step(output.sample.float(), t, x, eta=1.0, variance_noise=draw(i).to(x)).prev_sample
    return peer.vae.decode((x / factor).to(like.dtype)).sample.float() / 2 + 0.5
