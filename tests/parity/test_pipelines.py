"""models/pipelines.py: diffusers' pipelines of Stable Diffusion 3, Flux and XL, on tiny random weights, under our loop.

An ordinary run is the pipeline's own, latent by latent; a run under a map is a plain loop over its network and its
scheduler.
"""

import importlib
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import diffdiff
import sd
from models import pipelines
from tests import small

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its NumPy 1 spelling
PROMPT, NEGATIVE, K = "a red circle", "two blue squares", 6
H, W = 8, 12  # latents
SIDE = 2  # pixels of a latent
KINDS = ["sd3", "flux", "schnell", "xl"]


def make_clip(network):
    end = len(small.VOCAB) - 1
    return network(transformers.CLIPTextConfig(
        vocab_size=len(small.VOCAB), hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=32, bos_token_id=end - 1, eos_token_id=end))


def make_t5(width):
    """T5's encoder, and a tokenizer of letters"""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    config = transformers.T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config), transformers.T5Tokenizer(vocab=words, extra_ids=0)


def make_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5305, shift_factor=0.0609)


def make_peer(kind, folder):
    """A pipeline of diffusers, on random weights"""
    if kind == "xl":
        sd.save(small.stable_diffusion_xl("base", size_width=8), folder)
        return diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    torch.manual_seed(0)
    small.write_tokenizer(folder)
    words = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    if kind == "sd3":
        t5, letters = make_t5(96)
        texts = [make_clip(transformers.CLIPTextModelWithProjection) for _ in range(2)]
        network = diffusers.SD3Transformer2DModel(
            sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=96, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        parts = dict(text_encoder_2=texts[1], tokenizer_2=words, text_encoder_3=t5, tokenizer_3=letters)
        pipeline = diffusers.StableDiffusion3Pipeline
    else:
        t5, letters = make_t5(32)
        texts = [make_clip(transformers.CLIPTextModel)]
        network = diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=kind == "flux")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        if kind == "flux":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        parts = dict(text_encoder_2=t5, tokenizer_2=letters)
        pipeline = diffusers.FluxPipeline
    vae = make_vae()
    for model in (network, vae, t5, *texts):
        small.randomise(model)
    return pipeline(transformer=network, vae=vae, text_encoder=texts[0], tokenizer=words, scheduler=scheduler, **parts)


@pytest.fixture(scope="module", params=KINDS)
def peer(request, tmp_path_factory):
    pipe = make_peer(request.param, tmp_path_factory.mktemp(request.param))
    pipe.set_progress_bar_config(disable=True)
    pipe.kind = request.param
    return pipe


GUIDANCE = {"sd3": 5.0, "flux": 3.5, "schnell": 0.0, "xl": 5.0}
Z_INIT, NOISE = small.randn(2, 1, 4, H, W, seed=5)
MU = torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(7))
MU[..., :2, :2] = 1
MU[..., 2:, :2] = 0


def packs(pipe):
    return pipe.kind in ("flux", "schnell")


def make_denoiser(pipe):
    negative = None if packs(pipe) else NEGATIVE
    return pipelines.make_denoiser(pipe, PROMPT, negative, GUIDANCE[pipe.kind])


def run(pipe, mu, denoise=None, **options):
    """-> the last latents, and those of every step"""
    steps = []
    sampler = pipelines.make_sampler(pipe, Z_INIT, K)
    z = diffdiff.differential_diffusion(denoise or make_denoiser(pipe), Z_INIT, mu, sampler, NOISE,
                                        callback=lambda i, z: steps.append(z), **options)
    return z, steps


def from_edm(pipe, x, i):
    """XL's scheduler has latents of another space, of variance 1 + sigma^2"""
    return x / (1 + pipe.scheduler.sigmas[i] ** 2) ** 0.5 if pipe.kind == "xl" else x


# --- An ordinary run ------------------------------------------------------------------------------


@torch.no_grad()
def run_peer(pipe):
    """Text to image from the same start -> the latents of every step, and the picture"""
    steps = []

    def keep(pipe, i, t, told):
        z = told["latents"]
        z = pipe._unpack_latents(z, H * SIDE, W * SIDE, SIDE) if packs(pipe) else z
        steps.append(from_edm(pipe, z, i + 1))
        return told

    start = NOISE.clone()  # a flow begins with nothing of the picture
    if pipe.kind == "xl":
        start = pipelines.make_sampler(pipe, Z_INIT, K).noise_to(0, Z_INIT, NOISE)
    latents = pipe._pack_latents(start, 1, 4, H, W) if packs(pipe) else start
    options = {} if packs(pipe) else {"negative_prompt": NEGATIVE}
    picture = pipe(PROMPT, height=H * SIDE, width=W * SIDE, num_inference_steps=K, guidance_scale=GUIDANCE[pipe.kind],
                   latents=latents, callback_on_step_end=keep, output_type="pt", **options).images
    return steps, picture


def test_a_black_map_is_the_pipelines_own_run(peer):
    z, ours = run(peer, torch.zeros(H, W))
    theirs, picture = run_peer(peer)
    assert len(ours) == len(theirs) == K
    for a, b in zip(ours, theirs):
        assert small.relative_error(a, b) <= 1e-4
    assert small.relative_error(z, NOISE) > 0.1 and picture.std() > 0.05
    assert (pipelines.decode(peer, z) / 2 + 0.5 - picture).abs().max() <= 2 / 255


# --- Under a map ----------------------------------------------------------------------------------


def make_asker(pipe):
    """(z, t) -> what the peer's own network says, as its pipeline asks it"""
    g = GUIDANCE[pipe.kind]
    if packs(pipe):
        context, pooled, text_ids = pipe.encode_prompt(PROMPT, PROMPT)
        ids = pipe._prepare_latent_image_ids(1, H // 2, W // 2, "cpu", torch.float32)
        number = torch.tensor([g]) if pipe.kind == "flux" else None

        def ask(z, t):
            tokens = pipe.transformer(pipe._pack_latents(z, 1, 4, H, W), context, pooled, t[None] / 1000, ids, text_ids,
                                      number).sample
            return pipe._unpack_latents(tokens, H * SIDE, W * SIDE, SIDE)

        return ask

    said = pipe.encode_prompt(PROMPT, PROMPT, **{"prompt_3": PROMPT} if pipe.kind == "sd3" else {},
                              negative_prompt=NEGATIVE)
    sizes = torch.tensor([[H * SIDE, W * SIDE, 0, 0, H * SIDE, W * SIDE]])

    def ask_once(z, t, context, pooled):
        if pipe.kind == "sd3":
            return pipe.transformer(z, context, pooled, t[None]).sample
        return pipe.unet(z, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample

    def ask(z, t):
        given, without = ask_once(z, t, said[0], said[2]), ask_once(z, t, said[1], said[3])
        return without + g * (given - without)

    return ask


@torch.no_grad()
def test_a_change_map_as_a_plain_loop_over_the_peer(peer):
    """Algorithm 1 over the peer's network, in its scheduler's space: every latent."""
    ask, scheduler = make_asker(peer), peer.scheduler
    if packs(peer):
        shift = diffusers.pipelines.flux.pipeline_flux.calculate_shift(H * W // 4)
        scheduler.set_timesteps(sigmas=[1 - i / K for i in range(K)], mu=shift)
    else:
        scheduler.set_timesteps(K)
    want = []
    x = None
    for i, t in enumerate(scheduler.timesteps):
        if peer.kind == "xl":
            kept = Z_INIT + scheduler.sigmas[i] * NOISE
        else:
            kept = scheduler.scale_noise(Z_INIT, t[None], NOISE)
        x = kept if x is None else torch.where(MU >= i / K, kept, x)
        x = scheduler.step(ask(from_edm(peer, x, i), t), t, x).prev_sample
        want.append(from_edm(peer, x, i + 1))
    last, got = run(peer, MU, skip=False)
    assert len(got) == len(want) == K
    for ours, theirs in zip(got, want):
        assert small.relative_error(ours, theirs) <= 1e-4
    assert small.relative_error(last, torch.where(MU >= 1, Z_INIT, want[-1])) <= 1e-4


@pytest.mark.skipif("DIFFUSERS" not in os.environ, reason="needs a checkout of huggingface/diffusers")
@pytest.mark.parametrize("kind, module, name", [
    ("sd3", "stable_diffusion_3", "StableDiffusion3DifferentialImg2ImgPipeline"),
    ("flux", "flux", "FluxDifferentialImg2ImgPipeline"),
    ("xl", "stable_diffusion_xl", "StableDiffusionXLDifferentialImg2ImgPipeline")])
def test_a_change_map_as_the_community_pipelines(kind, module, name, tmp_path, monkeypatch):
    """They noise and encode inside: they are given our noised original in place."""
    monkeypatch.syspath_prepend(os.environ["DIFFUSERS"] + "/examples/community")
    theirs = getattr(importlib.import_module(f"pipeline_{module}_differential_img2img"), name)
    pipe = make_peer(kind, tmp_path)
    pipe.kind = kind
    other = theirs(**{part: x for part, x in pipe.components.items() if x is not None})
    sampler, mu = pipelines.make_sampler(pipe, Z_INIT, K), MU
    if kind == "sd3":
        def noised(*said):
            return other.scheduler.scale_noise(Z_INIT.expand(len(said[5]), -1, -1, -1), said[5], NOISE)

        other.prepare_latents = noised
        options = {"map": MU, "negative_prompt": NEGATIVE}
    elif kind == "xl":
        def noised(image, t, *said):
            return other.scheduler.add_noise(Z_INIT.expand(len(t), -1, -1, -1), NOISE, t)

        other.prepare_latents = noised
        pixels = MU[0].repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)
        original = torch.zeros(1, 3, H * SIDE, W * SIDE)
        options = {"map": pixels, "negative_prompt": NEGATIVE, "original_image": original}
    else:
        packed = pipelines.pack
        ids = pipe._prepare_latent_image_ids(1, H // 2, W // 2, "cpu", torch.float32)
        other.prepare_latents = lambda *_: (packed(NOISE), packed(NOISE), packed(Z_INIT), ids)
        other.prepare_mask_latents = lambda *_: (packed(MU.expand(1, 4, H, W)), None)
        options = {"mask_image": MU}
        mu = torch.where(MU > 0, (MU + 1 / K).clamp(max=1), 0.0)  # it takes each threshold a step later
    want = []

    def keep(pipe, i, t, told):
        z = told["latents"]
        want.append(pipelines.unpack(z, H, W) if kind == "flux" else from_edm(other, z, i + 1))
        return told

    if kind != "xl":
        options |= {"height": H * SIDE, "width": W * SIDE}
    other.kind = kind
    other(prompt=PROMPT, image=torch.zeros(1, 3, H * SIDE, W * SIDE), strength=1.0, num_inference_steps=K,
          guidance_scale=GUIDANCE[kind], callback_on_step_end=keep, output_type="latent", **options)
    got = []
    seen = []
    denoise = make_denoiser(pipe)
    diffdiff.differential_diffusion(lambda z, t: seen.append(z) or denoise(z, t), Z_INIT, mu, sampler, NOISE,
                                    skip=False, callback=lambda i, z: got.append(z))
    if kind == "flux":  # it replaces at the end of a step: what it reports is what the next step sees
        got[:-1] = seen[1:]
    assert len(got) == len(want) == K
    for ours, theirs in zip(got, want):
        assert small.relative_error(ours, theirs) <= 1e-4


# --- Batches, precision, the autoencoder, schedulers ----------------------------------------------


def test_pictures_of_a_batch_are_alone(peer):
    denoise, t = make_denoiser(peer), torch.tensor([700])
    z = torch.cat([Z_INIT, NOISE])
    both = denoise(z, t.repeat(2))
    assert small.relative_error(both, torch.cat([denoise(Z_INIT, t), denoise(NOISE, t)])) <= 1e-5


def test_latents_stay_as_fine_as_they_came(tmp_path):
    """The pipeline in bfloat16, the sampler in float32"""
    pipe = make_peer("flux", tmp_path).to(torch.bfloat16)
    pipe.kind = "flux"
    picture = small.randn(1, 3, 16, 24).clamp(-1, 1)
    z, steps = run(pipe, MU)
    kept = (MU == 1).expand_as(z)
    assert all(step.dtype == torch.float32 and (step != step.bfloat16()).any() for step in steps)
    assert torch.equal(z[kept], Z_INIT[kept])
    assert pipelines.encode(pipe, picture).dtype == pipelines.decode(pipe, z).dtype == torch.float32


@torch.no_grad()
def test_the_autoencoder_there_and_back(peer):
    picture = small.randn(1, 3, 16, 24).clamp(-1, 1)
    z = pipelines.encode(peer, picture)
    mean = peer.vae.encode(picture).latent_dist.mean
    assert z.shape == (1, 4, 8, 12)
    assert small.relative_error(pipelines.decode(peer, z), peer.vae.decode(mean).sample.clamp(-1, 1)) <= 1e-4
    shift = peer.vae.config.shift_factor or 0
    assert small.relative_error(z, (mean - shift) * peer.vae.config.scaling_factor) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True, "max_shift": 1.4},
                                     {"use_dynamic_shifting": True, "time_shift_type": "linear"}])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("k", [1, 4, 28])
def test_the_schedulers_levels(kind, options, k):
    """Of each pipeline's own way to ask for them, with what other checkpoints of the kind configure"""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    c = scheduler.config
    told = {}
    if c.use_dynamic_shifting:
        shift = diffusers.pipelines.flux.pipeline_flux.calculate_shift
        told["mu"] = shift(60 * 40 // 4, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    if kind == "flux":
        told["sigmas"] = [1 - i / k for i in range(k)]
    scheduler.set_timesteps(k, **told)
    name = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}[kind]
    pipe = type(name, (), {"scheduler": scheduler, "config": {}})()
    sampler = pipelines.make_sampler(pipe, torch.zeros(1, 16, 60, 40), k)
    torch.testing.assert_close(torch.tensor(sampler.timesteps), scheduler.timesteps, rtol=1e-4, atol=0)


def test_the_code_of_the_page_runs(peer, tmp_path, monkeypatch):
    """docs/with_diffusers.md as it is, but for the model's weights, their device and the size"""
    page = (Path(__file__).parents[2] / "docs/with_diffusers.md").read_text(encoding="utf-8")
    first, *blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    name = type(peer).__name__
    code = next(block for block in blocks if f"import {name}" in block)
    monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", lambda *_, **__: peer)
    monkeypatch.setattr(peer, "to", lambda device: peer)
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 30), 80).convert("RGB").save("photo.jpg")
    Image.linear_gradient("L").resize((40, 30)).save("map.png")
    exec(first.replace("1024, 1024", "32, 16") + code.replace("k=28", "k=4").replace("k=50", "k=4"), {})
    assert Image.open("out.png").size == (32, 16)
