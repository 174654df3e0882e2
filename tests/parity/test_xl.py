"""Stable Diffusion XL against diffusers' pipelines: base, refiner, both in turn, and both under a change map."""


import pytest
import torch

import diffdiff
import samplers
import sd
from checkpoints import configs, names
from models.xl import hand_over
from tests import small

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPT, GUIDANCE, K = "a red circle", 5.0, 10
HEIGHT, WIDTH = 16, 24


def open_peer(pipeline, folder):
    pipe = pipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
    return pipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Base and refiner as `sd.load` reads them from folders, and as diffusers does"""
    models, peers = [], []
    for kind, pipeline in (("base", diffusers.StableDiffusionXLPipeline),
                           ("refiner", diffusers.StableDiffusionXLImg2ImgPipeline)):
        folder = tmp_path_factory.mktemp(kind)
        sd.save(small.stable_diffusion_xl(kind, size_width=8), folder)
        models.append(sd.load(folder))
        peers.append(open_peer(pipeline, folder))
    return *models, *peers


def test_folders_that_the_peers_wrote(pair, tmp_path):
    for i, kind in enumerate(("base", "refiner")):
        pair[2 + i].save_pretrained(tmp_path / kind)
        got = sd.load(tmp_path / kind)
        assert small.same_model(got, pair[i]) and got.xl.zeros == (kind == "base")
        assert [tokenizer.pad for _, tokenizer in got.readers()] == ["<|endoftext|>", "!"][i:]


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_openclip_as_diffusers_converts_it(kind):
    convert = pytest.importorskip("diffusers.loaders.single_file_utils")
    transformers = pytest.importorskip("transformers")
    model = small.stable_diffusion_xl(kind)
    tensors = small.to_original(model)
    parts, _ = names.split_stable_diffusion("it", tensors)
    c = transformers.CLIPTextConfig(**configs.text_config_to_json(model.text.config))
    prefix = f"conditioner.embedders.{len(model.readers()) - 1}.model."
    peer = transformers.CLIPTextModelWithProjection(c)
    want = convert.convert_open_clip_checkpoint(peer, dict(tensors), prefix=prefix)
    want = {name.removeprefix("text_model."): x for name, x in want.items() if "position_ids" not in name}
    got = {name.removeprefix("text_model."): x for name, x in parts["text_encoder_2"].items()}
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


def make_denoiser(model, sampler, negative):
    return model.denoiser(PROMPT, negative or "", GUIDANCE, timesteps=sampler.timesteps, size=(HEIGHT, WIDTH))


@pytest.mark.parametrize("negative", [None, "cats"])
@torch.no_grad()
def test_text_to_image(pair, negative):
    """Of no negative prompt the base makes zeros, and the refiner an empty text."""
    base, refiner, base_peer, refiner_peer = pair
    noise = small.randn(1, 4, HEIGHT // 2, WIDTH // 2)
    options = dict(prompt=PROMPT, negative_prompt=negative, num_inference_steps=K, guidance_scale=GUIDANCE)
    of_base = options | dict(latents=noise.clone(), height=HEIGHT, width=WIDTH)
    sampler = samplers.make_sampler("euler", base.schedule, K)
    denoise = make_denoiser(base, sampler, negative)
    z = samplers.run_sampler(denoise, noise, sampler)
    want = base_peer(**of_base | {"latents": noise.clone()}, output_type="latent").images
    assert small.relative_error(z, want) <= 1e-4
    picture = base_peer(**of_base | {"latents": noise.clone()}, output_type="pt").images
    assert ((base.decode(z) / 2 + 0.5).clamp(0, 1) - picture).abs().max() <= 2 / 255 and picture.std() > 0.05

    half = base_peer(**of_base, denoising_end=0.8, output_type="latent").images
    want = refiner_peer(**options, image=half, denoising_start=0.8, output_type="latent").images
    both = hand_over(denoise, make_denoiser(refiner, sampler, negative), 0.8)
    got = samplers.run_sampler(both, noise, sampler)
    assert small.relative_error(got, want) <= 1e-4 and small.relative_error(z, want) > 1e-2


@torch.no_grad()
def test_a_change_map_as_a_plain_loop_over_the_peers(pair):
    """Algorithm 1 as the release writes it, in the scheduler's space, on diffusers' networks: every latent."""
    base, refiner, base_peer, refiner_peer = pair
    h, w = HEIGHT // 2, WIDTH // 2
    z_init, noise = small.randn(2, 1, 4, h, w, seed=5)
    mu = torch.rand(1, 1, h, w, generator=torch.Generator().manual_seed(6))
    mu[..., :2, :2] = 1
    mu[..., 2:, :2] = 0

    want, x = [], None
    times = torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * 2), torch.tensor(
        [[HEIGHT, WIDTH, 0, 0, 2.5], [HEIGHT, WIDTH, 0, 0, 6.0]])
    told = []
    for peer, ids in zip((base_peer, refiner_peer), times):
        prompt, negative, pooled, negative_pooled = peer.encode_prompt(PROMPT, negative_prompt="cats")
        told.append((torch.cat([negative, prompt]), {"text_embeds": torch.cat([negative_pooled, pooled]),
                                                     "time_ids": ids}))
    scheduler = base_peer.scheduler
    scheduler.set_timesteps(K)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        kept = z_init + sigma * noise
        x = kept if x is None else torch.where(mu >= i / K, kept, x)
        peer, (context, added) = (base_peer, told[0]) if t >= 200 else (refiner_peer, told[1])
        seen = torch.cat([x, x]) / (sigma**2 + 1) ** 0.5
        without, given = peer.unet(seen, t, context, added_cond_kwargs=added).sample.chunk(2)
        x = x + (scheduler.sigmas[i + 1] - sigma) * (without + GUIDANCE * (given - without))
        want.append(x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5)

    sampler = samplers.make_sampler("euler", base.schedule, K)
    denoise = hand_over(*(make_denoiser(model, sampler, "cats") for model in (base, refiner)))
    got = []
    last = diffdiff.differential_diffusion(denoise, z_init, mu, sampler, noise, skip=False,
                                           callback=lambda i, z: got.append(z))
    assert len(got) == len(want) == K
    for ours, theirs in zip(got, want):
        assert small.relative_error(ours, theirs) <= 1e-4
    assert small.relative_error(last, torch.where(mu >= 1, z_init, want[-1])) <= 1e-4
