"""DeepFloyd IF against diffusers' pipelines: both stages, from a prompt to the picture, and under a change map."""


import pytest
import torch
import torch.nn.functional as F

from models import deepfloyd
from tests import small_deepfloyd as small_if
from tests.small import randn, relative_error

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

K, GUIDANCE = (10, 8), (1.5, 1.5)  # at a larger guidance random networks amplify what rounding leaves
PROMPT, NEGATIVE = "A red Circle ", "cats"
PICTURE = randn(1, 3, 16, 24, seed=4).clamp(-1, 1).double()


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """The model as `load` reads it from two folders, and diffusers' two pipelines, all in double precision"""
    folders = small_if.write_cascade(tmp_path_factory.mktemp("if"))
    model = deepfloyd.load(*folders)
    vocab = [(text, score) for text, score, _ in small_if.PIECES]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=small_if.CHARMAP, extra_ids=0)
    text = transformers.T5EncoderModel.from_pretrained(folders[0] / "text_encoder").double()
    peers = []
    for folder, stage, pipeline in zip(folders, model.stages, (diffusers.IFImg2ImgPipeline,
                                                               diffusers.IFImg2ImgSuperResolutionPipeline)):
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").double()
        scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
        noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        more = {"image_noising_scheduler": noising} if peers else {}
        peer = pipeline(tokenizer=tokenizer, text_encoder=text, unet=unet, scheduler=scheduler, safety_checker=None,
                        feature_extractor=None, watermarker=None, requires_safety_checker=False, **more)
        peer.set_progress_bar_config(disable=True)
        for schedule in (scheduler, *more.values()):  # in single precision 1 - abar cancels at small t
            schedule.alphas_cumprod = torch.tensor(stage.schedule.abar, dtype=torch.float64)
        stage.unet.double()
        peers.append(peer)
    model.text.double()
    return model, peers


def hand_out(monkeypatch, shape, stage, k, first):
    """Let diffusers draw what we draw, in its order: the original's, the small picture's, then those of the steps."""
    draw = deepfloyd.make_draws(shape, [0], stage)
    order = iter([k, *[k + 1][:stage], *range(first, k)])
    for module in ("pipelines.deepfloyd_if.pipeline_if_img2img", "schedulers.scheduling_ddpm",
                   "pipelines.deepfloyd_if.pipeline_if_img2img_superresolution"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: draw(next(order)).double())


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_pipelines(cascade, monkeypatch, strength):
    """A constant map is image-to-image at one strength."""
    model, peers = cascade
    want = None
    for i, peer in enumerate(peers):
        x = deepfloyd.shrink(PICTURE, model.stages[i])
        hand_out(monkeypatch, x.shape[1:], i, K[i], K[i] - int(K[i] * strength))
        given = {"image": want, "original_image": x} if i else {"image": x}
        want = peer(prompt=PROMPT, negative_prompt=NEGATIVE, strength=strength, num_inference_steps=K[i],
                    guidance_scale=GUIDANCE[i], output_type="pt", clean_caption=False, **given).images
    states = model.encode_prompt(PROMPT, NEGATIVE)
    got = deepfloyd.edit(model, states, PICTURE, torch.full((1, 1), 1 - strength), K, GUIDANCE)
    assert (got - want).abs().max() / 2 <= 2 / 255 and want.std() > 0.1
    assert relative_error(got, want) <= 1e-4


@torch.no_grad()
def test_a_change_map_as_a_plain_loop_over_the_peers(cascade, monkeypatch):
    """Algorithm 1 in both stages on diffusers' networks and schedulers: every state."""
    model, peers = cascade
    mu = torch.rand(1, 1, 16, 24, generator=torch.Generator().manual_seed(6))
    mu[..., :4, :4] = 1
    mu[..., 8:, :8] = 0
    states = model.encode_prompt(PROMPT, NEGATIVE)
    small = None
    for stage, (peer, k) in enumerate(zip(peers, K)):
        x = deepfloyd.shrink(PICTURE, model.stages[stage])
        mu_s = F.interpolate(mu, x.shape[-2:], mode="area")
        draw = deepfloyd.make_draws(x.shape[1:], [0], stage)
        hand_out(monkeypatch, x.shape[1:], stage, k, 0)
        noise = diffusers.schedulers.scheduling_ddpm.randn_tensor()
        beside, level = [], None
        if small is not None:
            beside = F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=True)
            blur = diffusers.schedulers.scheduling_ddpm.randn_tensor()
            beside = [peer.image_noising_scheduler.add_noise(beside, blur, torch.tensor([250]))]
            level = torch.tensor([250, 250])
        peer.scheduler.set_timesteps(k)
        z, want = None, []
        for i, t in enumerate(peer.scheduler.timesteps):
            kept = peer.scheduler.add_noise(x, noise, t[None])
            z = kept if z is None else torch.where(mu_s >= i / k, kept, z)
            seen = torch.cat([torch.cat([z, *beside], dim=1)] * 2)
            without, given = peer.unet(seen, t, states, class_labels=level).sample.chunk(2)
            guided = without[:, :3] + GUIDANCE[stage] * (given - without)[:, :3]
            z = peer.scheduler.step(torch.cat([guided, given[:, 3:]], dim=1), t, z).prev_sample
            want.append(z)
        want = [*want, torch.where(mu_s >= 1, x, z)]

        got = []
        last = deepfloyd.edit_stage(model.stages[stage], states, x, mu, k, GUIDANCE[stage], draw, small,
                                    callback=lambda _, z, got=got: got.append(z))
        for a, b in zip([*got, last], want, strict=True):
            assert relative_error(a, b) <= 1e-4
        small = want[-1]
